"""EAGLE-3 training-time test: T steps on true tokens, each taught the target's distribution on the draft vocabulary.

Row t of a document holds the feature of token t and the embedding of token t+1. At step j it is fed token t+1+j and
taught the target's distribution at token t+1+j, which is about token t+2+j. With w_tj = 1 iff token t+2+j is
supervised and in the same document and the target's arg-max for it is in the draft vocabulary:

    loss_sum = sum_j gamma^j sum_t w_tj loss_tj        weight = sum_j gamma^j sum_t w_tj

(arXiv 2503.01840, section 3.2, where the loss is the soft cross-entropy; the normalisation is ours). A row is computed at
step j only while it still has a supervised target at step j or later: no other row ever sees it, so leaving it out is exact.
Where only few rows could leave, they stay, since moving the others together costs more.
"""

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar, Self

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from specforge.config.methods import Eagle3Options
from specforge.data.vocabulary import DraftVocabulary
from specforge.errors import CheckpointError
from specforge.features.batch import DraftBatch
from specforge.features.source import FeatureStore
from specforge.features.tables import TargetTables
from specforge.layers.norm import normalise
from specforge.layers.rows import take_rows, to_device
from specforge.methods.balance import balance_sum
from specforge.methods.base import Moment, Plan, StepOutput
from specforge.methods.distillation import TaughtRows, chunked_loss, chunks_of, default_chunk_rows
from specforge.methods.objectives import Objective
from specforge.methods.teacher import teacher_at
from specforge.models.draft_folder import read_draft_tensors
from specforge.models.eagle3 import Eagle3Config, Eagle3Draft, LayerState, StepRows
from specforge.models.initial_weights import draw_weights

_FEW_ROWS = 1 / 16
"""Share of the rows that must leave together."""

Feed = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]
"""What rows are fed at a later step, of their outputs, plain and `normalise`d, and the tokens that follow: see `Eagle3Draft.next_step`."""


@dataclass(frozen=True)
class TTTStep:
    """Host-side indices of one step; all arrays int64."""

    rows_R: np.ndarray
    """Packed token indices of the computed rows, ascending."""
    keep_R: np.ndarray | None
    """Where these rows stood among the rows of the step before; None: they are the same rows."""
    supervised_S: np.ndarray
    """Which of the R rows have a supervised target at this very step."""


@dataclass(frozen=True)
class TTTPlan(Plan):
    steps: tuple[TTTStep, ...]
    counted_JT: np.ndarray
    """w_tj: bool [T steps, tokens]."""
    moment: Moment | None = None


def supervised_targets(batch: DraftBatch, num_steps: int) -> np.ndarray:
    """Which rows have a supervised target at each step, in the draft vocabulary or not: bool [T steps, tokens]."""
    mask_T, document_T = batch.loss_mask.numpy(), batch.documents.index_T
    tokens = len(mask_T)
    supervised_JT = np.zeros((num_steps, tokens), dtype=bool)
    for step in range(min(num_steps, max(tokens - 2, 0))):
        reach = tokens - 2 - step
        supervised_JT[step, :reach] = mask_T[2 + step :] & (document_T[2 + step :] == document_T[:reach])
    return supervised_JT


def plan_ttt(
    batch: DraftBatch, supervised_JT: np.ndarray, in_vocabulary_V: np.ndarray, decay: float, moment: Moment | None = None
) -> TTTPlan:
    """Which rows each step computes, which of them are supervised, and the batch's weight."""
    num_steps, tokens = supervised_JT.shape
    teachable_T = in_vocabulary_V[batch.argmax.numpy()]
    counted_JT = np.zeros_like(supervised_JT)
    for step in range(min(num_steps, max(tokens - 2, 0))):
        reach = tokens - 2 - step
        counted_JT[step, :reach] = supervised_JT[step, :reach] & teachable_T[1 + step : tokens - 1]
    needed_JT = np.logical_or.accumulate(supervised_JT[::-1], axis=0)[::-1]
    # Every rank's backward must reach the parameters, or the reduction of the others would wait for it.
    needed_JT[0, 0] |= not needed_JT[0].any()
    steps, rows = list[TTTStep](), np.flatnonzero(needed_JT[0])
    for step in range(num_steps):
        needed, keep = np.flatnonzero(needed_JT[step]), None
        if len(needed) <= (1 - _FEW_ROWS) * len(rows):
            rows, keep = needed, np.searchsorted(rows, needed)
        steps.append(TTTStep(rows, keep, np.flatnonzero(supervised_JT[step, rows])))
    weight = sum(decay**step * float(counted_JT[step].sum()) for step in range(num_steps))
    return TTTPlan(weight, tuple(steps), counted_JT, moment)


def derive_config(options: Eagle3Options, tables: TargetTables, aux_layer_ids: tuple[int, ...], draft_vocab_size: int) -> Eagle3Config:
    """The draft's shape from its target's: same width, heads, RoPE and context length."""
    return Eagle3Config.of_target(
        tables.config,
        options,
        aux_layer_ids,
        draft_vocab_size=draft_vocab_size,
        head_trained=options.head == "trained",
        fc_norm=options.fc_norm,
        norm_before_fc=options.norm_before_fc,
        norm_output=options.norm_output,
    )


