"""DFlash: blocks of masked tokens behind anchors of the text, each row taught the token at its place.

Drafting from a start s (its token known, its feature not) gives the drafts k = 1..K for the tokens s + k. In training some starts of
every sample are anchors, drawn from (seed, step, sample number) alone; in an evaluation every start is one. Draft k counts while all
of the tokens s + 1..s + k are supervised, in the same document as s. With w_k = exp(-(k - 1) / gamma):

    loss_sum = sum over anchors and their drafts of w_k CE_sk        weight = sum of the same w_k

(arXiv 2602.06036). With D-PACE (arXiv 2605.18810) the weights come out of the probabilities of the labels, and weight counts drafts.
"""

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from specforge.config.methods import BlockOptions
from specforge.errors import ConfigError
from specforge.features.batch import DraftBatch
from specforge.features.source import FeatureStore
from specforge.features.tables import TargetTables
from specforge.layers.block_attention import BlockMask
from specforge.layers.rows import to_device
from specforge.methods.balance import balance_sum
from specforge.methods.base import Moment, Plan, StepOutput
from specforge.methods.distillation import Loss, TaughtRows, chunked_loss, chunks_of, default_chunk_rows
from specforge.methods.mask_token import require_known, unused_token
from specforge.methods.objectives import Objective
from specforge.methods.teacher import Teacher, teacher_at
from specforge.models.dflash import FULL, SLIDING, Blocks, DFlashConfig, DFlashDraft, Outputs
from specforge.models.initial_weights import draw_weights


@dataclass(frozen=True)
class BlockPlan(Plan):
    """Host-side indices, all int64. The N drafts that count are listed block by block, k ascending."""

    anchors_A: np.ndarray
    """Packed token index of each block's anchor, ascending."""
    block_N: np.ndarray
    draft_N: np.ndarray
    """k, from 1 on."""
    moment: Moment | None = None

    @property
    def start_N(self) -> np.ndarray:
        return self.anchors_A[self.block_N]


def plan_blocks(batch: DraftBatch, draft_weight_K: np.ndarray, anchors: int, moment: Moment | None) -> BlockPlan:
    """At most `anchors` blocks a sample, or one at every start if there is no moment; draft k weighs `draft_weight_K[k - 1]`."""
    mask_T, documents = batch.loss_mask.numpy(), batch.documents
    token_T = np.arange(len(mask_T))
    ends = np.flatnonzero(~mask_T | (documents.position_T == 0))
    supervised_T = np.append(ends, len(mask_T))[np.searchsorted(ends, token_T, side="right")] - token_T - 1
    anchors_A = np.flatnonzero(mask_T & (supervised_T > 0))
    if moment is not None and len(anchors_A):
        borders = np.searchsorted(anchors_A, documents.starts)
        drawn = [
            np.random.default_rng([moment.seed, moment.step, sample]).permutation(anchors_A[begin:end])[:anchors]
            for sample, (begin, end) in zip(batch.samples, pairwise(borders), strict=True)
        ]
        anchors_A = np.sort(np.concatenate(drawn))
    drafts_A = np.minimum(supervised_T[anchors_A], len(draft_weight_K))
    block_N = np.repeat(np.arange(len(anchors_A)), drafts_A)
    draft_N = np.arange(len(block_N)) - (np.cumsum(drafts_A) - drafts_A)[block_N] + 1
    if not len(anchors_A):  # every rank's backward must reach the parameters, or the reduction of the others would wait for it
        anchors_A = np.zeros(1, dtype=np.int64)
    return BlockPlan(float(draft_weight_K[draft_N - 1].sum(dtype=np.float64)), anchors_A, block_N, draft_N, moment)


@dataclass(frozen=True)
class TaughtDrafts:
    """The drafts of a plan in the order of their loss, on the device of the batch."""

    rows: TaughtRows
    teacher: Teacher | None
    start_N: torch.Tensor
    column_N: torch.Tensor
    """k - 1."""


class Drafted(NamedTuple):
    """What is known of one place of B blocks before its token is chosen."""

    logits_BV: torch.Tensor
    confidence_B: torch.Tensor | None = None
    """How probably the token will be accepted; None: as probable as the likeliest token is."""


