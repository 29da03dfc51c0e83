"""What the trainer and the evaluator ask of every method."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Protocol, Self

import torch

from specforge.features.batch import DraftBatch
from specforge.features.source import FeatureStore
from specforge.features.tables import TargetTables


class StepOutput(NamedTuple):
    """Sums and counts of one batch; ratios are formed once, after they were added over micro-batches and ranks.

    A NamedTuple, since FSDP looks for the tensors that need a gradient in the structure that `forward` returns.
    """

    loss_sum: torch.Tensor
    """Scalar, in nats, with gradient."""
    tally: dict[str, torch.Tensor]
    """Additive numbers by name, each a vector of fixed length; `correct` and `count` [K] are always there."""
    proposals_TK: torch.Tensor
    """The id proposed for token s+k when drafting starts at token s, in column k-1 of row s; -1: none. int32."""
    confidences_TK: torch.Tensor
    """How probable the draft calls that id, from 0 to 1; 0 where there is none. float32."""

    @classmethod
    def of(
        cls, loss_sum: torch.Tensor, batch: DraftBatch, draft_tokens: int, starts: torch.Tensor, columns: torch.Tensor,
        ids: torch.Tensor, confidences: torch.Tensor,
    ) -> Self:  # fmt: skip
        """From N drafts: where drafting starts, k - 1, the id proposed and its confidence, [N] each."""
        proposals_TK = torch.full((batch.documents.num_tokens, draft_tokens), -1, dtype=torch.int32, device=ids.device)
        proposals_TK[starts, columns] = ids.int()
        confidences_TK = torch.zeros(proposals_TK.shape, device=ids.device)
        confidences_TK[starts, columns] = confidences
        right_N, zeros = ids == batch.argmax[starts + columns], torch.zeros(draft_tokens, device=ids.device)
        tally = {
            "correct": zeros.index_add(0, columns, right_N.float()),
            "count": zeros.index_add(0, columns, torch.ones_like(right_N, dtype=torch.float32)),
        }
        return cls(loss_sum, tally, proposals_TK, confidences_TK)


@dataclass(frozen=True)
class Plan:
    """What is known of a batch before its forward, worked out on the host."""

    weight: float
    """The batch's share of the global loss weight."""


@dataclass(frozen=True)
class Moment:
    """When in a training a batch is used. What a method draws, it draws from (seed, step, sample number), so that neither ranks nor
    batches decide; what changes in the course of a training follows from step and total_steps."""

    seed: int
    step: int
    """Optimiser steps that were done before."""
    total_steps: int


class Trainable(Protocol):
    """What the trainer asks of a module, whatever it learns."""

    def plan(self, batch: Any, moment: Moment | None = None) -> Any:
        """What the host can work out before the forward, a `Plan`. No moment: evaluation, in which nothing is drawn."""
        ...

    def __call__(self, batch: Any, plan: Any) -> Any:
        """A structure with the `loss_sum` and the `tally` of a `StepOutput`."""
        ...

    def config_dict(self) -> dict[str, Any]:
        """The configuration of what is trained, stored as `config.json` beside its weights."""
        ...


class Method(Trainable, Protocol):
    """A way to train a draft. `build` starts one, `read` takes one from a checkpoint's folder."""

    draft_tokens: int
    """K: how many tokens the method drafts from one start."""
    drafts_longer: ClassVar[bool]
    """Whether a decoder may ask for more than K, which repeats the last step."""

    @classmethod
    def build(cls, options: Any, tables: TargetTables, store: FeatureStore, seed: int) -> Self:
        """A new draft; its weights follow from `seed`, its vocabulary from the supervised tokens of `store`."""
        ...

    @classmethod
    def read(cls, options: Any, tables: TargetTables, folder: Path) -> Self:
        """The draft that `folder` describes, its vocabulary read; the weights are still to be filled in."""
        ...

    @classmethod
    def count_parameters(cls, options: Any, tables: TargetTables, aux_layer_ids: tuple[int, ...]) -> int:
        """Trained numbers of a draft with these options, without building it."""
        ...

    def plan(self, batch: DraftBatch, moment: Moment | None = None) -> Plan: ...

    def __call__(self, batch: DraftBatch, plan: Any) -> StepOutput: ...
