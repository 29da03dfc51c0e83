"""A run folder as a report sees it: only files are read, nothing is measured."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from specforge import files
from specforge.config import RankingConfig, load_task, to_dict
from specforge.errors import CheckpointError, DataError
from specforge.eval.acceptance import domains_of
from specforge.eval.record import EvaluationRecord, read_records
from specforge.log.run_log import read_metrics
from specforge.training.run_folder import Best, Branch, find_checkpoints, newest, read_best, read_branch

Points = list[tuple[int, float]]


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    name: str
    """What the run calls itself, else its folder."""
    lines: list[dict[str, Any]]
    """Of `metrics.jsonl`, without those that a later resume or fork took back."""
    events: list[dict[str, Any]]
    config: dict[str, Any]
    """Of the newest configuration; empty where the folder has none."""
    branch: Branch | None
    best: Best | None
    checkpoints: list[str]
    state: dict[str, Any]
    """`state.json` of the checkpoint where the run stands; empty where there is none."""
    record: EvaluationRecord | None
    """The evaluation of the best checkpoint or, without one, of the furthest that was evaluated, on the rows that the training held out."""
    elsewhere: list[EvaluationRecord]
    """Evaluations on other rows."""

    @classmethod
    def read(cls, folder: Path) -> "Run":
        """
        Raises:
            CheckpointError: there is no run in `folder`, or one of its files is damaged.
            DataError: a line of `metrics.jsonl` is damaged; a last one that a crash tore is left out.
        """
        metrics = folder / "metrics.jsonl"
        if not metrics.is_file():
            raise CheckpointError(f"RUN={str(folder)!r}: holds no metrics.jsonl; give the output_dir of a training.")
        lines = read_metrics(metrics, superseded=False)
        complete, last, best, records = find_checkpoints(folder), newest(folder), read_best(folder), read_records(folder)
        held_out = [record for record in records if record.held_out]
        of_best = [record for record in held_out if best and record.checkpoint == best.checkpoint]
        branch = read_branch(folder)
        return cls(
            folder=folder,
            name=branch.run_id if branch else folder.resolve().name,
            lines=[line for line in lines if "event" not in line],
            events=[line for line in lines if "event" in line],
            config=_config(folder),
            branch=branch,
            best=best,
            checkpoints=[checkpoint.path.name for checkpoint in complete],
            state=files.read_object(last.path / "state.json", CheckpointError) if last else {},
            record=next(iter([*of_best, *reversed(held_out)]), None),
            elsewhere=[record for record in records if not record.held_out],
        )

    def renamed(self, name: str) -> "Run":
        return replace(self, name=name)

    @property
    def method(self) -> str:
        return str(self.config.get("method", {}).get("name", "-"))

    @property
    def target(self) -> str:
        return str(self.config.get("model", {}).get("target_path", ""))

    @property
    def fingerprint(self) -> str:
        """Of the files of the target that the draft was trained for."""
        return str(self.state.get("settings", {}).get("target_fingerprint") or "")[:16]

    @property
    def checkpoint(self) -> str:
        """The checkpoint that the numbers are of; empty where they are of a step that was not saved."""
        of_best = self.best.checkpoint if self.best and self.step == self.best.step else ""
        return self.record.checkpoint if self.record else of_best

    @property
    def step(self) -> int | None:
        """The step that the numbers are of."""
        return self.record.step if self.record else self.numbers.get("step")

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """The evaluation to show: the record's, else the best one's of the training, else the last one's."""
        if self.record:
            return self.record.numbers
        evaluations = [line for line in self.lines if "eval/acc_len" in line]
        of_best = [line for line in evaluations if self.best and line["step"] == self.best.step]
        return next(iter([*of_best, *reversed(evaluations)]), {})

    def points(self, name: str, position: int | None = None) -> Points:
        """(step, value) of a number of `metrics.jsonl`, or of one place of a list; what is not finite is left out.

        Raises:
            DataError: it is something else.
        """
        found = []
        for line in self.lines:
            if name in line:
                value = line[name] if position is None else self._listed(line[name], name)[position]
                found.append((line["step"], self._number(value, name)))
        return [(step, value) for step, value in found if math.isfinite(value)]

    def number(self, name: str) -> float | None:
        """A number of the evaluation; None where it was not measured or cannot be known."""
        value = self.numbers.get(name)
        number = math.nan if value is None else self._number(value, name)
        return number if math.isfinite(number) else None

    def values(self, name: str) -> list[float]:
        """A list of the evaluation, null as NaN; empty where it was not measured."""
        values = self._listed(self.numbers.get(name, []), name)
        return [math.nan if value is None else self._number(value, name) for value in values]

    def named_values(self, name: str) -> dict[str, float]:
        """An object of the evaluation whose values are numbers; empty where it was not measured."""
        values = self.numbers.get(name, {})
        if not isinstance(values, dict):
            raise DataError(f"{self.folder}: {name}={files.shown(values)} must be an object; restore the file, or measure again.")
        return {str(key): self._number(value, f"{name}/{key}") for key, value in values.items()}

    @property
    def domains(self) -> list[str]:
        return domains_of(self.numbers)

    def _number(self, value: object, name: str) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DataError(f"{self.folder}: {name}={files.shown(value)} must be a number; restore the file, or measure again.")
        return float(value)

    def _listed(self, value: object, name: str) -> Sequence[Any]:
        if not isinstance(value, list):
            raise DataError(f"{self.folder}: {name}={files.shown(value)} must be a list; restore the file, or measure again.")
        return value


def _config(folder: Path) -> dict[str, Any]:
    """The newest of `config.yaml`, `config-2.yaml`, ...: a resumed run adds one."""
    paths = sorted(folder.glob("config*.yaml"), key=lambda path: (len(path.name), path.name))
    if not paths:
        return {}
    config = load_task(paths[-1])
    if isinstance(config, RankingConfig):
        raise CheckpointError(
            f"RUN={str(folder)!r}: is a ranking run; `specforge report` shows drafts, so give the folder of a draft's run."
        )
    return to_dict(config)
