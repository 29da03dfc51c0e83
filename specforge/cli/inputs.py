"""What a run reads: rows, tokens, the target's tables, and its features on disk or in the evaluation cache."""

import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from specforge import files
from specforge.config import RunConfig
from specforge.config.schema import EvalConfig
from specforge.data.conversations import Message, Row, prompt_of, read_rows, split_rows
from specforge.data.template import EncodedSet, Encoder, encode_all
from specforge.distributed import World
from specforge.errors import ConfigError, FeatureError
from specforge.eval.cache import EvalCache
from specforge.features.capture import capture_features
from specforge.features.online import OnlineFeatureStore
from specforge.features.producer import Producer
from specforge.features.regenerate import Regenerated, regenerate
from specforge.features.shared import SharedDirFeatureStore
from specforge.features.source import FeatureStore
from specforge.features.store import FeatureMeta, LocalFeatureStore
from specforge.features.tables import TargetTables
from specforge.features.target import Target, aux_layer_ids


@dataclass(frozen=True)
class Paths:
    """Where a run keeps what it makes."""

    run: Path
    features: Path
    cache: Path

    @classmethod
    def of(cls, config: RunConfig) -> "Paths":
        run = Path(config.output_dir)
        folder = "shared" if config.features.source == "shared" else "train"
        return cls(run, Path(config.features.path or run / "features" / folder), Path(config.features.cache_dir or run / "features"))


def load_tokenizer(config: RunConfig) -> PreTrainedTokenizerBase:
    """The run's tokenizer, from a local folder."""
    path = Path(config.tokenizer_path)
    if not path.is_dir():
        raise ConfigError(f"model.tokenizer_path={str(path)!r}: there is no such folder; give the folder of a tokenizer or of the target.")
    with files.foreign(path, ConfigError, "model.tokenizer_path must hold a tokenizer that transformers loads without code of its own"):
        return AutoTokenizer.from_pretrained(path, local_files_only=True, trust_remote_code=False)


def build_encoder(config: RunConfig) -> Encoder:
    data = config.data
    return Encoder(load_tokenizer(config), data.max_length, chat_template=data.chat_template, last_turn_only=data.last_turn_only)


def rows_of(config: RunConfig, split: str) -> list[Row]:
    """The rows of `train` or `eval`: the file of that name, else a share of the training file by a hash of the id.

    `all` is the whole training file.
    """
    if split == "eval" and config.data.eval_path:
        return list(read_rows(config.data.eval_path))
    rows = list(read_rows(config.data.train_path))
    if config.data.eval_path or split == "all":
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
            print(
                f"{split}: {encoded.truncated} of {encoded.num_rows} rows are cut to data.max_length={config.data.max_length}",
                file=sys.stderr,
            )
    return encoded


def read_tables(config: RunConfig) -> TargetTables:
    """The target's embedding and head in the data type of the features."""
    tables = TargetTables.read(config.model.target_path)
    dtype = getattr(torch, config.model.dtype)
    return replace(tables, embedding=tables.embedding.to(dtype), head=tables.head.to(dtype))


def captured_layers(config: RunConfig, num_layers: int) -> tuple[int, ...]:
    """The layers of a target of `num_layers` that this run reads: those asked for, else those that its method reads."""
    return aux_layer_ids(num_layers, config.model.aux_layer_ids or config.method.options.captured_layers(num_layers))


def feature_meta(config: RunConfig, tables: TargetTables, world: World) -> FeatureMeta:
    """What this run's features are; the target's files are hashed by rank 0."""
    encoder, target = build_encoder(config), Path(config.model.target_path)
    return FeatureMeta(
        target_path=config.model.target_path,
        target_fingerprint=world.on_main(lambda: _fingerprints(config).fingerprint(target)),
        target_revision=config.model.target_revision,
        tokenizer_path=config.tokenizer_path,
        template_digest=encoder.template_digest,
        aux_layer_ids=captured_layers(config, tables.config.num_hidden_layers),
        dtype=config.model.dtype,
        hidden_size=tables.config.hidden_size,
        vocab_size=tables.config.vocab_size,
        max_length=config.data.max_length,
        mask_options=mask_options(config),
        teacher_top_k=_teacher_top_k(config, tables),
    )


