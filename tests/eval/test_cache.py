"""The key is the identity and nothing else; an entry is produced once, whoever asks, dies or damages it."""

import dataclasses
import itertools
import logging
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge import files
from specforge.config.schema import EvalConfig
from specforge.distributed.world import World
from specforge.errors import ConfigError, FeatureError
from specforge.eval import cache as cache_module
from specforge.eval.cache import META, EvalCache
from specforge.features.capture import capture_features
from specforge.features.store import FeatureMeta, LocalFeatureStore
from specforge.features.target import Target
from tests.processes import fork, wait_until
from tests.ranks import run_ranks
from tests.tiny import AUX, make_samples, make_target

BASE = EvalConfig(
    eval_data_path="rows.jsonl", target_path="target", target_revision="r", tokenizer_path="tok", chat_template="t.jinja",
    aux_hidden_state_layer_ids=(2, 4, 5), max_length=64,
)  # fmt: skip


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "rows.jsonl").write_text('{"id": "a"}\n')
    (tmp_path / "data" / "target").mkdir()
    (tmp_path / "data" / "target" / "config.json").write_text("{}")
    return dataclasses.replace(
        BASE,
        eval_data_path=str(tmp_path / "data" / "rows.jsonl"),
        target_path=str(tmp_path / "data" / "target"),
        cache_dir=str(tmp_path / "cache"),
    )


def producer(calls: list[int] | None = None, text: str = "features") -> Callable[[Path], None]:
    def produce(folder: Path) -> None:
        (folder / "shard").write_text(text)
        if calls is not None:
            calls.append(1)

    return produce


@pytest.mark.parametrize(
    "change",
    [
        {"eval_data_path": "other.jsonl"},
        {"target_path": "other"},
        {"target_revision": "s"},
        {"tokenizer_path": "other"},
        {"chat_template": "other.jinja"},
        {"aux_hidden_state_layer_ids": (2, 4)},
        {"max_length": 65},
        {"feature_dtype": "bfloat16"},
        {"mask_options": (("last_turn_only", "True"),)},
    ],
)
def test_every_identity_field_flips_the_key(tmp_path: Path, change: dict[str, Any]) -> None:
    cache = EvalCache(tmp_path)
    assert cache.key(dataclasses.replace(BASE, **change)) != cache.key(BASE)
    assert cache.key(dataclasses.replace(BASE)) == cache.key(BASE)


def test_every_field_of_the_identity_is_tried_above() -> None:
    tried = test_every_identity_field_flips_the_key.pytestmark[0].args[1]
    assert {name for change in tried for name in change} == {*BASE.identity_fields(), "feature_dtype", "mask_options"}


def test_what_only_changes_reading_keeps_the_key(tmp_path: Path) -> None:
    assert EvalCache(tmp_path).key(dataclasses.replace(BASE, micro_batch_tokens=1, cache_dir="x")) == EvalCache(tmp_path / "b").key(BASE)


@pytest.mark.parametrize("separator", ["|", '"', ",", '", "', "\n"])
def test_separators_moved_across_a_border_never_collide(tmp_path: Path, separator: str) -> None:
    names = ["eval_data_path", "target_path", "target_revision", "tokenizer_path", "chat_template"]
    cache = EvalCache(tmp_path)
    for first, second in itertools.pairwise(names):
        left = dataclasses.replace(BASE, **{first: f"a{separator}b", second: "c"})
        right = dataclasses.replace(BASE, **{first: "a", second: f"b{separator}c"})
        assert cache.key(left) != cache.key(right)


def test_format_version_flips_the_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = EvalCache(tmp_path).key(BASE)
    monkeypatch.setattr(cache_module, "CACHE_FORMAT", 99)
    assert EvalCache(tmp_path).key(BASE) != before


@pytest.mark.parametrize("edited", ["rows.jsonl", "target/config.json"])
def test_content_edited_in_place_is_a_miss(tmp_path: Path, config: EvalConfig, edited: str) -> None:
    calls: list[int] = []
    cache = EvalCache.for_config(config)
    first = cache.get_or_produce(config, producer(calls))
    path = tmp_path / "data" / edited
    path.write_text(path.read_text()[::-1])  # the same size
    assert cache.try_get(config) is None
    assert cache.get_or_produce(config, producer(calls)) != first
    assert len(calls) == 2


