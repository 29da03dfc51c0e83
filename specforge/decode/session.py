"""A target at work on several sequences: blocks of proposed tokens behind what is committed, of which a part is kept.

Shapes: B sequences (rows), N nodes of a block (or tokens of the longest prompt), U slots in use, A layers asked for, H hidden size,
F = A*H, V vocabulary.
"""

import inspect
import weakref
from collections.abc import Sequence
from contextlib import ExitStack
from typing import NamedTuple

import numpy as np
import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask, create_block_mask

from specforge.decode.cache import SlotCache
from specforge.decode.tree import Tree
from specforge.errors import ConfigError
from specforge.features.target import Target

Mask = torch.Tensor | BlockMask
"""What is added to the attention scores; for flex attention, which blocks of them there are, and what is seen in each."""

_FULL, _SLIDING = "full_attention", "sliding_attention"


class Block(NamedTuple):
    """What one forward computed of every token it was given."""

    last_BNH: torch.Tensor
    """Hidden state after the final norm."""
    aux_BNF: torch.Tensor
    """Residual stream after the layers asked for, low to high."""


class TargetSession:
    """A target's cache over B sequences, whose rows grow by different numbers of tokens.

    `forward` leaves `lengths` as they are: what it wrote is committed by `keep` or overwritten by the next `forward`. A node sees the
    committed tokens of its row and the nodes above it; it stands at position `lengths[row]` + its depth, and a sliding window is
    measured between positions.

    Args:
        capacity: tokens of a row that are committed or proposed.
        text_tokens: tokens of the longest row when all is said (0: `capacity`). Nodes beyond are none that a row keeps; they stand at the
            last of these positions, since the target may have no more, or scale all its positions by the largest one.

    Raises:
        ConfigError: the target has layers whose state cannot be rolled back, an attention that takes no mask, or positions that
            nobody can tell it; from `prefill`: they change their scale within the text; from `prefill` and `forward`: a row outgrows
            `capacity`.
    """

    def __init__(self, target: Target, rows: int, capacity: int, layer_ids: Sequence[int] = (), text_tokens: int = 0) -> None:
        self.target = target
        self.layer_ids = tuple(sorted(layer_ids))
        self.lengths = [0] * rows
        """Committed tokens in the cache, a row."""
        self._layer_types = _layer_types(target)
        self._flex = target.config._attn_implementation == "flex_attention"
        _require_told_positions(target)
        self._device = target.device
        self._cache = SlotCache(target.num_layers, capacity, self._device)
        self._last_position = (text_tokens or capacity) - 1
        hooks = ExitStack()
        self._stream = hooks.enter_context(target.residual_stream(self.layer_ids))
        weakref.finalize(self, hooks.close)
        self._shown, self._hidden = torch.tensor([0.0, torch.finfo(target.dtype).min], dtype=target.dtype, device=self._device)

    def prefill(self, prompts: Sequence[np.ndarray]) -> Block:
        """Start anew with these prompts ([S] integers each), right-padded to one forward; a row's block ends in padding."""
        lengths = [len(prompt) for prompt in prompts]
        _require_one_scale(self.target, min(lengths), self._last_position + 1)
        ids_BN = torch.zeros(len(prompts), max(lengths), dtype=torch.long)
        for row, prompt in enumerate(prompts):
            ids_BN[row, : lengths[row]] = torch.from_numpy(np.asarray(prompt, dtype=np.int64))
        self.target.require_plain_head(prompts[0])
        self._cache.slots.aim([0] * len(prompts), ids_BN.shape[1])
        # The decoder's own causal mask will do: padding comes after all that is real.
        block = self._run(ids_BN.to(self._device), self._cache.slots.slot_C[None, : ids_BN.shape[1]], None)
        self.lengths = lengths
        return block

    def forward(self, ids_BN: torch.Tensor, tree: Tree) -> Block:
        """The nodes of `tree` behind the committed tokens."""
        self._cache.slots.aim(self.lengths, ids_BN.shape[1])
        position_B1N = tree.depth_BN[:, None] + self._cache.slots.start
        return self._run(ids_BN, position_B1N[:, 0].clamp_max(self._last_position), self._mask(tree.visible_BNN, position_B1N))

    def keep(self, paths: Sequence[Sequence[int]]) -> None:
        """Commit nodes of the last block, a row: ascending depth, node 0 first; an empty path commits nothing."""
        moves = [
            (row, length + node, length + depth)
            for row, (length, path) in enumerate(zip(self.lengths, paths, strict=True))
            for depth, node in enumerate(path)
            if node != depth
        ]
        if moves:
            self._cache.move(*self._cache.slots.on_device(list(zip(*moves, strict=True))))
        self.lengths = [length + len(path) for length, path in zip(self.lengths, paths, strict=True)]

    def logits(self, last_BNH: torch.Tensor) -> torch.Tensor:
        """Logits [B, N, V] in float32; of a float64 target in float64."""
        return self.target.logits(last_BNH)

    @torch.no_grad()
    def _run(self, ids_BN: torch.Tensor, position_BN: torch.Tensor, mask: Mask | dict[str, Mask] | None) -> Block:
        output = self.target.decoder(
            input_ids=ids_BN, attention_mask=mask, position_ids=position_BN, past_key_values=self._cache, use_cache=True
        )
        last_BNH = output.last_hidden_state.to(self._device)
        aux = [self._stream[layer].to(self._device) for layer in self.layer_ids]
        return Block(last_BNH, torch.cat(aux, dim=-1) if aux else last_BNH[..., :0])

    def _mask(self, visible_BNN: torch.Tensor, position_B1N: torch.Tensor) -> Mask | dict[str, Mask]:
        """What nodes see of the slots [B, 1, N, U]: one for all layers, or one for each type of layer."""
        slots = self._cache.slots
        slot_U = slots.slot_C[: slots.stop]
        if isinstance(slots.start, int):
            visible_BNU = F.pad(visible_BNN, (slots.start, 0), value=True)
        else:
            visible_BNU = (slot_U < slots.start).expand(*visible_BNN.shape[:2], -1).clone()
            slots.write(visible_BNU, visible_BNN)
        if self._layer_types == {_FULL}:
            return self._scores(visible_BNU)
        position_B1U = slot_U.repeat(len(visible_BNN), 1, 1)
        slots.write(position_B1U, position_B1N)
        near_BNU = position_B1U > position_B1N.transpose(1, 2) - self.target.config.sliding_window
        sliding = self._scores(visible_BNU & near_BNU)
        return sliding if self._layer_types == {_SLIDING} else {_FULL: self._scores(visible_BNU), _SLIDING: sliding}

    def _scores(self, visible_BNU: torch.Tensor) -> Mask:
        if self._flex:
            rows, nodes, slots = visible_BNU.shape
            return create_block_mask(
                lambda row, head, node, slot: visible_BNU[row, node, slot], rows, None, nodes, slots, str(self._device)
            )
        return torch.where(visible_BNU, self._shown, self._hidden)[:, None]


