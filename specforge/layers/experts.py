"""Ways to compute the same mixture: which of them is fast depends on the number of tokens and on the device.

`loop` is the slow reference, an expert after the other. `sorted` lays the picks of an expert side by side and reads one list of ends back.
`dense` feeds every token to every expert and lets the gate's zeros take out what was not picked: more products, but two of them in all.
`grouped` is `sorted` without a look at the ends. `capacity` gives each expert a fixed number of places and counts who finds none.

Shapes: T tokens of width D with K picks each, P = T * K picks, G groups of experts (one each, unless merged) with I inner numbers,
C places of a group.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional as F

from specforge.layers.rows import take_rows

CAPACITY_FACTOR = 1.5
"""Places of all experts over picks of all tokens, for `capacity`."""


class Experts(NamedTuple):
    """y = relu(x up^T + up_bias) down + down_bias, stacked; both matrices lie so that folding the groups away is a view."""

    up_GID: torch.Tensor
    up_bias_GI: torch.Tensor
    down_GID: torch.Tensor
    down_bias_GD: torch.Tensor


class Picks(NamedTuple):
    """What the gate chose; two picks of a token may be the same group, and then their weights add."""

    weight_TK: torch.Tensor
    group_TK: torch.Tensor


Outcome = tuple[torch.Tensor, torch.Tensor]
"""The mixture [T, D] and the number of picks that found no place, int64 []."""


def _loop(x_TD: torch.Tensor, experts: Experts, picks: Picks) -> Outcome:
    out_TD = torch.zeros_like(x_TD)
    for group, (up_ID, up_bias_I, down_ID, down_bias_D) in enumerate(zip(*experts)):
        picked_TK = picks.group_TK == group
        if not picked_TK.any():
            continue
        token_N, pick_N = picked_TK.nonzero(as_tuple=True)
        hidden_NI = F.relu(F.linear(x_TD[token_N], up_ID, up_bias_I))
        y_ND = torch.addmm(down_bias_D, hidden_NI, down_ID)
        out_TD = out_TD.index_add(0, token_N, y_ND * picks.weight_TK[token_N, pick_N, None])
    return out_TD, _none_lost(x_TD)


def _dense(x_TD: torch.Tensor, experts: Experts, picks: Picks) -> Outcome:
    up_GID, up_bias_GI, down_GID, down_bias_GD = experts
    weight_TG = x_TD.new_zeros(len(x_TD), len(up_GID)).scatter_add(1, picks.group_TK, picks.weight_TK)
    hidden_TGI = F.relu(F.linear(x_TD, up_GID.flatten(0, 1), up_bias_GI.flatten())).unflatten(1, up_bias_GI.shape)
    weighed_TX = (hidden_TGI * weight_TG[..., None]).flatten(1)  # X = G * I
    return torch.addmm(weight_TG @ down_bias_GD, weighed_TX, down_GID.flatten(0, 1)), _none_lost(x_TD)


def _sorted(x_TD: torch.Tensor, experts: Experts, picks: Picks) -> Outcome:
    line = _Line.of(x_TD, picks, len(experts.up_GID))
    ends = line.end_G.tolist()
    y_ND = [
        torch.addmm(down_bias_D, F.relu(F.linear(line.x_PD[begin:end], up_ID, up_bias_I)), down_ID)
        for begin, end, up_ID, up_bias_I, down_ID, down_bias_D in zip([0, *ends], ends, *experts)
        if end > begin
    ]
    return line.mixed(torch.cat([line.x_PD[:0], *y_ND]), picks.weight_TK), _none_lost(x_TD)


def _grouped(x_TD: torch.Tensor, experts: Experts, picks: Picks) -> Outcome:
    line = _Line.of(x_TD, picks, len(experts.up_GID))
    ends = line.end_G.int()
    member_PG = (line.group_P[:, None] == torch.arange(len(ends), device=ends.device)).to(x_TD.dtype)  # a GPU sums a product in fixed order
    hidden_PI = F.relu(torch.addmm(F.grouped_mm(line.x_PD, experts.up_GID.mT, offs=ends), member_PG, experts.up_bias_GI))
    y_PD = torch.addmm(F.grouped_mm(hidden_PI, experts.down_GID, offs=ends), member_PG, experts.down_bias_GD)
    return line.mixed(y_PD, picks.weight_TK), _none_lost(x_TD)


def _capacity(x_TD: torch.Tensor, experts: Experts, picks: Picks) -> Outcome:
    """The picks of later tokens lose: a pick without a place adds nothing, as if its expert had answered zero."""
    up_GID, up_bias_GI, down_GID, down_bias_GD = experts
    line, num_groups, num_picks = _Line.of(x_TD, picks, len(up_GID)), len(up_GID), picks.group_TK.numel()
    places = min(math.ceil(CAPACITY_FACTOR * num_picks / num_groups), num_picks)
    start_G = F.pad(line.end_G[:-1], (1, 0))
    position_P = torch.arange(num_picks, device=x_TD.device) - start_G[line.group_P]
    lost_P = position_P >= places
    place_P = torch.where(lost_P, num_groups * places, line.group_P * places + position_P)  # the lost ones share a last place
    x_GCD = x_TD.new_zeros(num_groups * places + 1, x_TD.shape[1]).index_copy(0, place_P, line.x_PD)[:-1].unflatten(0, (num_groups, places))
    hidden_GCI = F.relu(torch.baddbmm(up_bias_GI[:, None], x_GCD, up_GID.mT))
    y_GCD = torch.baddbmm(down_bias_GD[:, None], hidden_GCI, down_GID)
    y_PD = F.pad(y_GCD.flatten(0, 1), (0, 0, 0, 1)).index_select(0, place_P)
    return line.mixed(y_PD, picks.weight_TK), lost_P.sum()


class _Line(NamedTuple):
    """The picks in one line, those of a group side by side, in the order of their tokens."""

    x_PD: torch.Tensor
    group_P: torch.Tensor
    end_G: torch.Tensor
    """Where the picks of each group end."""
    back_P: torch.Tensor
    """Where the picks of a token went, token by token."""

    @classmethod
    def of(cls, x_TD: torch.Tensor, picks: Picks, num_groups: int) -> "_Line":
        group_P, order_P = picks.group_TK.flatten().sort(stable=True)
        number_P, number_G = (torch.arange(size, device=x_TD.device) for size in (len(order_P), num_groups))
        end_G = torch.searchsorted(group_P, number_G, right=True)
        x_PD = take_rows(x_TD.repeat_interleave(picks.group_TK.shape[1], 0), order_P)
        return cls(x_PD, group_P, end_G, torch.empty_like(order_P).scatter_(0, order_P, number_P))

    def mixed(self, y_PD: torch.Tensor, weight_TK: torch.Tensor) -> torch.Tensor:
        return (take_rows(y_PD, self.back_P).unflatten(0, weight_TK.shape) * weight_TK[..., None]).sum(1)


def _none_lost(x_TD: torch.Tensor) -> torch.Tensor:
    return torch.zeros((), dtype=torch.int64, device=x_TD.device)


FORMS: dict[str, Callable[[torch.Tensor, Experts, Picks], Outcome]] = {
    "loop": _loop,
    "sorted": _sorted,
    "dense": _dense,
    "grouped": _grouped,
    "capacity": _capacity,
}
