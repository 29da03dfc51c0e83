"""Drafts whose layers' feed-forward is a mixture of experts: what the method contract does not say of them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge import files
from specforge.config.methods import METHODS
from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.errors import CheckpointError, ConfigError
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore
from specforge.features.tables import TargetTables
from specforge.layers import experts as experts_module
from specforge.layers import moe as moe_module
from specforge.layers.experts import FORMS
from specforge.layers.moe import SparseMoE
from specforge.methods.balance import balance_sum
from specforge.training.backend import FSDPTrainingBackend
from tests.methods.test_contract import EXPERTS, MOMENT, make
from tests.sync_free import value_read


def mixtures(method: Any) -> list[SparseMoE]:
    return [module for module in method.modules() if isinstance(module, SparseMoE)]


def whole_batch(store: LocalFeatureStore) -> DraftBatch:
    return DraftBatch.read(store, range(len(store)))


def learnt(method: Any, batch: DraftBatch, plan: Any) -> list[torch.Tensor]:
    """Loss and gradients."""
    loss_sum = method(batch, plan).loss_sum
    return [loss_sum, *torch.autograd.grad(loss_sum, list(method.parameters()))]


@pytest.mark.parametrize("name", METHODS)
def test_every_implementation_learns_the_same(
    name: str, target_path: Path, store: LocalFeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(experts_module, "CAPACITY_FACTOR", EXPERTS["experts"])
    method, batch = make(name, target_path, store, **EXPERTS), whole_batch(store)
    plan = method.plan(batch, MOMENT)
    expected = learnt(method, batch, plan)
    for form in FORMS:
        for mixture in mixtures(method):
            mixture.implementation = form
            assert mixture.choice(torch.zeros(4, 32)).name == form
        for got, wanted in zip(learnt(method, batch, plan), expected, strict=True):
            torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_many_rows_read_nothing_either(name: str, target_path: Path, store: LocalFeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rows ask all experts; the grouped product of many is what a GPU computes, in bfloat16 alone."""
    monkeypatch.setattr(moe_module, "DENSE_WORK", 0)
    method, batch = make(name, target_path, store, **EXPERTS), whole_batch(store)
    backend = FSDPTrainingBackend(method, TrainConfig(precision="bfloat16"), World())
    assert {mixture.choice(torch.zeros(4, 32).bfloat16()).name for mixture in mixtures(method)} == {"grouped"}

    def stepped(backend: FSDPTrainingBackend, batch: DraftBatch, plan: Any) -> None:
        backend.backward(backend(batch, plan).loss_sum, plan.weight, boundary=True)

    assert value_read(stepped, backend, batch, method.plan(batch, MOMENT)) is None


def test_balance_of_each_sample_by_its_weight(store: LocalFeatureStore) -> None:
    """Samples of 9 and 21 tokens. Importance in one layer of the first: (1.5, 0.5), of mean 1 and std sqrt(1/2); elsewhere equal."""
    batch, weight_N = DraftBatch.read(store, [0, 1]), torch.tensor([1.0, 4.0, 1.0, 4.0])
    start_N = torch.tensor([3, 9, 8, 29]).numpy()
    uneven_NE = torch.tensor([[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75]])
    even_NE = torch.full((4, 2), 0.5)
    expected = (0.5 * 2.0) * 0.5**0.5
    assert balance_sum([uneven_NE, even_NE], batch, start_N, weight_N).item() == pytest.approx(expected, rel=1e-5)
    both = balance_sum([even_NE.flip(0), uneven_NE], batch, start_N, torch.zeros(4))
    assert both.item() == 0


