"""Every objective against its formula on whole logits in float64, by autograd; D-PACE by hand too; and far from all comfort."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch

from specforge.config.methods import Eagle3Options
from specforge.errors import ConfigError
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore
from specforge.methods.distillation import Loss, TaughtRows, chunked_loss, chunks_of
from specforge.methods.objectives import Objective
from specforge.methods.teacher import CompressedTeacher, ExactTeacher
from tests.tiny import make_method

TARGET_IDS, DRAFT_IDS = 40, 24

OBJECTIVES = [
    Objective(kl=1.0),
    Objective(kl=0.7),
    Objective(ce=1.0),
    Objective(ce=2.5),
    Objective(tv=1.0),
    Objective(lk_alpha=1.0),
    Objective(lk_lambda=1.0),
    Objective(lk_lambda=1.0, lk_eta=0.4),
    Objective(ce=0.1, tv=1.8),
    Objective(kl=0.5, ce=0.2, tv=0.3, lk_alpha=0.6, lk_lambda=0.4),
]


def plain_rows(
    objective: Objective, logits_ND: torch.Tensor, target_NV: torch.Tensor, kept_D: torch.Tensor, label_N: torch.Tensor
) -> torch.Tensor:
    """The loss of each row: the definitions, the target on all of its ids."""
    log_q = logits_ND.log_softmax(-1)
    q_on_all = torch.zeros_like(target_NV).index_copy(1, kept_D, log_q.exp())
    p = target_NV[:, kept_D]
    renormalised = p / p.sum(-1, keepdim=True)
    acceptance = torch.minimum(target_NV, q_on_all).sum(-1)
    share = torch.exp(-objective.lk_eta * acceptance).detach()
    half_distance = (target_NV - q_on_all).abs().sum(-1) / 2
    kl = (renormalised * (renormalised.log() - log_q)).sum(-1)
    return (
        objective.kl * -(renormalised * log_q).sum(-1)
        + objective.ce * torch.nn.functional.cross_entropy(logits_ND, label_N, reduction="none")
        + objective.tv * half_distance
        + objective.lk_alpha * -acceptance.log()
        + objective.lk_lambda * (share * kl + (1 - share) * half_distance)
    )


@dataclass
class Scene:
    """31 of 40 states in two parts, taught by 12 positions of a target that has 40 ids, of which the draft keeps 24."""

    parts: list[tuple[torch.Tensor, torch.Tensor]]
    rows: TaughtRows
    teacher: ExactTeacher
    target_NV: torch.Tensor
    kept_D: torch.Tensor

    @property
    def tensors(self) -> list[torch.Tensor]:
        return [tensor for part in self.parts for tensor in part]

    def logits(self, parts: int) -> torch.Tensor:
        whole = [hidden[self.rows.row_N] @ head.T for hidden, head in self.parts[:parts]]
        return torch.stack(whole).sum(0)

    def plain(self, objective: Objective, parts: int) -> torch.Tensor:
        assert self.rows.label_N is not None
        return plain_rows(objective, self.logits(parts), self.target_NV, self.kept_D, self.rows.label_N)


def scene(chunk_rows: int) -> Scene:
    """Sharp logits; every fifth row is masked."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    group_N = torch.unique(torch.randint(0, 12, (31,), generator=generator).sort().values, return_inverse=True)[1]
    last, head = normal(int(group_N[-1]) + 1, 16), normal(TARGET_IDS, 16).mul_(1.5)
    kept = torch.randperm(TARGET_IDS, generator=generator)[:DRAFT_IDS].sort().values
    parts = [(normal(40, width).requires_grad_(), normal(DRAFT_IDS, width).mul_(1.5).requires_grad_()) for width in (16, 3)]
    weight = torch.rand(31, generator=generator).masked_fill(torch.arange(31) % 5 == 4, 0)
    rows = TaughtRows(
        torch.randperm(40, generator=generator)[:31], weight, group_N, chunks_of(group_N.numpy(), chunk_rows),
        label_N=torch.randint(DRAFT_IDS, (31,), generator=generator),
    )  # fmt: skip
    logits_UV = last @ head.T
    teacher = ExactTeacher(last, head[kept], logits_UV.logsumexp(-1))
    return Scene(parts, rows, teacher, logits_UV.softmax(-1)[group_N], kept)


