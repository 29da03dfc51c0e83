"""CheckpointManager: complete or absent, the best remembered, nothing newer ever deleted.

RUN/{run_id}-step{N}/   manifest.json   sizes and checksums of all the files below
                        state.json      step, position, world size, the settings that must not change
                        rng-rank{r}.json
                        draft/          config.json and safetensors, one shard a rank
                        optimizer/      safetensors, one shard a rank
RUN/latest, RUN/best    relative links; where links cannot be made, the newest step and `best_meta.json` serve
RUN/best_meta.json      checkpoint, step, score, metric, metrics
"""

import math
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException

from specforge import files
from specforge.distributed import World, randomness
from specforge.errors import CheckpointError, ConfigError, SpecForgeError
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.state import TrainState

FORMAT_VERSION = 1
T = TypeVar("T")
_NAME = re.compile(r"(?P<run_id>.+)-step(?P<step>\d+)")
_LOWER_IS_BETTER = ("loss", "ece", "brier")


@dataclass(frozen=True)
class Checkpoint:
    """A complete step folder."""

    path: Path
    run_id: str
    step: int


@dataclass(frozen=True)
class Best:
    """The best evaluation so far; `checkpoint` is the name of its step folder."""

    checkpoint: str
    step: int
    score: float
    metric: str
    metrics: dict[str, Any]


def find_checkpoints(folder: Path) -> list[Checkpoint]:
    """All complete checkpoints of a run folder, oldest step first."""
    found = []
    for path in folder.iterdir() if folder.is_dir() else ():
        match = _NAME.fullmatch(path.name)
        if match and not path.is_symlink() and (path / files.MANIFEST).is_file():
            found.append(Checkpoint(path, match["run_id"], int(match["step"])))
    return sorted(found, key=lambda checkpoint: (checkpoint.step, checkpoint.run_id))


def read_best(folder: Path) -> Best | None:
    """What `best_meta.json` says, unless its checkpoint is gone."""
    path = folder / "best_meta.json"
    if not path.is_file():
        return None
    stored = files.read_json(path, error=CheckpointError)
    best = Best(**{key: stored[key] for key in ("checkpoint", "step", "score", "metric", "metrics")})
    return best if (files.inside(folder, best.checkpoint, CheckpointError) / files.MANIFEST).is_file() else None


def resolve(path: Path) -> Checkpoint:
    """The checkpoint that `RUN/latest`, `RUN/best` or a step folder means, also where links could not be made.

    Raises:
        CheckpointError: there is no complete checkpoint at that path.
    """
    folder = path.resolve() if path.exists() else path
    if not folder.is_dir() and path.name == "best":
        best = read_best(path.parent)
        folder = path.parent / best.checkpoint if best else path
    elif not folder.is_dir() and path.name == "latest":
        complete = find_checkpoints(path.parent)
        folder = complete[-1].path if complete else path
    for checkpoint in find_checkpoints(folder.parent):
        if checkpoint.path.name == folder.name:
            return checkpoint
    known = [checkpoint.path.name for checkpoint in find_checkpoints(path.parent)]
    raise CheckpointError(
        f"train.resume_from={str(path)!r}: no complete checkpoint is there; "
        + (f"complete ones beside it: {', '.join(known)}." if known else "give RUN/latest, RUN/best or a step folder.")
    )


def changed_settings(stored: Mapping[str, Any], current: Mapping[str, Any], prefix: str = "") -> list[str]:
    """Readable differences of two nested settings."""
    lines = []
    for key in sorted({*stored, *current}):
        before, now = stored.get(key), current.get(key)
        if isinstance(before, Mapping) and isinstance(now, Mapping):
            lines += changed_settings(before, now, f"{prefix}{key}.")
        elif before != now:
            lines.append(f"{prefix}{key}: checkpoint {before!r}, now {now!r}")
    return lines


