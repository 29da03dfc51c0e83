"""What an evaluation leaves beside its run, so that it can be looked at later: `RUN/evaluations/CHECKPOINT.json`.

The newest evaluation of a checkpoint replaces the one before it.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specforge import files
from specforge.errors import CheckpointError

FOLDER = "evaluations"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class EvaluationRecord:
    """One evaluation of one checkpoint."""

    checkpoint: str
    run_id: str
    step: int
    time: float
    """Seconds since 1970."""
    made_with: dict[str, Any]
    """Versions, device and ranks."""
    data: str
    """Where the held-out rows were."""
    numbers: dict[str, Any]
    """`eval/...`, as `specforge eval` prints them; null where a number cannot be known."""
    groups: dict[str, Any]
    """By version of the confidence, `calibration.groups`."""
    texts: list[Any]
    """Answers with their rounds: objects with `id`, `domain`, `prompt`, `first` and `rounds`, each of these an object with `accepted`
    (a text a token), `own` (the target's token after them, "" where the answer ended) and `refused` (what was drafted in its place)."""

    def write(self, run: Path) -> Path:
        """Replace the record of this checkpoint in one step.

        Raises:
            CheckpointError: the run's folder cannot be written.
        """
        path = run / FOLDER / f"{self.checkpoint}.json"
        with files.writable(run, CheckpointError):
            path.parent.mkdir(exist_ok=True)
            files.write_text(path, files.json_line({"format_version": FORMAT_VERSION, **asdict(self)}) + "\n")
        return path

    @classmethod
    def read(cls, path: Path) -> "EvaluationRecord":
        """Raises CheckpointError where the file is damaged or of another version."""
        stored = files.read_object(path, CheckpointError, format_version=int)
        if stored["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}; make it again with `specforge eval`.")
        kinds = files.kinds_of(cls)
        files.check_fields(stored, str(path), CheckpointError, **kinds)
        return cls(**{name: stored[name] for name in kinds})


def read_records(run: Path) -> list[EvaluationRecord]:
    """The evaluations of a run, oldest step first.

    Raises:
        CheckpointError: one of them is damaged or of another version.
    """
    records = [EvaluationRecord.read(path) for path in sorted((run / FOLDER).glob("*.json"))]
    return sorted(records, key=lambda record: (record.step, record.time))
