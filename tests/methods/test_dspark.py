"""DSpark against a slow form in float64."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge.config.methods import DSparkOptions
from specforge.distributed import World
from specforge.errors import ConfigError
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.methods.base import Moment
from specforge.methods.dspark import DSpark
from tests.methods.test_contract import train
from tests.ranks import run_ranks
from tests.slow_blocks import assert_equals_slow_form, ragged, sharpen, slow_decay, slow_outputs, target_logits
from tests.training.test_steps import assert_equal

HEADS = ["vanilla", "gated", "rnn"]
MOMENT = Moment(seed=3, step=7, total_steps=10)
RANK = 6


def make_dspark(target_path: Path, store: LocalFeatureStore, **options: Any) -> DSpark:
    """In float64, with sharp weights."""
    chosen: dict[str, Any] = {
        "block_size": 4, "anchors": 4, "layers": 2, "loss_chunk_rows": 7, "position_decay": 3.0, "markov_rank": RANK, **options,
    }  # fmt: skip
    method = DSpark.build(DSparkOptions(**chosen), TargetTables.read(target_path), store, 0).double()
    sharpen(method)
    return method


def slow_heads(method: DSpark, sample: SampleFeatures, anchor: int, outputs_KH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Biases [K, V] and confidences [K], row by row."""
    tensors, state = dict(method.draft.named_parameters()), torch.zeros(RANK, dtype=torch.float64)
    biases, confidences = [], []
    for k, h in enumerate(outputs_KH):
        e = f = tensors["markov_head.markov_w1.weight"][int(sample.input_ids[anchor + k])]
        if method.options.markov_head == "gated":
            gate = tensors["markov_head.gate_proj.weight"] @ torch.cat([h, e]) + tensors["markov_head.gate_proj.bias"]
            f = gate.sigmoid() * e
        if method.options.markov_head == "rnn":
            joint = tensors["markov_head.joint_proj.weight"] @ torch.cat([state, e, h]) + tensors["markov_head.joint_proj.bias"]
            g, c, o = joint[:RANK], joint[RANK : 2 * RANK], joint[2 * RANK :]
            state = g.sigmoid() * state + (1 - g.sigmoid()) * c.tanh()
            f = o.tanh()
        biases.append(tensors["markov_head.markov_w2.weight"] @ f)
        confidence = tensors["confidence_head.proj.weight"] @ torch.cat([h, e]) + tensors["confidence_head.proj.bias"]
        confidences.append(confidence.sigmoid()[0])
    return torch.stack(biases), torch.stack(confidences)


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["evaluation", "training"])
@pytest.mark.parametrize("head", HEADS)
def test_blocks_equal_the_slow_form(head: str, moment: Moment | None, target_path: Path, store: LocalFeatureStore) -> None:
    method = make_dspark(target_path, store, markov_head=head)
    confidences = []

    def slow_block(sample: SampleFeatures, anchor: int, drafts: int) -> tuple[torch.Tensor, list[float], torch.Tensor]:
        outputs_KH = slow_outputs(method, sample, anchor)[:drafts]
        biases_KV, confidence_K = slow_heads(method, sample, anchor, outputs_KH)
        log_q_KV = (outputs_KH @ method.head_VH.T + biases_KV).log_softmax(-1)
        loss, weights = torch.zeros((), dtype=torch.float64), slow_decay(method, drafts)
        for k, (log_q, c, weight) in enumerate(zip(log_q_KV, confidence_K, weights, strict=True)):
            distance = (target_logits(method, sample, anchor + k).softmax(-1) - log_q.exp()).abs().sum()
            accepted = (1 - distance.detach() / 2).float().double()  # the loss hands out acceptance in float32
            surprise = -accepted * c.log() - (1 - accepted) * (1 - c).log()
            loss = loss + weight * (-0.1 * log_q[int(sample.input_ids[anchor + k + 1])] + 0.9 * distance + surprise)
        confidences.extend(confidence_K.tolist())
        return loss, weights, log_q_KV

    output = assert_equals_slow_form(method, store, moment, slow_block)
    got_N = output.confidences_TK[output.proposals_TK >= 0]
    torch.testing.assert_close(got_N, torch.tensor(confidences), rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("head", HEADS[1:])
def test_two_ranks_learn_the_same(head: str, target_path: Path, store: LocalFeatureStore) -> None:
    """As the contract of all methods holds the first head to."""
    expected = train(World(), "dspark", target_path, store.folder, 40, markov_head=head)
    for rank_result in run_ranks(partial(train, markov_head=head), "dspark", target_path, store.folder, 64, world=2):
        assert_equal(rank_result, expected)


def test_the_bias_costs_the_confidence_nothing(target_path: Path, store: LocalFeatureStore) -> None:
    """What is accepted is not taught by what is said of it: the loss of the confidence leaves W2 alone."""
    method = make_dspark(target_path, store)
    batch = DraftBatch.pack(range(len(store)), ragged(store))
    weight, gradients = method.draft.markov_head.markov_w2.weight, []
    for bias in (0.0, 3.0):
        method.draft.confidence_head.proj.bias.data.fill_(bias)
        gradients.append(torch.autograd.grad(method(batch, method.plan(batch)).loss_sum, weight)[0])
    assert gradients[0].equal(gradients[1])


def test_a_new_draft_has_no_bias(target_path: Path, store: LocalFeatureStore) -> None:
    """And what it is does not depend on torch's own generator."""
    for head in HEADS:
        drafts = []
        for seed in (1, 2):
            torch.manual_seed(seed)
            options = DSparkOptions(layers=1, markov_head=head, markov_rank=RANK)
            drafts.append(DSpark.build(options, TargetTables.read(target_path), store, 0).draft.state_dict())
        assert all(drafts[0][name].equal(drafts[1][name]) for name in drafts[0])
        zeros = {name for name, tensor in drafts[0].items() if not tensor.any()}
        assert zeros == {"markov_head.markov_w2.weight", *(name for name in drafts[0] if name.endswith("bias"))}


def test_tensors_have_the_names_of_the_engines(target_path: Path, store: LocalFeatureStore) -> None:
    own: dict[str, dict[str, tuple[int, ...]]] = {
        "vanilla": {},
        "gated": {"gate_proj.weight": (6, 38), "gate_proj.bias": (6,)},
        "rnn": {"joint_proj.weight": (18, 44), "joint_proj.bias": (18,)},
    }
    for head, expected in own.items():
        method = make_dspark(target_path, store, markov_head=head)
        shapes = {name: tuple(tensor.shape) for name, tensor in method.draft.state_dict().items()}
        assert {name: shape for name, shape in shapes.items() if "head." in name} == {
            "markov_head.markov_w1.weight": (64, 6), "markov_head.markov_w2.weight": (64, 6), "confidence_head.proj.weight": (1, 38),
            "confidence_head.proj.bias": (1,), **{f"markov_head.{name}": shape for name, shape in expected.items()},
        }  # fmt: skip


def test_confidence_is_worked_out_in_float32(target_path: Path, store: LocalFeatureStore) -> None:
    head = make_dspark(target_path, store).draft.confidence_head.bfloat16()
    embedded_NR, hidden_NH = torch.randn(3, RANK).bfloat16(), torch.randn(3, 32).bfloat16()
    expected_N = torch.cat([hidden_NH, embedded_NR], 1).double() @ head.proj.weight.double()[0] + head.proj.bias.double()
    torch.testing.assert_close(head(embedded_NR, hidden_NH), expected_N.float(), rtol=1e-5, atol=1e-5)


def test_what_does_not_fit_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="markov_rank=0: must be at least 1"):
        DSparkOptions(markov_rank=0)
