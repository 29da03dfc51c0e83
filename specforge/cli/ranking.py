"""From a RankingConfig to a ready controller, and from a checkpoint to numbers and a calibration."""

from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from specforge.cli.continuing import continued, horizon, refuse_other_settings, settings_of, starting_point, write_config
from specforge.config import RankingConfig, to_dict
from specforge.distributed import World, randomness
from specforge.features.loader import FeatureDataLoader
from specforge.log.run_log import RunLog
from specforge.methods.base import Moment
from specforge.ranking.batch import RankingBatch
from specforge.ranking.calibration import fit_and_measure, write_shift
from specforge.ranking.evaluate import RankingEvaluator
from specforge.ranking.method import RankingMethod
from specforge.ranking.store import UserCache, UserStore
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.controller import TrainerController, refuse_after_non_finite
from specforge.training.run_folder import read_state, resolve
from specforge.training.state import TrainState


def contract(config: RankingConfig) -> dict[str, Any]:
    """The settings that a checkpoint remembers and a resumed run must share."""
    whole = settings_of(config)
    data = {key: value for key, value in whole["data"].items() if key not in ("exclude_ids", "cache_dir")}
    return {**{key: whole[key] for key in ("task", "seed", "model", "train")}, "data": data, "signid_mode": whole["levers"]["signid_mode"]}


def read_users(config: RankingConfig, split: str, world: World) -> UserStore:
    """The rows of `train` or `eval`, packed once and then found again; what was left out of them is said.

    Raises:
        DataError: with file and line, of a row that breaks the form of `ranking.rows`.
    """
    cache = UserCache(Path(config.data.cache_dir or Path(config.output_dir) / "rows"))
    path = Path(config.data.train_path if split == "train" else config.data.eval_path)
    store = cache.get(path, slots=config.model.slots, filter_users=config.levers.filter_test_users, max_rows=config.data.max_rows)
    if world.is_main:
        print(f"{path}: {store.counts.sentence()}")
    return store


def scorer(method: RankingMethod, backend: FSDPTrainingBackend) -> Callable[[RankingBatch], torch.Tensor]:
    """The logits of a batch's scored rows, in the run's precision."""
    return lambda batch: backend(batch, method.plan(batch)).logit_P


def build_ranking_controller(config: RankingConfig, world: World) -> TrainerController:
    """A controller ready for `fit()`. What can be refused is refused before anything is written."""
    folder = Path(config.output_dir)
    refuse_after_non_finite(folder, config.train, config.data.exclude_ids)
    start = world.on_main(lambda: starting_point(config))
    if start is not None:
        refuse_other_settings(config, contract(config), read_state(start, world), start)

    with ExitStack() as undo:
        checkpoints = CheckpointManager(folder, world, config.checkpoint.keep, config.checkpoint.best_metric)
        checkpoints.claim()
        undo.callback(checkpoints.release)
        world.on_main(lambda: write_config(folder, config))
        users, heldout = (read_users(config, split, world) for split in ("train", "eval"))

        randomness.seed_all(config.seed, world.rank)
        if start is None:
            method = RankingMethod.build(config, world.device)
        else:
            method = RankingMethod.read(config, start.path / "draft", world.device)
        backend = FSDPTrainingBackend(method, config.train, world)
        state, note = TrainState(config.run_id), None
        if start is not None:
            state, note = continued(config, start, checkpoints, backend, world)

        total_steps, total_samples = horizon(config, len(users), state)
        data = FeatureDataLoader(
            users, config.seed, config.train.batch_samples, config.train.micro_batch_tokens, total_samples, world,
            config.data.exclude_ids, plan=lambda batch, step: method.plan(batch, Moment(config.seed, step, total_steps)), kind=RankingBatch,
        )  # fmt: skip
        evaluator = RankingEvaluator(heldout, world, micro_batch_tokens=config.train.micro_batch_tokens)
        log = RunLog(folder, world, config.log.wandb, config.log.wandb_project, state.run_id, to_dict(config))
        if note:
            log.note(**note)
        undo.pop_all()
    return TrainerController(
        config=config.train, total_steps=total_steps, method=method, backend=backend, data=data, checkpoints=checkpoints, log=log,
        world=world, state=state, settings=contract(config), evaluate=lambda: evaluator.evaluate(scorer(method, backend)), seed=config.seed,
    )  # fmt: skip


def evaluate_ranking_checkpoint(config: RankingConfig, path: Path, world: World, *, calibrate: bool = False) -> dict[str, Any]:
    """`eval/*` numbers of a checkpoint as it was trained; on the half of its users that does not fit it also those of the shifted logits.

    Args:
        calibrate: store the shift beside the weights, where `load_ranking_model` finds it.
    """
    checkpoint = world.on_main(lambda: resolve(path))
    refuse_other_settings(config, contract(config), read_state(checkpoint, world), checkpoint, weights_only=True)
    folder = checkpoint.path / "draft"
    method = RankingMethod.read(config, folder, world.device)
    backend = FSDPTrainingBackend(method, config.train, world)
    CheckpointManager(Path(config.output_dir), world, config.checkpoint.keep).load_draft(checkpoint, backend)
    evaluator = RankingEvaluator(read_users(config, "eval", world), world, micro_batch_tokens=config.train.micro_batch_tokens)
    with backend.whole():
        predictions = evaluator.predict(scorer(method, backend))
    shift, measured = fit_and_measure(evaluator.store, predictions, world)
    if calibrate:
        world.on_main(lambda: write_shift(folder, shift))
    return evaluator.numbers(predictions) | measured
