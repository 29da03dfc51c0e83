"""Wherever features come from, the same steps are trained: bit by bit in fp32 where every sample has a forward of its own."""

import contextlib
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge.cli.__main__ import main
from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.errors import FeatureError
from specforge.features import ConsumedError, FeatureStore, LocalFeatureStore, MemoryFeatureStore, OnlineFeatureStore, open_store
from specforge.features.capture import capture_features, capture_group, capture_samples
from specforge.features.loader import FeatureDataLoader
from specforge.features.producer import Producer
from specforge.features.shared import SharedDirFeatureStore
from specforge.features.span import Span, Spans
from specforge.features.store import TENSORS, FeatureMeta
from specforge.features.target import Target
from specforge.features.uri import offer
from specforge.log.run_log import read_metrics
from specforge.training.backend import FSDPTrainingBackend
from tests.features.shared_folder import processes
from tests.ranks import run_ranks
from tests.texts import make_text_target, write_rows
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
    """A store of this kind, and what feeds it."""
    samples, meta, target = make_samples(LENGTHS), meta_of(dtype), Target.load(target_path, dtype)
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
            store.put(number, capture_group(target, [store.samples[number]], store.meta)[0], span.position)


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


def trained(
    kind: str, folder: Path, target_path: Path, world: int = 1, capture_tokens: int = ALONE, dtype: str = "float32"
) -> list[dict[str, torch.Tensor]]:
    with processes(1 if kind == "shared" else 0, lambda: produce(folder / "shared", target_path)):
        return run_ranks(train, kind, folder, target_path, capture_tokens, dtype, world=world)


def produce(folder: Path, target_path: Path) -> None:
    Producer(folder, make_samples(LENGTHS), meta_of(), lambda: Target.load(target_path, "float32"), wait_s=30).run()


def capture_alone(folder: Path, target_path: Path, dtype: str = "float32") -> None:
    capture_features(
        make_samples(LENGTHS), lambda: Target.load(target_path, dtype), folder / "offline", meta_of(dtype), World(),
        capture_tokens=ALONE, shard_bytes=2**14,
    )  # fmt: skip


def differing(result: dict[str, torch.Tensor], expected: dict[str, torch.Tensor]) -> list[str]:
    assert result.keys() == expected.keys()
    return [name for name in result if not torch.equal(result[name], expected[name])]


@pytest.mark.parametrize("world", [1, 2])
def test_all_sources_train_the_same_bits(world: int, tmp_path: Path, target_path: Path) -> None:
    capture_alone(tmp_path, target_path)
    expected = trained("offline", tmp_path, target_path, world)
    assert any(name.startswith("gradient of") for name in expected[0])
    for kind in ("online", "shared", "mem"):
        for rank, result in enumerate(trained(kind, tmp_path, target_path, world)):
            assert not differing(result, expected[rank]), f"{kind}, rank {rank}"


def test_sources_train_the_same_bits_from_bf16_features(tmp_path: Path, target_path: Path) -> None:
    """Features are rounded once, by the target; so bf16 changes nothing as long as a sample has a forward of its own."""
    capture_alone(tmp_path, target_path, "bfloat16")
    expected, result = (trained(kind, tmp_path, target_path, dtype="bfloat16")[0] for kind in ("offline", "online"))
    assert not differing(result, expected)


def test_samples_that_share_a_forward_differ_by_rounding(tmp_path: Path, target_path: Path) -> None:
    """Negative control of the tests above, and the size of what `features.capture_tokens=1` removes."""
    capture_alone(tmp_path, target_path)
    expected, grouped = trained("offline", tmp_path, target_path)[0], trained("online", tmp_path, target_path, capture_tokens=GROUPED)[0]
    assert "losses" in differing(grouped, expected)
    assert ((grouped["losses"] - expected["losses"]).abs() / expected["losses"]).max() < 1e-5


def test_bf16_features_of_shared_forwards_stay_within_their_roundings(target_path: Path) -> None:
    """The residual stream is rounded to bf16 twice a layer. Another order of summation can move each rounding by one spacing,
    2^-7 of the number at most; after L layers that is 2 L 2^-7 of the largest number, to first order."""
    target, samples = Target.load(target_path, "bfloat16"), make_samples(LENGTHS)
    numbers, bound = range(len(samples)), 2 * target.num_layers * 2**-7
    alone, grouped = (capture_samples(target, samples, numbers, tokens, meta_of("bfloat16")) for tokens in (ALONE, GROUPED))

    def distance(one: torch.Tensor, other: torch.Tensor) -> float:
        return float((one.float() - other.float()).abs().max() / other.float().abs().max())

    for number in numbers:
        for name in ("aux", "last"):
            expected, got = getattr(alone[number], name), getattr(grouped[number], name)
            assert distance(got, expected) < bound
            assert distance(expected.roll(1, 0), expected) > bound, "a feature of another token is farther away"


