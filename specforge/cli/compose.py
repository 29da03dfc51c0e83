"""From a RunConfig to ready objects; the one place where all packages meet.

`build_controller` is what the command line, scripts and tests call.
"""

import json
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specforge import files
from specforge.config import RunConfig, dump_config, to_dict
from specforge.config.methods import registered
from specforge.config.schema import EvalConfig
from specforge.data.conversations import Message, Row, prompt_of, read_rows, split_rows
from specforge.data.template import EncodedSet, Encoder, encode_all
from specforge.distributed import World, randomness
from specforge.errors import CheckpointError, ConfigError
from specforge.eval.cache import EvalCache
from specforge.eval.evaluator import Evaluator, why_no_walk
from specforge.features.capture import capture_features
from specforge.features.loader import FeatureDataLoader
from specforge.features.regenerate import Regenerated, regenerate
from specforge.features.store import FeatureMeta, LocalFeatureStore
from specforge.features.tables import TargetTables
from specforge.features.target import Target, aux_layer_ids
from specforge.log.run_log import RunLog
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import Checkpoint, CheckpointManager, changed_settings, find_checkpoints, read_state, resolve
from specforge.training.controller import TrainerController, refuse_after_non_finite
from specforge.training.state import TrainState

_FREE_TRAIN_SETTINGS = (
    "resume_from", "allow_config_change", "allow_non_finite", "log_every", "eval_every", "save_every", "micro_batch_tokens", "sharding",
)  # fmt: skip
"""Settings of `train` that may differ between a checkpoint and the run that continues it."""


@dataclass(frozen=True)
class Paths:
    """Where a run keeps what it makes."""

    run: Path
    features: Path
    cache: Path

    @classmethod
    def of(cls, config: RunConfig) -> "Paths":
        run = Path(config.output_dir)
        return cls(run, Path(config.features.path or run / "features" / "train"), Path(config.features.cache_dir or run / "features"))


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer, from a local folder."""
    path = Path(config.tokenizer_path)
    if not path.is_dir():
        raise ConfigError(f"model.tokenizer_path={str(path)!r}: there is no such folder; give the folder of a tokenizer or of the target.")
    return AutoTokenizer.from_pretrained(path, local_files_only=True)


def build_encoder(config: RunConfig) -> Encoder:
    data = config.data
    return Encoder(load_tokenizer(config), data.max_length, chat_template=data.chat_template, last_turn_only=data.last_turn_only)


def rows_of(config: RunConfig, split: str) -> list[Row]:
    """The rows of `train` or `eval`: the file of that name, else a share of the training file by a hash of the id."""
    if split == "eval" and config.data.eval_path:
        return list(read_rows(config.data.eval_path))
    rows = list(read_rows(config.data.train_path))
    if config.data.eval_path:
        return rows
    train, heldout = split_rows(rows, config.data.eval_fraction)
    return train if split == "train" else heldout


def encode(config: RunConfig, split: str) -> EncodedSet:
    encoded = encode_all(rows_of(config, split), build_encoder(config))
    if int(os.environ.get("RANK", "0")) == 0:
        for count, ids, what in (
            (encoded.unsupervised, encoded.unsupervised_ids, "have no supervised token"),
            (encoded.short, encoded.short_ids, "are too short"),
        ):
            if count:
                print(f"{split}: {count} of {encoded.num_rows} rows {what} and are left out ({', '.join(ids)}, ...)", file=sys.stderr)
        if encoded.truncated:
            print(f"{split}: {encoded.truncated} of {encoded.num_rows} rows are cut to data.max_length={config.data.max_length}", file=sys.stderr)
    return encoded


def read_tables(config: RunConfig) -> TargetTables:
    """The target's embedding and head in the data type of the features."""
    tables = TargetTables.read(config.model.target_path)
    dtype = getattr(torch, config.model.dtype)
    return replace(tables, embedding=tables.embedding.to(dtype), head=tables.head.to(dtype))


