"""Many processes and several jobs want one entry at once; some are killed, some entries are damaged, the disk is full."""

import contextlib
import ctypes
import os
import resource
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from specforge import files
from specforge.config.schema import EvalConfig
from specforge.distributed.world import World
from specforge.errors import FeatureError, SpecForgeError
from specforge.eval.cache import META, EvalCache
from specforge.features.rendezvous import Rendezvous
from tests.processes import PATIENCE_S, fork, wait_until
from tests.ranks import Collectives, run_ranks, start_ranks

_NEW_MOUNTS = 0x20000


@pytest.fixture
def config(tmp_path: Path) -> EvalConfig:
    (tmp_path / "rows.jsonl").write_text('{"id": "a"}\n')
    return EvalConfig(eval_data_path=str(tmp_path / "rows.jsonl"), cache_dir=str(tmp_path / "cache"))


def join(processes: list[BaseProcess]) -> None:
    """All end by themselves, and well."""
    deadline = time.monotonic() + PATIENCE_S
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    hanging = [process for process in processes if process.exitcode is None]
    for process in hanging:
        process.kill()
    assert not hanging
    assert {process.exitcode for process in processes} == {0}


def kill(*processes: BaseProcess) -> None:
    for process in processes:
        process.kill()
        process.join()


@contextlib.contextmanager
def killed_at_the_end(processes: list[BaseProcess]) -> Iterator[None]:
    try:
        yield
    finally:
        kill(*processes)


def produce_slowly(calls: Path, name: str = "shard", seconds: float = 0.2) -> Callable[[Path], None]:
    """Leaves one letter in `calls` for each time that it is called."""

    def produce(folder: Path) -> None:
        with calls.open("a") as file:
            file.write("x")
        time.sleep(seconds)
        (folder / name).write_text("features")

    return produce


def half_then_wait(folder: Path) -> None:
    (folder / f"half-{os.getpid()}").write_text("x")
    time.sleep(60)


def halves(config: EvalConfig) -> list[Path]:
    return list(Path(config.cache_dir).glob(".*staging*/half-*"))


def hidden_folders(config: EvalConfig) -> list[str]:
    return [path.name for path in Path(config.cache_dir).glob(".*staging*")]


def ask_as_ranks(config: EvalConfig, produce: Callable[[Path], object]) -> Callable[[World], str]:
    return lambda world: str(EvalCache.for_config(config).get_or_produce(config, produce, world))


def errors_of(folder: Path) -> dict[int, str]:
    return {int(path.name.removeprefix("error-")): path.read_text() for path in folder.glob("error-*")}


# -- who produces ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damaged", [False, True], ids=["absent", "damaged"])
def test_sixty_four_processes_produce_once(tmp_path: Path, config: EvalConfig, damaged: bool) -> None:
    """Also where an entry is there and each of the many finds it damaged."""
    if damaged:
        (EvalCache.for_config(config).get_or_produce(config, produce_slowly(tmp_path / "before")) / "shard").write_text("feAtures")

    def ask() -> None:
        wait_until((tmp_path / "go").exists)
        entry = EvalCache.for_config(config).get_or_produce(config, produce_slowly(tmp_path / "calls"))
        (tmp_path / f"got-{os.getpid()}").write_text(f"{entry} {(entry / 'shard').read_text()}")

    processes = [fork(ask) for _ in range(64)]
    (tmp_path / "go").touch()
    join(processes)
    entry = EvalCache.for_config(config).try_get(config)
    assert (tmp_path / "calls").read_text() == "x"
    assert [path.read_text() for path in tmp_path.glob("got-*")] == [f"{entry} features"] * 64
    assert hidden_folders(config) == []


def test_three_jobs_produce_once(tmp_path: Path, config: EvalConfig) -> None:
    def job(number: int) -> None:
        def produce(folder: Path, world: World) -> None:
            produce_slowly(tmp_path / f"calls-{number}", f"shard-{world.rank}")(folder)

        def ask(world: World) -> str:
            return str(EvalCache.for_config(config).get_or_produce(config, lambda folder: produce(folder, world), world))

        (tmp_path / f"got-{number}").write_text(" ".join(run_ranks(ask)))

    join([fork(lambda number=number: job(number)) for number in range(3)])  # type: ignore[misc]
    entry = EvalCache.for_config(config).try_get(config)
    assert entry is not None
    assert [path.read_text() for path in tmp_path.glob("got-*")] == [f"{entry} {entry}"] * 3
    assert [path.read_text() for path in tmp_path.glob("calls-*")] == ["xx"]  # both ranks of one job
    assert sorted(path.name for path in entry.iterdir()) == [META, "shard-0", "shard-1"]
    assert [path.name for path in Path(config.cache_dir).iterdir() if path.is_dir()] == [entry.name]  # no meeting is left


