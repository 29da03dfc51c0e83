"""The model against its formula, fast forms against slow ones, and who sees whom."""

import copy
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from specforge.config import Levers
from specforge.layers.documents import Documents
from specforge.ranking.batch import RankingBatch, RowMeta
from specforge.ranking.load import apply_levers
from specforge.ranking.model import LARGEST_LOGIT, CTRModel, Scores
from tests.ranking.small import LENGTHS, ROWS, SLOTS, make_batch, make_model, make_user
from tests.sync_free import value_read

CPU = torch.device("cpu")
FAST = [
    *(replace(Levers.reference(), attn=name) for name in ("loop", "padded", "bucket")),
    *(replace(Levers.reference(), moe=name) for name in ("sorted", "dense", "grouped", "auto")),
    replace(Levers.reference(), fuse_embedding=True),
    Levers(),
]


def with_levers(model: CTRModel, levers: Levers, dtype: torch.dtype) -> CTRModel:
    model = copy.deepcopy(model).to(dtype)
    apply_levers(model, levers, CPU, dtype)
    return model


def formula(model: CTRModel, batch: RankingBatch) -> torch.Tensor:
    """The logits of all rows, row by row, head by head and expert by expert."""
    shape, starts = model.config, batch.documents.starts
    bags, x = batch.bags, []
    for row in range(batch.documents.num_tokens):
        slots = []
        for slot in range(SLOTS):
            begin, end = (int(bags.begin_B[row * SLOTS + slot + side]) for side in (0, 1))
            rows = [model.encoder.slots.table[sign % ROWS] for sign in bags.sign_V[begin:end].tolist()]
            slots.append(sum(rows, torch.zeros(shape.slots.width, dtype=torch.float64)))
        x.append(model.encoder.project(model.encoder.norm(torch.cat(slots))))
    for layer in model.layers:
        qkv, attended = [layer.qkv(layer.norm(row)).view(3, shape.heads, -1) for row in x], []
        for row in range(len(x)):
            first = int(starts[np.searchsorted(starts, row, side="right") - 1])
            heads = []
            for head in range(shape.heads):
                q, keys, values = (
                    qkv[row][0, head],
                    *(torch.stack([qkv[key][part, head] for key in range(first, row + 1)]) for part in (1, 2)),
                )
                heads.append(((keys @ q) / len(q) ** 0.5).softmax(0) @ values)
            attended.append(layer.out(torch.cat(heads)))
        moe, x = layer.feed_forward.moe, [row + more for row, more in zip(x, attended)]
        for row, own in enumerate(x):
            normed = layer.feed_forward.norm(own)
            shares = moe.gate(normed).softmax(0)
            for expert in shares.argsort(descending=True)[: shape.top_k].tolist():
                hidden = F.relu(moe.up_GID[expert] @ normed + moe.up_bias_GI[expert])
                x[row] = x[row] + shares[expert] * (hidden @ moe.down_GID[expert] + moe.down_bias_GD[expert])
    return torch.stack([model.head(row)[0].clamp(-LARGEST_LOGIT, LARGEST_LOGIT) for row in x])


@pytest.mark.parametrize("gain", [2.0, 8.0])
@pytest.mark.parametrize("levers", [Levers.reference(), Levers()])
def test_the_model_is_its_formula(levers: Levers, gain: float) -> None:
    """With a gain of 8 some logits are clamped."""
    batch, model = make_batch(LENGTHS["ragged"]), make_model(gain=gain).double()
    expected = formula(model, batch)
    clamped = (expected.abs() == LARGEST_LOGIT).double().mean().item()
    assert clamped == 0 if gain < 3 else 0.1 < clamped < 1, clamped
    found = with_levers(model, levers, torch.float64)(batch).logit_P
    torch.testing.assert_close(found, expected[batch.scored_rows], rtol=0, atol=1e-10)