class CheckpointManager:
    """Saves, loads, rotates and ranks the checkpoints of one run folder. All methods are called on every rank alike."""

    def __init__(self, folder: Path, world: World, keep: int, best_metric: str = "") -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self._metric = best_metric
        self.best: Best | None = world.on_main(lambda: read_best(folder))
        self._lock = files.Lock(folder / ".lock")

    def claim(self, patience_s: float = 10.0) -> None:
        """Make this run the only one that writes here, until `release` or the end of the process.

        Raises:
            CheckpointError: another run still writes here after `patience_s` (workers outlive a killed torchrun by a step).
        """
        held = True
        if self.world.is_main:
            deadline_s = time.monotonic() + patience_s
            while not (held := self._lock.try_acquire()) and time.monotonic() < deadline_s:
                time.sleep(0.1)
        if not self.world.from_main(held):
            raise CheckpointError(
                f"output_dir={str(self.folder)!r}: another run writes here now; wait for its end or choose another output_dir."
            )

    def release(self) -> None:
        self._lock.release()

    def path(self, state: TrainState) -> Path:
        return self.folder / f"{state.run_id}-step{state.step}"

    def save(self, state: TrainState, backend: FSDPTrainingBackend, draft_config: dict[str, Any], settings: dict[str, Any]) -> Path:
        """Write the step folder beside its place, rename it there, point `latest` at it and rotate.

        Raises:
            CheckpointError: some rank could not write; nothing of the attempt stays and older checkpoints are untouched.
        """
        final = self.path(state)
        if self.world.is_main and final.is_dir() and not (final / files.MANIFEST).is_file():
            shutil.rmtree(final)
        staged = self._on_main(lambda: str(files.new_staging(final)), final.name)
        failures = [text for text in self.world.gather_objects(self._written(Path(staged), state, backend, draft_config, settings)) if text]
        try:
            if failures:
                raise CheckpointError(f"checkpoint {final.name} was not saved: {failures[0]} Earlier checkpoints are untouched.")
            self._on_main(lambda: files.publish(Path(staged), final), final.name)
        finally:
            if self.world.is_main:
                shutil.rmtree(staged, ignore_errors=True)
        if self.world.is_main:
            files.relative_link(self.folder / "latest", final.name)
        self._rotate(state)
        return final

    def _on_main(self, act: Callable[[], T], name: str) -> T:
        try:
            return self.world.on_main(act)
        except (OSError, SpecForgeError) as error:
            raise CheckpointError(f"checkpoint {name} was not saved: {error} Earlier checkpoints are untouched.") from error

    def _written(
        self, staged: Path, state: TrainState, backend: FSDPTrainingBackend, draft_config: dict[str, Any], settings: dict[str, Any]
    ) -> str | None:
        """Write this rank's share; the reason if that failed."""
        try:
            for name, tensors in (("draft", backend.draft_state()), ("optimizer", backend.optimizer_state())):
                (staged / name).mkdir(exist_ok=True)
                writer = HuggingFaceStorageWriter(str(staged / name), save_distributed=True)
                with _quiet_alone():
                    dcp.save(tensors, storage_writer=writer, no_dist=self.world.size == 1)
            files.write_json(staged / f"rng-rank{self.world.rank}.json", randomness.capture())
            if self.world.is_main:
                files.write_json(staged / "draft" / "config.json", draft_config)
                stored = {"format_version": FORMAT_VERSION, **state.as_dict(), "world_size": self.world.size, "settings": settings}
                files.write_json(staged / "state.json", stored)
        except (OSError, CheckpointException) as error:
            return f"rank {self.world.rank}: {error}"
        return None

    def load(self, checkpoint: Checkpoint, backend: FSDPTrainingBackend) -> tuple[TrainState, int]:
        """Fill parameters, moments and random state; returns where the run stood and the world size that saved it.

        Random state is restored at the same world size only; at another one the fresh streams of this run go on.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the draft.
        """
        stored = read_state(checkpoint, self.world)
        for name, tensors in (("draft", backend.draft_state()), ("optimizer", backend.optimizer_state())):
            self._read(checkpoint.path / name, tensors)
        if stored["world_size"] == self.world.size:
            randomness.restore(files.read_json(checkpoint.path / f"rng-rank{self.world.rank}.json", error=CheckpointError))
        state = TrainState(**{key: stored[key] for key in ("run_id", "step", "samples_seen", "parent")})
        return state, int(stored["world_size"])

    def load_draft(self, checkpoint: Checkpoint, backend: FSDPTrainingBackend) -> None:
        """Fill the draft's weights only, for evaluation or for a new run that starts from an earlier draft."""
        read_state(checkpoint, self.world)
        self._read(checkpoint.path / "draft", backend.draft_state())

    def _read(self, folder: Path, tensors: dict[str, torch.Tensor]) -> None:
        try:
            with _quiet_alone():
                dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=self.world.size == 1)
        except CheckpointException as error:
            reason = str(next(iter(error.failures.values()))[0])
            raise CheckpointError(
                f"{folder}: cannot be loaded into this draft: {reason}. Take a checkpoint of the same method and model."
            ) from error

    def _rotate(self, state: TrainState) -> None:
        """Drop this run's own older checkpoints beyond the newest `keep`; never the best, never anything newer."""
        if self.keep and self.world.is_main:
            own = [c for c in find_checkpoints(self.folder) if c.run_id == state.run_id and c.step <= state.step]
            for old in own[: -self.keep]:
                if self.best is None or old.path.name != self.best.checkpoint:
                    (old.path / files.MANIFEST).unlink()
                    shutil.rmtree(old.path)
        self.world.barrier()

    def metric(self, metrics: Mapping[str, Any]) -> str:
        """The metric that decides, given what an evaluation produced.

        Raises:
            ConfigError: `checkpoint.best_metric` is not among the numbers.
        """
        if self._metric and not isinstance(metrics.get(self._metric), int | float):
            numbers = ", ".join(sorted(name for name, value in metrics.items() if isinstance(value, int | float)))
            raise ConfigError(f"checkpoint.best_metric={self._metric!r}: this evaluation does not produce it; choose one of {numbers}.")
        return self._metric or ("eval/walk_acc_len" if "eval/walk_acc_len" in metrics else "eval/acc_len")

    def is_best(self, metrics: Mapping[str, Any]) -> bool:
        """Whether an evaluation beats the best so far (strictly); rank 0 decides for all."""
        metric = self.metric(metrics)
        score = metrics.get(metric, math.nan)
        if self.best is None or self.best.metric != metric:
            better = not math.isnan(score)
        elif any(word in metric for word in _LOWER_IS_BETTER):
            better = score < self.best.score
        else:
            better = score > self.best.score
        return bool(self.world.from_main(better))

    def mark_best(self, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Remember the saved checkpoint of `state` as the best."""
        metric = self.metric(metrics)
        best = Best(self.path(state).name, state.step, float(metrics[metric]), metric, dict(metrics))
        if self.world.is_main:
            files.write_json(self.folder / "best_meta.json", vars(best))
            files.relative_link(self.folder / "best", best.checkpoint)
        self.best = self.world.from_main(best)


@contextmanager
def _quiet_alone() -> Iterator[None]:
    """A world of one has no process group, which is no news to it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def read_state(checkpoint: Checkpoint, world: World) -> dict[str, Any]:
    """`state.json` of a checkpoint whose files were checked against its manifest, by rank 0 for all.

    Raises:
        CheckpointError: on every rank, if a file is missing or damaged or of another format.
    """

    def verified() -> dict[str, Any]:
        files.verify(checkpoint.path, error=CheckpointError)
        return files.read_json(checkpoint.path / "state.json", error=CheckpointError)

    stored = world.on_main(verified)
    if stored["format_version"] != FORMAT_VERSION:
        raise CheckpointError(
            f"{checkpoint.path}: format_version is {stored['format_version']}, this version reads {FORMAT_VERSION}; use a matching release."
        )
    return stored
