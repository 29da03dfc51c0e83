"""SIGKILL at every single change that saving makes to a run folder: what stays resumes, to the same bits, best included."""

import concurrent.futures
import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from specforge.cli.continuing import starting_point
from specforge.config import load_config
from specforge.distributed import World
from specforge.errors import CheckpointError
from specforge.features.store import LocalFeatureStore
from specforge.log.run_log import read_metrics
from specforge.training.run_folder import find_checkpoints, newest, read_best, read_state, resolve
from specforge.training.state import TrainState
from specforge.training.stop import StoppedError
from tests.processes import fork
from tests.ranks import run_ranks
from tests.training.test_resume import SCORES, STEPS, controller_for, run, same

CHANGES = ("open", "os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.symlink")


def changes_below(folder: Path, event: str, arguments: tuple[Any, ...]) -> bool:
    """Whether an audit event is about to change something below `folder`."""
    if event not in CHANGES or not isinstance(arguments[0], str | os.PathLike):
        return False
    reading = event == "open" and not (isinstance(arguments[2], int) and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
    # What one step of `rmtree` removes is named relative to a descriptor.
    return not reading and (str(arguments[0]).startswith(str(folder)) or not os.path.isabs(str(arguments[0])))


def train(folder: Path, target_path: Path, features: Path, resume: str, keep: int, kill_at: int, seen: Path) -> None:
    """In a child: train, and die at change number `kill_at` of the folder; what changed goes to `seen` otherwise."""
    names: list[str] = []

    def count(event: str, arguments: tuple[Any, ...]) -> None:
        if changes_below(folder, event, arguments):
            names.append(f"{event} {Path(str(arguments[0])).name}")
            if len(names) == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)

    controller = controller_for(World(), folder, target_path, features, resume)
    controller.checkpoints.keep = keep
    controller.checkpoints.claim()
    sys.addaudithook(count)
    controller.fit()
    seen.write_text(json.dumps(names))


def in_child(*arguments: Any) -> int | None:
    child = fork(lambda: train(*arguments))
    child.join(60)
    return child.exitcode


def contents(folder: Path) -> dict[str, dict[str, str]]:
    """Hashes of the weights, moments and random state of every complete checkpoint, each verified."""
    found = {}
    for checkpoint in find_checkpoints(folder):
        read_state(checkpoint, World())
        tensors = {
            f"{path.parent.name}/{name}": tensor
            for path in checkpoint.path.rglob("*.safetensors")
            for name, tensor in load_file(path).items()
        }
        hashes = {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}
        found[checkpoint.path.name] = {**hashes, "random": (checkpoint.path / "rng-rank0.json").read_text()}
    return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, target_path: Path, store: LocalFeatureStore) -> tuple[list[str], dict[str, Any]]:
    """The changes that an uninterrupted run makes, and the checkpoints that a run which keeps all of them has."""
    folder = tmp_path_factory.mktemp("crash")
    assert in_child(folder / "rotated", target_path, store.folder, "", 1, 0, folder / "seen") == 0
    assert in_child(folder / "kept", target_path, store.folder, "", 0, 0, folder / "ignored") == 0
    return json.loads((folder / "seen").read_text()), contents(folder / "kept")


def second_save(changes: list[str]) -> range:
    """Numbers of the changes from the save of the best, step 2, to the end of the rotation that follows it."""
    first, beyond = (next(i for i, name in enumerate(changes, 1) if f".r-step{step}.staging" in name) for step in (2, 4))
    return range(first, beyond)


def kill_and_resume(folder: Path, target_path: Path, features: Path, number: int, whole: tuple[list[str], dict[str, Any]]) -> None:
    changes, expected = whole
    assert in_child(folder, target_path, features, "", 1, number, folder / "seen") == -signal.SIGKILL
    left = contents(folder)
    assert left == {name: expected[name] for name in left}, f"{changes[number - 1]}: what is complete is what an uninterrupted run wrote"
    stand = newest(folder)
    assert stand is not None, changes[number - 1]
    assert (folder / "latest").resolve().name in left, "the link never dangles"
    best = read_best(folder)
    assert best is not None and best.checkpoint in left

    assert in_child(folder, target_path, features, "latest", 1, 0, folder / "seen") == 0
    assert contents(folder) == {name: expected[name] for name in ("r-step2", "r-step6")}
    again = read_best(folder)
    assert again is not None and (again.step, again.score) == (2, max(SCORES)), f"{changes[number - 1]}: the best was lost"
    assert not [path.name for path in folder.glob(".*")], "what the kill left behind is swept"


def test_a_kill_at_any_change_leaves_what_resumes(tmp_path: Path, target_path: Path, store: LocalFeatureStore, whole: Any) -> None:
    for number in second_save(whole[0])[::5]:
        kill_and_resume(tmp_path / str(number), target_path, store.folder, number, whole)


