"""Results of a suite on disk: a line a task, a file of lines a task's examples; what was scored once is not scored again.

`tasks.jsonl` is appended to, after `examples/LABEL.jsonl` is complete. A kill loses the task that was under way.
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from specforge import files
from specforge.errors import DataError
from specforge.suite.evaluate import TaskResult

_LARGEST_MIB = 1024


class Record:
    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._lines = self._read()

    def known(self, label: str, identity: dict[str, Any]) -> dict[str, Any] | None:
        """The numbers of this very task, scored before in this very way."""
        digest = _digest(identity)
        return next((line for line in reversed(self._lines) if (line["task"], line["identity"]) == (label, digest)), None)

    def last_centred(self, label: str) -> float | None:
        """What the task had the last time, in whatever way it was scored."""
        return next((line["centred"] for line in reversed(self._lines) if line["task"] == label), None)

    def write(self, result: TaskResult, identity: dict[str, Any]) -> None:
        numbers = {**result.numbers(), "identity": _digest(identity)}
        examples = self.folder / "examples"
        with files.writable(self.folder, DataError):
            examples.mkdir(parents=True, exist_ok=True)
            text = "".join(files.json_line(line) + "\n" for line in example_lines(result))
            files.write_text(examples / f"{_file_name(result.task.label)}.jsonl", text)
            with (self.folder / "tasks.jsonl").open("a") as file:
                file.write(files.json_line(numbers) + "\n")
                file.flush()
                os.fsync(file.fileno())
        self._lines.append(numbers)

    def _read(self) -> list[dict[str, Any]]:
        """All whole lines; one that a kill tore is cut off, so that the next one begins at a line's beginning."""
        path = self.folder / "tasks.jsonl"
        if not path.exists():
            return []
        data = files.read_bytes(path, DataError, _LARGEST_MIB)
        whole = data[: data.rfind(b"\n") + 1]
        if len(whole) < len(data):
            os.truncate(path, len(whole))
        lines = []
        for number, line in enumerate(whole.splitlines(), 1):
            try:
                fields = files.parse_json(line)
            except ValueError as cause:
                raise DataError(f"{path}:{number}: is not JSON ({cause}); move the file away to begin anew.") from cause
            kinds = {"task": str, "identity": str, "mode": str, "accuracy": float, "centred": float, "centred_v2": float, "seconds": float}
            files.check_fields(fields, f"{path}:{number}", DataError, **kinds, slots=int, row_tokens=int, shots=int)
            lines.append(fields)
        return lines


def example_lines(result: TaskResult) -> list[dict[str, Any]]:
    answers, tokens = result.answers, result.tokens
    return [
        {
            "example": example, "gold": int(tokens.gold_E[example]), "predicted": int(answers.predicted_E[example]),
            "right": bool(answers.right_E[example]), "margin": float(answers.margin_E[example]),
            "losses": answers.loss_R[(rows := tokens.rows_of(example)).start : rows.stop].tolist(),
            "greedy": answers.is_greedy_R[rows.start : rows.stop].tolist(),
        }
        for example in range(len(tokens))
    ]  # fmt: skip


def _digest(identity: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()


def _file_name(label: str) -> str:
    """Labels are free text; what no file name may hold becomes an underscore, and a hash keeps two such labels apart."""
    plain = "".join(letter if (letter.isascii() and letter.isalnum()) or letter in "-_." else "_" for letter in label)[:80]
    if plain and plain == label and not plain.startswith("."):
        return plain
    return f"{plain.lstrip('.')}-{hashlib.sha256(label.encode()).hexdigest()[:8]}"