def test_no_collective_while_another_job_produces(tmp_path: Path, config: EvalConfig) -> None:
    """The job that waits for another one's lock issues the collectives of entering a meeting, and none else."""

    def count(world: World) -> tuple[int, int, float]:
        with Collectives() as entering, Rendezvous(tmp_path / "meetings", world):
            pass
        began = time.monotonic()
        with Collectives() as asking:
            EvalCache.for_config(config).get_or_produce(config, produce_slowly(tmp_path / "ours"), world)
        return entering.total, asking.total, time.monotonic() - began

    other = fork(lambda: EvalCache.for_config(config).get_or_produce(config, produce_slowly(tmp_path / "theirs", seconds=2.5)))
    wait_until((tmp_path / "theirs").exists)
    for entering, asking, waited_s in run_ranks(count):
        assert entering == asking > 0
        assert waited_s > 0.5
    join([other])
    assert not (tmp_path / "ours").exists()


# -- who is killed -----------------------------------------------------------------------------------------------------


def take_over(tmp_path: Path, config: EvalConfig) -> None:
    """The next one finds the lock free, sweeps, and produces once."""
    join([fork(lambda: EvalCache.for_config(config).get_or_produce(config, produce_slowly(tmp_path / "calls"))) for _ in range(3)])
    assert (tmp_path / "calls").read_text() == "x"
    assert EvalCache.for_config(config).try_get(config) is not None
    assert hidden_folders(config) == []


def test_killed_while_others_wait(tmp_path: Path, config: EvalConfig) -> None:
    producer = fork(lambda: EvalCache.for_config(config).get_or_produce(config, half_then_wait))
    wait_until(lambda: halves(config))
    waiting = [fork(lambda: EvalCache.for_config(config).get_or_produce(config, produce_slowly(tmp_path / "calls"))) for _ in range(3)]
    time.sleep(0.1)
    kill(producer)
    join(waiting)
    assert (tmp_path / "calls").read_text() == "x"
    assert hidden_folders(config) == []


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_rank_is_noticed_by_its_peer(tmp_path: Path, config: EvalConfig, victim: int) -> None:
    """The peer has done its share and waits. Nobody tells it; the lock that the kernel released does."""

    def ask(world: World) -> str:
        produce = half_then_wait if world.rank == victim else produce_slowly(tmp_path / "survivor")
        return str(EvalCache.for_config(config).get_or_produce(config, produce, world))

    ranks = start_ranks(ask, world=2, folder=tmp_path)
    with killed_at_the_end(ranks):
        wait_until(lambda: halves(config) and (tmp_path / "survivor").exists())
        kill(ranks[victim])
        ranks[1 - victim].join(PATIENCE_S)
        assert f"FeatureError: rank {victim} of this job ended without a word" in errors_of(tmp_path)[1 - victim]
    take_over(tmp_path, config)


def test_killed_job_is_taken_over_from(tmp_path: Path, config: EvalConfig) -> None:
    ranks = start_ranks(ask_as_ranks(config, half_then_wait), world=2, folder=tmp_path)
    with killed_at_the_end(ranks):
        wait_until(lambda: len(halves(config)) == 2)
    take_over(tmp_path, config)


def test_rank_that_outlives_its_job_does_not_disturb(tmp_path: Path, config: EvalConfig) -> None:
    """Rank 0 is killed; rank 1 still writes as fast as it can into the folder that the next producer sweeps."""

    def write_on(folder: Path) -> None:
        (folder / "half-").touch()
        for number in range(10**9):
            (folder / f"late-{number}").touch()

    def ask(world: World) -> None:
        EvalCache.for_config(config).get_or_produce(config, half_then_wait if world.is_main else write_on, world)

    ranks = start_ranks(ask, world=2, folder=tmp_path)
    with killed_at_the_end(ranks):
        wait_until(lambda: len(halves(config)) == 2)
        kill(ranks[0])
        take_over(tmp_path, config)
        ranks[1].join(PATIENCE_S)
        assert list(errors_of(tmp_path)) == [1]


def test_ranks_stop_waiting_when_their_launcher_is_killed(tmp_path: Path, config: EvalConfig) -> None:
    holder = fork(lambda: EvalCache.for_config(config).get_or_produce(config, half_then_wait))
    wait_until(lambda: halves(config))

    def launch() -> None:
        start_ranks(ask_as_ranks(config, half_then_wait), world=2, folder=tmp_path)
        time.sleep(60)

    launcher = fork(launch)
    with killed_at_the_end([holder, launcher]):
        wait_until(lambda: len(list(Path(config.cache_dir).glob(".meeting-*/alive.*"))) == 2)
        time.sleep(0.1)
        kill(launcher)
        wait_until(lambda: sum("the launcher of this job is gone" in text for text in errors_of(tmp_path).values()) == 2)


