"""A folder shared by producers and a trainer: bounded, and the same features whoever dies."""

import os
import signal
import threading
import time
from collections.abc import Generator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from specforge.distributed import World
from specforge.errors import FeatureError
from specforge.features.batch import DraftBatch
from specforge.features.capture import capture_features
from specforge.features.loader import FeatureDataLoader, Window
from specforge.features.producer import Producer
from specforge.features.request import Request
from specforge.features.shared import SharedDirFeatureStore
from specforge.features.span import Span
from specforge.features.span_file import span_path, spans_present
from specforge.features.store import TENSORS, FeatureMeta, LocalFeatureStore, SampleFeatures
from specforge.features.target import Target
from tests.features.shared_folder import processes
from tests.ranks import run_ranks
from tests.tiny import AUX, make_samples

LENGTHS = [14, 9, 21, 5, 17, 12, 30, 6, 25, 11]
META = FeatureMeta(target_path="t", target_fingerprint="f", aux_layer_ids=AUX, dtype="float32", hidden_size=32, vocab_size=64)
BATCH, STEPS, SEED = 4, 8, 1
TOTAL = BATCH * STEPS
AHEAD = 3
ALONE = 1


SETTINGS: dict[str, Any] = {"capture_tokens": ALONE, "ahead": AHEAD, "wait_s": 10}


def producer(folder: Path, target_path: Path, wait_s: float = 30) -> Producer:
    return Producer(folder, make_samples(LENGTHS), META, lambda: Target.load(target_path, "float32"), wait_s=wait_s)


def shared(folder: Path, **settings: Any) -> SharedDirFeatureStore:
    return SharedDirFeatureStore(folder, make_samples(LENGTHS), META, World(), **{**SETTINGS, **settings})


def loader(store: Any, position: int = 0) -> FeatureDataLoader:
    data = FeatureDataLoader(store, SEED, BATCH, 64, TOTAL, World())
    data.seek(position)
    return data


def batches(windows: Any) -> list[DraftBatch]:
    return [batch for window in windows for batch in window.batches]


def assert_same(got: list[DraftBatch], expected: list[DraftBatch]) -> None:
    assert [batch.samples for batch in got] == [batch.samples for batch in expected]
    for one, other in zip(got, expected, strict=True):
        assert all(torch.equal(getattr(one, name), getattr(other, name)) for name in TENSORS)


