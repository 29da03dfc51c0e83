"""What an evaluation leaves beside its run, so that it can be looked at later: `RUN/evaluations/CHECKPOINT.json` of the rows that the
training held out, `CHECKPOINT-ROWS.json` of others.

The newest evaluation of a checkpoint on the same rows replaces the one before it, all but what that one alone has measured.
"""

import contextlib
import hashlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from specforge import files
from specforge.errors import CheckpointError
from specforge.features.store import LocalFeatureStore

FOLDER = "evaluations"
FORMAT_VERSION = 2


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
    """Where the rows were."""
    rows: str
    """Their `rows_digest`."""
    held_out: bool
    """Whether they are those that the training held out, as far as the checkpoint knows."""
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
        path = run / FOLDER / (f"{self.checkpoint}.json" if self.held_out else f"{self.checkpoint}-{self.rows[:8]}.json")
        stored = {"format_version": FORMAT_VERSION, **asdict(self), "numbers": {**self._measured_before(path), **self.numbers}}
        with files.writable(run, CheckpointError):
            path.parent.mkdir(exist_ok=True)
            files.write_text(path, files.json_line(stored) + "\n")
        return path

    def _measured_before(self, path: Path) -> dict[str, Any]:
        """Live decoding and trees of an evaluation of the same rows; a damaged record, or one of another version, has none."""
        with contextlib.suppress(CheckpointError):
            before = EvaluationRecord.read(path)
            if (before.rows, before.numbers.get("eval/draft_tokens")) == (self.rows, self.numbers.get("eval/draft_tokens")):
                return {name: value for name, value in before.numbers.items() if name.startswith(("eval/live/", "eval/trees"))}
        return {}

    @classmethod
    def read(cls, path: Path) -> "EvaluationRecord":
        """Raises CheckpointError where the file is damaged or of another version."""
        stored = files.read_object(path, CheckpointError, format_version=int)
        if stored["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}; make it again with `specforge eval`.")
        kinds = files.kinds_of(cls)
        files.check_fields(stored, str(path), CheckpointError, **kinds)
        return cls(**{name: stored[name] for name in kinds})


def rows_digest(store: LocalFeatureStore, samples: int) -> str:
    """SHA-256 of the tokens of the first `samples` samples, all where it is 0, and of which are supervised."""
    digest = hashlib.sha256()
    for number in range(min(samples or len(store), len(store))):
        for tensor_S in store.tokens(number):
            digest.update(tensor_S.numpy().tobytes())
    return digest.hexdigest()


def read_records(run: Path) -> list[EvaluationRecord]:
    """The evaluations of a run, oldest step first.

    Raises:
        CheckpointError: one of them is damaged or of another version.
    """
    records = [EvaluationRecord.read(path) for path in sorted((run / FOLDER).glob("*.json"))]
    return sorted(records, key=lambda record: (record.step, record.time))