def test_produced_once_then_found(config: EvalConfig) -> None:
    calls: list[int] = []
    cache = EvalCache.for_config(config)
    assert cache.try_get(config) is None
    entry = cache.get_or_produce(config, producer(calls))
    assert entry == cache.root / cache.key(config) == cache.try_get(config)
    assert EvalCache.for_config(config).get_or_produce(config, producer(calls)) == entry
    assert (entry / "shard").read_text() == "features"
    assert calls == [1]
    meta = files.read_json(entry / META)
    assert meta["key"] == entry.name
    assert meta["identity"]["fields"] == config.identity_fields()
    assert list(meta["files"]) == ["shard"]


def test_invalidated_is_produced_again(config: EvalConfig) -> None:
    calls: list[int] = []
    cache = EvalCache.for_config(config)
    assert cache.invalidate(config) is False
    entry = cache.get_or_produce(config, producer(calls))
    assert cache.invalidate(config) is True
    assert not entry.exists()
    cache.get_or_produce(config, producer(calls))
    assert calls == [1, 1]


def test_racing_processes_produce_once(tmp_path: Path, config: EvalConfig) -> None:
    def produce(folder: Path) -> None:
        with (tmp_path / "calls").open("a") as calls:
            calls.write("x")
        time.sleep(0.3)
        (folder / "shard").write_text("features")

    def ask() -> None:
        entry = EvalCache.for_config(config).get_or_produce(config, produce)
        (tmp_path / f"got-{os.getpid()}").write_text((entry / "shard").read_text())

    for process in [fork(ask) for _ in range(4)]:
        process.join()
    assert (tmp_path / "calls").read_text() == "x"
    assert [path.read_text() for path in tmp_path.glob("got-*")] == ["features"] * 4


def test_killed_producer_is_swept_and_taken_over_from(tmp_path: Path, config: EvalConfig) -> None:
    def hang(folder: Path) -> None:
        (folder / "half").write_text("x")
        time.sleep(60)

    cache = EvalCache.for_config(config)
    process = fork(lambda: EvalCache.for_config(config).get_or_produce(config, hang))
    wait_until(lambda: list(cache.root.glob(".*staging*/half")))
    waiter = fork(lambda: cache.get_or_produce(config, producer()))
    time.sleep(0.1)
    assert cache.try_get(config) is None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    waiter.join()
    assert cache.try_get(config) is not None
    assert not list(cache.root.glob(".*staging*"))


def test_failed_producer_leaves_nothing_visible(config: EvalConfig) -> None:
    def fail(folder: Path) -> None:
        (folder / "half").write_text("x")
        raise KeyError("boom")

    cache = EvalCache.for_config(config)
    with pytest.raises(KeyError):
        cache.get_or_produce(config, fail)
    assert [path for path in cache.root.iterdir() if path.is_dir()] == []
    with pytest.raises(FeatureError, match="wrote nothing"):
        cache.get_or_produce(config, lambda folder: None)
    assert cache.get_or_produce(config, producer()).is_dir()