@pytest.mark.parametrize("failing", [0, 1])
def test_failure_in_a_meeting_within_the_staging_folder(config: EvalConfig, failing: int) -> None:
    """Rank 0 removes the staging folder, and with it the inner meeting where the other rank waits."""

    def ask(world: World) -> str:
        def produce(folder: Path) -> None:
            with Rendezvous(folder, world) as inner:
                if world.rank == failing:
                    raise FeatureError("out of memory")
                inner.meet("never")

        with pytest.raises(FeatureError) as error:
            EvalCache.for_config(config).get_or_produce(config, produce, world)
        return str(error.value)

    for _ in range(5):
        assert all("out of memory" in message for message in run_ranks(ask))


# -- meetings ----------------------------------------------------------------------------------------------------------


def test_meetings_of_several_jobs_do_not_disturb_each_other(tmp_path: Path) -> None:
    """Each entering sweeps the folder in which the others leave; every meeting looks old enough to be swept."""

    def meet_often(world: World) -> None:
        for number in range(40):
            with Rendezvous(tmp_path / "meetings", world) as meeting:
                os.utime(meeting.folder, (0, 0))
                assert meeting.meet("number", number + world.rank) == [number, number + 1]

    join([fork(lambda: run_ranks(meet_often)) for _ in range(3)])
    assert list((tmp_path / "meetings").iterdir()) == []


def test_abandoned_meetings_are_swept_and_living_ones_stay(tmp_path: Path) -> None:
    def meet(world: World) -> None:
        with Rendezvous(tmp_path, world):
            pass

    for name in ("dead", "young", "living"):
        (tmp_path / f".meeting-{name}").mkdir()
        (tmp_path / f".meeting-{name}" / "alive.0").touch()
    for name in ("dead", "living"):
        os.utime(tmp_path / f".meeting-{name}", (0, 0))
    with files.Lock(tmp_path / ".meeting-living" / "alive.0"):
        run_ranks(meet)
    assert sorted(path.name for path in tmp_path.glob(".meeting-*")) == [".meeting-living", ".meeting-young"]


# -- what is read while others write -----------------------------------------------------------------------------------


def test_looking_while_another_removes(tmp_path: Path, config: EvalConfig) -> None:
    """`try_get` takes no lock: it sees all of an entry or nothing, whenever the folder goes."""

    def churn() -> None:
        while not (tmp_path / "stop").exists():
            EvalCache.for_config(config).get_or_produce(config, lambda folder: [(folder / f"{i}").write_text("x") for i in range(5)])
            EvalCache.for_config(config).invalidate(config)

    churner = fork(churn)
    with killed_at_the_end([churner]):
        cache = EvalCache.for_config(config)
        seen: list[Path | None] = []
        while len(seen) < 200 or {*seen} == {None} or None not in seen:
            seen.append(cache.try_get(config))
        (tmp_path / "stop").touch()
        churner.join(PATIENCE_S)
        assert churner.exitcode == 0
    assert set(seen) == {None, cache.root / cache.key(config)}


def test_remembered_hashes_are_valid_whoever_writes(tmp_path: Path) -> None:
    memo_path = tmp_path / "memo.json"
    for number in range(20):
        (tmp_path / f"{number}.txt").write_text(str(number))
        os.utime(tmp_path / f"{number}.txt", (0, 0))
    files.Fingerprints(memo_path).sha256(tmp_path / "0.txt")

    def remember() -> None:
        for path in tmp_path.glob("*.txt"):
            files.Fingerprints(memo_path).sha256(path)

    processes = [fork(remember) for _ in range(8)]
    while any(process.is_alive() for process in processes):
        files.read_json(memo_path)
    join(processes)
    for path, (*_, digest) in files.read_json(memo_path).items():
        assert digest == files.sha256_file(Path(path))
    path = tmp_path / "3.txt"
    path.write_text("4")
    os.utime(path, (0, 0))  # the same size, inode and mtime
    assert files.Fingerprints(memo_path).sha256(path) == files.sha256_file(path)


@pytest.mark.parametrize("memo", ["[]", "null", '{"PATH": null}', '{"PATH": []}', '{"PATH": [1, 2]}', "[" * 9999, '{"PATH": {"a": 1}}'])
def test_damaged_memory_is_no_memory(tmp_path: Path, memo: str) -> None:
    path = tmp_path / "a.txt"
    path.write_text("a")
    (tmp_path / "memo.json").write_text(memo.replace("PATH", str(path)))
    assert files.Fingerprints(tmp_path / "memo.json").sha256(path) == files.sha256_file(path)


