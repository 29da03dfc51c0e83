"""Capture gives the same features at any world size, goes on after a kill, and publishes all or nothing."""

import multiprocessing
import os
import signal
import time
import unittest.mock
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from specforge import files
from specforge.distributed.world import World
from specforge.errors import FeatureError
from specforge.features import capture
from specforge.features.capture import capture_features, forwards, plan_shards
from specforge.features.store import TENSORS, FeatureMeta, LocalFeatureStore
from specforge.features.target import Target
from tests.ranks import run_ranks
from tests.tiny import AUX, make_samples, make_target

LENGTHS = [7, 30, 3, 18, 25, 4, 9, 31, 12, 6, 22, 15]
TOKENS = 32
META = FeatureMeta(target_path="t", target_fingerprint="f", aux_layer_ids=AUX, dtype="float32", hidden_size=32, vocab_size=64)


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def run(folder: Path, target_path: Path, world: World | None = None, samples: list[SimpleNamespace] | None = None, shard_tokens: int = 50):
    return capture_features(
        samples or make_samples(LENGTHS), lambda: Target.load(target_path, "float32"), folder, META, world or World(),
        capture_tokens=TOKENS, shard_bytes=shard_tokens * META.bytes_per_token,
    )  # fmt: skip


def assert_equal(one: LocalFeatureStore, other: LocalFeatureStore) -> None:
    assert one.ids == other.ids
    for number in range(len(one)):
        assert all(torch.equal(getattr(one.read(number), name), getattr(other.read(number), name)) for name in TENSORS)


def kill_in_the_middle(folder: Path, target_path: Path, shards_done: int) -> None:
    """Run a capture in a process of its own and SIGKILL it once so many shards are on the disk."""

    def work() -> None:
        torch.set_num_threads(1)
        original = capture.capture_group

        def slow(*args: Any) -> Any:
            time.sleep(0.05)
            return original(*args)

        with unittest.mock.patch.object(capture, "capture_group", slow):
            run(folder, target_path)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    deadline = time.monotonic() + 20
    while len(list(folder.with_name(f".{folder.name}.capture").glob("features-*.json"))) < shards_done:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()


def test_plan_covers_the_samples_in_order() -> None:
    shards = plan_shards(LENGTHS, 10, TOKENS, 500)
    assert [number for shard in shards for number in shard] == list(range(len(LENGTHS)))
    assert all(sum(LENGTHS[i] for i in shard) <= 50 for shard in shards)
    assert [list(shard) for shard in plan_shards([90, 10, 20], 10, TOKENS, 500)] == [[0], [1, 2]]
    assert plan_shards([], 10, TOKENS, 500) == []


def test_forwards_hold_like_lengths_within_the_budget() -> None:
    groups = list(forwards(range(len(LENGTHS)), LENGTHS, TOKENS))
    assert sorted(number for group in groups for number in group) == list(range(len(LENGTHS)))
    padded = [len(group) * max(LENGTHS[i] for i in group) for group in groups]
    assert max(padded) <= TOKENS
    assert sum(padded) < 1.2 * sum(LENGTHS)
    assert list(forwards(range(1), [90], TOKENS)) == [[0]]


