"""CheckpointManager: complete or absent, written beside the training, the best remembered, nothing newer ever deleted.

RUN/{run_id}-step{N}/   manifest.json   sizes and checksums of all the files below
                        state.json      step, position, world size, settings that must not change, the best so far
                        rng-rank{r}.json
                        draft/          config.json and safetensors, one shard a rank
                        optimizer/      safetensors, one shard a rank

A save copies the state and returns; a thread of each rank writes, publishes by one rename, then moves `latest`, then
`best_meta.json` and `best`, then rotates. A kill between any two of these leaves a folder that resumes.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from specforge import files
from specforge.distributed import World, randomness
from specforge.errors import CheckpointError, ConfigError, SpecForgeError
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.run_folder import (
    BEST,
    BRANCH,
    FORMAT_VERSION,
    Best,
    Branch,
    Checkpoint,
    best_of,
    find_checkpoints,
    newest,
    read_best,
    read_state,
)
from specforge.training.snapshot import Snapshot, random_name, read_tensors, tensors_of
from specforge.training.state import TrainState

T = TypeVar("T")
_LOWER_IS_BETTER = ("loss", "ece", "brier")


class CheckpointManager:
    """Saves, loads, rotates and ranks the checkpoints of one run folder. All methods are called on every rank alike."""

    def __init__(self, folder: Path, world: World, keep: int, best_metric: str = "") -> None:
        self.folder = folder
        self.world = world
        self.keep = keep
        self._metric = best_metric
        self.best: Best | None = world.on_main(lambda: read_best(folder))
        self._lock = files.Lock(folder / ".lock")
        self._snapshot = Snapshot()
        self._writers = world.apart()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._saving: Future[None] | None = None

    def claim(self, patience_s: float = 10.0) -> None:
        """Make this run the only one that writes here, until `release` or the end of the process; sweep what killed ones left.

        Raises:
            CheckpointError: another run still writes here after `patience_s` (workers outlive a killed torchrun by a step).
        """
        held = True
        if self.world.is_main:
            deadline_s = time.monotonic() + patience_s
            while not (held := self._lock.try_acquire()) and time.monotonic() < deadline_s:
                time.sleep(0.1)
            if held:
                files.sweep_all(self.folder)
        if not self.world.from_main(held):
            raise CheckpointError(
                f"output_dir={str(self.folder)!r}: another run writes here now; wait for its end or choose another output_dir."
            )

    def begin(self, state: TrainState, resume_from: str = "") -> None:
        """Record which run writes here now, so that a restarted job finds its own branch."""
        branch = Branch(state.run_id, state.parent, resume_from, job_name())
        self.world.on_main(lambda: files.write_json(self.folder / BRANCH, vars(branch)))

    def release(self) -> None:
        """Let other runs write here once the save in progress, good or bad, has ended."""
        self._thread.shutdown()
        self._lock.release()

    def path(self, state: TrainState) -> Path:
        return self.folder / f"{state.run_id}-step{state.step}"

    def save(self, state: TrainState, backend: FSDPTrainingBackend, draft_config: dict[str, Any], settings: dict[str, Any]) -> None:
        """Copy the state, then write it while training goes on; an earlier save is waited for first.

        Raises:
            CheckpointError: the earlier save failed; nothing of it stays and older checkpoints are untouched.
        """
        self.wait()
        self._snapshot.take(backend)
        best = None if self.best is None else vars(self.best)
        stored = {"format_version": FORMAT_VERSION, **state.as_dict(), "world_size": self.world.size, "settings": settings, "best": best}
        self._saving = self._thread.submit(self._write, state, draft_config, stored)

    def wait(self) -> None:
        """Return when the last save is complete.

        Raises:
            CheckpointError: some rank could not write; raised on every rank.
        """
        if self._saving is not None:
            saving, self._saving = self._saving, None
            saving.result()

    @property
    def failed(self) -> bool:
        """Whether the save in progress is known to have failed; `wait` says why."""
        return self._saving is not None and self._saving.done() and self._saving.exception() is not None

    def _write(self, state: TrainState, draft_config: dict[str, Any], stored: dict[str, Any]) -> None:
        final = self.path(state)
        staged = self._on_main(lambda: self._stage(final, draft_config, stored), final.name)
        if staged:
            failures = [text for text in self._writers.gather_objects(self._snapshot.write(Path(staged), self._writers)) if text]
            self._on_main(lambda: self._publish(Path(staged), final, failures), final.name)
        self._on_main(lambda: self._point_at(final, best_of(self.folder, stored["best"])), final.name)
        self._on_main(lambda: self._rotate(state), final.name)

    def _on_main(self, act: Callable[[], T], name: str) -> T:
        try:
            return self._writers.on_main(act)
        except (OSError, SpecForgeError) as error:
            untouched, go_on = "No checkpoint was complete before it", "give the same command again"
            if newest(self.folder) is not None:
                untouched, go_on = "Earlier checkpoints are untouched", f"continue with train.resume_from={self.folder}/latest"
            raise CheckpointError(
                f"checkpoint {name} was not saved: {error} {untouched}; "
                f"make room or give {str(self.folder)!r} back its rights, then {go_on}."
            ) from error

    def _stage(self, final: Path, draft_config: dict[str, Any], stored: dict[str, Any]) -> str:
        """The hidden folder to write into; "" where this very step is complete already."""
        if (final / files.MANIFEST).is_file():
            return ""
        staged = files.new_staging(final)
        (staged / "draft").mkdir()
        files.write_json(staged / "draft" / "config.json", draft_config)
        files.write_json(staged / "state.json", stored)
        return str(staged)

    def _publish(self, staged: Path, final: Path, failures: list[str]) -> None:
        try:
            if failures:
                raise CheckpointError(failures[0])
            files.publish(staged, final)
        finally:
            shutil.rmtree(staged, ignore_errors=True)

    def _point_at(self, final: Path, best: Best | None) -> None:
        files.relative_link(self.folder / "latest", final.name)
        if best is not None:
            if best != read_best(self.folder):
                files.write_json(self.folder / BEST, vars(best))
            files.relative_link(self.folder / "best", best.checkpoint)

    def _rotate(self, state: TrainState) -> None:
        """Drop this run's own older checkpoints beyond the newest `keep`; never the best, never anything newer."""
        best = read_best(self.folder)
        own = [c for c in find_checkpoints(self.folder) if c.run_id == state.run_id and c.step <= state.step]
        for old in own[: -self.keep] if self.keep else ():
            if best is None or old.path.name != best.checkpoint:
                files.discard(old.path)

    def load(self, checkpoint: Checkpoint, backend: FSDPTrainingBackend) -> tuple[TrainState, int]:
        """Fill parameters, moments and random state; returns where the run stood and the world size that saved it.

        Random state is restored at the same world size only; at another one the fresh streams of this run go on.

        Raises:
            CheckpointError: a file is missing, damaged or does not fit the draft.
        """
        stored = read_state(checkpoint, self.world)
        for name, tensors in tensors_of(backend).items():
            read_tensors(checkpoint.path / name, tensors, self.world)
        if stored["world_size"] == self.world.size:
            path = checkpoint.path / random_name(self.world)
            stored_random = files.read_object(path, CheckpointError)
            with files.foreign(path, CheckpointError, "take another checkpoint, or another world size, which begins new random streams"):
                randomness.restore(stored_random)
        # A run that was killed after the rename and before `best_meta.json` left its best only here.
        known = self.world.on_main(lambda: best_of(self.folder, stored["best"]))
        if known is not None and self._beats(known.metric, known.score):
            self.best = known
        state = TrainState(**{key: stored[key] for key in ("run_id", "step", "samples_seen", "parent")})
        return state, int(stored["world_size"])

    def load_draft(self, checkpoint: Checkpoint, backend: FSDPTrainingBackend) -> None:
        """Fill the draft's weights only, for evaluation or for a new run that starts from an earlier draft."""
        read_state(checkpoint, self.world)
        read_tensors(checkpoint.path / "draft", backend.draft_state(), self.world)

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
        return bool(self.world.from_main(self._beats(metric, metrics.get(metric, math.nan))))

    def _beats(self, metric: str, score: float) -> bool:
        if self.best is None or self.best.metric != metric:
            return not math.isnan(score)
        lower = any(word in metric for word in _LOWER_IS_BETTER)
        return score < self.best.score if lower else score > self.best.score

    def mark_best(self, state: TrainState, metrics: Mapping[str, Any]) -> None:
        """Remember the checkpoint of `state` as the best; the `save` of that state, which must follow, makes it known on disk."""
        metric = self.metric(metrics)
        best = Best(self.path(state).name, state.step, float(metrics[metric]), metric, dict(metrics))
        self.best = self.world.from_main(best)


def job_name() -> str:
    """What the launcher calls this job; the same in all its restarts."""
    return os.environ.get("TORCHELASTIC_RUN_ID", "")
