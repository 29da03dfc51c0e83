"""Sums of a batch, and what a step draws."""

import numpy as np
import pytest
import torch

from specforge.config import RankingConfig
from specforge.config.ranking import RankingDataConfig, RankingModelConfig
from specforge.layers.moe import GATE_NOISE
from specforge.methods.base import Moment
from specforge.ranking.batch import RankingBatch, RowMeta
from specforge.ranking.method import RankingMethod
from tests.ranking.small import SLOTS, make_batch, make_user
from tests.sync_free import value_read

MODEL = RankingModelConfig(slots=SLOTS, rows=64, slot_width=6, width=16, layers=2, heads=4, inner=24, experts=4)
MOMENT = Moment(seed=0, step=3, total_steps=9)


def make_method(balance_weight: float = 0.0) -> RankingMethod:
    config = RankingConfig(output_dir="none", model=MODEL, data=RankingDataConfig(train_path="none", eval_path="none"))
    method = RankingMethod.build(config, torch.device("cpu"))
    method.balance_weight = balance_weight
    return method


def test_the_loss_is_the_sum_of_the_scored_rows() -> None:
    """-log p of a click, -log(1 - p) of none."""
    method, batch = make_method().eval(), make_batch((9, 1, 0, 20))
    output = method(batch, method.plan(batch))
    probability_P, clicked_P = output.logit_P.double().sigmoid(), batch.label_N[batch.scored_N] == 1
    nats_P = -torch.where(clicked_P, probability_P, 1 - probability_P).log()
    assert output.loss_sum.item() == pytest.approx(nats_P.sum().item(), rel=1e-6)
    right = int(((probability_P > 0.5) == clicked_P).sum())
    assert (output.tally["correct"].item(), output.tally["count"].item()) == (right, batch.num_scored)
    assert method.plan(batch).weight == batch.num_scored


def test_balance_weighs_as_much_as_the_rows() -> None:
    batch, plain, weighed = make_batch((9, 1, 0, 20)), make_method().eval(), make_method(0.5).eval()
    more = weighed(batch, weighed.plan(batch)).loss_sum - plain(batch, plain.plan(batch)).loss_sum
    balance = plain.draft(batch).balance
    assert balance > 0.01
    assert more.item() == pytest.approx(0.5 * batch.num_scored * balance.item(), rel=1e-3)


@pytest.mark.parametrize("balance_weight", [0.0, 0.5])
def test_micro_batches_add_up(balance_weight: float) -> None:
    """But for the balance loss, which is that of a micro-batch. Their gates are given the very noise that they have in one batch."""
    method, users = make_method(balance_weight).train(), [make_user(length, number) for number, length in enumerate((9, 1, 0, 20))]
    sums = []
    for parts in ([[0, 1, 2, 3]], [[3, 0], [1], [2]]):
        batches = [RankingBatch.pack(part, [users[number] for number in part]) for part in parts]
        sums.append(sum(method(batch, method.plan(batch, MOMENT)).loss_sum.item() for batch in batches))
    assert (sums[1] == pytest.approx(sums[0], rel=1e-5)) == (balance_weight == 0.0)


def test_gate_noise_follows_the_user_and_the_step() -> None:
    method, lengths = make_method(), (5, 0, 8, 5)
    users = [make_user(length, number) for number, length in enumerate(lengths)]
    here = method.plan(RankingBatch.pack((4, 7, 9, 2), users), MOMENT).noise_LNE
    swapped = method.plan(RankingBatch.pack((2, 9, 7, 4), users[::-1]), MOMENT).noise_LNE
    assert here.shape == (2, 18, 4)
    each_user = here.split(lengths, 1)
    assert torch.equal(torch.cat(each_user[::-1], 1), swapped)
    assert not torch.equal(each_user[0], each_user[3])
    assert not torch.equal(here, method.plan(RankingBatch.pack((4, 7, 9, 2), users), Moment(0, 4, 9)).noise_LNE)
    assert method.plan(RankingBatch.pack((4, 7, 9, 2), users)).noise_LNE is None
    assert method.plan(RankingBatch.empty(RowMeta(SLOTS)), MOMENT).noise_LNE.shape == (2, 1, 4)


def test_gate_noise_has_its_standard_deviation_and_reaches_the_gate() -> None:
    method = make_method()
    batch = RankingBatch.pack([0], [make_user(3000, 0)])
    noise_LNE = method.plan(batch, MOMENT).noise_LNE
    assert noise_LNE.std().item() == pytest.approx(1.0, abs=0.02) and abs(noise_LNE.mean().item()) < 0.02
    moe, x_ND = method.draft.layers[0].feed_forward.moe.train(), torch.randn(3000, 16)
    share_NE = (moe.gate(x_ND) + GATE_NOISE * noise_LNE[0]).softmax(-1)
    torch.testing.assert_close(moe(x_ND, noise_LNE[0]).importance_E, share_NE.sum(0))


def test_a_new_model_is_the_same_on_all_ranks_and_disturbs_no_generator() -> None:
    torch.manual_seed(1)
    first = make_method()
    drawn = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(drawn, torch.rand(1))
    torch.manual_seed(2)
    second = make_method()
    assert all(torch.equal(one, other) for one, other in zip(first.parameters(), second.parameters(), strict=True))


def test_a_training_step_reads_no_value_back() -> None:
    method, batch = make_method(0.5).bfloat16().train(), make_batch((300, 1, 0, 150))
    for layer in method.draft.layers:
        layer.feed_forward.moe.sync_free = True
    plan = method.plan(batch, MOMENT)
    assert value_read(lambda method, batch, plan: method(batch, plan).loss_sum.backward(), method, batch, plan) is None


def test_padding_learns_nothing() -> None:
    """Row 0 of the table is what sign 0 and multiples of 64 mean."""
    method, batch = make_method(), make_batch((9, 1, 0, 20))
    method(batch, method.plan(batch, MOMENT)).loss_sum.backward()
    gradient = method.draft.encoder.slots.table.grad
    assert (batch.bags.sign_V.numpy() % 64 == 0).any() and not gradient[0].any()
    read = np.unique(batch.bags.sign_V.numpy() % 64)
    assert set(gradient.abs().sum(1).nonzero()[:, 0].tolist()) <= set(read.tolist()) - {0}
