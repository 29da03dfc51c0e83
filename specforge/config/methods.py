"""The one registry of training methods: name -> option class and the place of the implementation.

Options are plain frozen dataclasses, so a configuration is checked without importing torch; the implementation is
imported when a method is built.
"""

import difflib
import importlib
from dataclasses import dataclass
from typing import Any, Literal

from specforge.errors import ConfigError


@dataclass(frozen=True, kw_only=True)
class DraftOptions:
    """Of every method's layers."""

    layers: int = 1
    """Decoder layers of the draft."""
    intermediate_size: int = 0
    """Width of a layer's feed-forward, or of each of its experts; 0: the target's."""
    experts: int = 0
    """Experts of each layer's feed-forward, of two matrices and a ReLU; 0: one dense SwiGLU."""
    experts_per_token: int = 2
    """Experts that answer a row."""
    balance_weight: float = 0.01
    """What the experts' unevenness within a sample, std / mean of their importance, adds to the training loss of a target."""

    def __post_init__(self) -> None:
        for key, least in (("layers", 1), ("experts", 0), ("experts_per_token", 1), ("balance_weight", 0)):
            _at_least(key, getattr(self, key), least)
        if 0 < self.experts < self.experts_per_token:
            raise ConfigError(
                f"method.options.experts_per_token={self.experts_per_token}: must be at most experts={self.experts}; pick fewer."
            )