@pytest.mark.gpu
def test_a_stream_of_its_own_changes_nothing_on_a_gpu(target_path: Path) -> None:
    target, samples, numbers = Target.load(target_path, "float32", "cuda"), make_samples(LENGTHS), range(len(LENGTHS))
    store = OnlineFeatureStore(samples, meta_of(), lambda: target, ALONE)
    spans = Spans(len(store), SEED, len(store), len(store))
    with store.reading(spans, 0):
        taken = store.take(next(spans.following(0, 1)), numbers)
    expected = capture_samples(target, samples, numbers, ALONE, meta_of())
    assert all(torch.equal(getattr(taken[number], name), getattr(expected[number], name)) for number in numbers for name in TENSORS)


def memory(limit_tokens: int = 100, wait_s: float = 0.1) -> MemoryFeatureStore:
    return MemoryFeatureStore(make_samples(LENGTHS), meta_of(), limit_bytes=limit_tokens * meta_of().bytes_per_token, wait_s=wait_s)


def test_memory_gives_each_sample_once(target_path: Path) -> None:
    store = memory()
    features = capture_samples(Target.load(target_path, "float32"), store.samples, [0, 1], ALONE, store.meta)
    assert open_store(offer("run", store)) is store
    for number in (0, 1):
        store.put(number, features[number])
    assert store.resident_bytes == (14 + 9) * store.meta.bytes_per_token
    assert store.read(1) is features[1]
    with pytest.raises(ConsumedError, match=r"sample 's1': was read already.*features.retain=true"):
        store.read(1)
    with pytest.raises(FeatureError, match="was put already"):
        store.put(1, features[1])
    store.release(Span(0, 2, (0, 1)))
    assert store.resident_bytes == 0, "what other ranks read is freed too"
    with pytest.raises(ConsumedError):
        store.read(0)
    store.put(1, features[1], position=2)
    assert store.read(1, position=2) is features[1]


def test_memory_is_bounded(target_path: Path) -> None:
    store = memory(limit_tokens=20)
    features = capture_samples(Target.load(target_path, "float32"), store.samples, [0, 1], ALONE, store.meta)
    store.put(0, features[0])
    with pytest.raises(FeatureError, match=r"limit_bytes=\d+: no room for sample 's1'"):
        store.put(1, features[1])
    with pytest.raises(FeatureError, match="nobody put it"):
        store.read(1)
    store.read(0)
    store.put(1, features[1])


def test_stores_by_address(tmp_path: Path, target_path: Path) -> None:
    capture_alone(tmp_path, target_path)
    store = open_store(f"file://{tmp_path / 'offline'}")
    assert torch.equal(store.read(3).aux, store.read(3).aux), "a store on disk can be read again"
    for wrong in ("mem://nobody", "s3://bucket", str(tmp_path)):
        with pytest.raises(FeatureError, match=r"must be file://PATH or an offered mem://NAME"):
            open_store(wrong)


def test_the_setting_chooses_the_source(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A run of the command line on `online` features: the losses of the run on stored ones, and no features on the disk."""
    make_text_target(tmp_path / "target")
    words = [
        f"model.target_path={tmp_path / 'target'}", f"data.train_path={write_rows(tmp_path / 'rows.jsonl', 16)}",
        f"data.eval_path={write_rows(tmp_path / 'heldout.jsonl', 4)}", "data.max_length=64", "train.micro_batch_tokens=128",
        "train.batch_samples=4", "train.steps=5", "train.log_every=1", "eval.bootstrap=0", "features.capture_tokens=1",
    ]  # fmt: skip
    (tmp_path / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 2, draft_vocab_size: 100}}\n")
    losses = {}
    for source in ("offline", "online"):
        run = tmp_path / source
        assert main(["train", str(tmp_path / "c.yaml"), *words, f"output_dir={run}", f"features.source={source}"]) == 0
        losses[source] = [line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line]
        assert (run / "features" / "train").exists() == (source == "offline")
    assert len(losses["online"]) == 5
    assert losses["online"] == losses["offline"]
    assert main(["produce", str(tmp_path / "c.yaml"), *words, f"output_dir={tmp_path}"]) == 2
    assert "features.source='offline': only features of source 'shared'" in capsys.readouterr().err
