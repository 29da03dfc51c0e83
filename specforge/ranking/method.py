"""What the trainer asks of the ranking model: sums over scored rows, of

    loss_sum = sum over scored rows of BCE(logit, click)  +  P * balance_weight * balance        weight = P

`balance` is the mixtures' of one micro-batch, as the contest's is of one batch: the only number here that depends on how users fall into
micro-batches. Gate noise is drawn from (seed, step, user), so neither ranks nor micro-batches decide it.

The table of signs is sharded with all else. It could be kept whole on each rank, but its gradient is dense: adding that up over ranks
moves as many bytes as gathering the table and scattering the gradient do, and three copies of the moments and the table would stay on each
rank. What would save bytes is an exchange of the touched rows alone, for which AdamW, which moves every row at each step, is the wrong
optimiser.

Shapes: N rows, P scored rows, L layers, E experts.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from specforge.config.ranking import RankingConfig
from specforge.methods.base import Moment, Plan
from specforge.ranking.batch import RankingBatch
from specforge.ranking.load import apply_levers
from specforge.ranking.model import CTRModel
from specforge.ranking.shape import CTRConfig


@dataclass(frozen=True)
class RankingPlan(Plan):
    noise_LNE: torch.Tensor | None
    """Standard normal numbers of the gates; None in an evaluation."""


class RankingOutput(NamedTuple):
    """A NamedTuple, since FSDP looks for the tensors that need a gradient in the structure that `forward` returns."""

    loss_sum: torch.Tensor
    """Scalar, in nats, with gradient."""
    tally: dict[str, torch.Tensor]
    """`correct` [1]: scored rows whose click is called rightly at one half; `count` [1]: scored rows."""
    logit_P: torch.Tensor


class RankingMethod(nn.Module):
    """The model as `draft`, by which name backend and checkpoints know what is trained."""

    def __init__(self, model: CTRModel, balance_weight: float) -> None:
        super().__init__()
        self.draft = model
        self.balance_weight = balance_weight

    @classmethod
    def build(cls, config: RankingConfig, device: torch.device) -> Self:
        """A new model, the same on all ranks."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.seed)
            model = CTRModel(CTRConfig.of(config.model, config.levers.signid_mode))
        return cls._with_levers(model, config, device)

    @classmethod
    def read(cls, config: RankingConfig, folder: Path, device: torch.device) -> Self:
        """The shape of a checkpointed model, which must be this run's; its weights are loaded by the caller."""
        shape = CTRConfig.of(config.model, config.levers.signid_mode)
        shape.refuse_other(CTRConfig.read(folder), folder)
        return cls._with_levers(CTRModel(shape), config, device)

    @classmethod
    def _with_levers(cls, model: CTRModel, config: RankingConfig, device: torch.device) -> Self:
        apply_levers(model, config.levers, device, getattr(torch, config.train.precision))
        return cls(model, config.model.balance_weight)

    def config_dict(self) -> dict[str, Any]:
        return self.draft.config.stored()

    def plan(self, batch: RankingBatch, moment: Moment | None = None) -> RankingPlan:
        """What the host knows before the forward. No moment: evaluation, in which nothing is drawn."""
        noise_LNE = None
        if moment is not None:
            shape = self.draft.config
            each_user = [
                np.random.default_rng([moment.seed, moment.step, user]).standard_normal((shape.layers, length, shape.experts), np.float32)
                for user, length in zip(batch.samples, batch.documents.lengths)
            ]
            none = np.zeros((shape.layers, 0 if batch.samples else batch.documents.num_tokens, shape.experts), np.float32)
            noise_LNE = torch.from_numpy(np.concatenate([none, *each_user], 1))
        return RankingPlan(float(batch.num_scored), noise_LNE)

    def forward(self, batch: RankingBatch, plan: RankingPlan) -> RankingOutput:
        device = batch.label_N.device
        noise_LNE = None if plan.noise_LNE is None else plan.noise_LNE.to(device, non_blocking=True)
        scores = self.draft(batch, noise_LNE)
        label_P = batch.label_N.index_select(0, batch.scored_rows).to(scores.logit_P.dtype)
        loss_sum = F.binary_cross_entropy_with_logits(scores.logit_P, label_P, reduction="sum")
        loss_sum = loss_sum + plan.weight * self.balance_weight * scores.balance
        right_P = (scores.logit_P > 0) == (label_P > 0.5)
        tally = {"correct": right_P.sum().float().reshape(1), "count": torch.full((1,), plan.weight, device=device)}
        return RankingOutput(loss_sum, tally, scores.logit_P)