@pytest.mark.long
def test_a_kill_at_every_change_leaves_what_resumes(tmp_path: Path, target_path: Path, store: LocalFeatureStore, whole: Any) -> None:
    numbers = second_save(whole[0])
    kinds = {name.split()[0] for name in whole[0][numbers.start : numbers.stop]}
    assert kinds == set(CHANGES)
    for number in numbers:
        kill_and_resume(tmp_path / str(number), target_path, store.folder, number, whole)


def test_values_saved_are_those_of_the_step(tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    """The writing waits until training went on; what it writes is what was."""
    controller = controller_for(World(), tmp_path, target_path, store.folder)
    checkpoints, backend = controller.checkpoints, controller.backend
    trained = threading.Event()
    checkpoints._thread.submit(trained.wait)
    before = {name: tensor.clone() for name, tensor in {**backend.draft_state(), **backend.optimizer_state()}.items()}
    checkpoints.save(TrainState("r", 5, 20), backend, controller.method.config_dict(), {})
    assert not find_checkpoints(tmp_path), "save returned before anything was written"
    with torch.no_grad():
        for tensor in (*backend.trainable.values(), *backend.optimizer_state().values()):
            tensor.add_(1.0)
    trained.set()
    checkpoints.wait()
    state, _ = checkpoints.load(find_checkpoints(tmp_path)[0], backend)
    assert (state.step, state.samples_seen) == (5, 20)
    after = {**backend.draft_state(), **backend.optimizer_state()}
    assert all(torch.equal(before[name], after[name]) for name in before)
    controller.log.close()
    checkpoints.release()


def full_disk(world: World, folder: Path, target_path: Path, features: Path) -> tuple[str, int]:
    """No file of rank 1 may grow beyond 10 kB once step 2 was saved."""
    controller = controller_for(world, folder, target_path, features)
    save = controller.checkpoints.save

    def limited(state: TrainState, *rest: Any) -> None:
        controller.checkpoints.wait()
        if state.step == 4 and world.rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, 10_000))
        save(state, *rest)
        saving = controller.checkpoints._saving
        if state.step == 4 and saving is not None:
            concurrent.futures.wait([saving])

    controller.checkpoints.save = limited  # type: ignore[method-assign, assignment]
    with pytest.raises(CheckpointError) as failure:
        controller.fit()
    return str(failure.value), controller.state.step


