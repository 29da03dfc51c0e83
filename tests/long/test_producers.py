"""Real producers and a real torchrun training over one folder, each killed once: the losses are those of the offline run."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Self

import psutil
import pytest

from specforge.features.span_file import spans_present
from specforge.log.run_log import read_metrics
from tests.texts import make_text_target, write_rows

pytestmark = pytest.mark.long

STEPS = 40
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "specforge"]


def settings(folder: Path, run: Path, *more: str) -> list[str]:
    return [
        str(folder / "c.yaml"), f"model.target_path={folder / 'target'}", f"data.train_path={folder / 'rows.jsonl'}",
        f"data.eval_path={folder / 'heldout.jsonl'}", f"output_dir={run}", "data.max_length=64", "train.micro_batch_tokens=128",
        "train.batch_samples=4", "train.learning_rate=1e-2", f"train.steps={STEPS}", "train.log_every=1", "train.save_every=4",
        "checkpoint.keep=0", "eval.bootstrap=20", "features.capture_tokens=1", *more,
    ]  # fmt: skip


def losses(run: Path) -> list[tuple[int, float]]:
    metrics = run / "metrics.jsonl"
    return [(line["step"], line["train/loss"]) for line in (read_metrics(metrics) if metrics.exists() else []) if "train/loss" in line]


class Command:
    """A command of two processes and its output; killed with all that it started when the `with` block ends."""

    def __init__(self, output: Path, *words: str) -> None:
        self._output = output
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        with output.open("w") as file:
            self._process = subprocess.Popen([*TORCHRUN, *words], env=environment, stdout=file, stderr=subprocess.STDOUT)

    def finish(self) -> None:
        assert self._process.wait(timeout=240) == 0, self._output.read_text()

    def require_alive(self) -> None:
        assert self._process.poll() is None, self._output.read_text()

    def kill(self) -> None:
        if self._process.poll() is None:
            agent = psutil.Process(self._process.pid)
            for member in [agent, *agent.children(recursive=True)]:
                with contextlib.suppress(psutil.NoSuchProcess):
                    member.send_signal(signal.SIGKILL)
            self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *details: object) -> None:
        self.kill()


def wait_for(condition: Callable[[], object], *alive: Command) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        for command in alive:
            command.require_alive()
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_losses_do_not_depend_on_who_died(tmp_path: Path) -> None:
    make_text_target(tmp_path / "target")
    write_rows(tmp_path / "rows.jsonl", 30)
    write_rows(tmp_path / "heldout.jsonl", 8)
    (tmp_path / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 3, draft_vocab_size: 100}}\n")
    with Command(tmp_path / "offline.log", "train", *settings(tmp_path, tmp_path / "offline")) as whole:
        whole.finish()
    expected = dict(losses(tmp_path / "offline"))
    assert sorted(expected) == list(range(1, STEPS + 1))

    run, folder = tmp_path / "run", tmp_path / "shared"
    words = settings(tmp_path, run, "features.source=shared", f"features.path={folder}", "features.ahead_steps=3")
    with Command(tmp_path / "first.log", "train", *words) as first, Command(tmp_path / "killed.log", "produce", *words) as killed:
        wait_for(lambda: len(losses(run)) >= 6, first, killed)
        killed.kill()
        wait_for(lambda: not spans_present(folder), first)
        with Command(tmp_path / "serving.log", "produce", *words) as serving:
            wait_for(lambda: losses(run)[-1][0] >= 18, first, serving)
            first.kill()
            with Command(tmp_path / "second.log", "train", *words, f"train.resume_from={run / 'latest'}") as second:
                second.finish()
            serving.finish()
    got = losses(run)
    assert got[-1][0] == STEPS
    assert len(got) > STEPS, "some steps were made twice"
    assert all(loss == expected[step] for step, loss in got)
    assert spans_present(folder) == []
