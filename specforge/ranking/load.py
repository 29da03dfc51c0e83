"""A trained ranking model, ready for use: read, calibrated, its experts merged, cast, compiled, in this order.

Merging compares and averages weights, so it comes before they are rounded; compiling comes last, since it sees what then runs.
"""

import importlib.util
import os
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from specforge.config.levers import Levers
from specforge.errors import CheckpointError, ConfigError
from specforge.layers.attention_choice import resolve
from specforge.layers.expert_keys import stack_experts
from specforge.layers.expert_merge import MergeReport, merge_experts
from specforge.layers.moe import why_not_grouped
from specforge.layers.precision import PrecisionPolicy
from specforge.ranking.calibration import read_shift
from specforge.ranking.model import CTRModel
from specforge.ranking.shape import CTRConfig
from specforge.training.run_folder import resolve as resolve_checkpoint
from specforge.training.snapshot import read_whole


@dataclass(frozen=True)
class LoadedModel:
    model: CTRModel
    """In evaluation mode, on its device."""
    levers: Levers
    """What was asked for; what stands in for an unavailable one was printed."""
    merged: dict[str, MergeReport]
    """By name of the mixture; empty unless `expert_merge`."""
    shift: float
    """Added to the head's bias: the calibration of the checkpoint, 0 where there is none."""


def load_ranking_model(
    path: str | Path, levers: Levers, device: torch.device = torch.device("cpu"), *, strict: bool = False
) -> LoadedModel:
    """
    Args:
        path: RUN/best, RUN/latest, a step folder, or any folder of `config.json` and safetensors; experts stacked or under a key each.
        strict: refuse a lever that is not available here; otherwise what stands in for it is printed.

    Raises:
        CheckpointError: the folder is not that of a ranking model.
        ConfigError: signs mean other rows than in training, or a lever is not available under `strict`.
    """
    folder = Path(path)
    if not (folder / "config.json").exists():
        folder = resolve_checkpoint(folder).path / "draft"
    config = CTRConfig.read(folder)
    replace(config.slots, signid_mode=levers.signid_mode).refuse_other(config.slots.stored())
    model = CTRModel(config)
    _fill(model, folder)
    shift = read_shift(folder)
    with torch.no_grad():
        model.head.bias.add_(shift)
    merged = _merge(model, levers.merge_threshold) if levers.expert_merge else {}
    dtype = getattr(torch, levers.dtype)
    PrecisionPolicy(dtype, levers.keep_fp32_modules).apply(model.to(device))
    apply_levers(model.eval(), levers, device, dtype, strict=strict)
    return LoadedModel(model, levers, merged, shift)


def apply_levers(model: CTRModel, levers: Levers, device: torch.device, dtype: torch.dtype, *, strict: bool = False) -> None:
    """Set how the model computes on `device`; its weights stay."""
    model.attn = levers.attn
    if levers.attn != "auto":
        model.attn = resolve(levers.attn, device, dtype, gradient=model.training, strict=strict).name
    moe = levers.moe
    if moe == "grouped":
        refused = why_not_grouped(torch.empty(0, model.config.width, dtype=dtype, device=device), model.config.inner)
        moe = _instead("moe", moe, "auto", refused, strict) if refused else moe
    for layer in model.stack:
        layer.feed_forward.moe.implementation = moe
    model.encoder.slots.implementation = "fused" if levers.fuse_embedding else "per_slot"
    compiles = levers.compile
    if compiles and (lacking := why_not_compiled(device)):
        compiles = _instead("compile", True, False, lacking, strict)
    if compiles:  # attention is left out: it is called with other lengths in each batch
        for part in (model.encoder, *(layer.feed_forward for layer in model.stack)):
            part.compile(dynamic=True)


def _instead(lever: str, asked: Any, instead: Any, lacking: str, strict: bool) -> Any:
    """What stands in for a lever that is not available."""
    if strict:
        raise ConfigError(
            f"levers.{lever}={asked}: {lacking}; use levers.{lever}={instead}, or do without strict, which forbids to fall back."
        )
    print(f"levers.{lever}={instead} stands in for {asked}: {lacking}.", file=sys.stderr, flush=True)
    return instead


def why_not_compiled(device: torch.device) -> str | None:
    if device.type == "cuda":
        return None if importlib.util.find_spec("triton") else "torch.compile needs triton on CUDA, which is not installed"
    compiler = os.environ.get("CXX", "g++")
    return None if shutil.which(compiler) else f"torch.compile needs a C++ compiler on a CPU, and there is no {compiler}"


def _merge(model: CTRModel, threshold: float) -> dict[str, MergeReport]:
    reports = {}
    for number, layer in enumerate(model.stack):
        layer.feed_forward.moe, reports[f"layers.{number}.feed_forward.moe"] = merge_experts(layer.feed_forward.moe, threshold)
    return reports


def _fill(model: CTRModel, folder: Path) -> None:
    """Read the weights into the model, float32.

    A gate may be stored as `gate.w_g`, as the contest's are: the weight [E, D] of a `Linear` or its transpose, without a bias.
    """
    state = _with_our_gates(stack_experts(read_whole(folder)), model.config)
    wanted = model.state_dict()
    for name, tensor in wanted.items():
        found = state.get(name)
        if found is None or found.shape != tensor.shape:
            has = "is missing" if found is None else f"is of shape {list(found.shape)}, wanted is {list(tensor.shape)}"
            raise CheckpointError(f"{folder}: {name} {has}; take another checkpoint.")
    model.load_state_dict({name: state[name] for name in wanted})


def _with_our_gates(state: Mapping[str, torch.Tensor], config: CTRConfig) -> dict[str, torch.Tensor]:
    ours = {}
    for name, tensor in state.items():
        gate, found, rest = name.partition("gate.w_g")
        if found and rest in ("", ".weight"):
            ours[f"{gate}gate.weight"] = tensor if len(tensor) == config.experts else tensor.T
            ours.setdefault(f"{gate}gate.bias", torch.zeros(config.experts))
        else:
            ours[name] = tensor
    return ours
