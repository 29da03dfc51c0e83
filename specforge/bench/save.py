"""How long a checkpoint keeps training waiting: the copy alone, against writing it at once."""

import statistics
import tempfile
import time
from pathlib import Path

import torch

from specforge.bench.synthetic import SHAPES, Shape, make_batch, make_method
from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.state import TrainState


def measure(folder: Path, repeats: int, shape: Shape = SHAPES["wide"]) -> dict[str, float]:
    """Medians over `repeats` saves below `folder`, both kinds by turns, and the size of one checkpoint in MB.

    `stall_ms` is what `save` takes while steps are trained; `sync_ms` is `save` and the wait for its end. The step beside a
    write is compared with a step that has the machine to itself.
    """
    method = make_method(shape)
    backend = FSDPTrainingBackend(method, TrainConfig(), World())
    batch = make_batch(shape, method)
    plan = method.plan(batch)

    def step() -> float:
        started_s = time.perf_counter()
        backend.backward(backend(batch, plan).loss_sum, plan.weight, boundary=True)
        backend.clip()
        backend.step(1e-4)
        return 1e3 * (time.perf_counter() - started_s)

    times: dict[str, list[float]] = {"sync_ms": [], "stall_ms": [], "step_ms": [], "step_beside_ms": []}
    with tempfile.TemporaryDirectory(dir=folder) as name:
        checkpoints = CheckpointManager(Path(name), World(), keep=1)
        checkpoints.save(TrainState("bench"), backend, {}, {})
        step()
        for number in range(1, repeats + 1):
            for kind, offset in (("sync_ms", 0), ("stall_ms", repeats)):
                checkpoints.wait()
                times["step_ms"].append(step())
                started_s = time.perf_counter()
                checkpoints.save(TrainState("bench", number + offset), backend, {}, {})
                if kind == "sync_ms":
                    checkpoints.wait()
                times[kind].append(1e3 * (time.perf_counter() - started_s))
                if kind == "stall_ms":
                    times["step_beside_ms"].append(step())
        checkpoints.release()
    size = sum(tensor.nbytes for state in (backend.draft_state(), backend.optimizer_state()) for tensor in state.values())
    medians = {kind: statistics.median(values) for kind, values in times.items()}
    return {
        **medians,
        "stall_ratio": medians["stall_ms"] / medians["sync_ms"],
        "checkpoint_mb": size / 1e6,
        "threads": torch.get_num_threads(),
    }