@pytest.fixture(scope="module")
def offline(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> LocalFeatureStore:
    folder = tmp_path_factory.mktemp("captured") / "offline"
    samples, load = make_samples(LENGTHS), lambda: Target.load(target_path, "float32")
    return capture_features(samples, load, folder, META, World(), capture_tokens=ALONE, shard_bytes=2**14)


def wait_for(condition: Any, timeout_s: float = 20) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def test_two_producers_make_each_span_once_and_no_more_than_allowed(tmp_path: Path, target_path: Path, offline: LocalFeatureStore) -> None:
    folder = tmp_path / "shared"
    most, watching = 0, True

    def watch() -> None:
        nonlocal most
        while watching:
            most = max(most, len(spans_present(folder)))
            time.sleep(0.001)

    def work() -> None:
        (tmp_path / f"made-{os.getpid()}").write_text(str(producer(folder, target_path).run()))

    watcher = threading.Thread(target=watch)
    with processes(2, work) as producers:
        watcher.start()
        got: list[Window] = []
        for window in loader(shared(folder)):
            wait_for(lambda: len(spans_present(folder)) == min(AHEAD, STEPS - len(got)))
            time.sleep(0.0 if got else 1.0)  # a trainer that lags: more would come if they could
            got.append(window)
        for process in producers:
            process.join(20)
        watching = False
        watcher.join()
        assert [process.exitcode for process in producers] == [0, 0]
    assert most == AHEAD
    assert spans_present(folder) == []
    assert sum(int(path.read_text()) for path in tmp_path.glob("made-*")) == STEPS
    assert_same(batches(got), batches(loader(offline)))


def test_a_producer_that_is_late_makes_nothing_twice(tmp_path: Path, target_path: Path) -> None:
    """It read the request before the trainer went on; the span that it misses was made, read and removed meanwhile."""
    store = shared(tmp_path)
    spans = loader(store)._spans
    with store.reading(spans, 0):
        late = Request.read(tmp_path)
        store.release(next(spans.following(0, 1)))
    assert late is not None
    assert producer(tmp_path, target_path).make_one(late)
    assert spans_present(tmp_path) == [BATCH], "the first span that is still wanted"


def test_a_producer_waits_until_the_trainer_made_room(tmp_path: Path, target_path: Path) -> None:
    """A trainer that dies between telling its position and removing what is behind it leaves more than it should."""
    store = shared(tmp_path)
    with store.reading(loader(store)._spans, BATCH):
        request = Request.read(tmp_path)
    assert request is not None
    span_path(tmp_path, 0).write_bytes(b"")
    assert not producer(tmp_path, target_path).make_one(request)
    with store.reading(loader(store)._spans, BATCH):
        assert producer(tmp_path, target_path).make_one(request)
    assert spans_present(tmp_path) == [BATCH]


def test_a_killed_producer_is_replaced(tmp_path: Path, target_path: Path, offline: LocalFeatureStore) -> None:
    """One dies holding a claim, its span half written; one after it made two spans; the third one finishes."""
    folder = tmp_path / "shared"
    partial = folder / f".{span_path(folder, 0).name}.4711-abcd"

    def sleep() -> Target:
        time.sleep(60)
        raise AssertionError("it is killed before")

    def hang() -> None:
        partial.write_bytes(b"half")
        Producer(folder, make_samples(LENGTHS), META, sleep, wait_s=30).run()

    data = iter(loader(shared(folder)))
    first: list[Any] = []
    reader = threading.Thread(target=lambda: first.append(next(data)))
    reader.start()
    wait_for(lambda: (folder / "request.json").exists())
    with processes(1, hang) as hanging:
        wait_for(lambda: (folder / "claim-000000000000.lock").exists())
        os.kill(hanging[0].pid, signal.SIGKILL)
    with processes(1, lambda: producer(folder, target_path).run()) as second:
        wait_for(lambda: len(spans_present(folder)) >= 2)
        os.kill(second[0].pid, signal.SIGKILL)
    with processes(1, lambda: producer(folder, target_path).run()):
        reader.join()
        got = [*first, *data]
    assert not partial.exists()
    assert_same(batches(got), batches(loader(offline)))


class SlowToRead(SharedDirFeatureStore):
    """Reads a span only after rank 0 got it."""

    def take(self, span: Span, numbers: Sequence[int]) -> list[SampleFeatures]:
        if not self._world.is_main:
            wait_for((self.folder / f"got-{span.position}").exists)
        return super().take(span, numbers)


def test_a_slow_rank_still_finds_its_part(tmp_path: Path, target_path: Path, offline: LocalFeatureStore) -> None:
    def read(world: World, store: Any) -> list[str]:
        data = FeatureDataLoader(store or SlowToRead(tmp_path, make_samples(LENGTHS), META, world, **SETTINGS), SEED, BATCH, 64, 12, world)
        seen: list[str] = []
        for number, window in enumerate(data):
            if world.is_main:
                (tmp_path / f"got-{number * BATCH}").touch()
            world.barrier()  # as each step does
            seen += [sample_id for batch in window.batches for sample_id in batch.ids]
        return seen

    with processes(1, lambda: producer(tmp_path, target_path).run()):
        assert run_ranks(read, None, world=2) == run_ranks(read, offline, world=2)


def test_a_killed_trainer_comes_back_at_an_earlier_position(tmp_path: Path, target_path: Path, offline: LocalFeatureStore) -> None:
    folder = tmp_path / "shared"

    def die() -> None:
        for number, _ in enumerate(loader(shared(folder))):
            if number == 5:
                os.kill(os.getpid(), signal.SIGKILL)

    with processes(1, lambda: producer(folder, target_path).run()):
        with processes(1, die) as trainer:
            trainer[0].join()
            assert trainer[0].exitcode == -signal.SIGKILL
        wait_for(lambda: spans_present(folder) == [20, 24, 28])
        got = []
        for window in loader(shared(folder), position=8):
            got.append(window)
            wait_for(lambda: len(spans_present(folder)) == min(AHEAD, STEPS - 1 - len(got)))
    assert_same(batches(got), batches(loader(offline, position=8)))


def test_retained_spans_are_read_again_without_a_producer(tmp_path: Path, target_path: Path, offline: LocalFeatureStore) -> None:
    folder = tmp_path / "shared"
    with processes(1, lambda: producer(folder, target_path).run()):
        first = list(loader(shared(folder, retain_on_release=True)))
    assert spans_present(folder) == list(range(0, TOTAL, BATCH))
    again = list(loader(shared(folder, retain_on_release=True, wait_s=1)))
    assert_same(batches(again), batches(first))
    assert_same(batches(again), batches(loader(offline)))


def test_a_damaged_span_is_made_again(tmp_path: Path, target_path: Path, offline: LocalFeatureStore, capfd: Any) -> None:
    folder = tmp_path / "shared"
    with processes(1, lambda: producer(folder, target_path).run()):
        got = []
        for window in loader(shared(folder)):
            got.append(window)
            if len(got) == 2:
                wait_for(lambda: span_path(folder, 12).exists())
                data = bytearray(span_path(folder, 12).read_bytes())
                data[-200:] = bytes(200)
                span_path(folder, 12).write_bytes(data)
    assert_same(batches(got), batches(loader(offline)))
    assert "span-000000000012" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"target_fingerprint": "g"}, "target_fingerprint: asked for is 'f', this process has 'g'"),
        ({"aux_layer_ids": (1, 2)}, r"aux_layer_ids: asked for is \(1, 2, 3\), this process has \(1, 2\)"),
        ({"dtype": "bfloat16"}, "dtype: asked for is 'float32', this process has 'bfloat16'"),
        ({"template_digest": "x"}, "template_digest"),
        ({"teacher_top_k": 8}, "teacher_top_k: asked for is 0, this process has 8"),
        ({}, "rows: asked for is"),
    ],
)
def test_another_kind_is_refused_on_both_sides(tmp_path: Path, change: dict[str, Any], named: str) -> None:
    folder = tmp_path / "shared"
    store = shared(folder)
    with store.reading(loader(store)._spans, 0):
        pass
    samples, meta = make_samples(LENGTHS, seed=0 if change else 1), replace(META, **change)
    with pytest.raises(FeatureError, match=named):
        Producer(folder, samples, meta, lambda: pytest.fail("no target is loaded"), wait_s=5).run()
    with pytest.raises(FeatureError, match=named):
        SharedDirFeatureStore(folder, samples, meta, World(), **SETTINGS)