def test_features_are_those_of_each_sample_alone(tmp_path: Path, target_path: Path) -> None:
    samples = make_samples(LENGTHS)
    for sample in samples:
        sample.input_ids.flags.writeable = False
    store = run(tmp_path / "store", target_path, samples=samples)
    store.verify()
    target = Target.load(target_path, "float32")
    assert store.ids == [sample.id for sample in samples]
    for number, sample in enumerate(samples):
        features, alone = store.read(number), target.capture([sample.input_ids], AUX)[0]
        assert features.input_ids.tolist() == sample.input_ids.tolist()
        assert features.loss_mask.tolist() == sample.loss_mask.tolist()
        torch.testing.assert_close(features.aux, alone["aux"], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(features.logsumexp, alone["logsumexp"], atol=1e-5, rtol=1e-5)
    assert sorted(path.name for path in store.folder.iterdir() if path.suffix == ".json") == ["index.json", "manifest.json"]
    assert [path.name for path in tmp_path.iterdir()] == ["store"]


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_change_nothing(tmp_path: Path, target_path: Path, size: int) -> None:
    def work(world: World) -> tuple[int, int]:
        store = run(tmp_path / "several", target_path, world)
        return len(store), Target.forwards

    counts = run_ranks(work, world=size)
    alone = run_ranks(lambda world: (len(run(tmp_path / "alone", target_path, world)), Target.forwards), world=1)
    assert_equal(LocalFeatureStore(tmp_path / "several"), LocalFeatureStore(tmp_path / "alone"))
    work_done = [forwards - Target.forwards for _, forwards in counts]
    assert sum(work_done) == alone[0][1] - Target.forwards
    assert min(work_done) > 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["alone", "several"]


@pytest.mark.parametrize("size", [1, 2])
def test_killed_capture_goes_on_at_any_world_size(tmp_path: Path, target_path: Path, size: int) -> None:
    kill_in_the_middle(tmp_path / "store", target_path, shards_done=2)
    assert not (tmp_path / "store").exists()
    work_folder = tmp_path / ".store.capture"
    finished = {
        path.name: path.stat().st_mtime_ns for path in work_folder.glob("*.safetensors") if (work_folder / f"{path.name}.json").exists()
    }
    assert len(finished) >= 2
    run_ranks(lambda world: len(run(tmp_path / "store", target_path, world)), world=size)
    assert {name: (tmp_path / "store" / name).stat().st_mtime_ns for name in finished} == finished
    run(tmp_path / "alone", target_path)
    assert_equal(LocalFeatureStore(tmp_path / "store"), LocalFeatureStore(tmp_path / "alone"))


def test_damaged_shard_is_captured_again(tmp_path: Path, target_path: Path) -> None:
    kill_in_the_middle(tmp_path / "store", target_path, shards_done=2)
    shard = tmp_path / ".store.capture" / "features-00000.safetensors"
    data = bytearray(shard.read_bytes())
    data[-1] ^= 1
    shard.write_bytes(data)
    store = run(tmp_path / "store", target_path)
    run(tmp_path / "alone", target_path)
    assert_equal(store, LocalFeatureStore(tmp_path / "alone"))


def test_shards_of_other_settings_are_not_mixed_in(tmp_path: Path, target_path: Path) -> None:
    kill_in_the_middle(tmp_path / "store", target_path, shards_done=1)
    with pytest.raises(FeatureError, match=r"other settings \(shard_bytes\).*remove that folder"):
        run(tmp_path / "store", target_path, shard_tokens=60)
    with pytest.raises(FeatureError, match=r"other settings \(samples\)"):
        run(tmp_path / "store", target_path, samples=make_samples(LENGTHS, seed=1))


def test_nothing_is_published_where_a_feature_is_not_finite(tmp_path: Path, target_path: Path) -> None:
    def load_with_nan() -> Target:
        target = Target.load(target_path, "float32")
        with torch.no_grad():
            target.model.get_input_embeddings().weight[63] = torch.nan
        return target

    samples = make_samples(LENGTHS)
    for sample in samples:
        sample.input_ids[sample.input_ids == 63] = 4
    samples[7].input_ids[-1] = 63
    with pytest.raises(FeatureError, match=r"sample 's7'.*NaN"):
        capture_features(samples, load_with_nan, tmp_path / "store", META, World(), capture_tokens=TOKENS, shard_bytes=10_000)
    assert not (tmp_path / "store").exists()


def test_failure_of_one_rank_reaches_the_others(tmp_path: Path, target_path: Path) -> None:
    def work(world: World) -> str:
        def load() -> Target:
            if world.rank == 1:
                raise FeatureError("no memory left")
            return Target.load(target_path, "float32")

        samples = make_samples(LENGTHS)
        try:
            capture_features(samples, load, tmp_path / "store", META, world, capture_tokens=TOKENS, shard_bytes=50 * META.bytes_per_token)
        except FeatureError as error:
            return str(error)
        return ""

    assert run_ranks(work) == ["rank 1 failed: no memory left", "no memory left"]
    assert not (tmp_path / "store").exists()


def test_full_disk_is_foreseen(tmp_path: Path, target_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def refuse(path: Path, needed_bytes: int, purpose: str, error: type[FeatureError]) -> None:
        asked.append(needed_bytes)
        raise error("disk full")

    monkeypatch.setattr(files, "require_free", refuse)
    loads = Target.loads
    with pytest.raises(FeatureError, match="disk full"):
        run(tmp_path / "store", target_path)
    assert asked == [sum(LENGTHS) * META.bytes_per_token]
    assert Target.loads == loads
    assert not list((tmp_path / ".store.capture").glob("*.safetensors"))


def test_estimate_is_what_a_shard_takes(tmp_path: Path, target_path: Path) -> None:
    store = run(tmp_path / "store", target_path, shard_tokens=10_000)
    written = sum(path.stat().st_size for path in store.folder.glob("*.safetensors"))
    estimate = sum(LENGTHS) * META.bytes_per_token
    assert estimate <= written <= estimate + 1024


def test_misdeclared_features_and_repeated_ids_are_refused(tmp_path: Path, target_path: Path) -> None:
    samples = make_samples(LENGTHS)
    with pytest.raises(FeatureError, match="declared as"):
        capture_features(
            samples,
            lambda: Target.load(target_path, "bfloat16"),
            tmp_path / "store",
            META,
            World(),
            capture_tokens=TOKENS,
            shard_bytes=9_999,
        )
    samples[3].id = samples[1].id
    with pytest.raises(FeatureError, match=r"sample id 's1': occurs more than once"):
        run(tmp_path / "other", target_path, samples=samples)


def test_existing_store_and_rival_job_are_respected(tmp_path: Path, target_path: Path) -> None:
    run(tmp_path / "store", target_path)
    with pytest.raises(FeatureError, match="exists already"):
        run(tmp_path / "store", target_path)
    with files.Lock(tmp_path / ".other.capture.lock"), pytest.raises(FeatureError, match="another job"):
        run(tmp_path / "other", target_path)
    run(tmp_path / "other", target_path)


def test_shards_do_not_depend_on_the_world() -> None:
    lengths = np.random.default_rng(0).integers(10, 400, 4000).tolist()
    shards = plan_shards(lengths, 1000, 2048, 2**40)
    assert 48 <= len(shards) <= 70  # enough for many ranks although one shard would hold everything
    assert capture._SHARDS_WANTED == 64
