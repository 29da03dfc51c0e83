"""Step parity: the split over ranks, micro-batches and meshes does not change what is learned; collectives are counted."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.distributed.tensor import DTensor

from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.errors import DataError, SpecForgeError
from specforge.features.loader import FeatureDataLoader
from specforge.features.store import LocalFeatureStore
from specforge.training.backend import FSDPTrainingBackend
from tests.ranks import Collectives, run_ranks
from tests.tiny import make_method, make_samples, make_store

STEPS = 3
RANKS_PER_NODE = 2
"""Four ranks are two nodes to the hybrid mesh."""


def whole(tensor: torch.Tensor) -> torch.Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(world: World, target_path: Path, folder: Path, settings: dict[str, Any], scale: float = 1.0) -> dict[str, torch.Tensor]:
    """Parameters after a few clipped steps, and the norms before clipping: AdamW forgives a wrong scale, these do not.

    `scale` is a mutation: it multiplies each rank's loss.
    """
    store = LocalFeatureStore(folder)
    config = TrainConfig(**{"batch_samples": 4, "learning_rate": 1e-2, "clip_norm": 0.1, "micro_batch_tokens": 64, **settings})
    method = make_method(target_path, store, layers=2)
    node = {"local_rank": world.rank % RANKS_PER_NODE, "local_size": min(world.size, RANKS_PER_NODE)}
    backend = FSDPTrainingBackend(method, config, replace(world, **node))
    data = FeatureDataLoader(store, 0, config.batch_samples, config.micro_batch_tokens, STEPS * config.batch_samples, world)
    norms = []
    for window in data:
        plans = [method.plan(batch) for batch in window.batches]
        weight = float(world.sum_(torch.tensor(sum(plan.weight for plan in plans), dtype=torch.float64)))
        for index, (batch, plan) in enumerate(zip(window.batches, plans, strict=True)):
            output = backend(batch, plan)
            factor = plan.weight / weight * world.size if scale != 1.0 else 1.0
            backend.backward(output.loss_sum / factor if factor else output.loss_sum, weight, boundary=index == len(plans) - 1)
        norms.append(backend.clip().detach().clone())
        backend.step(config.learning_rate)
    return {**{name: whole(p) for name, p in method.named_parameters()}, "gradient norms": torch.stack(norms)}


def assert_equal(got: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> None:
    """Norms and the whole vector of parameters agree to 1e-6, relative; AdamW magnifies rounding in single small entries."""
    assert got.keys() == expected.keys()
    names = expected.keys() - {"gradient norms"}
    flat_got, flat_expected = (torch.cat([values[name].flatten() for name in sorted(names)]) for values in (got, expected))
    for left, right in ((flat_got, flat_expected), (got["gradient norms"], expected["gradient norms"])):
        error = (left - right).norm() / right.norm()
        assert error < 1e-6, f"relative error {error:.1e}"


@pytest.mark.parametrize(
    ("world", "settings"),
    [
        (1, {"micro_batch_tokens": 200}),
        (2, {}),
        (2, {"sharding": "replicate"}),
        (2, {"micro_batch_tokens": 40}),
        (4, {}),
        (4, {"sharding": "hybrid"}),
    ],
    ids=str,
)
def test_every_split_learns_the_same(world: int, settings: dict[str, Any], target_path: Path, store: LocalFeatureStore) -> None:
    expected = train(World(), target_path, store.folder, {"micro_batch_tokens": 40})
    for rank_result in run_ranks(train, target_path, store.folder, settings, world=world):
        assert_equal(rank_result, expected)


def test_the_mean_of_rank_means_is_not_the_same(target_path: Path, store: LocalFeatureStore) -> None:
    """Negative control: normalising each micro-batch by its own weight learns something else."""
    expected = train(World(), target_path, store.folder, {})
    mean_of_means = run_ranks(train, target_path, store.folder, {}, 2.0, world=2)[0]
    with pytest.raises(AssertionError):
        assert_equal(mean_of_means, expected)


def test_repeating_a_world_gives_the_same_bits(target_path: Path, store: LocalFeatureStore) -> None:
    first, second = (run_ranks(train, target_path, store.folder, {}, world=2)[0] for _ in range(2))
    assert all(torch.equal(first[name], second[name]) for name in first)


def count_collectives(world: World, target_path: Path, folder: Path) -> list[tuple[int, int]]:
    store = LocalFeatureStore(folder)
    method = make_method(target_path, store)
    backend = FSDPTrainingBackend(method, TrainConfig(), world)
    data = FeatureDataLoader(store, 0, len(store), 48, len(store), world)
    window = next(iter(data))
    assert len(window.batches) >= 2
    counted = []
    for index, batch in enumerate(window.batches):
        with Collectives() as seen:
            output = backend(batch, method.plan(batch))
            backend.backward(output.loss_sum, 1.0, boundary=index == len(window.batches) - 1)
        counted.append((seen.all_gathers, seen.reduce_scatters))
    return counted


def test_gradients_are_reduced_once_a_window(target_path: Path, store: LocalFeatureStore) -> None:
    for counted in run_ranks(count_collectives, target_path, store.folder, world=2):
        assert [scatters for _, scatters in counted] == [0] * (len(counted) - 1) + [1]
        assert [gathers for gathers, _ in counted] == [1] + [0] * (len(counted) - 1)


def step_unreduced(world: World, target_path: Path, folder: Path) -> str:
    store = LocalFeatureStore(folder)
    method = make_method(target_path, store)
    backend = FSDPTrainingBackend(method, TrainConfig(), world)
    batch = next(iter(FeatureDataLoader(store, 0, 4, 200, 4, world))).batches[0]
    backend.backward(backend(batch, method.plan(batch)).loss_sum, 1.0, boundary=False)
    try:
        backend.clip()
    except SpecForgeError as error:
        return str(error)
    return "no error"


def test_an_unreduced_window_cannot_step(target_path: Path, store: LocalFeatureStore) -> None:
    assert all("unreduced" in message for message in run_ranks(step_unreduced, target_path, store.folder, world=2))


def test_world_one_accumulates_without_reduction(target_path: Path, store: LocalFeatureStore) -> None:
    """At world size 1 the micro-steps before the boundary count, and a step changes every parameter."""
    one = train(World(), target_path, store.folder, {"micro_batch_tokens": 40})
    large = train(World(), target_path, store.folder, {"micro_batch_tokens": 400})
    assert_equal(one, large)
    start = dict(make_method(target_path, store, layers=2).named_parameters())
    assert all(not torch.equal(one[name], start[name]) for name in start)


def first_step_in(precision: str, world: World, target_path: Path, folder: Path) -> tuple[set[torch.dtype], set[torch.dtype], float]:
    """Data types that are stored and computed in, and the loss sum of the first window, all after one optimiser step."""
    store = LocalFeatureStore(folder)
    method = make_method(target_path, store)
    config = TrainConfig(precision=precision)
    backend = FSDPTrainingBackend(method, config, world)
    computed: set[torch.dtype] = set()
    method.draft.fc.register_forward_hook(lambda module, args, output: computed.add(output.dtype))
    window = next(iter(FeatureDataLoader(store, 0, 8, 64, 8, world)))
    loss = torch.zeros(())
    for index, batch in enumerate(window.batches):
        output = backend(batch, method.plan(batch))
        backend.backward(output.loss_sum, 50.0, boundary=index == len(window.batches) - 1)
        loss += output.loss_sum.detach()
    backend.clip()
    backend.step(config.learning_rate)
    stored = {t.dtype for t in [*backend.trainable.values(), *backend.optimizer_state().values()]}
    return stored, computed, world.sum_(loss).item()


@pytest.mark.parametrize("world", [1, 2])
def test_bf16_computes_in_bf16_and_keeps_fp32(world: int, target_path: Path, store: LocalFeatureStore) -> None:
    _, plainly_computed, plain_loss = first_step_in("float32", World(), target_path, store.folder)
    assert plainly_computed == {torch.float32}
    step = partial(first_step_in, "bfloat16")
    for stored, computed, loss in run_ranks(step, target_path, store.folder, world=world):
        assert stored == {torch.float32}
        assert computed == {torch.bfloat16}
        assert loss == pytest.approx(plain_loss, rel=1e-2)
        assert loss != plain_loss


def test_fewer_samples_than_ranks_is_refused(tmp_path: Path, target_path: Path) -> None:
    small = make_store(tmp_path / "store", target_path, make_samples([9]))
    with pytest.raises(DataError, match="1 training samples for 2 ranks"):
        FeatureDataLoader(small, 0, 4, 64, 4, World(rank=0, size=2))


def test_seek_reads_nothing_and_continues_the_order(store: LocalFeatureStore, monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows after a seek are those of the uninterrupted order, the last one smaller; before them no feature is read."""
    read: list[int] = []
    original = LocalFeatureStore.read

    def recording(self: LocalFeatureStore, number: int) -> Any:
        read.append(number)
        return original(self, number)

    monkeypatch.setattr(LocalFeatureStore, "read", recording)
    whole = [(w.samples, sorted(s for b in w.batches for s in b.samples)) for w in FeatureDataLoader(store, 0, 4, 64, 23, World())]
    assert [count for count, _ in whole] == [4, 4, 4, 4, 4, 3]
    read.clear()
    data = FeatureDataLoader(store, 0, 4, 64, 23, World())
    data.seek(16)
    assert read == []
    rest = [(w.samples, sorted(s for b in w.batches for s in b.samples)) for w in data]
    assert rest == whole[4:]
    assert len(read) == 7
