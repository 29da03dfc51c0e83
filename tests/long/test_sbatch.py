"""`scripts/train.sbatch` on two nodes of two processes: srun, scancel and scontrol are small programs that do what Slurm's do."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch

from specforge.cli.__main__ import main
from specforge.log.run_log import read_metrics
from tests.distributed.test_world import free_port
from tests.texts import make_text_target, write_rows

pytestmark = pytest.mark.long
STEPS = 60
SCRIPT = Path(__file__).parents[2] / "scripts" / "train.sbatch"

SRUN = """#!/bin/bash
# One task on each of two nodes; the step ends with the worse of both.
while [[ "$1" == --* ]]; do shift; done
trap '' TERM
for node in 0 1; do
    (trap - TERM; SLURM_NODEID=$node SLURM_PROCID=$node SLURM_LOCALID=0 exec "$@") &
    echo $! >> "$SLURM_STAND_IN/tasks"
done
code=0
for task in $(jobs -p); do wait $task || code=$?; done
exit $code
"""
SCANCEL = """#!{python}
# Slurm signals every process of a step: the agents and their workers.
import os, psutil, signal
for task in open(os.environ["SLURM_STAND_IN"] + "/tasks").read().split():
    if psutil.pid_exists(int(task)):
        for process in [psutil.Process(int(task)), *psutil.Process(int(task)).children(recursive=True)]:
            process.send_signal(signal.SIGTERM)
"""
SCONTROL = """#!/bin/bash
[[ "$1" == show ]] && echo 127.0.0.1
[[ "$1" == requeue ]] && echo "$2" >> "$SLURM_STAND_IN/requeued"
exit 0
"""


@contextmanager
def no_task_left(tasks: Path) -> Iterator[None]:
    """Whatever happens, the processes of the step end."""
    try:
        yield
    finally:
        for task in (int(line) for line in tasks.read_text().split()):
            if psutil.pid_exists(task):
                for process in [*psutil.Process(task).children(recursive=True), psutil.Process(task)]:
                    process.kill()


def losses(run: Path) -> dict[int, float]:
    if not (run / "metrics.jsonl").is_file():
        return {}
    return {line["step"]: line["train/loss"] for line in read_metrics(run / "metrics.jsonl") if "train/loss" in line}


def test_a_job_that_is_told_to_stop_saves_and_goes_on(tmp_path: Path) -> None:
    """The job is stopped in the middle and started again with the same words; its losses are those of one process without a stop."""
    target = make_text_target(tmp_path / "target")
    rows, heldout = write_rows(tmp_path / "rows.jsonl", 40), write_rows(tmp_path / "heldout.jsonl", 6)
    (tmp_path / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 3, draft_vocab_size: 100}}\n")
    words = [
        str(tmp_path / "c.yaml"), f"model.target_path={target}", f"data.train_path={rows}", f"data.eval_path={heldout}",
        f"features.path={tmp_path / 'features'}", f"features.cache_dir={tmp_path / 'cache'}", "data.max_length=64", f"train.steps={STEPS}",
        "train.micro_batch_tokens=64", "train.batch_samples=8", "train.learning_rate=1e-3", "train.log_every=1", "train.sharding=hybrid",
        "eval.bootstrap=0",
    ]  # fmt: skip
    assert main(["train", *words, f"output_dir={tmp_path / 'one'}"]) == 0

    stand_in, run = tmp_path / "slurm", tmp_path / "run"
    stand_in.mkdir()
    for name, text in (("srun", SRUN), ("scancel", SCANCEL.format(python=sys.executable)), ("scontrol", SCONTROL)):
        (stand_in / name).write_text(text)
        (stand_in / name).chmod(0o755)
    environment = {
        **os.environ, "PATH": f"{stand_in}:{os.environ['PATH']}", "SLURM_STAND_IN": str(stand_in), "SLURM_JOB_ID": "7",
        "SLURM_JOB_NODELIST": "localhost", "SLURM_JOB_NUM_NODES": "2", "PYTHON": sys.executable, "PROCESSES_PER_NODE": "2",
        "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    job = ["bash", str(SCRIPT), str(run), *words]
    with (tmp_path / "log").open("w") as log, no_task_left(stand_in / "tasks"):
        first = subprocess.Popen(job, env={**environment, "RENDEZVOUS_PORT": str(free_port())}, stdout=log, stderr=log)
        while first.poll() is None and len(losses(run)) < 3:
            time.sleep(0.05)
        first.send_signal(signal.SIGTERM)
        first.wait(timeout=300)
        told = (tmp_path / "log").read_text()[-4000:]
        assert (stand_in / "requeued").read_text().split() == ["7"], told
        stopped_at = max(losses(run))
        assert 3 <= stopped_at < STEPS, told
        assert (run / f"run-step{stopped_at}" / "manifest.json").is_file(), told
        subprocess.run(job, env={**environment, "RENDEZVOUS_PORT": str(free_port())}, stdout=log, stderr=log, check=True, timeout=600)
    one, requeued = losses(tmp_path / "one"), losses(run)
    assert list(requeued) == list(one), "every step once"
    torch.testing.assert_close(torch.tensor(list(requeued.values())), torch.tensor(list(one.values())), rtol=1e-4, atol=0)
