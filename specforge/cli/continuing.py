"""How a run begins, and goes on from a checkpoint; the same for every task."""

import json
import os
from pathlib import Path
from typing import Any

from specforge import files
from specforge.config import RankingConfig, RunConfig, dump_config, to_dict
from specforge.distributed import World, randomness
from specforge.errors import CheckpointError
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager, job_name
from specforge.training.run_folder import Checkpoint, changed_settings, find_checkpoints, newest, read_branch, resolve
from specforge.training.state import TrainState

Config = RunConfig | RankingConfig

_FREE_TRAIN_SETTINGS = (
    "resume_from", "allow_config_change", "allow_non_finite", "log_every", "eval_every", "save_every", "micro_batch_tokens", "sharding",
    "profile",
)  # fmt: skip
"""Settings of `train` that may differ between a checkpoint and the run that continues it."""


def settings_of(config: Config) -> dict[str, Any]:
    """All settings as JSON has them, of `train` only those that a checkpoint and the run that continues it must share."""
    whole = json.loads(json.dumps(to_dict(config)))
    train = {key: value for key, value in whole["train"].items() if key not in _FREE_TRAIN_SETTINGS}
    return {**whole, "train": train}


def refuse_other_settings(
    config: Config, contract: dict[str, Any], stored: dict[str, Any], checkpoint: Checkpoint, *, weights_only: bool = False
) -> None:
    """
    Args:
        contract: the settings that the checkpoint, whose state is `stored`, and this run must share.

    Raises:
        CheckpointError: they differ, in the run of which the weights alone are not enough, and nobody allowed it.
    """
    then = {key: value for key, value in stored["settings"].items() if key in contract}
    differences = changed_settings(then, contract)
    if differences and not weights_only and not config.train.allow_config_change:
        raise CheckpointError(
            f"{checkpoint.path}: its settings differ from this run's:\n  " + "\n  ".join(differences)
            + "\nUse the checkpoint's values, or set train.allow_config_change=true to go on with the new ones."
        )  # fmt: skip


def starting_point(config: Config) -> Checkpoint | None:
    """The checkpoint to begin from: what `train.resume_from` names or, in a torchrun restart, where this job's branch stands.

    Raises:
        CheckpointError: `resume_from` names none, or the folder holds a run and `resume_from` is empty.
    """
    folder = Path(config.output_dir)
    complete, branch = find_checkpoints(folder), read_branch(folder)
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if restarted and branch and (branch.job, branch.resume_from) == (job_name(), config.train.resume_from):
        return newest(folder)
    if config.train.resume_from:
        return resolve(Path(config.train.resume_from), "train.resume_from")
    if complete:
        raise CheckpointError(
            f"output_dir={str(folder)!r}: holds a run already ({complete[-1].path.name}); "
            f"set train.resume_from={folder}/latest to continue it, or choose another output_dir."
        )
    return None


def fork_id(folder: Path, checkpoint: Checkpoint, run_id: str) -> str:
    """The run id to go on with: the checkpoint's own if it is the newest of its run here, else a new one."""
    if checkpoint.path.parent.resolve() != folder.resolve():
        return run_id
    known = find_checkpoints(folder)
    if all(other.step <= checkpoint.step for other in known if other.run_id == checkpoint.run_id):
        return checkpoint.run_id
    number = 1
    while any(other.run_id == f"{checkpoint.run_id}.fork{number}" for other in known):
        number += 1
    return f"{checkpoint.run_id}.fork{number}"


def horizon(config: Config, num_samples: int, state: TrainState) -> tuple[int, int]:
    """(optimiser steps, samples) at the end of the run; the last step may be smaller.

    From `state` on, every step takes `train.batch_samples`, whatever a checkpoint's steps took.
    """
    batch = config.train.batch_samples
    samples = config.train.epochs * num_samples
    if config.train.steps:
        samples = state.samples_seen + (config.train.steps - state.step) * batch
    return state.step - (state.samples_seen - samples) // batch, samples


def continued(
    config: Config, start: Checkpoint, checkpoints: CheckpointManager, backend: FSDPTrainingBackend, world: World
) -> tuple[TrainState, dict[str, Any]]:
    """Restore a checkpoint; going on from anything but the newest of its run is a fork under a run id of its own."""
    state, saved_size = checkpoints.load(start, backend)
    run_id = world.on_main(lambda: fork_id(checkpoints.folder, start, config.run_id))
    note: dict[str, Any] = {"event": "resume", "checkpoint": start.path.name, "step": state.step}
    if run_id != state.run_id:
        note = {"event": "fork", "parent": start.path.name, "run_id": run_id, "step": state.step}
        state = TrainState(run_id, state.step, state.samples_seen, start.path.name)
    if saved_size != world.size:
        note["random_streams"] = f"derived anew: saved by {saved_size} ranks, continued by {world.size}"
        randomness.seed_all(config.seed, world.rank, state.step)
    return state, note


def write_config(folder: Path, config: Config) -> None:
    """`config.yaml`, or `config-2.yaml` and so on beside the one that the folder's checkpoints were made with."""
    folder.mkdir(parents=True, exist_ok=True)
    text, path, number = dump_config(config), folder / "config.yaml", 1
    while find_checkpoints(folder) and path.is_file() and path.read_text() != text:
        number += 1
        path = folder / f"config-{number}.yaml"
    files.write_text(path, text)
