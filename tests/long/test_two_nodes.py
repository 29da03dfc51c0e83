"""Two nodes on loopback, two processes each: the run of one process, step by step, by torchrun's rendezvous and by srun's variables."""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge.cli.__main__ import main
from specforge.cli.compose import build_controller
from specforge.config import load_config
from specforge.distributed import World
from specforge.log.run_log import read_metrics
from tests.distributed.test_world import free_port
from tests.texts import make_text_target, write_rows

pytestmark = pytest.mark.long
STEPS = 6
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}

TRAIN_AND_TELL = """
import json, os, sys
from specforge.cli.compose import build_controller
from specforge.config import load_config
from specforge.distributed import World

world = World.join()
controller = build_controller(load_config(sys.argv[1], sys.argv[2:]), world)
mesh = next(controller.method.parameters()).device_mesh
told = json.dumps([world.rank, world.local_rank, world.local_size, list(mesh.shape), mesh.mesh.tolist()])
os.write(1, (told + chr(10)).encode())  # at once: two processes share the pipe
controller.fit()
world.leave()
os._exit(0)
"""


@pytest.fixture(scope="module")
def words(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A configuration whose features are there already, captured by a run of one process; that run is `one`."""
    folder = tmp_path_factory.mktemp("nodes")
    target = make_text_target(folder / "target")
    rows, heldout = write_rows(folder / "rows.jsonl", 40), write_rows(folder / "heldout.jsonl", 6)
    (folder / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 3, draft_vocab_size: 100}}\n")
    (folder / "tell.py").write_text(TRAIN_AND_TELL)
    settings = [
        f"model.target_path={target}", f"data.train_path={rows}", f"data.eval_path={heldout}", f"features.path={folder / 'features'}",
        f"features.cache_dir={folder / 'cache'}", "data.max_length=64", "train.micro_batch_tokens=64", "train.batch_samples=8",
        "train.learning_rate=1e-2", f"train.steps={STEPS}", "train.log_every=1", "train.sharding=hybrid", "eval.bootstrap=0",
    ]  # fmt: skip
    everything = [str(folder / "c.yaml"), *settings]
    assert main(["train", *everything, f"output_dir={folder / 'one'}"]) == 0
    return everything


def side_by_side(commands: Sequence[Sequence[str]], environments: Sequence[dict[str, str]]) -> list[str]:
    """The standard output of processes that run at the same time and all end well."""
    started = [
        subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for command, environment in zip(commands, environments, strict=True)
    ]
    ended = [process.communicate(timeout=120) for process in started]
    for process, (_, errors) in zip(started, ended, strict=True):
        assert process.returncode == 0, errors[-3000:]
    return [output for output, _ in ended]


def losses(run: Path) -> torch.Tensor:
    lines = read_metrics(run / "metrics.jsonl")
    return torch.tensor([line["train/loss"] for line in lines if "train/loss" in line], dtype=torch.float64)


def draft(words: Sequence[str], run: Path, scratch: Path) -> torch.Tensor:
    """All parameters of a run's last checkpoint as one vector, read by one process."""
    controller = build_controller(
        load_config(words[0], [*words[1:], f"output_dir={scratch}", f"model.draft_path={run / 'latest'}"]), World()
    )
    controller.checkpoints.release()
    controller.log.close()
    return torch.cat([parameter.detach().flatten() for _, parameter in sorted(controller.backend.trainable.items())])


def assert_the_run_of_one_process(words: Sequence[str], run: Path, scratch: Path) -> None:
    """Equal but for rounding. Adam divides an entry's first gradient by its own size, so where that is rounding alone, the step is not:
    with other micro-batches in one process, too, ten entries have 0.999 of the squared error."""
    one = Path(words[0]).parent / "one"
    assert len(losses(run)) == STEPS
    torch.testing.assert_close(losses(run), losses(one), rtol=1e-6, atol=0)
    expected = draft(words, one, scratch / "expected")
    squares = (draft(words, run, scratch / "got") - expected).square().sort().values
    most, ten = (float(part.sum().sqrt() / expected.norm()) for part in (squares[:-10], squares[-10:]))
    assert most < 1e-6, f"relative error without the ten largest {most:.1e}"
    assert ten < 5e-6, f"relative error of these ten {ten:.1e}"


def test_two_torchrun_agents_are_two_nodes(words: list[str], tmp_path: Path) -> None:
    program, run = Path(words[0]).parent / "tell.py", tmp_path / "run"
    endpoint = f"127.0.0.1:{free_port()}"
    agents = [
        [
            sys.executable, "-m", "torch.distributed.run", "--nnodes=2", f"--node-rank={node}", "--nproc-per-node=2",
            "--rdzv-backend=c10d", f"--rdzv-endpoint={endpoint}", "--rdzv-id=two-nodes", "--local-addr=127.0.0.1",
            str(program), *words, f"output_dir={run}",
        ]
        for node in (0, 1)
    ]  # fmt: skip
    told: list[list[Any]] = []
    for output in side_by_side(agents, [ENVIRONMENT] * 2):
        ranks = [json.loads(line) for line in output.splitlines() if line.startswith("[")]
        assert len(ranks) == 2, "each agent runs two processes"
        assert {rank // 2 for rank, *_ in ranks} in ({0}, {1}), "which follow each other"
        told += ranks
    assert sorted(told) == [[rank, rank % 2, 2, [2, 2], [[0, 1], [2, 3]]] for rank in range(4)]
    assert_the_run_of_one_process(words, run, tmp_path)


def test_four_tasks_of_srun_on_two_nodes(words: list[str], tmp_path: Path) -> None:
    """Plain processes, no LOCAL_RANK: what srun sets, and nothing else."""
    run, port = tmp_path / "run", str(free_port())
    clean = {name: value for name, value in ENVIRONMENT.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR")}
    tasks = [
        {
            **clean, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank % 2), "SLURM_NODEID": str(rank // 2), "SLURM_NTASKS": "4",
            "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_TASKS_PER_NODE": "2(x2)", "SLURM_STEP_NODELIST": "localhost", "SLURM_JOB_ID": "7",
            "SLURM_STEP_ID": "0", "MASTER_PORT": port,
        }
        for rank in range(4)
    ]  # fmt: skip
    command = [sys.executable, "-m", "specforge", "train", *words, f"output_dir={run}"]
    outputs = side_by_side([command] * 4, tasks)
    assert [bool(output) for output in outputs] == [True, False, False, False], "rank 0 alone talks"
    assert_the_run_of_one_process(words, run, tmp_path)
