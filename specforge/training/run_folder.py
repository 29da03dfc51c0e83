"""What a run folder holds, as a reader sees it at any moment, also after a kill in the middle of a save.

RUN/{run_id}-step{N}/   a checkpoint, complete or absent (its files: `checkpoint.py`)
RUN/latest, RUN/best    relative links for people; where they lag behind or cannot be made, the two files below decide
RUN/branch.json         the run id that writes here now, and where it began
RUN/best_meta.json      checkpoint, step, score, metric, metrics
"""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from specforge import files
from specforge.distributed import World
from specforge.errors import CheckpointError
from specforge.training.state import TrainState

FORMAT_VERSION = 2
BRANCH = "branch.json"
BEST = "best_meta.json"
_NAME = re.compile(r"(?P<run_id>.+)-step(?P<step>\d{1,18})")


@dataclass(frozen=True)
class Checkpoint:
    """A complete step folder."""

    path: Path
    run_id: str
    step: int


@dataclass(frozen=True)
class Branch:
    """The run that writes into the folder now. A fork has a `parent`, the name of the checkpoint it began from."""

    run_id: str
    parent: str
    resume_from: str
    """`train.resume_from` of the job, as it was given."""
    job: str
    """The launcher's name for the job: what a restarted worker recognises its own branch by."""


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


def read_branch(folder: Path) -> Branch | None:
    """What `branch.json` says; None where no run began here."""
    return Branch(**_fields(folder / BRANCH, Branch)) if (folder / BRANCH).exists() else None


def read_best(folder: Path) -> Best | None:
    """What `best_meta.json` says, unless its checkpoint is gone."""
    return best_of(folder, _fields(folder / BEST, Best)) if (folder / BEST).exists() else None


def best_of(folder: Path, stored: Mapping[str, Any] | None) -> Best | None:
    """The best that was stored in a file of `folder`, unless its checkpoint is gone."""
    if stored is None:
        return None
    best = Best(**_checked(stored, folder, Best))
    return best if (files.inside(folder, best.checkpoint, CheckpointError) / files.MANIFEST).is_file() else None


def _fields(path: Path, kind: type[Branch] | type[Best]) -> dict[str, Any]:
    return _checked(files.read_json(path, CheckpointError), path, kind)


def _checked(stored: Mapping[str, Any], where: Path, kind: type[Branch] | type[Best]) -> dict[str, Any]:
    """The fields of `kind` in what was read from a file."""
    kinds = files.kinds_of(kind)
    files.check_fields(stored, str(where), CheckpointError, **kinds)
    return {name: stored[name] for name in kinds}


def newest(folder: Path) -> Checkpoint | None:
    """Where the run stands that writes into `folder` now: its newest checkpoint, or the one that it forked from."""
    complete, branch = find_checkpoints(folder), read_branch(folder)
    if branch is not None:
        own = [checkpoint for checkpoint in complete if checkpoint.run_id == branch.run_id]
        complete = own or [checkpoint for checkpoint in complete if checkpoint.path.name == branch.parent]
    return complete[-1] if complete else None


def resolve(path: Path, key: str = "checkpoint") -> Checkpoint:
    """The checkpoint that `RUN/latest`, `RUN/best` or a step folder means. It does not depend on links.

    Args:
        key: what the user gave the path for, as errors name it.

    Raises:
        CheckpointError: there is no complete checkpoint at that path.
    """
    complete = find_checkpoints(path.parent)
    found, why = None, ""
    if path.name == "latest":
        found = newest(path.parent)
    elif path.name == "best":
        best = read_best(path.parent)
        found = next((checkpoint for checkpoint in complete if best and checkpoint.path.name == best.checkpoint), None)
    else:
        folder = Path(os.path.realpath(path))
        found = next((checkpoint for checkpoint in find_checkpoints(folder.parent) if checkpoint.path.name == folder.name), None)
        why = _why_incomplete(folder)
    if found is None:
        known = ", ".join(checkpoint.path.name for checkpoint in complete)
        raise CheckpointError(
            f"{key}={str(path)!r}: no complete checkpoint is there{why}; "
            + (f"complete ones beside it: {known}." if known else "give RUN/latest, RUN/best or a step folder.")
        )
    return found


def _why_incomplete(folder: Path) -> str:
    """What a folder lacks of a checkpoint; "" where there is none."""
    if not folder.is_dir():
        return ""
    if not _NAME.fullmatch(folder.name):
        return ", for the folder of one is called RUN_ID-stepN"
    return f", for {folder / files.MANIFEST} is missing, so the folder was not finished or was copied in part"


def read_state(checkpoint: Checkpoint, world: World) -> dict[str, Any]:
    """`state.json` of a checkpoint whose files were checked against its manifest, by rank 0 for all.

    Raises:
        CheckpointError: on every rank, if a file is missing or damaged or of another format; it names the run's other checkpoints.
    """

    def verified() -> dict[str, Any]:
        try:
            files.verify(checkpoint.path, error=CheckpointError)
        except CheckpointError as error:
            others = [other.path.name for other in find_checkpoints(checkpoint.path.parent) if other != checkpoint]
            raise CheckpointError(f"{error} Or take another one there: {', '.join(others)}." if others else str(error)) from error
        path = checkpoint.path / "state.json"
        stored = files.read_object(path, CheckpointError, format_version=int)
        if stored["format_version"] != FORMAT_VERSION:
            raise CheckpointError(
                f"{checkpoint.path}: format_version is {stored['format_version']}, this version reads {FORMAT_VERSION}; "
                "use a matching release."
            )
        kinds = {**files.kinds_of(TrainState), "world_size": int, "settings": dict, "best": dict | None}
        files.check_fields(stored, str(path), CheckpointError, **kinds)
        return stored

    return world.on_main(verified)


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