# -- where nothing can be locked or written ----------------------------------------------------------------------------


@pytest.mark.parametrize("number", [37, 95])  # ENOLCK, EOPNOTSUPP
def test_file_system_without_locks(config: EvalConfig, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def refuse(descriptor: int, operation: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("fcntl.flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(SpecForgeError, match=r"\.lock: cannot be locked \(.*\); choose a folder .* on a file system with flock"):
        EvalCache.for_config(config).get_or_produce(config, produce_slowly(Path("never")))
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("kind", ["folder", "link", "loop"])
def test_lock_that_is_no_file(tmp_path: Path, kind: str) -> None:
    path, outside = tmp_path / "lock", tmp_path / "outside"
    if kind == "folder":
        path.mkdir()
    else:
        path.symlink_to(outside if kind == "link" else path)
    with pytest.raises(SpecForgeError, match="cannot be locked"):
        files.Lock(path).try_acquire()
    assert not outside.exists()


def in_child(fn: Callable[[], None]) -> None:
    """Run `fn` in a process of its own; it may limit itself. What it raises is shown."""
    process = fork(fn)
    join([process])


def test_full_disk_is_said_and_nothing_half_written_is_visible(tmp_path: Path, config: EvalConfig) -> None:
    """A limit on the size of files gives a real error of the system, as a full disk does, at each place where something is written."""

    def produce(folder: Path) -> None:
        (folder / "shard").write_bytes(bytes(5000))

    def check() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
        cache = EvalCache.for_config(config)
        with pytest.raises(FeatureError, match=r"could not be written \(File too large\); make room"):
            cache.get_or_produce(config, produce)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, 4096))  # the shard fits now, its manifest does not
        with pytest.raises(FeatureError, match="could not be written"):
            cache.get_or_produce(config, lambda folder: (folder / "shard").write_bytes(bytes(10)))
        assert [path.name for path in cache.root.iterdir() if path.is_dir()] == []
        with pytest.raises(OSError, match="File too large"):
            files.write_json(tmp_path / "kept.json", "x" * 5000)

    files.write_json(tmp_path / "kept.json", "old")
    in_child(check)
    assert files.read_json(tmp_path / "kept.json") == "old"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["cache", "kept.json", "rows.jsonl"]
    assert EvalCache.for_config(config).get_or_produce(config, produce).is_dir()


def test_full_disk_of_one_rank_is_said_by_all(config: EvalConfig) -> None:
    def ask(world: World) -> str:
        def produce(folder: Path) -> None:
            if world.rank == 1:
                signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
                resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
            (folder / f"shard-{world.rank}").write_bytes(bytes(5000))

        with pytest.raises(FeatureError) as error:
            EvalCache.for_config(config).get_or_produce(config, produce, world)
        return str(error.value)

    assert all("File too large" in message for message in run_ranks(ask))
    assert hidden_folders(config) == []


def test_read_only_cache_is_read_and_says_that_it_cannot_be_written(tmp_path: Path, config: EvalConfig) -> None:
    """The administrator ignores mode bits, so the folder is mounted read-only, in a name space of the child alone."""
    cache = EvalCache.for_config(config)
    entry = cache.get_or_produce(config, produce_slowly(tmp_path / "calls"))
    os.utime(entry / "shard", (0, 0))
    other = EvalConfig(eval_data_path=config.eval_data_path, cache_dir=config.cache_dir, max_length=77)
    refused = tmp_path / "refused"

    def check() -> None:
        if not _mount_read_only(cache.root):
            refused.touch()
            return
        assert cache.try_get(config) == entry
        with pytest.raises(SpecForgeError, match=r"Read-only file system\); choose a folder that can be written"):
            cache.get_or_produce(other, produce_slowly(tmp_path / "never"))
        for write in (
            lambda: files.write_json(cache.root / "a.json", 1),
            lambda: files.relative_link(cache.root / "link", "a"),
            lambda: files.new_staging(cache.root / "b"),
            lambda: files.publish(entry, cache.root / "b"),
        ):
            with pytest.raises(FeatureError, match="Read-only file system"), files.writable(cache.root, FeatureError):
                write()

    in_child(check)
    if refused.exists():
        pytest.skip("this system lets no process mount a folder read-only")
    assert cache.try_get(config) == entry


def _mount_read_only(folder: Path) -> bool:
    """For this process alone."""
    if ctypes.CDLL(None).unshare(_NEW_MOUNTS) != 0:  # an ordinary user may not
        return False
    commands = (["--make-rprivate", "/"], ["--bind", str(folder), str(folder)], ["-o", "remount,bind,ro", str(folder)])
    return all(subprocess.run(["mount", *words], capture_output=True, check=False).returncode == 0 for words in commands)
