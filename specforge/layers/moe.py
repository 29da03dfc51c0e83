"""A sparse mixture of experts as feed-forward: each token is answered by its few experts, weighed by a gate.

The gate is a softmax over all experts. The weights of the picked ones are used as they are and not made to add up to one again, as in
the ranking model of the CTI contest of 2026, from which the gate's noise in training and the balance loss are too.

Shapes: T tokens of width D, E experts with I inner numbers, K picks of a token, G groups of experts that share weights.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional as F

from specforge.errors import ConfigError
from specforge.layers.choice import Choice
from specforge.layers.experts import FORMS, Experts, Picks

GATE_NOISE = 0.1
DENSE_WORK = 2**17
"""Tokens * width * inner up to which a CPU computes all experts sooner than it sorts (measured with 8 experts, 2 of them picked)."""
IMPLEMENTATIONS = ("auto", *FORMS)


class Mixture(NamedTuple):
    out_TD: torch.Tensor
    share_TE: torch.Tensor
    """The gate's softmax, float32 at least."""
    overflow: torch.Tensor
    """Picks that found no place with their expert, int64 []; always 0 but for `capacity`. Whoever calls reports it."""

    @property
    def importance_E(self) -> torch.Tensor:
        """The gate's softmax, summed over tokens: for `balance_loss`."""
        return self.share_TE.sum(0)


class SparseMoE(nn.Module):
    """
    Args:
        implementation: one of `IMPLEMENTATIONS`.
        groups: the group of each expert, 0, 1, ...; experts of a group are one (`expert_merge`). None: each is its own.
        sync_free: `auto`, and what stands in for `grouped`, may not read a value back from the device.
        gate_noise: standard deviation of what is added to the gate's logits in training.

    Raises:
        ConfigError: there is no such implementation.
    """

    group_E: torch.Tensor | None

    def __init__(
        self,
        width: int,
        inner: int,
        num_experts: int,
        top_k: int,
        implementation: str = "auto",
        groups: Sequence[int] | None = None,
        sync_free: bool = False,
        gate_noise: float = GATE_NOISE,
    ) -> None:
        super().__init__()
        if implementation not in IMPLEMENTATIONS:
            raise ConfigError(f"moe={implementation!r}: there is no such implementation; choose one of {', '.join(IMPLEMENTATIONS)}.")
        self.top_k, self.implementation, self.sync_free, self.gate_noise = top_k, implementation, sync_free, gate_noise
        self.groups = tuple(range(num_experts)) if groups is None else tuple(groups)
        num_groups = max(self.groups) + 1
        self.gate = nn.Linear(width, num_experts)
        self.up_GID = nn.Parameter(torch.empty(num_groups, inner, width))
        self.up_bias_GI = nn.Parameter(torch.empty(num_groups, inner))
        self.down_GID = nn.Parameter(torch.empty(num_groups, inner, width))
        self.down_bias_GD = nn.Parameter(torch.empty(num_groups, width))
        self.register_buffer("group_E", None if groups is None else torch.tensor(self.groups))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Each expert as two `nn.Linear` begin."""
        self.gate.reset_parameters()
        inner, width = self.up_GID.shape[1:]
        for fan_in, weights in ((width, (self.up_GID, self.up_bias_GI)), (inner, (self.down_GID, self.down_bias_GD))):
            for weight in weights:
                nn.init.uniform_(weight, -(fan_in**-0.5), fan_in**-0.5)

    @property
    def experts(self) -> Experts:
        return Experts(self.up_GID, self.up_bias_GI, self.down_GID, self.down_bias_GD)

    def forward(self, x_TD: torch.Tensor, noise_TE: torch.Tensor | None = None) -> Mixture:
        """
        Args:
            noise_TE: standard normal numbers for the gate's noise; None: the mixture draws them in training, and has none elsewhere.
        """
        picks, share_TE = self.route(x_TD, noise_TE)
        out_TD, overflow = FORMS[self.choice(x_TD).name](x_TD, self.experts, picks)
        return Mixture(out_TD, share_TE, overflow)

    def route(self, x_TD: torch.Tensor, noise_TE: torch.Tensor | None = None) -> tuple[Picks, torch.Tensor]:
        """What the gate picks, and its softmax [T, E]."""
        logits_TE = self.gate(x_TD)
        if noise_TE is None and self.training and self.gate_noise:
            noise_TE = torch.randn_like(logits_TE)
        if noise_TE is not None:
            logits_TE = logits_TE + self.gate_noise * noise_TE.to(logits_TE.dtype)
        share_TE = logits_TE.softmax(-1, dtype=torch.promote_types(logits_TE.dtype, torch.float32))
        weight_TK, expert_TK = share_TE.topk(self.top_k, -1)
        group_TK = expert_TK if self.group_E is None else self.group_E[expert_TK]
        return Picks(weight_TK.to(x_TD.dtype), group_TK), share_TE

    def choice(self, x_TD: torch.Tensor) -> Choice:
        """Which implementation computes `x_TD`, and why."""
        (tokens, width), inner, on_cpu = x_TD.shape, self.up_GID.shape[1], x_TD.device.type == "cpu"
        asked, refused, sync_free = self.implementation, why_not_grouped(x_TD, inner), self.sync_free or not on_cpu
        if not tokens:
            return Choice("dense", "there is no token, and of all implementations this one gives every weight its gradient of zeros")
        if asked not in ("auto", "grouped") or (asked == "grouped" and not refused):
            return Choice(asked, "as configured")
        work = f"{tokens} tokens x {width} x {inner}"
        because = f"grouped is not possible, since {refused}; " if refused and (asked == "grouped" or sync_free) else ""
        if on_cpu and tokens * width * inner <= DENSE_WORK:
            return Choice("dense", f"{because}{work} are so few products that all experts are computed sooner than the picked ones sorted")
        if sync_free:
            return Choice("dense" if refused else "grouped", f"{because}reads no value back from the device")
        return Choice("sorted", f"{because}{work} are so many products that the picked experts alone are sooner")


def why_not_grouped(x_TD: torch.Tensor, inner: int) -> str | None:
    """What keeps `torch.nn.functional.grouped_mm` from these tokens; None: nothing."""
    width, dtype = x_TD.shape[1], x_TD.dtype
    if not hasattr(F, "grouped_mm"):
        return f"torch {torch.__version__} has no grouped_mm"
    if x_TD.is_cuda and (dtype != torch.bfloat16 or torch.cuda.get_device_capability(x_TD.device) < (8, 0)):
        return f"grouped_mm on CUDA wants bfloat16 and compute capability 8.0, not {dtype} on {torch.cuda.get_device_name(x_TD.device)}"
    if dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"grouped_mm does not take {dtype}"
    if width * x_TD.itemsize % 16 or inner * x_TD.itemsize % 16:
        return f"grouped_mm wants rows of a multiple of 16 bytes, not {width} and {inner} x {x_TD.itemsize}"
    return None


def balance_loss(importance_XE: torch.Tensor) -> torch.Tensor:
    """std / mean of the experts' importance, [X], which is 0 when all are asked alike, as an expert without others is."""
    return importance_XE.std(-1, correction=min(importance_XE.shape[-1] - 1, 1)) / (importance_XE.mean(-1) + 1e-6)