def feature_meta(config: RunConfig, tables: TargetTables) -> FeatureMeta:
    encoder = build_encoder(config)
    return FeatureMeta(
        target_path=config.model.target_path,
        target_fingerprint=_fingerprints(config).fingerprint(Path(config.model.target_path)),
        target_revision=config.model.target_revision,
        tokenizer_path=config.tokenizer_path,
        template_digest=encoder.template_digest,
        aux_layer_ids=aux_layer_ids(tables.config.num_hidden_layers, config.model.aux_layer_ids),
        dtype=config.model.dtype,
        hidden_size=tables.config.hidden_size,
        vocab_size=tables.config.vocab_size,
        max_length=config.data.max_length,
        mask_options=mask_options(config),
    )


def _fingerprints(config: RunConfig) -> files.Fingerprints:
    return files.Fingerprints(Paths.of(config).cache / "fingerprints.json")


def mask_options(config: RunConfig) -> tuple[tuple[str, str], ...]:
    """What decides which tokens are supervised and, without an evaluation file, which rows are held out."""
    held_out = "" if config.data.eval_path else str(config.data.eval_fraction)
    return (("last_turn_only", str(config.data.last_turn_only)), ("eval_fraction", held_out))


def eval_config(config: RunConfig, layers: tuple[int, ...]) -> EvalConfig:
    """The identity of this run's evaluation features."""
    return EvalConfig(
        eval_data_path=config.data.eval_path or config.data.train_path,
        target_path=config.model.target_path,
        target_revision=config.model.target_revision,
        tokenizer_path=config.tokenizer_path,
        chat_template=config.data.chat_template,
        aux_hidden_state_layer_ids=layers,
        max_length=config.data.max_length,
        feature_dtype=config.model.dtype,
        mask_options=mask_options(config),
        micro_batch_tokens=config.train.micro_batch_tokens,
        cache_dir=str(Paths.of(config).cache),
    )


@dataclass(frozen=True)
class ChatPrompt:
    """What the target is asked to answer: the messages, and their tokens with the header of the answer."""

    id: str
    domain: str
    messages: list[Message]
    prompt_ids: np.ndarray


class LazyTarget:
    """Loads the target at the first call and hands out the same one afterwards."""

    def __init__(self, config: RunConfig, world: World) -> None:
        self._config = config
        self._world = world
        self._target: Target | None = None

    def __call__(self) -> Target:
        if self._target is None:
            model = self._config.model
            self._target = Target.load(model.target_path, model.dtype, self._world.device, model.device_map)
        return self._target


def capture(config: RunConfig, split: str, folder: Path, meta: FeatureMeta, target: Callable[[], Target], world: World) -> None:
    """Features of a split into `folder`, on all ranks together."""
    features = config.features
    capture_features(
        encode(config, split).samples, target, folder, meta, world,
        capture_tokens=features.capture_tokens, shard_bytes=features.shard_mib * 2**20,
    )  # fmt: skip


def train_store(config: RunConfig, meta: FeatureMeta, target: Callable[[], Target], world: World) -> LocalFeatureStore:
    """The training features: captured if they are not there, refused if they are of another target or layer set."""
    folder = Paths.of(config).features
    if not world.from_main(folder.is_dir()):
        capture(config, "train", folder, meta, target, world)
    store = LocalFeatureStore(folder)
    fields = ("target_fingerprint", "aux_layer_ids", "dtype", "template_digest", "max_length", "mask_options")
    store.expect(**{name: getattr(meta, name) for name in fields})
    return store


def eval_store(config: RunConfig, meta: FeatureMeta, target: Callable[[], Target], world: World) -> LocalFeatureStore:
    """The evaluation features, produced at most once per identity."""
    identity = eval_config(config, meta.aux_layer_ids)
    cache = EvalCache.for_config(identity)
    entry = cache.get_or_produce(identity, lambda staging: capture(config, "eval", staging / "store", meta, target, world), world)
    return LocalFeatureStore(entry / "store")


