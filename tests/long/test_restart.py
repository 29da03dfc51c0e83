"""Real torchrun with --max-restarts and real signals: a run goes on by itself, on the branch it was on."""

import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from specforge.log.run_log import read_metrics
from specforge.training.run_folder import find_checkpoints, newest, resolve
from tests.long.test_kill import command, steps, tensors
from tests.texts import make_text_target, write_rows

pytestmark = pytest.mark.long
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Inputs, and `whole`, a run of 60 steps that nobody disturbed."""
    folder = tmp_path_factory.mktemp("restart")
    make_text_target(folder / "target")
    write_rows(folder / "rows.jsonl", 30)
    write_rows(folder / "heldout.jsonl", 8)
    (folder / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 3, draft_vocab_size: 100}}\n")
    subprocess.run(command(folder, folder / "whole"), env=ENVIRONMENT, check=True, capture_output=True)
    return folder


def restarting(words: list[str]) -> list[str]:
    place = words.index("--standalone") + 1
    return [*words[:place], "--max-restarts=3", *words[place:]]


@contextmanager
def started(words: list[str], output: Path) -> Iterator[subprocess.Popen[bytes]]:
    with output.open("wb") as file, subprocess.Popen(words, env=ENVIRONMENT, stdout=file, stderr=subprocess.STDOUT) as process:
        try:
            yield process
        finally:
            process.kill()


def wait_until(true: Callable[[], bool], process: "subprocess.Popen[bytes]") -> None:
    while not true():
        assert process.poll() is None, "it must be disturbed while it trains"
        time.sleep(0.02)


def workers(process: "subprocess.Popen[bytes]") -> list[psutil.Process]:
    return [child for child in psutil.Process(process.pid).children(recursive=True) if "specforge" in child.cmdline()]


def same_end(folder: Path, run: Path) -> bool:
    left, right = (tensors(resolve(place / "latest").path) for place in (folder / "whole", run))
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_killed_worker_is_restarted_twice(folder: Path) -> None:
    run = folder / "cut"
    with started(restarting(command(folder, run)), folder / "cut.txt") as process:
        for reached in (12, 33):
            wait_until(lambda: steps(run) >= reached, process)  # noqa: B023
            os.kill(workers(process)[-1].pid, signal.SIGKILL)
        assert process.wait(300) == 0, (folder / "cut.txt").read_text()[-3000:]
    events = [line["event"] for line in read_metrics(run / "metrics.jsonl") if "event" in line]
    assert events == ["resume", "resume"]
    assert {checkpoint.run_id for checkpoint in find_checkpoints(run)} == {"run"}
    assert same_end(folder, run)


def test_a_killed_fork_goes_on_as_that_fork(folder: Path) -> None:
    run = folder / "forked"
    subprocess.run(command(folder, run), env=ENVIRONMENT, check=True, capture_output=True)
    early = next(checkpoint for checkpoint in find_checkpoints(run) if 5 <= checkpoint.step < 60)
    with started(restarting(command(folder, run, f"train.resume_from={early.path}")), folder / "forked.txt") as process:
        wait_until(lambda: (stand := newest(run)) is not None and stand.run_id == "run.fork1" and stand.step >= early.step + 10, process)
        os.kill(workers(process)[0].pid, signal.SIGKILL)
        assert process.wait(300) == 0, (folder / "forked.txt").read_text()[-3000:]
    events = [line["event"] for line in read_metrics(run / "metrics.jsonl") if "event" in line]
    assert events == ["fork", "resume"]
    assert resolve(run / "latest").path.name == "run.fork1-step60"
    assert same_end(folder, run)


def test_sigterm_to_torchrun_ends_with_a_save(folder: Path) -> None:
    run = folder / "told"
    with started(command(folder, run), folder / "told.txt") as process:
        wait_until(lambda: steps(run) >= 17, process)
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    [event] = [line for line in read_metrics(run / "metrics.jsonl") if "event" in line]
    stopped = resolve(run / "latest").step
    assert (event["event"], event["signal"], event["step"]) == ("interrupted", "SIGTERM", stopped)
    assert stopped == steps(run), "not one step was lost"
    subprocess.run(command(folder, run, f"train.resume_from={run / 'latest'}"), env=ENVIRONMENT, check=True, capture_output=True)
    assert same_end(folder, run)
