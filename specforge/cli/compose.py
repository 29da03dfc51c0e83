"""From a RunConfig to a ready controller; `build_controller` is what the command line, scripts and tests call."""

import os
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch

from specforge.cli.continuing import continued, horizon, refuse_other_settings, settings_of, starting_point, write_config
from specforge.cli.draft import require_same_target
from specforge.cli.evaluation import TEXTS_OF_DOMAIN, record_of
from specforge.cli.inputs import LazyTarget, Paths, eval_store, feature_meta, prepare_features, read_tables
from specforge.config import RunConfig, to_dict
from specforge.config.methods import registered
from specforge.decode.engine import Decoder
from specforge.decode.tree import TreeShape
from specforge.distributed import World, randomness
from specforge.errors import CheckpointError, ConfigError
from specforge.eval.evaluator import Evaluator, why_no_walk
from specforge.eval.live import decode_answers, live_numbers
from specforge.eval.record import EvaluationRecord, rows_digest
from specforge.eval.simulate import simulate
from specforge.features.loader import FeatureDataLoader
from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from specforge.log.run_log import RunLog
from specforge.methods.base import Moment
from specforge.models.calibration import write_calibrations
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.controller import TrainerController, refuse_after_non_finite
from specforge.training.run_folder import Checkpoint, read_state, resolve
from specforge.training.state import TrainState


def build_evaluator(config: RunConfig, store: LocalFeatureStore, draft_tokens: int, world: World) -> Evaluator:
    chosen = config.eval.draft_tokens or draft_tokens
    if chosen > draft_tokens:
        raise ConfigError(f"eval.draft_tokens={chosen}: the draft was trained for {draft_tokens}; choose at most that many.")
    return Evaluator(
        store, world, draft_tokens=chosen, micro_batch_tokens=config.train.micro_batch_tokens,
        max_samples=config.eval.max_samples, bootstrap=config.eval.bootstrap, seed=config.seed,
    )  # fmt: skip


def contract(config: RunConfig) -> dict[str, Any]:
    """The settings that a checkpoint remembers and a resumed run must share."""
    whole = settings_of(config)
    data = {key: value for key, value in whole["data"].items() if key != "exclude_ids"}
    features = {"teacher_top_k": whole["features"]["teacher_top_k"]}
    return {
        "seed": whole["seed"],
        "model": whole["model"],
        "method": whole["method"],
        "data": data,
        "features": features,
        "train": whole["train"],
    }


def build_controller(config: RunConfig, world: World) -> TrainerController:
    """A controller ready for `fit()`: features captured, draft built or read, state restored, evaluation attached.

    What can be refused is refused before anything is written.
    """
    folder = Paths.of(config).run
    tables = read_tables(config)
    refuse_after_non_finite(folder, config.train, config.data.exclude_ids)
    start = world.on_main(lambda: starting_point(config))
    origin = start or (resolve(Path(config.model.draft_path), "model.draft_path") if config.model.draft_path else None)
    if origin is not None:
        _check_contract(config, read_state(origin, world), origin, weights_only=start is None)

    with ExitStack() as undo:
        checkpoints = CheckpointManager(folder, world, config.checkpoint.keep, config.checkpoint.best_metric)
        checkpoints.claim()
        undo.callback(checkpoints.release)
        world.on_main(lambda: write_config(folder, config))
        heldout, store = prepare_features(config, tables, world)

        randomness.seed_all(config.seed, world.rank)
        implementation, options = registered(config.method.name).load(), config.method.options
        if origin is None:
            method = implementation.build(options, tables, store, config.seed)
        else:
            method = implementation.read(options, tables, origin.path / "draft")
        backend = FSDPTrainingBackend(method, config.train, world)
        state, note = TrainState(config.run_id), None
        if start is not None:
            state, note = continued(config, start, checkpoints, backend, world)
        elif origin is not None:
            checkpoints.load_draft(origin, backend)
            note = {"event": "draft", "checkpoint": str(origin.path), "step": 0}

        total_steps, total_samples = horizon(config, len(store), state)
        data = FeatureDataLoader(
            store, config.seed, config.train.batch_samples, config.train.micro_batch_tokens, total_samples, world,
            config.data.exclude_ids, plan=lambda batch, step: method.plan(batch, Moment(config.seed, step, total_steps)),
        )  # fmt: skip
        evaluator = build_evaluator(config, heldout, method.draft_tokens, world)
        remembered = {"target_fingerprint": heldout.meta.target_fingerprint, "heldout_rows": rows_digest(heldout, config.eval.max_samples)}
        log = RunLog(folder, world, config.log.wandb, config.log.wandb_project, state.run_id, to_dict(config))
        if note:
            log.note(**note)
        undo.pop_all()
    return TrainerController(
        config=config.train, total_steps=total_steps, method=method, backend=backend, data=data, checkpoints=checkpoints, log=log,
        world=world, state=state, settings=contract(config) | remembered,
        evaluate=lambda: evaluator.evaluate(method, backend), seed=config.seed,
    )  # fmt: skip


def _check_contract(config: RunConfig, stored: dict[str, Any], checkpoint: Checkpoint, *, weights_only: bool) -> None:
    now, trained_by = contract(config), stored["settings"].get("method", {}).get("name")
    if now["method"]["name"] != trained_by:
        raise CheckpointError(
            f"{checkpoint.path}: was trained by method {trained_by!r}, this run uses {now['method']['name']!r}; "
            "set method.name to the checkpoint's or start without it."
        )
    refuse_other_settings(config, now, stored, checkpoint, weights_only=weights_only)