def learnt(model: CTRModel, batch: RankingBatch) -> list[torch.Tensor]:
    """Logits, balance and the gradients of a random direction of both."""
    scores = model(batch)
    direction = torch.randn(scores.logit_P.shape, generator=torch.Generator().manual_seed(1)).to(scores.logit_P)
    value = (scores.logit_P * direction).sum() + scores.balance
    return [scores.logit_P.detach(), scores.balance.detach(), *torch.autograd.grad(value, list(model.parameters()))]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-10)])
@pytest.mark.parametrize("which", LENGTHS)
def test_fast_levers_give_what_the_reference_gives(which: str, dtype: torch.dtype, tolerance: float) -> None:
    batch, model = make_batch(LENGTHS[which]), make_model()
    expected = learnt(with_levers(model, Levers.reference(), dtype), batch)
    for levers in FAST:
        for got, wanted in zip(learnt(with_levers(model, levers, dtype), batch), expected, strict=True):
            largest = max(wanted.abs().max().item(), 1.0) if wanted.numel() else 1.0
            torch.testing.assert_close(got, wanted, rtol=0, atol=tolerance * largest)


def test_merged_experts_agree_too() -> None:
    """Two picks of a token may then be one group, whose weights add."""
    from specforge.layers.expert_merge import merge_experts

    batch, model = make_batch(LENGTHS["ragged"]), make_model().double()
    for layer in model.layers:
        with torch.no_grad():
            for weight in layer.feed_forward.moe.experts:
                weight[3] = weight[1]
    expected = model(batch).logit_P
    for layer in model.layers:
        layer.feed_forward.moe, report = merge_experts(layer.feed_forward.moe, 0.99)
        assert report.members == ((0,), (1, 3), (2,))
    for levers in (Levers.reference(), *FAST):
        torch.testing.assert_close(with_levers(model, levers, torch.float64)(batch).logit_P, expected, rtol=0, atol=1e-10)


def all_logits(model: CTRModel, users: list[Any]) -> list[torch.Tensor]:
    """Of all rows of each user, in one batch."""
    users = [replace(user, scored_R=np.ones(len(user), dtype=bool)) for user in users]
    batch = RankingBatch.pack(range(len(users)), users)
    with torch.no_grad():
        return list(model(batch).logit_P.split(list(batch.documents.lengths)))


@pytest.mark.parametrize("attn", ["loop", "padded", "bucket", "sdpa"])
def test_editing_a_user_changes_no_other(attn: str) -> None:
    model = with_levers(make_model(), Levers(attn=attn), torch.float32)
    lengths = (9, 30, 4, 17)
    users = [make_user(length, number) for number, length in enumerate(lengths)]
    edited = [*users[:2], make_user(4, 99), *users[3:]]
    before, after = all_logits(model, users), all_logits(model, edited)
    for number in (0, 1):
        assert torch.equal(before[number], after[number])
    torch.testing.assert_close(before[3], after[3], rtol=0, atol=1e-6)
    assert (before[2] - after[2]).abs().max() > 0.1
    longer = all_logits(model, [*users[:2], make_user(13, 99), *users[3:]])
    for number in (0, 1, 3):
        torch.testing.assert_close(before[number], longer[number], rtol=0, atol=1e-6)


def test_a_later_row_changes_no_earlier_one() -> None:
    model, user = make_model(), make_user(20, 5)
    begin_RS = np.concatenate([[0], np.cumsum(user.count_RS)])
    edited = user.sign_V.copy()
    edited[begin_RS[12 * SLOTS] :] += 1
    [before], [after] = all_logits(model, [user]), all_logits(model, [replace(user, sign_V=edited)])
    assert torch.equal(before[:12], after[:12])
    assert (before[12:] - after[12:]).abs().min() > 1e-4


def test_only_rows_of_the_same_user_are_history() -> None:
    """A user alone, among others and in another order."""
    model, users = make_model(), [make_user(length, number) for number, length in enumerate((12, 1, 25))]
    together = all_logits(model, users)
    for user, expected in zip(users, together):
        torch.testing.assert_close(all_logits(model, [user])[0], expected, rtol=0, atol=1e-6)
    for expected, found in zip(together, reversed(all_logits(model, users[::-1]))):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)