def test_another_order_starts_anew(tmp_path: Path, target_path: Path, offline: LocalFeatureStore, capfd: Any) -> None:
    """Spans of another seed have the same names and other content; they are gone before anyone reads them."""
    folder = tmp_path / "shared"

    def of(store: Any) -> FeatureDataLoader:
        return FeatureDataLoader(store, SEED + 1, BATCH, 64, TOTAL, World())

    with processes(1, lambda: producer(folder, target_path).run()):
        next(iter(loader(shared(folder))))
        wait_for(lambda: len(spans_present(folder)) == AHEAD)
        assert_same(batches(of(shared(folder))), batches(of(offline)))
    assert "made again" not in capfd.readouterr().err


def test_excluded_samples_are_not_made(tmp_path: Path, target_path: Path) -> None:
    """They may be excluded because the target chokes on them: this one holds an id beyond the vocabulary."""
    samples = make_samples(LENGTHS)
    samples[7].input_ids[2] = META.vocab_size
    store = SharedDirFeatureStore(tmp_path, samples, META, World(), **SETTINGS)
    data = FeatureDataLoader(store, SEED, BATCH, 64, len(LENGTHS), World(), ["s7"])
    with processes(1, lambda: Producer(tmp_path, samples, META, lambda: Target.load(target_path, "float32"), wait_s=10).run()):
        read = [number for batch in batches(data) for number in batch.samples]
    assert sorted(read) == [0, 1, 2, 3, 4, 5, 6, 8, 9]


def test_a_producer_serves_the_training_that_goes_on_after_an_ended_one(
    tmp_path: Path, target_path: Path, offline: LocalFeatureStore
) -> None:
    """It is started before the longer training is, and must not take the end of the first for its own."""
    store = shared(tmp_path)
    with store.reading(loader(store)._spans, TOTAL):
        pass
    with processes(1, lambda: producer(tmp_path, target_path).run()) as producers:
        time.sleep(0.3)

        def longer(store: Any) -> FeatureDataLoader:
            data = FeatureDataLoader(store, SEED, BATCH, 64, TOTAL + 8, World())
            data.seek(TOTAL)
            return data

        assert_same(batches(longer(shared(tmp_path))), batches(longer(offline)))
        producers[0].join(20)
        assert producers[0].exitcode == 0


def test_two_runs_in_one_folder(tmp_path: Path) -> None:
    first, second = shared(tmp_path), shared(tmp_path)
    spans = loader(first)._spans
    with first.reading(spans, 0), pytest.raises(FeatureError, match="another run reads from it"), second.reading(spans, 0):
        pass


def test_waiting_has_an_end_and_says_what_is_missing(tmp_path: Path, target_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"span-000000000000.safetensors is not there yet; run `specforge produce`.*0.2 s in vain"):
        list(loader(shared(tmp_path / "a", wait_s=0.2)))
    with pytest.raises(FeatureError, match="no training reads from"):
        producer(tmp_path / "b", target_path, wait_s=0.2).run()


def test_a_reader_that_waits_lets_the_training_end(tmp_path: Path, target_path: Path) -> None:
    """Only the first span exists; closing the loader must not wait for the second."""
    folder = tmp_path / "shared"
    with processes(1, lambda: producer(folder, target_path).run()):
        windows = cast(Generator[Window, None, None], iter(loader(shared(folder, ahead=1, wait_s=120))))
        next(windows)
    began_s = time.monotonic()
    windows.close()
    assert time.monotonic() - began_s < 60, "wait_s is 120"