def evaluate_checkpoint(
    config: RunConfig, path: Path, world: World, *, calibrate: bool = False, live: int = 0, trees: Sequence[TreeShape] = ()
) -> dict[str, Any]:
    """`eval/*` numbers of a checkpoint; the target is loaded only if its features are not in the cache.

    The run's folder keeps them in `evaluations/`, where it can be written.

    Args:
        calibrate: store the scalings of the draft's confidence in its folder.
        live: decode the answers of so many samples too, greedily, and set the walk over the same samples beside it.
        trees: shapes whose tokens per round to find from the stored features.
    """
    checkpoint = world.on_main(lambda: resolve(path))
    state = read_state(checkpoint, world)
    settings = state["settings"]
    _check_contract(config, state, checkpoint, weights_only=True)
    world.on_main(lambda: require_same_target(checkpoint, settings.get("target_fingerprint"), Path(config.model.target_path)))
    tables = read_tables(config)
    meta = feature_meta(config, tables, world)
    asked_s = time.perf_counter()
    target = LazyTarget(config, world)
    store = eval_store(config, meta, target, world)
    cache_s = time.perf_counter() - asked_s
    method = registered(config.method.name).load().read(config.method.options, tables, checkpoint.path / "draft")
    backend = FSDPTrainingBackend(method, config.train, world)
    CheckpointManager(Paths.of(config).run, world, config.checkpoint.keep).load_draft(checkpoint, backend)
    evaluator = build_evaluator(config, store, method.draft_tokens, world)
    with backend.whole():
        calibrated = evaluator.calibrate(method, backend, walked_of_domain=TEXTS_OF_DOMAIN)
        numbers = calibrated.numbers
        if live:
            numbers |= _live(config, method, backend, store, target(), min(live, len(store)), world)
        numbers |= _simulated(config, method, trees, store, world)
    if calibrate:
        world.on_main(lambda: write_calibrations(checkpoint.path / "draft", calibrated.scalings))
    world.on_main(lambda: _keep(record_of(config, checkpoint, settings, store, calibrated, numbers, world), checkpoint))
    if world.is_main and (reason := why_no_walk(numbers)):
        print(reason, file=sys.stderr)
    return {**numbers, "target_loads": Target.loads, "target_forwards": Target.forwards, "cache_s": round(cache_s, 3)}


def _keep(record: EvaluationRecord, checkpoint: Checkpoint) -> None:
    """Somebody else's checkpoint can be measured too; then the numbers are printed and not kept."""
    try:
        record.write(checkpoint.path.parent)
    except CheckpointError as error:
        print(f"this evaluation is not kept for `specforge report`: {error}", file=sys.stderr)


def _live(
    config: RunConfig, method: Any, backend: FSDPTrainingBackend, store: LocalFeatureStore, target: Target, samples: int, world: World
) -> dict[str, Any]:
    """`eval/live/*`: what greedy decoding of the first samples shows, and the walk that predicts it."""
    draft_tokens = config.eval.draft_tokens or method.draft_tokens
    drafter = registered(config.method.name).load_drafter()(method, draft_tokens)
    answers = decode_answers(Decoder(target, drafter), store, range(world.rank, samples, world.size))
    evaluator = Evaluator(
        store, world, draft_tokens=draft_tokens, micro_batch_tokens=config.train.micro_batch_tokens, max_samples=samples, bootstrap=0
    )
    predicted = evaluator.evaluate(method, backend)
    numbers = {
        "samples": samples,
        "predicted_tokens_per_round": predicted.get("eval/walk_acc_len"),
        "predicted_histogram": predicted.get("eval/walk_histogram", []),
        **live_numbers(answers, draft_tokens, world),
    }
    return {f"eval/live/{name}": value for name, value in numbers.items()}


def _simulated(config: RunConfig, method: Any, trees: Sequence[TreeShape], store: LocalFeatureStore, world: World) -> dict[str, Any]:
    """`eval/trees`: tokens per round of each shape along the stored answers."""
    samples = min(config.eval.max_samples or len(store), len(store))
    found = {}
    for shape in trees:
        drafter = registered(config.method.name).load_tree_drafter()(method, shape)
        texts = simulate(drafter, store, range(world.rank, samples, world.size), world.device)
        committed = [tokens for text in texts for tokens in text.committed]
        sums = torch.tensor([sum(committed), len(committed)], device=world.device)
        tokens, rounds = world.sum_(sums.double()).tolist()
        found[str(shape)] = tokens / max(rounds, 1)
    return {"eval/trees": found} if found else {}


def report(controller: TrainerController, state: TrainState) -> None:
    """The last line of a training: where it ended and which step was best."""
    best = controller.checkpoints.best
    if controller.world.is_main:
        print(f"done: {state.run_id} at step {state.step}" + (f"; best step {best.step}, {best.metric} {best.score:.3f}" if best else ""))


def set_threads(world: World) -> None:
    """Share the cores of a machine among its ranks. OMP_NUM_THREADS decides for one rank; of several it is torchrun that sets it, to 1."""
    if world.device.type == "cpu" and (world.local_size > 1 or "OMP_NUM_THREADS" not in os.environ):
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