class Eagle3(nn.Module):
    """The draft together with the frozen tables of its target, which no checkpoint stores."""

    embedding_VH: torch.Tensor
    teacher_head_DH: torch.Tensor
    to_draft_V: torch.Tensor
    drafts_longer: ClassVar[bool] = True
    draft_type: ClassVar[type[Eagle3Draft]] = Eagle3Draft

    def __init__(self, options: Eagle3Options, draft: Eagle3Draft, tables: TargetTables) -> None:
        super().__init__()
        self.options = options
        self.draft = draft
        self.draft_tokens = options.draft_tokens
        self.objective = Objective.named(options.loss, lk_eta=options.lk_eta)
        for layer in draft.stack:
            layer.checkpointing = options.activation_checkpointing
        kept = torch.arange(draft.config.draft_vocab_size) + draft.d2t
        self.register_buffer("embedding_VH", tables.embedding, persistent=False)
        self.register_buffer("teacher_head_DH", tables.head[kept].contiguous(), persistent=False)
        to_draft_V = torch.full((len(draft.t2d),), -1, dtype=torch.int32)
        to_draft_V[kept] = torch.arange(len(kept), dtype=torch.int32)
        self.register_buffer("to_draft_V", to_draft_V, persistent=False)
        self._in_vocabulary_V = draft.t2d.numpy().copy()

    @classmethod
    def build(cls, options: Eagle3Options, tables: TargetTables, store: FeatureStore, seed: int) -> Self:
        """A new draft: vocabulary from the supervised tokens of `store`, head from the target's rows, the rest random."""
        vocabulary = DraftVocabulary.from_counts(
            store.supervised_counts(tables.config.vocab_size), options.draft_vocab_size, always=tables.config.eos_token_ids
        )
        config = cls.config_of(options, tables, store.aux_layer_ids, len(vocabulary.kept))
        draft = cls.draft_type(config, vocabulary)
        draw_weights(draft, seed)
        if draft.lm_head is not None:
            draft.lm_head.weight.data.copy_(tables.head[torch.from_numpy(vocabulary.kept)])
        return cls(options, draft, tables)

    @classmethod
    def read(cls, options: Eagle3Options, tables: TargetTables, folder: Path) -> Self:
        """The shape and vocabulary of a checkpointed draft; its weights are loaded by the caller, sharded or whole."""
        config = cls.draft_type.config_type.read(folder)
        tensors = read_draft_tensors(folder, ("d2t", "t2d"))
        vocabulary = DraftVocabulary.from_tables(tensors["d2t"].numpy(), tensors["t2d"].numpy())
        if (len(vocabulary.kept), vocabulary.target_size) != (config.draft_vocab_size, config.vocab_size):
            raise CheckpointError(
                f"draft in {folder}: its tables map {len(vocabulary.kept)} ids to {vocabulary.target_size}, but config.json says "
                f"draft_vocab_size={config.draft_vocab_size} and vocab_size={config.vocab_size}; take another checkpoint."
            )
        cls.config_of(options, tables, config.aux_layer_ids, config.draft_vocab_size).require_in(folder, config)
        return cls(options, cls.draft_type(config, vocabulary), tables)

    @classmethod
    def config_of(cls, options: Any, tables: TargetTables, aux_layer_ids: tuple[int, ...], draft_vocab_size: int) -> Eagle3Config:
        """The shape of the draft, and of what a method built on this one adds to it."""
        return derive_config(options, tables, aux_layer_ids, draft_vocab_size)

    @classmethod
    def count_parameters(cls, options: Eagle3Options, tables: TargetTables, aux_layer_ids: tuple[int, ...]) -> int:
        """Trained parameters of the draft that `build` would make; nothing is allocated."""
        size = min(options.draft_vocab_size or tables.config.vocab_size, tables.config.vocab_size)
        vocabulary = DraftVocabulary(np.arange(size), tables.config.vocab_size)
        with torch.device("meta"):
            draft = cls.draft_type(cls.config_of(options, tables, aux_layer_ids, size), vocabulary)
        return sum(parameter.numel() for parameter in draft.parameters())

    def config_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self.draft.config)

    def plan(self, batch: DraftBatch, moment: Moment | None = None) -> TTTPlan:
        supervised_JT = supervised_targets(batch, self.draft_tokens)
        return plan_ttt(batch, supervised_JT, self._in_vocabulary_V, self.options.step_decay, moment)

    def forward(self, batch: DraftBatch, plan: TTTPlan) -> StepOutput:
        outputs, states = self._steps(batch, plan)
        return self.loss(batch, plan, outputs, states)

    def _embed(self, ids: torch.Tensor) -> torch.Tensor:
        return F.embedding(ids, self.embedding_VH).to(self.draft.fc.weight.dtype)

    def _hidden_states(self, batch: DraftBatch, plan: TTTPlan) -> list[torch.Tensor]:
        return self._steps(batch, plan)[0]

    def _steps(self, batch: DraftBatch, plan: TTTPlan) -> tuple[list[torch.Tensor], list[LayerState]]:
        """The draft's output [R, H] of every step, normalised but not yet times the final norm's weight, and what its layers hold."""
        device, documents = batch.input_ids.device, batch.documents
        dtype, all_T = self.draft.fc.weight.dtype, np.arange(documents.num_tokens if self.options.layers > 1 else 0)
        flex = self.options.attention == "flex"
        angles_P1C = self.draft.rotary(max(documents.lengths) + len(plan.steps))
        everywhere = StepRows.of(documents, all_T, angles_P1C[to_device(documents.position_T, device)], dtype, flex)
        outputs, states = list[torch.Tensor](), list[LayerState]()
        for index, step in enumerate(plan.steps):
            if not len(step.rows_R):
                break
            angle_R1C = angles_P1C[to_device(documents.position_T[step.rows_R] + index, device)]
            if index == 0:
                rows = StepRows.of(documents, step.rows_R, angle_R1C, dtype, flex)
                hidden, states, feed = self._first_step(batch, everywhere, rows)
            else:
                rows, normed = replace(rows, angle_R1C=angle_R1C), outputs[-1]
                if step.keep_R is not None:
                    rows, keep_R = StepRows.of(documents, step.rows_R, angle_R1C, dtype, flex), to_device(step.keep_R, device)
                    hidden, normed = take_rows(hidden, keep_R), take_rows(normed, keep_R)
                    for state in states:
                        state.keep(keep_R)
                hidden = self.draft.next_step(*feed(hidden, normed, rows.token_R + index), rows, states)
            outputs.append(normalise(hidden, self.draft.config.rms_norm_eps))
        return outputs, states

    def _first_step(self, batch: DraftBatch, everywhere: StepRows, rows: StepRows) -> tuple[torch.Tensor, list[LayerState], Feed]:
        tokens, embedded_TH = batch.documents.num_tokens, self._embed(batch.input_ids.long().roll(-1))
        hidden, states = self.draft.first_step(self.draft.fuse(batch.aux), embedded_TH, everywhere, rows)
        # Rows that nobody asks any more may reach beyond the last token: they are fed the first ones.
        return hidden, states, lambda hidden, normed, following_R: (hidden, normed, following_R % tokens)

    def loss(self, batch: DraftBatch, plan: TTTPlan, outputs: list[torch.Tensor], states: Sequence[LayerState] = ()) -> StepOutput:
        """Loss, counts, proposals and their confidences from the `normalise`d outputs [R, H] of the steps, and what the layers hold."""
        device, steps = batch.input_ids.device, plan.steps[: len(outputs)]
        start_N = np.concatenate([step.rows_R[step.supervised_S] for step in steps])
        step_N = np.repeat(np.arange(len(steps)), [len(step.supervised_S) for step in steps])
        by_teacher = np.argsort(start_N + 1 + step_N, kind="stable")
        start_N, step_N = start_N[by_teacher], step_N[by_teacher]
        teacher_U, teacher_N = np.unique(start_N + 1 + step_N, return_inverse=True)
        weight_N = self.options.step_decay**step_N * plan.counted_JT[step_N, start_N]

        first_row = np.cumsum([0, *(len(out) for out in outputs[:-1])])
        row_N = np.concatenate([first + step.supervised_S for first, step in zip(first_row, steps, strict=True)])[by_teacher]
        # Step by step the product stays in the cache of a CPU.
        hidden_MH = torch.cat([normed_RH * self.draft.norm.weight for normed_RH in outputs])
        teacher = teacher_at(batch, to_device(teacher_U, device), self.teacher_head_DH, self.to_draft_V)
        head_DH = self.teacher_head_DH if self.draft.lm_head is None else self.draft.lm_head.weight
        chunk_rows = self.options.loss_chunk_rows or default_chunk_rows(len(head_DH))
        rows = TaughtRows(
            to_device(row_N, device), to_device(weight_N.astype(np.float32), device), to_device(teacher_N, device),
            chunks_of(teacher_N, chunk_rows),
        )  # fmt: skip
        loss_sum, proposals_N, confidences_N, _ = chunked_loss(self.objective, [(hidden_MH, head_DH.to(hidden_MH.dtype))], rows, teacher)

        if plan.moment is not None and any(state.shares_RE for state in states):
            shares_NE = [take_rows(torch.cat(state.shares_RE), rows.row_N) for state in states]
            loss_sum = loss_sum + self.options.balance_weight * balance_sum(shares_NE, batch, start_N, rows.weight_N)
        starts, columns = to_device(start_N + 1, device), to_device(step_N, device)
        ids_N = proposals_N + self.draft.d2t[proposals_N]
        return StepOutput.of(loss_sum, batch, self.draft_tokens, starts, columns, ids_N, confidences_N)
