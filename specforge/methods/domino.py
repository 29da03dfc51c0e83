"""Domino: DFlash's drafts, each corrected by those before it.

Row k = 0..B-1 of a block at anchor s predicts the token s + k + 1, so a block holds B drafts. Its logits are U_k without the
correction and U_k + D_k with it, D_0 = 0; in training the correction reads the true tokens s..s + k. With w_k = exp(-k / gamma) and
any loss of DFlash in the place of CE:

    loss_sum = sum over anchors and their rows of w_k ((1 - lambda) CE(U_k + D_k) + lambda CE(U_k))

where lambda goes from 1 to 0 in the first `base_decay` of the training, and is 0 in an evaluation (arXiv 2605.29707).
"""

from collections.abc import Callable
from typing import Any, ClassVar, Self

import torch

from specforge.config.methods import DominoOptions
from specforge.features.batch import DraftBatch
from specforge.features.source import FeatureStore
from specforge.features.tables import TargetTables
from specforge.layers.rows import take_rows, to_device
from specforge.methods.base import Moment, StepOutput
from specforge.methods.dflash import BlockPlan, DFlash, Drafted, derive_config
from specforge.methods.distillation import chunked_loss
from specforge.models.dflash import DFlashConfig, DFlashDraft
from specforge.models.domino import DominoConfig, DominoDraft


class Domino(DFlash):
    options: DominoOptions
    draft: DominoDraft
    draft_type: ClassVar[type[DFlashDraft]] = DominoDraft
    first_draft_row: ClassVar[int] = 0

    @classmethod
    def build(cls, options: Any, tables: TargetTables, store: FeatureStore, seed: int) -> Self:
        """A new draft of random weights, whose correction is 0."""
        method = super().build(options, tables, store, seed)
        torch.nn.init.zeros_(method.draft.correction_VE)
        return method

    @classmethod
    def config_of(cls, options: Any, tables: TargetTables, aux_layer_ids: tuple[int, ...], mask_token_id: int) -> DFlashConfig:
        shape = derive_config(options, tables, aux_layer_ids, mask_token_id)
        return DominoConfig(**vars(shape), gru_hidden_dim=options.gru_hidden_dim, emb_dim=options.emb_dim)

    def forward(self, batch: DraftBatch, plan: BlockPlan) -> StepOutput:
        taught, outputs = self._taught(batch, plan), self._outputs(batch, plan)
        parts = self.parts(batch, plan, outputs.hidden_NH)
        loss = chunked_loss(self.objective, parts, taught.rows, taught.teacher, self.base_share(plan.moment))
        return self._output(batch, plan, taught, loss, outputs)

    def parts(self, batch: DraftBatch, plan: BlockPlan, hidden_NH: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        device, size = hidden_NH.device, self.draft_tokens
        states_ABG = self.draft.prefix_gru(self.embed(batch.input_ids), to_device(plan.anchors_A, device), size)
        state_NG = take_rows(states_ABG.flatten(0, 1), to_device(plan.block_N * size + plan.draft_N - 1, device))
        corrected_N1 = to_device(plan.draft_N > 1, device)[:, None]
        correction_NE = self.draft.squeeze(hidden_NH, state_NG) * corrected_N1
        return [*super().parts(batch, plan, hidden_NH), (correction_NE, self.draft.correction_VE)]

    def base_share(self, moment: Moment | None) -> float:
        """lambda."""
        if moment is None:
            return 0.0
        return max(0.0, 1 - moment.step / max(1, int(moment.total_steps * self.options.base_decay)))

    def drafting(self, hidden_BNH: torch.Tensor) -> Callable[[int, torch.Tensor], Drafted]:
        logits_BNV = hidden_BNH @ self.head_VH.to(hidden_BNH.dtype).T
        state_BG: torch.Tensor | None = None

        def draft(place: int, previous_B: torch.Tensor) -> Drafted:
            nonlocal state_BG
            state_BG = self.draft.prefix_gru.step(self.embed(previous_B), state_BG)
            if place == 0:
                return Drafted(logits_BNV[:, 0])
            return Drafted(logits_BNV[:, place] + self.draft.squeeze(hidden_BNH[:, place], state_BG) @ self.draft.correction_VE.T)

        return draft