class DFlash(nn.Module):
    """The draft together with the frozen tables of its target, which no checkpoint stores."""

    embedding_VH: torch.Tensor
    head_VH: torch.Tensor
    drafts_longer: ClassVar[bool] = False
    first_draft_row: ClassVar[int] = 1
    """The row of a block that predicts draft 1; row 0 is the anchor's."""
    draft_type: ClassVar[type[DFlashDraft]] = DFlashDraft

    def __init__(self, options: BlockOptions, draft: DFlashDraft, tables: TargetTables) -> None:
        super().__init__()
        self.options, self.draft = options, draft
        self.draft_tokens = options.block_size - self.first_draft_row
        self.objective = self.objective_of(options)
        decay = 0.0 if self.objective.pace or not options.position_decay else 1 / options.position_decay
        self._draft_weight_K = np.exp(-decay * np.arange(self.draft_tokens)).astype(np.float32)
        self.register_buffer("embedding_VH", tables.embedding, persistent=False)
        self.register_buffer("head_VH", tables.head[: tables.config.vocab_size], persistent=False)

    @classmethod
    def build(cls, options: BlockOptions, tables: TargetTables, store: FeatureStore, seed: int) -> Self:
        """A new draft of random weights.

        Raises:
            ConfigError: the block does not fit the target's context, a captured layer is none that a draft can read, or the mask token is
                a token of the training rows.
        """
        mask_token_id = unused_token(options.mask_token_id, store, tables.config.vocab_size)
        draft = cls.draft_type(cls.config_of(options, tables, store.aux_layer_ids, mask_token_id))
        draw_weights(draft, seed)
        return cls(options, draft, tables)

    @classmethod
    def read(cls, options: BlockOptions, tables: TargetTables, folder: Path) -> Self:
        """The shape of a checkpointed draft; its weights are loaded by the caller, sharded or whole."""
        config = cls.draft_type.config_type.read(folder)
        mask_token_id = config.mask_token_id if options.mask_token_id < 0 else options.mask_token_id
        cls.config_of(options, tables, config.aux_layer_ids, mask_token_id).require_in(folder, config)
        return cls(options, cls.draft_type(config), tables)

    @classmethod
    def count_parameters(cls, options: BlockOptions, tables: TargetTables, aux_layer_ids: tuple[int, ...]) -> int:
        """Trained parameters of the draft that `build` would make; nothing is allocated."""
        with torch.device("meta"):
            draft = cls.draft_type(cls.config_of(options, tables, aux_layer_ids, 0))
        return sum(parameter.numel() for parameter in draft.parameters())

    @staticmethod
    def objective_of(options: Any) -> Objective:
        return Objective.named(options.loss, lk_eta=options.lk_eta, pace_alpha=options.dpace_alpha)

    @classmethod
    def config_of(cls, options: Any, tables: TargetTables, aux_layer_ids: tuple[int, ...], mask_token_id: int) -> DFlashConfig:
        """The shape of the draft, and of what a method built on this one adds to it."""
        return derive_config(options, tables, aux_layer_ids, mask_token_id)

    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.draft.config)

    def plan(self, batch: DraftBatch, moment: Moment | None = None) -> BlockPlan:
        return plan_blocks(batch, self._draft_weight_K, self.options.anchors, moment)

    def forward(self, batch: DraftBatch, plan: BlockPlan) -> StepOutput:
        taught, outputs = self._taught(batch, plan), self._outputs(batch, plan)
        parts = self.parts(batch, plan, outputs.hidden_NH)
        loss = chunked_loss(self.objective, parts, taught.rows, taught.teacher)
        return self._output(batch, plan, taught, loss, outputs)

    def parts(self, batch: DraftBatch, plan: BlockPlan, hidden_NH: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What the logits of the plan's drafts are the sum of: hidden [N, ...] and head [V, ...]."""
        return [(hidden_NH, self.head_VH.to(hidden_NH.dtype))]

    def embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.embedding_VH).to(self.draft.fc.weight.dtype)

    def embed_blocks(self, anchor_ids_A: torch.Tensor) -> torch.Tensor:
        """What blocks are made of: the anchors' tokens and, last, the mask token, [A + 1, H]."""
        return self.embed(torch.cat([anchor_ids_A, anchor_ids_A.new_full((1,), self.draft.config.mask_token_id)]))

    def drafting(self, hidden_BNH: torch.Tensor) -> Callable[[int, torch.Tensor], Drafted]:
        """Drafts of a block out of its outputs: called for the places 0, 1, ..., one after the other, with the token [B] before each."""
        hidden_BKH = hidden_BNH[:, self.first_draft_row :]
        logits_BKV = hidden_BKH @ self.head_VH.to(hidden_BKH.dtype).T
        return lambda place, previous_B: Drafted(logits_BKV[:, place])

    def _hidden_states(self, batch: DraftBatch, plan: BlockPlan) -> torch.Tensor:
        """The draft's outputs [N, H], after the final norm, of the rows whose drafts count."""
        return self._outputs(batch, plan).hidden_NH

    def _outputs(self, batch: DraftBatch, plan: BlockPlan) -> Outputs:
        """Of the rows whose drafts count."""
        config, documents, device = self.draft.config, batch.documents, batch.input_ids.device
        row_B = np.arange(config.block_size)
        position_R = (documents.position_T[plan.anchors_A][:, None] + row_B).ravel()
        angles_P1C = self.draft.rotary(max(documents.lengths) + config.block_size)
        embedded_EH = self.embed_blocks(batch.input_ids[to_device(plan.anchors_A, device)])
        windows = {FULL: 0, SLIDING: config.sliding_window}
        blocks = Blocks(
            angles_P1C[to_device(documents.position_T, device)],
            angles_P1C[to_device(position_R, device)],
            {
                kind: BlockMask.of(documents, plan.anchors_A, config.block_size, windows[kind], device, embedded_EH.dtype)
                for kind in set(config.layer_types)
            },
            to_device(plan.block_N * config.block_size + plan.draft_N - 1 + self.first_draft_row, device),
        )
        return self.draft(batch.aux, embedded_EH, blocks)

    def _taught(self, batch: DraftBatch, plan: BlockPlan) -> TaughtDrafts:
        device, vocab_size = batch.input_ids.device, len(self.head_VH)
        order_N = np.arange(len(plan.block_N)) if self.objective.pace else np.argsort(plan.start_N + plan.draft_N, kind="stable")
        start_N, draft_N = plan.start_N[order_N], plan.draft_N[order_N]
        teacher_U, group_N = np.unique(plan.block_N if self.objective.pace else start_N + draft_N - 1, return_inverse=True)
        starts, columns = to_device(start_N, device), to_device(draft_N - 1, device)
        rows = TaughtRows(
            to_device(order_N, device),
            to_device(self._draft_weight_K[draft_N - 1], device),
            to_device(group_N, device),
            chunks_of(group_N, self.options.loss_chunk_rows or default_chunk_rows(vocab_size)),
            label_N=batch.input_ids[starts + 1 + columns].long() if self.objective.needs_label else None,
            depth_N=columns if self.objective.pace else None,
            block_size=self.draft_tokens if self.objective.pace else 0,
        )
        teacher = teacher_at(batch, to_device(teacher_U, device), self.head_VH) if self.objective.needs_teacher else None
        return TaughtDrafts(rows, teacher, starts, columns)

    def _output(self, batch: DraftBatch, plan: BlockPlan, taught: TaughtDrafts, loss: Loss, outputs: Outputs) -> StepOutput:
        loss_sum = loss.loss_sum
        if plan.moment is not None and outputs.shares_NE:
            weight_N = to_device(self._draft_weight_K[plan.draft_N - 1], loss_sum.device)
            loss_sum = loss_sum + self.options.balance_weight * balance_sum(outputs.shares_NE, batch, plan.start_N, weight_N)
        return StepOutput.of(loss_sum, batch, self.draft_tokens, taught.start_N, taught.column_N, loss.proposals_N, loss.confidences_N)


def derive_config(options: BlockOptions, tables: TargetTables, aux_layer_ids: tuple[int, ...], mask_token_id: int) -> DFlashConfig:
    """The draft's shape from its target's: same width, heads, RoPE and context length.

    Raises:
        ConfigError: the block does not fit the context, the mask token is none of the vocabulary, or a captured layer is none that an
            engine hands out.
    """
    target = tables.config
    if options.block_size > target.max_position_embeddings:
        raise ConfigError(
            f"method.options.block_size={options.block_size}: the target has {target.max_position_embeddings} positions; "
            "choose a smaller block."
        )
    require_known(mask_token_id, target.vocab_size)
    if not all(0 < layer < target.num_hidden_layers for layer in aux_layer_ids):
        raise ConfigError(
            f"model.aux_layer_ids={list(aux_layer_ids)}: must lie between 1 and {target.num_hidden_layers - 1}, outputs of the target's "
            "layers but the last; leave it empty for layers spread evenly."
        )
    return DFlashConfig.of_target(
        target,
        options,
        aux_layer_ids,
        block_size=options.block_size,
        mask_token_id=mask_token_id,
        layer_types=tuple(options.layer_types) or (FULL,) * options.layers,
        sliding_window=options.sliding_window,
    )