@pytest.mark.parametrize("harm", ["flip", "truncate", "remove", "meta"])
def test_damaged_entry_is_said_so_and_produced_again(config: EvalConfig, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    calls: list[int] = []
    cache = EvalCache.for_config(config)
    shard = cache.get_or_produce(config, producer(calls)) / "shard"
    if harm == "flip":
        shard.write_text("feAtures")
    elif harm == "truncate":
        shard.write_text("feat")
    elif harm == "remove":
        shard.unlink()
    else:
        (shard.parent / META).write_text("{")
    with caplog.at_level(logging.WARNING):
        cache.get_or_produce(config, producer(calls))
    assert "damaged and will be produced again" in caplog.text
    assert (META if harm == "meta" else "shard") in caplog.text
    assert shard.read_text() == "features"
    assert len(calls) == 2


def test_unchanged_entry_is_not_read_again(config: EvalConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    cache = EvalCache.for_config(config)
    entry = cache.get_or_produce(config, producer())
    os.utime(entry / "shard", (1_000_000_000, 1_000_000_000))  # as if written long ago
    read: list[str] = []
    sha256_file = files.sha256_file

    def counted(path: Path) -> str:
        read.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(files.fingerprints, "sha256_file", counted)
    for _ in range(3):
        assert EvalCache.for_config(config).try_get(config) == entry
    assert read.count("shard") == 1


def test_cache_needs_a_folder() -> None:
    with pytest.raises(ConfigError, match=r"features.cache_dir"):
        EvalCache.for_config(BASE)


def capture_into(folder: Path, target_path: Path, world: World) -> None:
    meta = FeatureMeta(target_path="t", target_fingerprint="f", aux_layer_ids=AUX, dtype="float32", hidden_size=32, vocab_size=64)
    capture_features(
        make_samples([9, 17, 5, 30, 12]), lambda: Target.load(target_path, "float32"), folder / "features", meta, world,
        capture_tokens=32, shard_bytes=40 * meta.bytes_per_token,
    )  # fmt: skip


def test_hit_neither_loads_nor_runs_the_target(tmp_path: Path, config: EvalConfig) -> None:
    target_path = make_target(tmp_path / "model")
    cache = EvalCache.for_config(config)
    before = Target.loads, Target.forwards
    entry = cache.get_or_produce(config, lambda folder: capture_into(folder, target_path, World()))
    produced = Target.loads, Target.forwards
    assert produced[0] == before[0] + 1
    assert produced[1] > before[1]
    assert cache.get_or_produce(config, lambda folder: capture_into(folder, target_path, World())) == entry
    assert (Target.loads, Target.forwards) == produced
    assert len(LocalFeatureStore(entry / "features")) == 5


def test_all_ranks_take_part_in_one_production(tmp_path: Path, config: EvalConfig) -> None:
    target_path = make_target(tmp_path / "model")

    def ask(world: World) -> tuple[str, int, int]:
        loads = Target.loads
        cache = EvalCache.for_config(config)
        entries = [cache.get_or_produce(config, lambda folder: capture_into(folder, target_path, world), world) for _ in range(2)]
        world.barrier()
        return str(entries[1]), Target.loads - loads, len(LocalFeatureStore(entries[0] / "features"))

    entry = str(Path(config.cache_dir) / EvalCache.for_config(config).key(config))
    assert run_ranks(ask) == [(entry, 1, 5)] * 2
    assert sorted(path.name for path in Path(config.cache_dir).iterdir() if path.is_dir()) == [Path(entry).name]


def test_ranks_poll_while_another_job_produces(config: EvalConfig) -> None:
    """The job finds the other's entry after waiting longer than its collectives would."""

    def slowly(folder: Path) -> None:
        time.sleep(1.0)
        (folder / "shard").write_text("theirs")

    cache = EvalCache.for_config(config)
    other = fork(lambda: EvalCache.for_config(config).get_or_produce(config, slowly))
    wait_until(lambda: list(cache.root.glob(".*staging*")))
    texts = run_ranks(lambda world: (cache.get_or_produce(config, producer(text="ours"), world) / "shard").read_text())
    other.join()
    assert texts == ["theirs", "theirs"]


@pytest.mark.parametrize("failing", [0, 1])
def test_rank_that_fails_takes_the_others_along(config: EvalConfig, failing: int) -> None:
    """The other rank reports the cause although it sees a consequence first: the folder it writes to disappears."""

    def ask(world: World) -> str:
        def produce(folder: Path) -> None:
            (folder / f"begun-{world.rank}").touch()
            wait_until((folder / f"begun-{1 - world.rank}").exists)
            if world.rank == failing:
                raise FeatureError("out of memory")
            while failing == 0 and folder.exists():
                pass
            (folder / "shard").write_text("x")

        with pytest.raises(FeatureError) as error:
            EvalCache.for_config(config).get_or_produce(config, produce, world)
        return str(error.value)

    messages = ["out of memory", "out of memory"]
    messages[1 - failing] = f"rank {failing} failed: out of memory"
    assert run_ranks(ask) == messages
    assert EvalCache.for_config(config).try_get(config) is None