def test_a_full_disk_leaves_the_checkpoint_before(tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    (first, step), second = run_ranks(full_disk, tmp_path, target_path, store.folder, world=2)
    assert second == (first, step), "all ranks stop alike"
    assert step == 5, "at the first step after the failure, not at the next save"
    assert "r-step4 was not saved: rank 1: " in first and "File too large" in first
    assert "Earlier checkpoints are untouched; make room" in first and f"train.resume_from={tmp_path}/latest" in first
    stand = newest(tmp_path)
    assert stand is not None and stand.step == 2
    assert "r-step2" in contents(tmp_path)
    assert not list(tmp_path.glob(".r-step*")), "nothing of the attempt stays"


def one_name_taken(world: World, folder: Path, target_path: Path, features: Path) -> str:
    """Rank 1 alone cannot write its random state, after all have written their tensors."""
    controller = controller_for(world, folder, target_path, features)
    snapshot = controller.checkpoints._snapshot
    write = snapshot.write

    def taken(staged: Path, writers: World) -> str | None:
        if writers.rank == 1:
            (staged / "rng-rank1.json").mkdir()
        return write(staged, writers)

    snapshot.write = taken  # type: ignore[method-assign, assignment]
    with pytest.raises(CheckpointError) as failure:
        controller.fit()
    return str(failure.value)


def test_what_one_rank_cannot_write_is_published_by_none(tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    first, second = run_ranks(one_name_taken, tmp_path, target_path, store.folder, world=2)
    assert first == second
    assert "r-step0 was not saved: rank 1: " in first and "rng-rank1.json" in first
    assert not find_checkpoints(tmp_path)
    assert "No checkpoint was complete before it" in first and first.endswith("then give the same command again.")
    assert "resume_from" not in first, "nothing is there to resume"
    [step] = run_ranks(from_the_start, tmp_path, target_path, store.folder, world=1)
    assert step == STEPS, "the same command works"


def from_the_start(world: World, folder: Path, target_path: Path, features: Path) -> int:
    assert starting_point(load_config(None, [f"output_dir={folder}", "model.target_path=t", "data.train_path=d"])) is None
    return controller_for(world, folder, target_path, features).fit().step


def without_rights(world: World, folder: Path, target_path: Path, features: Path) -> str:
    """Mode bits mean nothing to root, so the rank becomes nobody once step 2 was saved."""
    controller = controller_for(world, folder, target_path, features)
    save = controller.checkpoints.save

    def refused(state: TrainState, *rest: Any) -> None:
        controller.checkpoints.wait()
        if state.step == 4:
            folder.chmod(0o555)
            os.seteuid(65534)
        save(state, *rest)

    controller.checkpoints.save = refused  # type: ignore[method-assign, assignment]
    try:
        with pytest.raises(CheckpointError) as failure:
            controller.fit()
    finally:
        os.seteuid(os.getuid())
    return str(failure.value)


def test_a_folder_without_rights_leaves_the_checkpoint_before(target_path: Path, store: LocalFeatureStore) -> None:
    with tempfile.TemporaryDirectory() as name:
        Path(name).chmod(0o755)
        (Path(name) / "run").mkdir()
        [message] = run_ranks(without_rights, Path(name) / "run", target_path, store.folder, world=1)
        assert "r-step4 was not saved" in message and "Permission denied" in message and "give" in message
        stand = newest(Path(name) / "run")
        assert stand is not None and stand.step == 2


def without_links(world: World, folder: Path, target_path: Path, features: Path) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EPERM, os.strerror(errno.EPERM))

    os.symlink = refuse
    controller_for(world, folder, target_path, features).fit()


def test_a_file_system_without_links_needs_none(tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    run_ranks(without_links, tmp_path, target_path, store.folder, world=1)
    assert not [path for path in tmp_path.iterdir() if path.is_symlink()]
    assert (resolve(tmp_path / "latest").step, resolve(tmp_path / "best").step) == (6, 2)


def signalled(world: World, folder: Path, target_path: Path, features: Path, number: int) -> tuple[int, str, int]:
    """Only rank 1 is told, in the middle of step 3."""
    controller = controller_for(world, folder, target_path, features)
    clip = controller.backend.clip

    def told() -> torch.Tensor:
        if controller.state.step == 2 and world.rank == 1:
            os.kill(os.getpid(), number)
        return clip()

    controller.backend.clip = told  # type: ignore[method-assign]
    with pytest.raises(StoppedError) as stopped:
        controller.fit()
    return stopped.value.exit_code, str(stopped.value), controller.state.step


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_all_ranks_after_a_save(number: signal.Signals, tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    first, second = run_ranks(signalled, tmp_path / "cut", target_path, store.folder, number, world=2)
    assert first == second
    code, message, step = first
    assert (code, step) == (128 + number, 3)
    assert message.startswith(f"{number.name} ended the run after step 3, which is saved")
    assert resolve(tmp_path / "cut" / "latest").step == 3
    assert [line["signal"] for line in read_metrics(tmp_path / "cut" / "metrics.jsonl") if line.get("event") == "interrupted"] == [
        number.name
    ]

    resumed = run_ranks(run, tmp_path / "cut", target_path, store.folder, "latest", world=2)
    assert same(resumed, run_ranks(run, tmp_path / "whole", target_path, store.folder, world=2))


def branches(folder: Path, *, restarts: str, resume_from: str, job: str = "job") -> str:
    """Where a worker of `job` begins."""
    config = load_config(None, [f"output_dir={folder}", f"train.resume_from={resume_from}", "model.target_path=t", "data.train_path=d"])
    with pytest.MonkeyPatch.context() as environment:
        environment.setenv("TORCHELASTIC_RESTART_COUNT", restarts)
        environment.setenv("TORCHELASTIC_RUN_ID", job)
        found = starting_point(config)
    return found.path.name if found else ""


def test_a_restart_goes_on_with_the_branch_it_was_on(
    tmp_path: Path, target_path: Path, store: LocalFeatureStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "job")
    monkeypatch.setattr(os, "getppid", lambda: 1)
    best = f"{tmp_path}/best"
    controller_for(World(), tmp_path, target_path, store.folder).fit()
    assert branches(tmp_path, restarts="0", resume_from=best) == "r-step2"
    assert branches(tmp_path, restarts="1", resume_from=best) == "r-step2", "killed before it said that it forks: another branch wrote here"

    fork = controller_for(World(), tmp_path, target_path, store.folder, "best")
    fork.state = replace(fork.state, parent="r-step2")
    fork.checkpoints.begin(fork.state, best)
    assert branches(tmp_path, restarts="1", resume_from=best) == "r-step2", "the fork has not saved yet: from its parent again"
    assert resolve(tmp_path / "latest").path.name == "r-step2"
    fork.config = replace(fork.config, resume_from=best)
    fork.fit()
    shutil.rmtree(tmp_path / "r.fork1-step6")
    assert branches(tmp_path, restarts="1", resume_from=best) == "r.fork1-step4", "r-step6 is newer, of another branch"
    assert branches(tmp_path, restarts="1", resume_from=best, job="another") == "r-step2"
    assert branches(tmp_path, restarts="0", resume_from=f"{tmp_path}/latest") == "r.fork1-step4"