def _layer_types(target: Target) -> set[str]:
    """The kinds of attention among the target's layers.

    Raises:
        ConfigError: one of them cannot be rolled back by overwriting slots, or takes no mask.
    """
    config = target.config
    types = set(getattr(config, "layer_types", None) or getattr(config, "attention_layers", None) or ())
    if not types:
        sliding, chunked = (getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
        types = {_SLIDING if sliding else "chunked_attention" if chunked else _FULL}
    other = sorted(types - {_FULL, _SLIDING}) or (["recurrent state"] if target.model._is_stateful else [])
    if other:
        raise ConfigError(
            f"model.target_path={target.path!r}: {type(target.decoder).__name__} has layers with {', '.join(other)}, which cannot take "
            f"back rejected tokens; decode with a target of {_FULL} and {_SLIDING} layers."
        )
    implementation = config._attn_implementation
    if implementation not in ("sdpa", "eager", "flex_attention"):
        raise ConfigError(
            f"model.target_path={target.path!r}: attention {implementation!r} takes no mask of a tree; load it with 'sdpa', 'eager' or "
            "'flex_attention'."
        )
    return types


def _require_told_positions(target: Target) -> None:
    """Raises ConfigError where a token's position is its place in the mask, which slots and trees do not keep."""
    told = "position_ids" in inspect.signature(target.decoder.forward).parameters
    if not told or getattr(target.config, "alibi", False):
        raise ConfigError(
            f"model.target_path={target.path!r}: {type(target.decoder).__name__} works out positions by itself (ALiBi), so rejected tokens "
            "and trees would shift them; decode with a target of rotary or learned positions."
        )


def _require_one_scale(target: Target, shortest_prompt: int, text_tokens: int) -> None:
    """LongRoPE turns all positions of a forward by other angles once one of them is beyond the original length, so keys in the cache
    would fit no longer. Raises ConfigError where that happens between a prompt and the end of a text."""
    rope = getattr(target.config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "longrope" and shortest_prompt <= rope["original_max_position_embeddings"] < text_tokens:
        raise ConfigError(
            f"model.target_path={target.path!r}: its angles change at original_max_position_embeddings="
            f"{rope['original_max_position_embeddings']}, between a prompt of {shortest_prompt} tokens and a text of {text_tokens}; "
            "ask for fewer new tokens."
        )
