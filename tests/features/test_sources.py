"""Wherever features come from, the same steps are trained: bit by bit in fp32 where every sample has a forward of its own."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.features import FeatureStore, LocalFeatureStore, MemoryFeatureStore, OnlineFeatureStore
from specforge.features.capture import capture_features, capture_group
from specforge.features.loader import FeatureDataLoader
from specforge.features.producer import Producer
from specforge.features.shared import SharedDirFeatureStore
from specforge.features.span import Spans
from specforge.features.store import FeatureMeta
from specforge.features.target import Target
from specforge.training.backend import FSDPTrainingBackend
from tests.features.shared_folder import processes
from tests.ranks import run_ranks
from tests.tiny import AUX, make_method, make_samples
from tests.training.test_steps import whole

LENGTHS = [14, 9, 21, 5, 17, 12, 30, 6, 25, 11]
BATCH, STEPS, SEED = 4, 6, 3
"""Ten samples in batches of four: the third span crosses the border of two epochs."""
TOTAL = BATCH * STEPS - 1
ALONE = 1
GROUPED = 64


def meta_of(dtype: str = "float32") -> FeatureMeta:
    return FeatureMeta(target_path="t", target_fingerprint="f", aux_layer_ids=AUX, dtype=dtype, hidden_size=32, vocab_size=64)


@contextlib.contextmanager
def opened(kind: str, folder: Path, target_path: Path, world: World, capture_tokens: int, dtype: str = "float32") -> Iterator[FeatureStore]:
    """A store of this kind and what feeds it."""
    samples, meta = make_samples(LENGTHS), meta_of(dtype)
    target = Target.load(target_path, dtype)
    if kind == "offline":
        yield LocalFeatureStore(folder / "offline")
    elif kind == "online":
        yield OnlineFeatureStore(samples, meta, lambda: target, capture_tokens)
    elif kind == "shared":
        yield SharedDirFeatureStore(folder / "shared", samples, meta, world, capture_tokens=capture_tokens, ahead=3, wait_s=30)
    else:
        store = MemoryFeatureStore(samples, meta, limit_bytes=150 * meta.bytes_per_token, wait_s=30)
        feeder = threading.Thread(target=feed, args=(store, target))
        feeder.start()
        yield store
        feeder.join()


def feed(store: MemoryFeatureStore, target: Target) -> None:
    for span in Spans(len(store), SEED, BATCH, TOTAL).following(0, STEPS):
        for number in dict.fromkeys(span.samples):
            store.put(number, capture_group(target, [store.samples[number]], AUX)[0], span.position)


def train(world: World, kind: str, folder: Path, target_path: Path, capture_tokens: int, dtype: str = "float32") -> dict[str, torch.Tensor]:
    """Losses and norms of the gradients of each step, the first gradient, and the parameters at the end."""
    config = TrainConfig(batch_samples=BATCH, learning_rate=1e-2, clip_norm=0.1, micro_batch_tokens=64)
    with opened(kind, folder, target_path, world, capture_tokens, dtype) as store:
        method = make_method(target_path, store, layers=2)
        backend = FSDPTrainingBackend(method, config, world)
        data = FeatureDataLoader(store, SEED, BATCH, config.micro_batch_tokens, TOTAL, world)
        losses, norms = list[torch.Tensor](), list[torch.Tensor]()
        gradients: dict[str, torch.Tensor] = {}
        for window in data:
            plans = [method.plan(batch) for batch in window.batches]
            weight = float(world.sum_(torch.tensor(sum(plan.weight for plan in plans), dtype=torch.float64)))
            for index, (batch, plan) in enumerate(zip(window.batches, plans, strict=True)):
                output = backend(batch, plan)
                backend.backward(output.loss_sum, weight, boundary=index == len(plans) - 1)
                losses.append(output.loss_sum.detach().clone())
            gradients = gradients or {f"gradient of {name}": whole(p.grad) for name, p in method.named_parameters() if p.grad is not None}
            norms.append(backend.clip().detach().clone())
            backend.step(config.learning_rate)
    parameters = {name: whole(p) for name, p in method.named_parameters()}
    return {**parameters, **gradients, "losses": torch.stack(losses), "norms": torch.stack(norms)}


@pytest.fixture(scope="module")
def captured(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> Path:
    """Offline features, every sample captured alone, in both data types."""
    return tmp_path_factory.mktemp("captured")


def capture(folder: Path, target_path: Path, capture_tokens: int, dtype: str = "float32") -> Path:
    if not (folder / "offline").exists():
        capture_features(
            make_samples(LENGTHS), lambda: Target.load(target_path, dtype), folder / "offline", meta_of(dtype), World(),
            capture_tokens=capture_tokens, shard_bytes=2**14,
        )  # fmt: skip
    return folder


def trained(kind: str, folder: Path, target_path: Path, world: int, capture_tokens: int) -> list[dict[str, torch.Tensor]]:
    with processes(1 if kind == "shared" else 0, lambda: produce(folder / "shared", target_path)):
        return run_ranks(train, kind, folder, target_path, capture_tokens, world=world)


def produce(folder: Path, target_path: Path) -> None:
    Producer(folder, make_samples(LENGTHS), meta_of(), lambda: Target.load(target_path, "float32"), wait_s=30).run()


@pytest.mark.parametrize("world", [1, 2])
def test_all_sources_train_the_same_bits(world: int, tmp_path: Path, target_path: Path) -> None:
    capture(tmp_path, target_path, ALONE)
    expected = trained("offline", tmp_path, target_path, world, ALONE)
    assert any(name.startswith("gradient of") for name in expected[0])
    for kind in ("online", "shared", "mem"):
        for rank, result in enumerate(trained(kind, tmp_path, target_path, world, ALONE)):
            assert result.keys() == expected[rank].keys()
            differing = [name for name in result if not torch.equal(result[name], expected[rank][name])]
            assert not differing, f"{kind}, rank {rank}"