def prepare_features(config: RunConfig, world: World) -> tuple[LocalFeatureStore, LocalFeatureStore]:
    """Held-out and training features, captured where they are not there yet."""
    meta, target = feature_meta(config, read_tables(config)), LazyTarget(config, world)
    return eval_store(config, meta, target, world), train_store(config, meta, target, world)


def regenerate_answers(config: RunConfig, out: Path, world: World, *, max_new_tokens: int, temperature: float, batch_rows: int) -> Regenerated:
    """The target's own answers to the prompts of `data.train_path`."""
    encoder = build_encoder(config)
    prompts = [
        ChatPrompt(row.id, row.domain, prompt_of(row), encoder.prompt_ids(prompt_of(row), row.tools)) for row in read_rows(config.data.train_path)
    ]
    return regenerate(
        prompts, LazyTarget(config, world), load_tokenizer(config), out, world,
        max_new_tokens=max_new_tokens, temperature=temperature, seed=config.seed, batch_rows=batch_rows,
    )  # fmt: skip


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
    whole = json.loads(json.dumps(to_dict(config)))
    train = {key: value for key, value in whole["train"].items() if key not in _FREE_TRAIN_SETTINGS}
    data = {key: value for key, value in whole["data"].items() if key != "exclude_ids"}
    return {"seed": whole["seed"], "model": whole["model"], "method": whole["method"], "data": data, "train": train}


