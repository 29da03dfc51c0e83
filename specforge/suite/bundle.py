"""A bundle of tasks as CORE publishes it: `core.yaml`, `eval_meta_data.csv`, and `eval_data/` with one JSONL file a task."""

import csv
import io
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, get_args

import yaml  # type: ignore[import-untyped]

from specforge import files
from specforge.config.document import read_document
from specforge.errors import ConfigError, DataError

Kind = Literal["multiple_choice", "schema", "language_modeling"]

BASELINES_V2 = {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25.0, "bigbench_language_identification": 25.0}
"""Random baselines, in percent, that DCLM corrected in September 2025; bundles carry the old ones."""
_LARGEST_ROWS_MIB = 1024


@dataclass(frozen=True)
class Task:
    label: str
    kind: Kind
    path: Path
    """JSONL, one example a line."""
    shots: int
    delimiter: str
    """Between a context and its continuation."""
    baseline_pct: float
    """Accuracy by chance."""

    @property
    def baseline_v2_pct(self) -> float:
        return BASELINES_V2.get(self.label, self.baseline_pct)


@dataclass(frozen=True)
class Example:
    """Texts of which the likeliest is the answer: `contexts[i]` followed by `continuations[i]`.

    Multiple choice: one context, several continuations. Schema: several contexts, one continuation. Language modelling: one text.
    """

    contexts: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def read_tasks(folder: Path, labels: Collection[str] = (), shots: int | None = None) -> list[Task]:
    """The tasks of a bundle in the order of its `core.yaml`.

    A task with several numbers of shots becomes as many tasks, their labels ending in `-Nshot`.

    Args:
        labels: take these only, as `core.yaml` names them; none: all.
        shots: for every task, in the place of what the bundle says.

    Raises:
        DataError: a file or field is missing, of the wrong kind, or of another version.
        ConfigError: a label that the bundle does not have.
    """
    listed, baselines = _listed(folder / "core.yaml"), _baselines(folder / "eval_meta_data.csv")
    unknown = sorted(set(labels) - {entry["label"] for entry in listed})
    if unknown:
        raise ConfigError(f"--tasks {' '.join(unknown)}: {folder} has {', '.join(entry['label'] for entry in listed)}; choose of these.")
    tasks = []
    for entry in listed:
        label = entry["label"]
        if labels and label not in labels:
            continue
        if label not in baselines:
            raise DataError(f"{folder / 'eval_meta_data.csv'}: task {label!r} has no row there; add its random baseline.")
        task = Task(
            label, entry["icl_task_type"], _data_path(folder, entry["dataset_uri"]), 0, entry.get("continuation_delimiter", " "),
            baselines[label],
        )  # fmt: skip
        counts = entry["num_fewshot"] if shots is None else [shots]
        tasks += [replace(task, label=label if len(counts) == 1 else f"{label}-{count}shot", shots=count) for count in counts]
    _refuse_twins([task.label for task in tasks], folder / "core.yaml")
    return tasks


def read_examples(task: Task) -> list[Example]:
    """In file order.

    Raises:
        DataError: with `file:line`, of the first example that breaks a rule; the file is missing or empty.
    """
    read = _READERS[task.kind]
    examples = []
    for number, line in enumerate(files.read_bytes(task.path, DataError, _LARGEST_ROWS_MIB).splitlines(), 1):
        if not line.strip():
            continue
        where = f"{task.path}:{number}"
        try:
            fields = files.parse_json(line)
        except ValueError as cause:
            raise DataError(f"{where}: is not JSON ({cause}); one line is one example.") from cause
        example = read(fields, where)
        try:
            "".join(example.contexts + example.continuations).encode()
        except UnicodeEncodeError as cause:
            raise DataError(f"{where}: holds half of a surrogate pair ({cause}), which is no text; correct the line.") from cause
        examples.append(example)
    if not examples:
        raise DataError(f"{task.path}: holds no examples; a task needs at least one.")
    return examples


def _listed(path: Path) -> list[dict[str, Any]]:
    try:
        document = yaml.safe_load(read_document(path))
    except ConfigError as cause:
        raise DataError(f"{cause} A bundle has it at its top.") from cause
    except (yaml.YAMLError, ValueError) as cause:  # such as a date of month 13
        raise DataError(f"{path}: is not YAML ({' '.join(str(cause).split())}); correct the file.") from cause
    entries = (document or {}).get("icl_tasks")
    if not isinstance(entries, list) or not entries:
        raise DataError(f"{path}: icl_tasks must be a list of tasks; this is no CORE bundle, or one of another version.")
    for number, entry in enumerate(entries, 1):
        _check(entry, f"{path}: task {number}")
    _refuse_twins([entry["label"] for entry in entries], path)
    return entries