@pytest.mark.parametrize("name", ["eagle3", "peagle", "dflash", "domino", "dspark"])
def test_the_training_loss_alone_wants_balance(name: str, target_path: Path, store: LocalFeatureStore) -> None:
    """What it adds is `balance_weight` times the unevenness of what the gates said of the taught rows, here of one depth or all alike."""
    alike = {"draft_tokens": 1, "draft_vocab_size": 0, "position_decay": 0.0, "block_size": 2, "depth_ratio": 1.0, "anchors": 99}
    known = METHODS[name].options.__dataclass_fields__
    options = EXPERTS | {key: value for key, value in alike.items() if key in known} | {"layers": 1}
    batch = DraftBatch.read(store, [1])
    losses, seen = {}, list[torch.Tensor]()
    for weight in (0.0, 0.5):
        method = make(name, target_path, store, **options | {"balance_weight": weight})
        for mixture in mixtures(method):
            mixture.register_forward_hook(lambda _module, _inputs, answer: seen.append(answer.share_TE))
        for moment in (MOMENT, None):
            plan = method.plan(batch, moment)
            losses[weight, moment] = method(batch, plan).loss_sum.item()
    assert losses[0.5, None] == losses[0.0, None]
    share_NE = seen[2]  # of the training loss that is balanced
    assert len(share_NE) == plan.weight
    importance_E = share_NE.sum(0)
    unevenness = importance_E.std() / importance_E.mean()
    assert losses[0.5, MOMENT] - losses[0.0, MOMENT] == pytest.approx(0.5 * plan.weight * unevenness.item(), rel=1e-3)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_checkpointing_gives_the_same_bits(precision: Any, target_path: Path, store: LocalFeatureStore) -> None:
    """The second pass finds the casts of the first, and counts no row twice."""
    batch, results = whole_batch(store), []
    for checkpointing in (False, True):
        method = make("eagle3", target_path, store, **EXPERTS, activation_checkpointing=checkpointing)
        backend, plan = FSDPTrainingBackend(method, TrainConfig(precision=precision), World()), method.plan(batch, MOMENT)
        loss_sum = backend(batch, plan).loss_sum
        backend.backward(loss_sum, plan.weight, boundary=True)
        results.append([loss_sum.detach(), *(parameter.grad for parameter in method.parameters())])
    assert all(torch.equal(plain, again) for plain, again in zip(*results, strict=True))


@pytest.mark.parametrize("name", METHODS)
def test_parameters_are_counted(name: str, target_path: Path, store: LocalFeatureStore) -> None:
    """Two layers of 4 experts of 24 for dense ones of 24: hidden size 32."""
    sizes = {"layers": 2, "intermediate_size": 24}
    dense, sparse = (make(name, target_path, store, **sizes, **others) for others in ({}, {"experts": 4}))
    counts = []
    for method in (dense, sparse):
        counted = METHODS[name].load().count_parameters(method.options, TargetTables.read(target_path), method.draft.config.aux_layer_ids)
        assert counted == sum(parameter.numel() for parameter in method.parameters())
        counts.append(counted)
    gate, expert, swiglu = 4 * 32 + 4, 2 * 24 * 32 + 24 + 32, 3 * 24 * 32
    assert counts[1] - counts[0] == 2 * (gate + 4 * expert - swiglu)


@pytest.mark.parametrize("name", METHODS)
def test_a_seed_says_all_of_a_new_draft(name: str, target_path: Path, store: LocalFeatureStore) -> None:
    """Whatever the generator of the process holds. Matrices as wide as their inputs allow, biases 0."""
    first = make(name, target_path, store, **EXPERTS)
    torch.rand(5)
    second = make(name, target_path, store, **EXPERTS)
    assert all(torch.equal(left, right) for left, right in zip(first.parameters(), second.parameters(), strict=True))
    for mixture in mixtures(first):
        assert not any(bias.any() for bias in (mixture.gate.bias, mixture.up_bias_GI, mixture.down_bias_GD))
        assert mixture.up_GID.std().item() == pytest.approx(32**-0.5, rel=0.1)
        assert mixture.down_GID.std().item() == pytest.approx((2 * 24) ** -0.5, rel=0.1)


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_config_json_says_how_many_experts(name: str, target_path: Path, store: LocalFeatureStore, tmp_path: Path) -> None:
    """And where it says nothing, as those of drafts before there were experts, there are none."""
    sparse, dense = make(name, target_path, store, **EXPERTS), make(name, target_path, store)
    shape_type, stored = type(dense.draft.config), dense.config_dict()
    files.write_json(tmp_path / "config.json", {key: value for key, value in stored.items() if not key.startswith("experts")})
    assert shape_type.read(tmp_path) == dense.draft.config
    with pytest.raises(CheckpointError, match=r"experts is 0, this run wants 4"):
        sparse.draft.config.require_in(tmp_path, replace(sparse.draft.config, experts=0))
    files.write_json(tmp_path / "config.json", sparse.config_dict())
    assert shape_type.read(tmp_path).experts == 4


def test_more_picks_than_experts_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"experts_per_token=3: must be at most experts=2"):
        METHODS["dflash"].options(experts=2, experts_per_token=3)
    assert METHODS["eagle3"].options(experts_per_token=3).experts == 0