@dataclass(frozen=True, kw_only=True)
class Eagle3Options(DraftOptions):
    """EAGLE-3 (arXiv 2503.01840); `fc_norm` and `norm_output` together are EAGLE-3.1."""

    draft_tokens: int = 7
    """T, steps of training-time test: the longest chain that is trained."""
    step_decay: float = 0.8
    """gamma: step j weighs gamma**j in the loss."""
    draft_vocab_size: int = 32000
    """Target ids that the draft can propose, the most frequent supervised ones; 0: the whole vocabulary."""
    head: Literal["trained", "frozen"] = "trained"
    """trained: starts as the target's rows and is learned; frozen: stays the target's rows."""
    fc_norm: bool = False
    """Normalise each captured layer by itself before the fusion."""
    norm_before_fc: bool = False
    """Normalise the concatenation of the captured layers before the fusion."""
    norm_output: bool = False
    """Hand the normed instead of the plain hidden state to the next step."""
    loss: Literal["kl", "lk_alpha", "lk_lambda", "tv"] = "kl"
    """kl: cross-entropy with the target's distribution, renormalised on the draft vocabulary; the others end in the probability that a
    sampled draft is rejected (tv), alone only for a draft that is trained already: see docs/methods.md."""
    lk_eta: float = 3.0
    """eta of lk_lambda: how fast it turns from kl to tv as acceptance grows."""
    attention: Literal["blocks", "flex"] = "blocks"
    """blocks: plain products, on any device; flex: one compiled block-sparse kernel, trains on CUDA only."""
    loss_chunk_rows: int = 0
    """Rows whose vocabulary-wide numbers exist at one time, one for each step and supervised target; 0: 256 to 1,024."""
    activation_checkpointing: bool = False
    """Compute attention and feed-forward of each step again in the backward: the same bits, less memory, more time."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("draft_tokens", 1), ("loss_chunk_rows", 0)):
            _at_least(key, getattr(self, key), least)
        if not 0 < self.step_decay <= 1:
            raise ConfigError(f"method.options.step_decay={self.step_decay}: must lie in (0, 1]; the paper uses 0.8.")
        if self.fc_norm and self.norm_before_fc:
            raise ConfigError("method.options.fc_norm=true and norm_before_fc=true exclude each other; keep one of them.")
        if not self.lk_eta >= 0:
            raise ConfigError(f"method.options.lk_eta={self.lk_eta}: must not be negative; the paper uses 3.")

    def captured_layers(self, num_layers: int) -> tuple[int, ...]:
        """Which layers of the target it reads unless told; empty: those that the serving engines capture by default."""
        return ()


@dataclass(frozen=True, kw_only=True)
class PEagleOptions(Eagle3Options):
    """P-EAGLE (arXiv 2602.01469): EAGLE-3 that drafts all depths in one forward, from mask tokens."""

    draft_tokens: int = 8
    """K, depths: the longest chain that is trained."""
    step_decay: float = 1.0
    """gamma: depth d weighs gamma**d in the loss."""
    layers: int = 4
    mask_token_id: int = -1
    """Id whose embedding stands for a token to be drafted, in no training row; -1: the highest such id."""
    depth_ratio: float = 0.7
    """Depth d trains on the share max(depth_ratio**d, depth_floor) of a sample's rows, drawn anew each time it is seen; 1: on all."""
    depth_floor: float = 0.2
    """The least of these shares."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("mask_token_id", self.mask_token_id, -1)
        for key in ("depth_ratio", "depth_floor"):
            if not 0 < getattr(self, key) <= 1:
                raise ConfigError(f"method.options.{key}={getattr(self, key)}: must lie in (0, 1]; 1 trains every depth on all rows.")
        if self.norm_output:
            raise ConfigError("method.options.norm_output=true: no depth of this draft reads another's output; leave it out.")


@dataclass(frozen=True, kw_only=True)
class BlockOptions(DraftOptions):
    """Of every method that drafts a block of mask tokens in one forward."""

    block_size: int = 16
    """B, rows of a block: the anchor's and B - 1 mask tokens."""
    anchors: int = 512
    """Blocks of a sample in a training step, drawn anew each time it is seen; an evaluation takes every start."""
    layers: int = 5
    layer_types: tuple[str, ...] = ()
    """full_attention or sliding_attention for each layer; empty: full_attention. Sliding layers are causal within the block."""
    sliding_window: int = 0
    """Positions that a row of a sliding layer sees, its own included."""
    mask_token_id: int = -1
    """Id whose embedding stands for a token to be drafted, in no training row; -1: the highest such id."""
    position_decay: float = 7.0
    """gamma: draft k weighs exp(-(k - 1) / gamma) in the loss; 0: all alike."""
    loss_chunk_rows: int = 0
    """Rows whose vocabulary-wide numbers exist at one time; 0: 256 to 1,024."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key, least in (("block_size", 2), ("anchors", 1), ("loss_chunk_rows", 0), ("mask_token_id", -1)):
            _at_least(key, getattr(self, key), least)
        _at_least("position_decay", self.position_decay, 0)
        unknown = sorted(set(self.layer_types) - {"full_attention", "sliding_attention"})
        if unknown or len(self.layer_types) not in (0, self.layers):
            raise ConfigError(
                f"method.options.layer_types={list(self.layer_types)}: must be empty or name full_attention or sliding_attention for "
                f"each of the {self.layers} layers."
            )
        if ("sliding_attention" in self.layer_types) != (self.sliding_window > 0):
            raise ConfigError(
                f"method.options.sliding_window={self.sliding_window}: must be positive where layer_types names sliding_attention, and 0 "
                "elsewhere; change one of them."
            )

    def captured_layers(self, num_layers: int) -> tuple[int, ...]:
        """As many layers of the target as the draft has, spread evenly from the second to the last but two, as indices into Hugging Face
        `hidden_states`; of a target too shallow for that, from the first to the last but one."""
        first, last = (1, num_layers - 3) if num_layers - 3 >= self.layers else (0, num_layers - 2)
        count = min(self.layers, last - first + 1)
        if count < 2:
            return (min(num_layers // 2, last) + 1,)
        return tuple(1 + round(first + i * (last - first) / (count - 1)) for i in range(count))


@dataclass(frozen=True, kw_only=True)
class DFlashOptions(BlockOptions):
    """DFlash (arXiv 2602.06036): each of the B - 1 mask tokens becomes the draft at its place."""

    loss: Literal["ce", "kl", "tv", "lk_alpha", "lk_lambda", "dpace", "dpace_prefix", "dpace_continuation"] = "ce"
    """ce: cross-entropy with the text; kl: with the target's distribution; tv, lk_alpha, lk_lambda: what of it is not accepted; dpace:
    ce, weighted by how probable the drafts before and after are, or by the former (prefix) or latter (continuation) alone, and not by
    position_decay."""
    lk_eta: float = 3.0
    """eta of lk_lambda: how fast it turns from kl to tv as acceptance grows."""
    dpace_alpha: float = 0.5
    """alpha of dpace: what a draft that cannot be right still counts for, in (0, 1]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("lk_eta", self.lk_eta, 0)
        if not 0 < self.dpace_alpha <= 1:
            raise ConfigError(f"method.options.dpace_alpha={self.dpace_alpha}: must lie in (0, 1]; the paper uses 0.5.")


