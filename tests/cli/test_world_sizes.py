"""One epoch trained by 2, then 1, then 4, then 2 ranks: nothing is lost, nothing is seen twice, the same is learned."""

import os
import signal
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch.distributed.tensor import DTensor

from specforge.cli.compose import build_controller
from specforge.cli.continuing import horizon
from specforge.config import RunConfig
from specforge.distributed import World
from specforge.errors import CheckpointError
from specforge.log.run_log import read_metrics
from specforge.training.controller import TrainerController
from specforge.training.state import TrainState
from specforge.training.stop import StoppedError
from tests.cli.test_run import config_of
from tests.ranks import run_ranks

ROWS = 24


class Part(NamedTuple):
    """What one rank saw between its start and its stop."""

    began: dict[str, torch.Tensor]
    ended: dict[str, torch.Tensor]
    ids: list[str]


def whole(controller: TrainerController) -> dict[str, torch.Tensor]:
    tensors = {**controller.backend.draft_state(), **controller.backend.optimizer_state()}
    return {name: (t.full_tensor() if isinstance(t, DTensor) else t).detach().clone() for name, t in tensors.items()}


def train_part(world: World, config: RunConfig, stop_after: int) -> Part:
    """Train until rank 0 hears SIGTERM in step `stop_after`, or to the end."""
    controller = build_controller(config, world)
    began, ids, step = whole(controller), list[str](), controller._step

    def recorded(window: Any) -> Any:
        ids.extend(sample_id for batch in window.batches for sample_id in batch.ids)
        if controller.state.step + 1 == stop_after and world.rank == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(window)

    controller._step = recorded  # type: ignore[method-assign]
    try:
        controller.fit()
    except StoppedError:
        assert controller.state.step == stop_after
    return Part(began, whole(controller), ids)


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_an_epoch_over_changing_world_sizes(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    config = config_of(prepared, tmp_path / "changing", "train.epochs=1")
    resumed = config_of(prepared, tmp_path / "changing", "train.epochs=1", f"train.resume_from={tmp_path / 'changing' / 'latest'}")
    parts, ids = list[Part](), list[str]()
    for size, stop_after in ((2, 2), (1, 3), (4, 5), (2, 0)):
        ranks = run_ranks(train_part, config, stop_after, world=size)
        assert not parts or same(ranks[0].began, parts[-1].ended), f"parameters and moments at {size} ranks"
        parts.append(ranks[0])
        ids += [sample_id for rank in ranks for sample_id in rank.ids]
        config = resumed
    assert sorted(ids) == sorted(f"r{number}" for number in range(ROWS)), "every sample exactly once"

    [alone] = run_ranks(train_part, config_of(prepared, tmp_path / "alone", "train.epochs=1"), 0, world=1)
    flat = [torch.cat([part.ended[name].double().flatten() for name in sorted(part.ended)]) for part in (parts[-1], alone)]
    assert (flat[0] - flat[1]).norm() / flat[1].norm() < 1e-6
    notes = [line.get("random_streams") for line in read_metrics(tmp_path / "changing" / "metrics.jsonl") if line.get("event") == "resume"]
    assert notes == [f"derived anew: saved by {before} ranks, continued by {now}" for before, now in ((2, 1), (1, 4), (4, 2))]


def test_another_batch_size_is_refused_or_exact(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    first = train_part(World(), config_of(prepared, tmp_path, "train.epochs=1"), 2)
    more = [f"train.resume_from={tmp_path / 'latest'}", "train.epochs=1", "train.batch_samples=5"]
    with pytest.raises(CheckpointError, match=r"train\.batch_samples: checkpoint 4, now 5"):
        build_controller(config_of(prepared, tmp_path, *more), World())
    controller = build_controller(config_of(prepared, tmp_path, *more, "train.allow_config_change=true"), World())
    assert controller.total_steps == 2 + 4, "16 samples are left: three steps of 5 and one of 1"
    controller.log.close()
    controller.checkpoints.release()
    second = train_part(World(), config_of(prepared, tmp_path, *more, "train.allow_config_change=true"), 0)
    assert sorted(first.ids + second.ids) == sorted(f"r{number}" for number in range(ROWS))


def test_a_run_counted_in_steps_keeps_its_steps(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Two steps of 4 samples are done; eight of 5 remain."""
    config = config_of(prepared, tmp_path, "train.steps=10", "train.batch_samples=5")
    assert horizon(config, ROWS, TrainState("r", step=2, samples_seen=8)) == (10, 8 + 8 * 5)
