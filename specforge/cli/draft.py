"""A draft for decoding, from what the command line calls it: a checkpoint, `ngram` or `none`."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specforge import files
from specforge.config.methods import registered
from specforge.decode.adaptive import AdaptiveLength
from specforge.decode.costs import measure_costs, measured_tokens
from specforge.decode.drafter import Drafter, NgramDrafter, NoDrafter, require_trained_for
from specforge.decode.sampling import Sampling
from specforge.decode.tree import TreeShape
from specforge.distributed import World
from specforge.errors import CheckpointError, ConfigError
from specforge.features.tables import TargetConfig, TargetTables
from specforge.features.target import Target
from specforge.models.calibration import Calibration
from specforge.models.draft_folder import read_draft_config
from specforge.training.run_folder import Checkpoint, read_state, resolve
from specforge.training.snapshot import read_tensors

NGRAM_DRAFT_TOKENS = 4


@dataclass(frozen=True)
class Draft:
    """A draft that fits its target. `method` is None for `ngram` and `none`, which learned nothing."""

    name: str
    draft_tokens: int
    """K, of a tree its depth: the most that a round can accept."""
    method: Any = None
    method_name: str = ""
    tree: TreeShape | None = None
    """None: it drafts chains."""
    adaptive: AdaptiveLength | None = None
    """Decides how many of the K tokens of a chain are drafted."""

    def drafter(self, target: Target, sampling: Sampling | None, generator: torch.Generator) -> Drafter:
        """At work beside `target`, on its device and in its data type as engines serve it.

        Args:
            sampling: draw drafts from the draft's own distribution; None: its arg-max.
        """
        if self.method is None:
            return NgramDrafter(self.draft_tokens) if self.draft_tokens else NoDrafter()
        method = self.method.to(target.device)
        for parameter in method.draft.parameters():  # tables of RoPE keep their precision
            parameter.data = parameter.data.to(target.dtype)
        known = registered(self.method_name)
        drafter: Drafter
        if self.tree is None:
            drafter = known.load_drafter()(method, self.draft_tokens, sampling, generator, self.adaptive)
        else:
            drafter = known.load_tree_drafter()(method, self.tree)
        return drafter

    def adapted(self, target: Target, prompts: Sequence[np.ndarray]) -> "Draft":
        """The same draft with lengths that follow its calibrated confidence, at what rounds of such a batch cost here.

        Raises:
            ConfigError: it drafts trees, or never learned.
            CheckpointError: it is not calibrated for its K positions.
        """
        if self.method is None or self.tree is not None:
            raise ConfigError(
                f"draft {self.name!r}: only chains of a draft that learned adapt their length; give a number of draft tokens."
            )
        calibration = Calibration.read(Path(self.name) / "draft", self.draft_tokens)
        generator = torch.Generator(target.device)
        room = max(target.config.max_position_embeddings - measured_tokens(self.draft_tokens), 1)
        costs = measure_costs(
            target, lambda length: replace(self, draft_tokens=length).drafter(target, None, generator), self.draft_tokens,
            [prompt_S[:room] for prompt_S in prompts],
        )  # fmt: skip
        return replace(self, adaptive=AdaptiveLength(calibration, costs))


def read_draft(
    name: str, target_path: Path, draft_tokens: int | None, tree: TreeShape | None = None, *, allow_other_target: bool | None = None
) -> Draft:
    """The draft that `name` means, checked against the target's files; neither model runs.

    Args:
        name: RUN/best, RUN/latest, a step folder, `ngram` or `none`.
        draft_tokens: K; None: as many as the draft was trained for.
        tree: draft trees of this shape; `draft_tokens` says nothing then.
        allow_other_target: what --allow-other-target says; None: the command has no such option.

    Raises:
        ConfigError: `draft_tokens` or `tree` is not what such a draft can do, or longer than it can.
        CheckpointError: there is no such checkpoint, or it does not fit the target, or was trained with another one.
    """
    if draft_tokens is not None and (draft_tokens < 1 or name == "none"):
        raise ConfigError(f"--draft-tokens {draft_tokens}: must be at least 1, and draft 'none' drafts nothing; leave it out.")
    if tree is not None and name in ("none", "ngram"):
        raise ConfigError(f"--tree {tree}: draft {name!r} drafts no trees; leave --tree out, or give --draft a checkpoint.")
    if name == "none":
        return Draft(name, 0)
    if name == "ngram":
        return Draft(name, draft_tokens or NGRAM_DRAFT_TOKENS)
    world, checkpoint = World(), resolve(Path(name), "--draft")
    settings, where = read_state(checkpoint, world)["settings"], f"{checkpoint.path}/state.json: settings"
    files.check_fields(settings, where, CheckpointError, method=dict)
    files.check_fields(settings["method"], f"{where}.method", CheckpointError, name=str, options=dict)
    folder, method_name = checkpoint.path / "draft", settings["method"]["name"]
    require_fit(folder, target_path)
    require_same_target(checkpoint, settings.get("target_fingerprint"), target_path, allow_other_target)
    known = registered(method_name)
    if tree is not None:
        known.load_tree_drafter()
    with files.foreign(checkpoint.path, CheckpointError, "its method has other options here; take a checkpoint of this version"):
        options = known.options(**settings["method"]["options"])
    method = known.load().read(options, TargetTables.read(target_path), folder)
    read_tensors(folder, method.draft.state_dict(), world)
    longest = tree.depth if tree else draft_tokens or method.draft_tokens
    require_trained_for(method, longest)
    return Draft(str(checkpoint.path), longest, method.eval(), method_name, tree)


def require_fit(folder: Path, target_path: Path) -> None:
    """Raises CheckpointError that names which of hidden size, vocabulary and captured layers the target does not have."""
    stored, target = read_draft_config(folder), TargetConfig.read(target_path)
    kinds: dict[str, Any] = {"target_hidden_size": int, "vocab_size": int, "aux_layer_ids": list}
    files.check_fields(stored, f"{folder}/config.json", CheckpointError, **kinds)
    sizes = (("hidden size", "target_hidden_size", target.hidden_size), ("vocabulary size", "vocab_size", target.vocab_size))
    wrong = [f"{name} is {stored[key]}, the target's is {has}" for name, key, has in sizes if stored[key] != has]
    beyond = [layer for layer in stored["aux_layer_ids"] if not (files.is_a(layer, int) and 0 <= layer <= target.num_hidden_layers)]
    if beyond:
        wrong.append(f"it reads layers {files.shown(stored['aux_layer_ids'])}, the target has {target.num_hidden_layers}")
    if wrong:
        fault = f"draft {folder} does not fit target {str(target_path)!r}: {'; '.join(wrong)}"
        raise CheckpointError(f"{fault}. Give the target of its training.")


def require_same_target(checkpoint: Checkpoint, stored: Any, target_path: Path, allowed: bool | None = None) -> None:
    """Compare the target's content with what the checkpoint remembers; those of earlier versions remember nothing.

    Args:
        allowed: what --allow-other-target says; None: the command has no such option.

    Raises:
        CheckpointError: they differ and that is not `allowed`.
    """
    if stored is None:
        print(f"{checkpoint.path}: does not say which target it was trained with; not checked.", file=sys.stderr)
        return
    memo = checkpoint.path.parent / "features" / ".fingerprints.json"
    found = files.Fingerprints(memo).fingerprint(target_path)
    if found == stored:
        return
    difference = f"draft {checkpoint.path}: its target has fingerprint {files.shown(stored)}, target {str(target_path)!r} has {found!r}"
    if not allowed:
        option = "" if allowed is None else ", or --allow-other-target to go on with this one"
        raise CheckpointError(f"{difference}; give the target of its training{option}.")
    print(f"Warning: {difference}.", file=sys.stderr)