@dataclass(frozen=True, kw_only=True)
class DominoOptions(DFlashOptions):
    """Domino (arXiv 2605.29707): B drafts of a block, the anchor's own row giving the first; each but that is corrected by the drafts
    before it."""

    anchors: int = 256
    gru_hidden_dim: int = 1024
    """G, width of the state that reads the drafts."""
    emb_dim: int = 256
    """E, rank of the correction."""
    base_decay: float = 1.0
    """Part of the training, in (0, 1], in which the loss of the uncorrected drafts goes from all of the loss to nothing."""

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("gru_hidden_dim", "emb_dim"):
            _at_least(key, getattr(self, key), 1)
        if not 0 < self.base_decay <= 1:
            raise ConfigError(f"method.options.base_decay={self.base_decay}: must lie in (0, 1]; 1 is the whole training.")


@dataclass(frozen=True, kw_only=True)
class DSparkOptions(BlockOptions):
    """DSpark (arXiv 2607.05147): B drafts of a block, the anchor's own row giving the first; each is biased by the one before it, and
    comes with a confidence. The loss is the paper's."""

    block_size: int = 7
    position_decay: float = 4.0
    markov_head: Literal["vanilla", "gated", "rnn"] = "vanilla"
    """What the bias depends on: the token before; gated: and the row's output; rnn: and what both were in the rows before."""
    markov_rank: int = 256
    """Rank of the table of pairs of tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _at_least("markov_rank", self.markov_rank, 1)


def _at_least(key: str, value: float, least: float) -> None:
    if value < least:
        raise ConfigError(f"method.options.{key}={value}: must be at least {least}; give a larger number.")


@dataclass(frozen=True)
class Registered:
    options: type[Any]
    implementation: str
    """`module:class`, imported when a method of this name is built."""
    drafter: str
    """`module:class` of what decodes with it: `(method, draft_tokens, sampling, generator)`."""
    tree_drafter: str = ""
    """`module:class` of what drafts trees with it: `(method, shape)`; empty: it drafts chains alone."""

    def load(self) -> Any:
        return _imported(self.implementation)

    def load_drafter(self) -> Any:
        return _imported(self.drafter)

    def load_tree_drafter(self) -> Any:
        if not self.tree_drafter:
            raise ConfigError(f"{self.implementation}: drafts chains alone; leave --tree and --simulate out.")
        return _imported(self.tree_drafter)


def _imported(path: str) -> Any:
    module, name = path.split(":")
    return getattr(importlib.import_module(module), name)


METHODS: dict[str, Registered] = {
    "eagle3": Registered(
        Eagle3Options, "specforge.methods.eagle3:Eagle3", "specforge.decode.eagle3:Eagle3Drafter",
        tree_drafter="specforge.decode.eagle3_tree:Eagle3TreeDrafter",
    ),
    "peagle": Registered(PEagleOptions, "specforge.methods.peagle:PEagle", "specforge.decode.peagle:PEagleDrafter"),
    "dflash": Registered(DFlashOptions, "specforge.methods.dflash:DFlash", "specforge.decode.block:BlockDrafter"),
    "domino": Registered(DominoOptions, "specforge.methods.domino:Domino", "specforge.decode.block:BlockDrafter"),
    "dspark": Registered(DSparkOptions, "specforge.methods.dspark:DSpark", "specforge.decode.block:BlockDrafter"),
}  # fmt: skip


def registered(name: str) -> Registered:
    """The entry of a method, or a ConfigError that names the closest known ones."""
    if name not in METHODS:
        close = sorted(difflib.get_close_matches(name, METHODS, n=2))
        hint = f"did you mean {' or '.join(map(repr, close))}?" if close else f"known methods: {', '.join(sorted(METHODS))}."
        raise ConfigError(f"method.name={name!r}: no such method; {hint}")
    return METHODS[name]