def _refuse_twins(labels: list[str], path: Path) -> None:
    if len(set(labels)) < len(labels):
        raise DataError(f"{path}: label {next(x for x in labels if labels.count(x) > 1)!r} occurs twice; give each task its own.")


def _check(entry: Any, where: str) -> None:
    _require(entry, where, label=str, dataset_uri=str, icl_task_type=str, num_fewshot=list)
    where = f"{where} ({files.shown(entry['label'])})"
    if entry["icl_task_type"] not in get_args(Kind):
        raise DataError(f"{where}: icl_task_type={files.shown(entry['icl_task_type'])}: must be one of {', '.join(get_args(Kind))}.")
    if not entry["num_fewshot"] or not all(files.is_a(count, int) for count in entry["num_fewshot"]):
        raise DataError(f"{where}: num_fewshot={files.shown(entry['num_fewshot'])}: must be a list of numbers of shots, such as [10].")
    if not isinstance(entry.get("continuation_delimiter", " "), str):
        raise DataError(f"{where}: continuation_delimiter={files.shown(entry['continuation_delimiter'])}: must be a text.")


def _baselines(path: Path) -> dict[str, float]:
    text = files.read_bytes(path, DataError).decode("utf-8", errors="replace")
    try:
        return _read_baselines(path, csv.DictReader(io.StringIO(text, newline="")))
    except csv.Error as cause:
        raise DataError(f"{path}: is not CSV ({cause}); correct the file.") from cause


def _read_baselines(path: Path, rows: "csv.DictReader[str]") -> dict[str, float]:
    if not {"Eval Task", "Random baseline"} <= set(rows.fieldnames or ()):
        raise DataError(f"{path}:1: the header must name 'Eval Task' and 'Random baseline'; this is another version of the file.")
    return {row["Eval Task"]: _percent(row["Random baseline"], f"{path}:{rows.line_num}") for row in rows}


def _percent(text: str | None, where: str) -> float:
    """All right is 100, so chance is below it: what is centred divides by the difference."""
    try:
        number = float(text or "")
    except ValueError:
        number = -1.0
    if not 0 <= number < 100:
        raise DataError(f"{where}: Random baseline={files.shown(text)}: must be a number, in percent, from 0 to below 100.")
    return number


def _data_path(folder: Path, uri: str) -> Path:
    """MosaicML's files of the same shape write `local_data/` before each path."""
    return files.inside(folder / "eval_data", uri.removeprefix("local_data/"), DataError)


def _multiple_choice(fields: Any, where: str) -> Example:
    _require(fields, where, query=str, choices=list, gold=int)
    choices = _texts(fields, "choices", where)
    return Example((fields["query"],) * len(choices), choices, _gold(fields, len(choices), where))


def _schema(fields: Any, where: str) -> Example:
    _require(fields, where, context_options=list, continuation=str, gold=int)
    contexts = _texts(fields, "context_options", where)
    return Example(contexts, (fields["continuation"],) * len(contexts), _gold(fields, len(contexts), where))


def _language_modeling(fields: Any, where: str) -> Example:
    _require(fields, where, context=str, continuation=str)
    return Example((fields["context"].strip(),), (fields["continuation"],), 0)


_READERS = {"multiple_choice": _multiple_choice, "schema": _schema, "language_modeling": _language_modeling}


def _require(fields: object, where: str, **kinds: type) -> None:
    if not isinstance(fields, dict):
        raise DataError(f"{where}: must be an object with {', '.join(kinds)}, not {files.shown(fields)}.")
    for name, kind in kinds.items():
        if name not in fields:
            raise DataError(f"{where}: {name} is missing; it needs {', '.join(kinds)}.")
        if not isinstance(fields[name], kind) or isinstance(fields[name], bool):
            raise DataError(f"{where}: {name}={files.shown(fields[name])}: must be of type {kind.__name__}.")


def _texts(fields: dict[str, Any], name: str, where: str) -> tuple[str, ...]:
    texts = fields[name]
    if len(texts) < 2 or not all(isinstance(text, str) for text in texts):
        raise DataError(f"{where}: {name}={files.shown(texts)}: must be a list of two texts or more.")
    return tuple(texts)


def _gold(fields: dict[str, Any], count: int, where: str) -> int:
    gold: int = fields["gold"]
    if not 0 <= gold < count:
        raise DataError(f"{where}: gold={gold}: must be the index of one of the {count} texts, from 0 to {count - 1}.")
    return gold
