"""Real torchrun, real SIGKILL: a run that lost all its processes goes on from `best` as if nothing had happened."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch

from specforge.log.run_log import read_metrics
from specforge.models.draft_folder import read_draft_config
from specforge.training.run_folder import find_checkpoints, resolve
from tests.texts import make_text_target, write_rows

pytestmark = pytest.mark.long


def command(folder: Path, run: Path, *more: str) -> list[str]:
    settings = [
        f"model.target_path={folder / 'target'}", f"data.train_path={folder / 'rows.jsonl'}", f"data.eval_path={folder / 'heldout.jsonl'}",
        f"output_dir={run}", "data.max_length=64", "train.micro_batch_tokens=128", "train.batch_samples=4", "train.learning_rate=1e-2",
        "train.steps=60", "train.log_every=1", "train.eval_every=5", "train.save_every=5", "checkpoint.keep=0", "eval.bootstrap=20",
    ]  # fmt: skip
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "specforge", "train"]
    return [*launch, str(folder / "c.yaml"), *settings, *more]


def steps(run: Path) -> int:
    return max((line.get("step", 0) for line in read_metrics(run / "metrics.jsonl")), default=0)


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    from safetensors import safe_open

    found = {}
    for path in sorted(folder.rglob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found.update({f"{path.relative_to(folder)}/{name}": shard.get_tensor(name) for name in shard.keys()})  # noqa: SIM118
    return found


def test_killed_and_resumed_from_best_equals_uninterrupted(tmp_path: Path) -> None:
    make_text_target(tmp_path / "target")
    write_rows(tmp_path / "rows.jsonl", 30)
    write_rows(tmp_path / "heldout.jsonl", 8)
    (tmp_path / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 3, draft_vocab_size: 100}}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    subprocess.run(command(tmp_path, whole), env=environment, check=True, capture_output=True)

    with subprocess.Popen(command(tmp_path, cut), env=environment, start_new_session=True, stdout=subprocess.DEVNULL) as process:
        while process.poll() is None and steps(cut) < 22:
            time.sleep(0.05)
        assert process.poll() is None, "it must be killed while it trains"
        for pid in [process.pid, *(child.pid for child in psutil.Process(process.pid).children(recursive=True))]:
            os.kill(pid, signal.SIGKILL)
    killed = {checkpoint.path.name for checkpoint in find_checkpoints(cut)}
    best = resolve(cut / "best")
    subprocess.run(command(tmp_path, cut, f"train.resume_from={cut / 'best'}"), env=environment, check=True, capture_output=True)

    assert killed <= {checkpoint.path.name for checkpoint in find_checkpoints(cut)}, "nothing was deleted"
    resumed, expected = resolve(cut / "latest"), resolve(whole / "latest")
    assert (resumed.step, expected.step) == (60, 60)
    left, right = tensors(resumed.path), tensors(expected.path)
    assert left.keys() == right.keys()
    assert all(torch.equal(left[name], right[name]) for name in left), f"resumed from step {best.step}"
    assert read_draft_config(resumed.path / "draft") == read_draft_config(expected.path / "draft")
