"""DSpark: DFlash's drafts, each biased by the one before it, taught the target's distribution, and a confidence for each.

Row k = 0..B-1 of a block at anchor s predicts the token s + k + 1, its logits are U_k + W2 f_k, and in training the token before it is
the true one, s + k. Let a_k = sum_v min(p_v, q_v) be the probability that a token drawn from the row's distribution q is accepted by
the target's p, c_k what the confidence head says of it, y_k the true token and w_k = exp(-k / gamma):

    loss_sum = sum over anchors and their rows of w_k (-0.1 log q(y_k) + 1.8 (1 - a_k) + BCE(c_k, a_k))

a_k is not differentiated in BCE; 1.8 (1 - a_k) is 0.9 |p - q|_1 (arXiv 2607.05147).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch
from torch.nn import functional as F

from specforge.config.methods import DSparkOptions
from specforge.features.batch import DraftBatch
from specforge.features.source import FeatureStore
from specforge.features.tables import TargetTables
from specforge.layers.rows import take_rows, to_device
from specforge.methods.base import StepOutput
from specforge.methods.dflash import BlockPlan, DFlash, Drafted, derive_config
from specforge.methods.distillation import chunked_loss
from specforge.methods.objectives import Objective
from specforge.models.dflash import DFlashConfig, DFlashDraft
from specforge.models.dspark import DSparkConfig, DSparkDraft


class DSpark(DFlash):
    options: DSparkOptions
    draft: DSparkDraft
    draft_type: ClassVar[type[DFlashDraft]] = DSparkDraft
    first_draft_row: ClassVar[int] = 0

    @classmethod
    def build(cls, options: Any, tables: TargetTables, store: FeatureStore, seed: int) -> Self:
        """A new draft of random weights, whose bias by the token before is 0."""
        method = super().build(options, tables, store, seed)
        torch.nn.init.zeros_(method.draft.markov_head.markov_w2.weight)
        return method

    @staticmethod
    def objective_of(options: Any) -> Objective:
        return Objective(ce=0.1, tv=1.8)

    @classmethod
    def config_of(cls, options: Any, tables: TargetTables, aux_layer_ids: tuple[int, ...], mask_token_id: int) -> DFlashConfig:
        shape = derive_config(options, tables, aux_layer_ids, mask_token_id)
        return DSparkConfig(**vars(shape), markov_rank=options.markov_rank, markov_head_type=options.markov_head)

    def forward(self, batch: DraftBatch, plan: BlockPlan) -> StepOutput:
        taught, outputs = self._taught(batch, plan), self._outputs(batch, plan)
        hidden_NH = outputs.hidden_NH
        previous_NR = self._previous(batch, plan)
        loss = chunked_loss(self.objective, self._parts(batch, plan, hidden_NH, previous_NR), taught.rows, taught.teacher)
        assert loss.acceptance_N is not None
        logit_N = take_rows(self.draft.confidence_head(previous_NR, hidden_NH), taught.rows.row_N)
        accepted_N, weight_N = loss.acceptance_N.to(logit_N.dtype).clamp(0, 1), taught.rows.weight_N.to(logit_N.dtype)
        surprise = F.binary_cross_entropy_with_logits(logit_N, accepted_N, weight_N, reduction="sum")
        confidences_N = logit_N.detach().sigmoid().float()
        loss = loss._replace(loss_sum=loss.loss_sum + surprise, confidences_N=confidences_N)
        return self._output(batch, plan, taught, loss, outputs)

    def parts(self, batch: DraftBatch, plan: BlockPlan, hidden_NH: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return self._parts(batch, plan, hidden_NH, self._previous(batch, plan))

    def _parts(
        self, batch: DraftBatch, plan: BlockPlan, hidden_NH: torch.Tensor, previous_NR: torch.Tensor
    ) -> list[tuple[torch.Tensor, torch.Tensor]]:
        head, cell_N = self.draft.markov_head, to_device(plan.block_N * self.draft_tokens + plan.draft_N - 1, hidden_NH.device)
        bias_NR = head(previous_NR, hidden_NH, cell_N, len(plan.anchors_A))
        return [*super().parts(batch, plan, hidden_NH), (bias_NR, head.markov_w2.weight)]

    def _previous(self, batch: DraftBatch, plan: BlockPlan) -> torch.Tensor:
        """W1 of the true tokens before the drafts, [N, R]."""
        before_N = plan.start_N + plan.draft_N - 1
        embedded_NR: torch.Tensor = self.draft.markov_head.markov_w1(batch.input_ids[to_device(before_N, batch.input_ids.device)])
        return embedded_NR

    def drafting(self, hidden_BNH: torch.Tensor) -> Callable[[int, torch.Tensor], Drafted]:
        logits_BNV, head = hidden_BNH @ self.head_VH.to(hidden_BNH.dtype).T, self.draft.markov_head
        state_BR: torch.Tensor | None = None

        def draft(place: int, previous_B: torch.Tensor) -> Drafted:
            nonlocal state_BR
            embedded_BR, hidden_BH = head.markov_w1(previous_B), hidden_BNH[:, place]
            feature_BR, state_BR = head.step(embedded_BR, hidden_BH, state_BR)
            confidence_B = self.draft.confidence_head(embedded_BR, hidden_BH).sigmoid()
            return Drafted(logits_BNV[:, place] + head.markov_w2(feature_BR), confidence_B)

        return draft