def _teacher_top_k(config: RunConfig, tables: TargetTables) -> int:
    top_k, vocab_size = config.features.teacher_top_k, tables.config.vocab_size
    if top_k > vocab_size:
        raise ConfigError(f"features.teacher_top_k={top_k}: the target has {vocab_size} ids; keep fewer, 64 for instance.")
    return top_k


def _fingerprints(config: RunConfig) -> files.Fingerprints:
    return files.Fingerprints(Paths.of(config).cache / ".fingerprints.json")


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


def train_store(config: RunConfig, meta: FeatureMeta, target: Callable[[], Target], world: World) -> FeatureStore:
    """The training features from `features.source`; those of another target or layer set are refused."""
    features, folder = config.features, Paths.of(config).features
    if features.source == "offline":
        return captured_store(config, meta, target, world)
    samples = encode(config, "train").samples
    if features.source == "online":
        return OnlineFeatureStore(samples, meta, target, features.capture_tokens)
    return SharedDirFeatureStore(
        folder, samples, meta, world, capture_tokens=features.capture_tokens, ahead=features.ahead_steps,
        wait_s=features.wait_s, retain_on_release=features.retain,
    )  # fmt: skip


def has_features(config: RunConfig) -> bool:
    """Whether the training features are on disk. Raises FeatureError where a folder of something else has their place."""
    folder = Paths.of(config).features
    if not folder.is_dir() or (folder / files.MANIFEST).is_file():
        return folder.is_dir()
    below = folder / "train"
    raise FeatureError(
        f"features.path={str(folder)!r}: is no folder of features, it has no {files.MANIFEST}; "
        + (f"give {str(below)!r}." if (below / files.MANIFEST).is_file() else "give one that was captured, or a name that is free.")
    )


def captured_store(config: RunConfig, meta: FeatureMeta, target: Callable[[], Target], world: World) -> LocalFeatureStore:
    """The training features on disk, captured if they are not there."""
    folder = Paths.of(config).features
    if not world.on_main(lambda: has_features(config)):
        capture(config, "train", folder, meta, target, world)
    store = LocalFeatureStore(folder)
    fields = ("target_fingerprint", "aux_layer_ids", "dtype", "template_digest", "max_length", "mask_options", "teacher_top_k")
    store.expect(**{name: getattr(meta, name) for name in fields})
    world.on_main(lambda: store.verify(_fingerprints(config)))
    return store


def producer(config: RunConfig, world: World) -> Producer:
    """What makes this configuration's training features in a shared folder."""
    meta = feature_meta(config, read_tables(config), world)
    samples = encode(config, "train").samples
    return Producer(Paths.of(config).features, samples, meta, LazyTarget(config, world), wait_s=config.features.wait_s)


def eval_store(config: RunConfig, meta: FeatureMeta, target: Callable[[], Target], world: World) -> LocalFeatureStore:
    """The evaluation features, produced at most once per identity; their teacher is always the exact one."""
    identity = eval_config(config, meta.aux_layer_ids)
    cache = EvalCache.for_config(identity)
    exact = replace(meta, teacher_top_k=0)
    entry = cache.get_or_produce(identity, lambda staging: capture(config, "eval", staging / "store", exact, target, world), world)
    return LocalFeatureStore(entry / "store")


def prepare_features(config: RunConfig, tables: TargetTables, world: World) -> tuple[LocalFeatureStore, FeatureStore]:
    """Held-out and training features; what is kept is captured where it is not there yet."""
    if config.features.source == "offline":
        world.on_main(lambda: has_features(config))
    meta, target = feature_meta(config, tables, world), LazyTarget(config, world)
    return eval_store(config, meta, target, world), train_store(config, meta, target, world)


def regenerate_answers(
    config: RunConfig, out: Path, world: World, *, max_new_tokens: int, temperature: float, batch_rows: int
) -> Regenerated:
    """The target's own answers to the prompts of `data.train_path`."""
    encoder = build_encoder(config)
    prompts = [
        ChatPrompt(row.id, row.domain, prompt_of(row), encoder.prompt_ids(prompt_of(row), row.tools))
        for row in read_rows(config.data.train_path)
    ]
    return regenerate(
        prompts, LazyTarget(config, world), load_tokenizer(config), out, world,
        max_new_tokens=max_new_tokens, temperature=temperature, seed=config.seed, batch_rows=batch_rows,
    )  # fmt: skip
