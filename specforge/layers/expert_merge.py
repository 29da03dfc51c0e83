"""Experts that are nearly the same, made one: their mean answers for all of them, the gate stays as it is.

Merging leaves an error that no training of the gate removes (REAP, arXiv 2510.13999), so what was merged is reported, never silent.

Shapes: E experts of the gate, G groups that they formed before merging.
"""

import copy
from dataclasses import dataclass

import torch
from torch.nn import functional as F

from specforge.errors import ConfigError
from specforge.layers.moe import SparseMoE


@dataclass(frozen=True)
class MergeReport:
    threshold: float
    members: tuple[tuple[int, ...], ...]
    """The gate's experts of each group."""
    cosine: tuple[float, ...]
    """Of each group: the least cosine between the weights of its first expert and of another one; 1 for an expert alone."""

    @property
    def sizes(self) -> tuple[int, ...]:
        return tuple(len(group) for group in self.members)

    def __str__(self) -> str:
        merged = [(group, cosine) for group, cosine in zip(self.members, self.cosine) if len(group) > 1]
        lines = [f"{sum(self.sizes)} experts became {len(self.members)}: cosine of their weights over {self.threshold:g}"]
        return "\n".join(
            lines + [f"  experts {', '.join(map(str, group))} are one: cosine {cosine:.4f} or more" for group, cosine in merged]
        )


def merge_experts(moe: SparseMoE, threshold: float) -> tuple[SparseMoE, MergeReport]:
    """A new mixture with the same gate, in which an expert joins the first group whose first expert has a cosine over the threshold.

    The cosine is that of all weights and biases of an expert, laid end to end.

    Raises:
        ConfigError: the threshold is no cosine of likeness.
    """
    if not 0 < threshold <= 1:
        raise ConfigError(f"merge_threshold={threshold}: must lie in (0, 1]; 1 merges nothing, the contest's model took 0.9.")
    with torch.no_grad():
        flat_GX = torch.cat([weight.float().flatten(1) for weight in moe.experts], 1)
        unit_GX = F.normalize(flat_GX, dim=1)
        cosine_GG = (unit_GX @ unit_GX.T).clamp(max=1).tolist()  # rounding takes that of copies beyond 1
    groups: list[list[int]] = []
    for each in range(len(cosine_GG)):
        home = next((group for group in groups if cosine_GG[group[0]][each] > threshold), None)
        groups.append([each]) if home is None else home.append(each)
    place = {each: number for number, group in enumerate(groups) for each in group}
    expert_groups = [place[each] for each in moe.groups]
    members = tuple(tuple(e for e, number in enumerate(expert_groups) if number == group) for group in range(len(groups)))
    least = tuple(min([1.0, *(cosine_GG[group[0]][each] for each in group[1:])]) for group in groups)
    return _merged(moe, groups, expert_groups), MergeReport(threshold, members, least)


def _merged(moe: SparseMoE, groups: list[list[int]], expert_groups: list[int]) -> SparseMoE:
    inner, width = moe.up_GID.shape[1:]
    merged = SparseMoE(width, inner, len(expert_groups), moe.top_k, moe.implementation, expert_groups, moe.sync_free)
    merged = merged.to(moe.up_GID).train(moe.training)
    merged.gate = copy.deepcopy(moe.gate)
    with torch.no_grad():
        for into, weight in zip(merged.experts, moe.experts):
            into.copy_(torch.stack([weight[group].mean(0, dtype=torch.float32) for group in groups]))
    return merged