def close(got: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, expected, rtol=tolerance, atol=tolerance)


def for_objective(objective: Objective, rows: TaughtRows) -> TaughtRows:
    return TaughtRows(rows.row_N, rows.weight_N, rows.group_N, rows.chunks, label_N=rows.label_N if objective.needs_label else None)


@pytest.mark.parametrize("base_share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("chunk_rows", [1, 5, 100])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=lambda objective: "+".join(f"{k}={v}" for k, v in vars(objective).items() if v))
def test_chunks_equal_the_formula_on_whole_logits(objective: Objective, chunk_rows: int, base_share: float) -> None:
    made = scene(chunk_rows)
    teacher = made.teacher if objective.needs_teacher else None
    got = chunked_loss(objective, made.parts, for_objective(objective, made.rows), teacher, base_share)
    weight = made.rows.weight_N.double()
    expected = weight @ ((1 - base_share) * made.plain(objective, 2) + base_share * made.plain(objective, 1))
    close(got.loss_sum, expected)
    for left, right in zip(
        torch.autograd.grad(3 * got.loss_sum, made.tensors), torch.autograd.grad(3 * expected, made.tensors), strict=True
    ):
        close(left, right)

    draft = made.logits(2).softmax(-1)
    assert torch.equal(got.proposals_N, draft.argmax(-1))
    close(got.confidences_N, draft.amax(-1).float(), 1e-6)
    assert (got.acceptance_N is not None) == objective.gives_acceptance
    if got.acceptance_N is not None:
        assert not got.acceptance_N.requires_grad
        close(got.acceptance_N, torch.minimum(draft, made.target_NV[:, made.kept_D]).sum(-1).float(), 1e-6)


@pytest.mark.parametrize("frozen", [(1,), (1, 3), (0, 2), (0, 1)])
def test_a_frozen_part_changes_no_other_gradient(frozen: tuple[int, ...]) -> None:
    made, objective = scene(5), Objective(ce=0.1, tv=1.8)
    expected = torch.autograd.grad(chunked_loss(objective, made.parts, made.rows, made.teacher, 0.3).loss_sum, made.tensors)
    for number in frozen:
        made.tensors[number].requires_grad_(False)
    chunked_loss(objective, made.parts, made.rows, made.teacher, 0.3).loss_sum.backward()
    for number, (tensor, gradient) in enumerate(zip(made.tensors, expected, strict=True)):
        assert (tensor.grad is None) == (number in frozen)
        assert tensor.grad is None or torch.equal(tensor.grad, gradient)


def test_a_compressed_teacher_of_all_ids_teaches_the_same() -> None:
    made, objective = scene(5), Objective(kl=0.5, tv=0.3, lk_alpha=0.6, lk_lambda=0.4)
    to_draft = torch.full((TARGET_IDS,), -1, dtype=torch.int32)
    to_draft[made.kept_D] = torch.arange(DRAFT_IDS, dtype=torch.int32)
    log_probs_NV = made.target_NV.log()
    first_N = np.unique(made.rows.group_N.numpy(), return_index=True)[1]
    log_probs, ids = log_probs_NV[first_N].topk(TARGET_IDS)
    rows = for_objective(objective, made.rows)
    losses = [
        chunked_loss(objective, made.parts, rows, teacher).loss_sum
        for teacher in (made.teacher, CompressedTeacher(ids.int(), log_probs, to_draft, DRAFT_IDS))
    ]
    close(*losses)
    for left, right in zip(*(torch.autograd.grad(loss, made.tensors) for loss in losses), strict=True):
        close(left, right)


def gap_loss(
    objective: Objective, gaps: list[float], weight: float, dtype: torch.dtype
) -> tuple[Loss, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Draft and target each sure of another id, by `gap` in the logits: row by row loss, logits, and the target's logits."""
    target = torch.zeros(len(gaps), 5, dtype=dtype)
    target[:, 0] = torch.tensor(gaps)
    hidden = torch.tensor([[0.0, gap, gap / 2, 0.3, -gap] for gap in gaps], dtype=dtype, requires_grad=True)
    rows = TaughtRows(
        torch.arange(len(gaps)), torch.full((len(gaps),), weight), torch.arange(len(gaps)), [(0, len(gaps), 0, len(gaps))],
        label_N=torch.zeros(len(gaps), dtype=torch.int64) if objective.needs_label else None,
    )  # fmt: skip
    identity = torch.eye(5, dtype=dtype)
    loss = chunked_loss(objective, [(hidden, identity)], rows, ExactTeacher(target, identity, target.logsumexp(-1)))
    return loss, hidden, target, torch.autograd.grad(loss.loss_sum, hidden)[0]


@pytest.mark.parametrize(
    "objective", [Objective(tv=1.0), Objective(lk_alpha=1.0), Objective(lk_lambda=1.0), Objective(ce=0.1, tv=1.8)], ids=str
)
def test_slopes_stay_those_of_the_formula_at_any_distance(objective: Objective) -> None:
    """float32 against the formula in float64, where e^-200 is a normal number."""
    gaps = [0.5, 2.0, 20.0, 90.0, 200.0]
    loss, hidden, target, gradient = gap_loss(objective, gaps, 1.0, torch.float32)
    logits = hidden.detach().double().requires_grad_()
    expected = plain_rows(objective, logits, target.double().softmax(-1), torch.arange(5), torch.zeros(5, dtype=torch.int64)).sum()
    close(loss.loss_sum, expected.float(), 1e-5)
    close(gradient, torch.autograd.grad(expected, logits)[0].float(), 1e-5)


@pytest.mark.parametrize("weight", [0.0, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_distances_that_underflow_stay_finite(objective: Objective, dtype: torch.dtype, weight: float) -> None:
    loss, _, _, gradient = gap_loss(objective, [0.0, 200.0, 2000.0, 1e5], weight, dtype)
    assert loss.loss_sum.isfinite() and gradient.isfinite().all()
    assert weight or (loss.loss_sum == 0 and not gradient.any())
    if objective == Objective(lk_alpha=weight):
        # Four ids overlap by e^-gap; of these only the target's own is more probable to it than to the draft.
        close(gradient[2:, 0], torch.full((2,), -0.25, dtype=dtype), 1e-2)


@pytest.mark.parametrize("objective", OBJECTIVES, ids=str)
def test_a_target_with_nothing_for_the_draft_stays_finite(objective: Objective) -> None:
    """All that a compressed teacher knows is outside the draft vocabulary, and rounding left nothing for the rest."""
    to_draft = torch.tensor([0, 1, 2, -1, -1], dtype=torch.int32)
    teacher = CompressedTeacher(torch.tensor([[3, 4]], dtype=torch.int32), torch.tensor([[0.0, -20.0]]).half(), to_draft, 3)
    hidden, head = torch.tensor([[3.0, 0.0, -1.0]], requires_grad=True), torch.eye(3, requires_grad=True)
    rows = TaughtRows(torch.tensor([0]), torch.tensor([1.0]), torch.tensor([0]), [(0, 1, 0, 1)], label_N=torch.tensor([2]))
    loss = chunked_loss(objective, [(hidden, head)], for_objective(objective, rows), teacher)
    assert loss.loss_sum.isfinite()
    assert all(gradient.isfinite().all() for gradient in torch.autograd.grad(loss.loss_sum, (hidden, head)))


@pytest.mark.parametrize("objective", [*OBJECTIVES, Objective(ce=1.0, pace="dpace")], ids=str)
def test_no_rows_give_zero_and_gradients(objective: Objective) -> None:
    made = scene(5)
    none = torch.zeros(0, dtype=torch.int64)
    rows = TaughtRows(none, torch.zeros(0), none, [], label_N=none, depth_N=none, block_size=4)
    loss = chunked_loss(objective, made.parts, rows, made.teacher if objective.needs_teacher else None)
    assert loss.loss_sum.item() == 0
    assert not any(gradient.any() for gradient in torch.autograd.grad(loss.loss_sum, made.tensors))


def test_bfloat16_parts() -> None:
    made, objective = scene(5), Objective(ce=0.1, tv=1.8)
    expected = chunked_loss(objective, made.parts, made.rows, made.teacher, 0.3)
    coarse = [(hidden.detach().bfloat16().requires_grad_(), head.detach().bfloat16().requires_grad_()) for hidden, head in made.parts]
    got = chunked_loss(objective, coarse, made.rows, made.teacher, 0.3)
    assert got.loss_sum.dtype == torch.float32
    torch.testing.assert_close(got.loss_sum.double(), expected.loss_sum, rtol=0.02, atol=0)
    for part, exact in zip([x for pair in coarse for x in pair], torch.autograd.grad(expected.loss_sum, made.tensors), strict=True):
        (gradient,) = torch.autograd.grad(got.loss_sum, part, retain_graph=True)
        assert gradient.dtype == torch.bfloat16
        assert (gradient.double() - exact).norm() < 0.05 * exact.norm()


HAND = {
    "prefix": [0.75, 0.46875, 0.41015625],
    "dpace": [1.62890625, 0.87890625, 0.41015625],
    "continuation": [2.171875, 1.875, 1.0],
}
"""Labels of probability 1/2, 1/4, 3/4: drafts survive with 0.75, 0.625, 0.875."""

HAND_WITHOUT_THE_SECOND = {"prefix": [0.75, 0.0, 0.65625], "dpace": [1.40625, 0.0, 0.65625], "continuation": [1.875, 0.0, 1.0]}


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("pace", list(HAND))
def test_dpace_by_hand(pace: str, masked: bool) -> None:
    probs = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 2, 1 / 4, 1 / 4], [1 / 8, 1 / 8, 3 / 4]], dtype=torch.float64)
    hidden, label = (probs.log() + 1.5).requires_grad_(), torch.tensor([0, 1, 2])
    weight = torch.tensor([1.0, 0.0, 1.0]) if masked else torch.ones(3)
    rows = TaughtRows(
        torch.arange(3), weight, torch.zeros(3, dtype=torch.int64), [(0, 3, 0, 1)], label_N=label, depth_N=torch.arange(3), block_size=4
    )
    objective = Objective(ce=1.0, pace=pace)
    loss = chunked_loss(objective, [(hidden, torch.eye(3, dtype=torch.float64))], rows).loss_sum
    expected = torch.tensor((HAND_WITHOUT_THE_SECOND if masked else HAND)[pace], dtype=torch.float64)
    close(loss, -expected @ probs.diagonal().log())
    close(torch.autograd.grad(loss, hidden)[0], expected[:, None] * (probs - torch.eye(3)))


@pytest.mark.parametrize("base_share", [0.0, 0.3])
@pytest.mark.parametrize("chunk_rows", [1, 6, 100])
@pytest.mark.parametrize("pace", list(HAND))
def test_dpace_of_ragged_blocks(pace: str, chunk_rows: int, base_share: float) -> None:
    """Nine blocks of 1 to 5 rows, block by block; the weights are the slopes of the expected accepted length, by autograd."""
    alpha, rng = 0.3, np.random.default_rng(0)
    lengths = rng.integers(1, 6, 9)
    block_N, depth_N = np.repeat(np.arange(9), lengths), np.concatenate([np.arange(length) for length in lengths])
    made, count = scene(1), int(lengths.sum())
    label_N = torch.from_numpy(rng.integers(0, DRAFT_IDS, count))
    weight_N = torch.from_numpy(np.where(rng.random(count) < 0.2, 0.0, rng.random(count) + 0.5)).float()
    rows = TaughtRows(
        torch.from_numpy(rng.permutation(40)[:count]), weight_N, torch.from_numpy(block_N), chunks_of(block_N, chunk_rows),
        label_N=label_N, depth_N=torch.from_numpy(depth_N), block_size=5,
    )  # fmt: skip
    made.rows = rows
    objective = Objective(ce=1.0, pace=pace, pace_alpha=alpha)
    loss = chunked_loss(objective, made.parts, rows, base_share=base_share).loss_sum

    q_N = made.logits(2).softmax(-1)[torch.arange(count), label_N].detach()
    pace_N = torch.zeros(count, dtype=torch.float64)
    for block in range(9):
        counted = [row for row in np.flatnonzero(block_N == block) if weight_N[row]]
        log_s = ((1 - alpha) * q_N[counted] + alpha).log().requires_grad_()
        reached = log_s.cumsum(0).exp()
        slopes = torch.autograd.grad(reached.sum(), log_s)[0] if counted else log_s.detach()
        reached = reached.detach()
        pace_N[counted] = {"prefix": reached, "dpace": slopes, "continuation": slopes / reached}[pace]
    log_q_1, log_q_2 = [made.logits(parts).log_softmax(-1)[torch.arange(count), label_N] for parts in (1, 2)]
    expected = (weight_N * pace_N) @ -((1 - base_share) * log_q_2 + base_share * log_q_1)
    close(loss, expected)
    for left, right in zip(torch.autograd.grad(loss, made.tensors), torch.autograd.grad(expected, made.tensors), strict=True):
        close(left, right)


@pytest.mark.parametrize("loss", ["lk_alpha", "lk_lambda", "tv"])
def test_eagle3_learns_by_it(loss: str, target_path: Path, store: LocalFeatureStore) -> None:
    """The loss of rows computed by itself from the whole target; each sample alone gives its share of the packed ones."""
    method = make_method(target_path, store, loss=loss, lk_eta=1.3)
    batch = DraftBatch.read(store, range(len(store)))
    plan = method.plan(batch)
    output = method(batch, plan)

    head_VH = make_method(target_path, store, draft_vocab_size=0).teacher_head_DH
    target_TV = (batch.last @ head_VH.T).softmax(-1)
    kept_D, objective = torch.arange(method.draft.config.draft_vocab_size) + method.draft.d2t, Objective.named(loss, lk_eta=1.3)
    expected = torch.zeros(())
    for index, (ttt, normed) in enumerate(zip(plan.steps, method._hidden_states(batch, plan), strict=True)):
        assert method.draft.lm_head is not None
        logits = method.draft.lm_head(normed * method.draft.norm.weight)
        counted = torch.from_numpy(plan.counted_JT[index, ttt.rows_R])
        reached = torch.from_numpy(ttt.rows_R)[counted] + 1 + index
        rows = plain_rows(objective, logits[counted], target_TV[reached], kept_D, torch.zeros(len(reached), dtype=torch.int64))
        expected = expected + method.options.step_decay**index * rows.sum()
    close(output.loss_sum, expected, 2e-5)
    parameters = list(method.parameters())
    for left, right in zip(torch.autograd.grad(output.loss_sum, parameters), torch.autograd.grad(expected, parameters), strict=True):
        close(left, right, 2e-5)

    alone = [DraftBatch.read(store, [number]) for number in range(len(store))]
    close(sum(method(one, method.plan(one)).loss_sum for one in alone), output.loss_sum, 2e-5)


def test_objectives_by_name() -> None:
    assert Objective.named("kl") == Objective(kl=1.0)
    assert Objective.named("lk_lambda", lk_eta=1.5) == Objective(lk_lambda=1.0, lk_eta=1.5)
    assert Objective.named("dpace", pace_alpha=0.2) == Objective(ce=1.0, pace="dpace", pace_alpha=0.2)
    assert Objective.named("dpace_prefix") == Objective(ce=1.0, pace="prefix")


def test_a_negative_eta_is_refused() -> None:
    with pytest.raises(ConfigError, match="lk_eta=-1"):
        Eagle3Options(lk_eta=-1.0)