def starting_point(config: RunConfig, world: World) -> Checkpoint | None:
    """The checkpoint to begin from: what `train.resume_from` names or, after a torchrun restart, the newest one.

    Raises:
        CheckpointError: `resume_from` names none, or the folder holds a run and `resume_from` is empty.
    """
    folder = Paths.of(config).run
    complete = find_checkpoints(folder)
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) and complete:
        return complete[-1]
    if config.train.resume_from:
        return resolve(Path(config.train.resume_from))
    if complete:
        raise CheckpointError(
            f"output_dir={str(folder)!r}: holds a run already ({complete[-1].path.name}); set train.resume_from={folder}/latest to continue it, "
            "or choose another output_dir."
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


def build_controller(config: RunConfig, world: World) -> TrainerController:
    """A controller ready for `fit()`: features captured, draft built or read, state restored, evaluation attached."""
    folder = Paths.of(config).run
    refuse_after_non_finite(folder, config.train, config.data.exclude_ids)
    start = world.from_main(starting_point(config, world) if world.is_main else None)
    randomness.seed_all(config.seed, world.rank)
    if world.is_main:
        _write_config(folder, config)
    tables = read_tables(config)
    heldout, store = prepare_features(config, world)

    implementation, options = registered(config.method.name).load(), config.method.options
    origin = start or (resolve(Path(config.model.draft_path)) if config.model.draft_path else None)
    if origin is None:
        method = implementation.build(options, tables, store, config.seed)
    else:
        _check_contract(config, read_state(origin, world), origin, weights_only=start is None)
        method = implementation.read(options, tables, origin.path / "draft")
    backend = FSDPTrainingBackend(method, config.train, world)
    checkpoints = CheckpointManager(folder, world, config.checkpoint.keep, config.checkpoint.best_metric)

    state, note = TrainState(config.run_id), None
    if start is not None:
        state, saved_size = checkpoints.load(start, backend)
        run_id = world.from_main(fork_id(folder, start, config.run_id) if world.is_main else "")
        if run_id != state.run_id:
            note = {"event": "fork", "parent": start.path.name, "run_id": run_id, "step": state.step}
            state = TrainState(run_id, state.step, state.samples_seen, start.path.name)
        else:
            note = {"event": "resume", "checkpoint": start.path.name, "step": state.step}
        if saved_size != world.size:
            note["random_streams"] = f"derived anew: saved by {saved_size} ranks, continued by {world.size}"
            randomness.seed_all(config.seed, world.rank, state.step)
    elif origin is not None:
        checkpoints.load_draft(origin, backend)
        note = {"event": "draft", "checkpoint": str(origin.path), "step": 0}

    total_steps, total_samples = horizon(config, len(store))
    data = FeatureDataLoader(
        store, config.seed, config.train.batch_samples, config.train.micro_batch_tokens, total_samples, world, config.data.exclude_ids
    )
    log = RunLog(folder, world, config.log.wandb, config.log.wandb_project, state.run_id, to_dict(config))
    if note:
        log.note(**note)
    evaluator = build_evaluator(config, heldout, method.draft_tokens, world)
    return TrainerController(
        config=config.train, total_steps=total_steps, method=method, backend=backend, data=data, checkpoints=checkpoints, log=log,
        world=world, state=state, settings=contract(config), evaluate=lambda: evaluator.evaluate(method, backend),
    )  # fmt: skip


def horizon(config: RunConfig, num_samples: int) -> tuple[int, int]:
    """(optimiser steps, samples) of the whole run; the last step may be smaller."""
    batch = config.train.batch_samples
    samples = config.train.steps * batch or config.train.epochs * num_samples
    return -(-samples // batch), samples


def _check_contract(config: RunConfig, stored: dict[str, Any], checkpoint: Checkpoint, *, weights_only: bool) -> None:
    now, then = contract(config), stored["settings"]
    if now["method"]["name"] != then["method"]["name"]:
        raise CheckpointError(
            f"{checkpoint.path}: was trained by method {then['method']['name']!r}, this run uses {now['method']['name']!r}; "
            "set method.name to the checkpoint's or start without it."
        )
    differences = changed_settings(then, now)
    if differences and not weights_only and not config.train.allow_config_change:
        raise CheckpointError(
            f"{checkpoint.path}: its settings differ from this run's:\n  " + "\n  ".join(differences)
            + "\nUse the checkpoint's values, or set train.allow_config_change=true to go on with the new ones."
        )  # fmt: skip


def _write_config(folder: Path, config: RunConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text, path = dump_config(config), folder / "config.yaml"
    number = 1
    while path.is_file() and path.read_text() != text:
        number += 1
        path = folder / f"config-{number}.yaml"
    if not path.is_file():
        files.write_text(path, text)


def evaluate_checkpoint(config: RunConfig, path: Path, world: World) -> dict[str, Any]:
    """`eval/*` numbers of a checkpoint; the target is loaded only if its features are not in the cache."""
    checkpoint = world.from_main(resolve(path) if world.is_main else None)
    tables = read_tables(config)
    meta = feature_meta(config, tables)
    store = eval_store(config, meta, LazyTarget(config, world), world)
    _check_contract(config, read_state(checkpoint, world), checkpoint, weights_only=True)
    method = registered(config.method.name).load().read(config.method.options, tables, checkpoint.path / "draft")
    backend = FSDPTrainingBackend(method, config.train, world)
    CheckpointManager(Paths.of(config).run, world, config.checkpoint.keep).load_draft(checkpoint, backend)
    evaluator = build_evaluator(config, store, method.draft_tokens, world)
    with backend.whole():
        numbers = evaluator.evaluate(method, backend)
    if world.is_main and (reason := why_no_walk(numbers)):
        print(reason, file=sys.stderr)
    return {**numbers, "target_loads": Target.loads, "target_forwards": Target.forwards}


def report(controller: TrainerController, state: TrainState) -> None:
    """The last line of a training: where it ended and which step was best."""
    best = controller.checkpoints.best
    if controller.world.is_main:
        print(f"done: {state.run_id} at step {state.step}" + (f"; best step {best.step}, {best.metric} {best.score:.3f}" if best else ""))


def set_threads(world: World) -> None:
    """Share the cores of a machine among its ranks; torchrun by itself gives each rank one thread."""
    if world.device.type == "cpu":
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // world.local_size))