def test_users_without_a_scored_row_can_be_left_out() -> None:
    model, users = make_model(), [make_user(length, number, scored=number % 2) for number, length in enumerate((12, 20, 0, 9, 25, 6))]
    whole, kept = (RankingBatch.pack(range(len(some)), some) for some in (users, [user for user in users if user.scored_R.any()]))
    assert kept.documents.lengths == (20, 9, 6)
    with torch.no_grad():
        torch.testing.assert_close(model(kept).logit_P, model(whole).logit_P, rtol=0, atol=1e-6)


def test_which_rows_are_scored_changes_no_prediction() -> None:
    model, batch = make_model(), make_batch(LENGTHS["ragged"])
    rows = torch.arange(batch.documents.num_tokens)
    with torch.no_grad():
        everything = model(replace(batch, scored_rows=rows)).logit_P
        torch.testing.assert_close(model(batch).logit_P, everything[batch.scored_rows], rtol=0, atol=1e-6)
    assert 0 < batch.num_scored < len(rows)


def test_a_batch_without_a_scored_row_has_gradients_of_zero() -> None:
    model = make_model().train()
    for batch in (RankingBatch.empty(RowMeta(SLOTS)), make_batch((5, 2), scored=0.0)):
        scores = model(batch)
        gradients = torch.autograd.grad(scores.logit_P.sum() + scores.balance, list(model.parameters()), allow_unused=True)
        assert all(gradient is not None and not gradient.any() for gradient in gradients[:-2]), "finite, and there"
        assert len(scores.logit_P) == 0


def test_lost_picks_are_counted() -> None:
    """All rows ask for experts 0 and 1, where each expert has room for three quarters of them."""
    model = with_levers(make_model(), Levers(moe="capacity"), torch.float32)
    for layer in model.layers:
        with torch.no_grad():
            layer.feed_forward.moe.gate.weight.zero_()
            layer.feed_forward.moe.gate.bias.copy_(torch.tensor([9.0, 8.0, 0.0, 0.0]))
    scores: Scores = model(make_batch((40,), scored=1.0))
    assert scores.overflow.item() == 2 * 2 * (40 - 30)


def score(model: CTRModel, batch: RankingBatch) -> torch.Tensor:
    with torch.no_grad():
        return model(batch).logit_P


def step(model: CTRModel, batch: RankingBatch) -> None:
    scores = model(batch)
    (scores.logit_P.sum() + scores.balance).backward()


@pytest.mark.parametrize("function", [score, step])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("attn", ["loop", "padded", "bucket", "sdpa"])
def test_a_forward_reads_no_value_back(attn: str, dtype: torch.dtype, function: Any) -> None:
    """torch knows the shape of a grouped product in bfloat16 only; in float32 the same rows are too many for nothing but `sorted`."""
    levers = Levers(attn=attn, moe="dense" if dtype == torch.float32 else "auto")
    model = with_levers(make_model(), levers, dtype).train(function is step)
    for layer in model.layers:
        layer.feed_forward.moe.sync_free = True
    assert value_read(function, model, make_batch((300, 1, 0, 150))) is None


@pytest.mark.parametrize("slow", [{"moe": "loop"}, {"moe": "sorted"}, {"fuse_embedding": False}])
def test_slow_forms_read_some(slow: dict[str, Any]) -> None:
    model = with_levers(make_model(), Levers(**slow), torch.float32)
    assert value_read(score, model, make_batch((30, 12))) is not None


def test_a_single_user_of_one_row() -> None:
    model, batch = make_model().double(), make_batch((1,), scored=1.0)
    assert batch.documents == Documents((1,))
    torch.testing.assert_close(model(batch).logit_P, formula(model, batch), rtol=0, atol=1e-10)
