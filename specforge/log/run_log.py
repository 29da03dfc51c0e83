"""The numbers of a run: one call writes them to `metrics.jsonl`, to the console and, where wanted, to Weights & Biases."""

import math
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO

from tqdm import tqdm

from specforge import files
from specforge.errors import ConfigError, DataError

if TYPE_CHECKING:
    from specforge.distributed import World

_LARGEST_MIB = 4096
Numbers = Mapping[str, float | list[float]]


class RunLog:
    """Rank 0 writes, every other rank is silent, so that the loop calls `write` without asking for the rank.

    `metrics.jsonl` is only appended to. A line holds `step`, `time` (seconds since 1970) and the numbers by name, or `event` and its
    fields; a number that is not finite is null.
    """

    def __init__(
        self,
        folder: Path,
        world: "World",
        wandb_mode: Literal["disabled", "offline", "online"] = "disabled",
        wandb_project: str = "specforge",
        run_id: str = "run",
        config: dict[str, Any] | None = None,
    ) -> None:
        self.folder = folder
        self._file: TextIO | None = None
        self._wandb: Any = None
        self._last_step = -1
        if world.is_main:
            folder.mkdir(parents=True, exist_ok=True)
            path = folder / "metrics.jsonl"
            _drop_torn_line(path)
            self._last_step = max((line.get("step", -1) for line in read_metrics(path) if "event" not in line), default=-1)
            self._file = path.open("a", buffering=1)
            if wandb_mode != "disabled":
                self._wandb = _join_wandb(folder, wandb_mode, wandb_project, run_id, config or {})

    def write(self, step: int, numbers: Numbers) -> None:
        """Record what was measured after optimiser step `step`. A list holds one number a position."""
        if self._file is None:
            return
        self._append({"step": step, **numbers})
        self._last_step = max(self._last_step, step)
        tqdm.write(_console_line(step, numbers))
        if self._wandb is not None:
            self._wandb.log({"step": step, **_flat(numbers)})

    def note(self, event: str, **fields: Any) -> None:
        """Record that something happened, such as `note("resume", step=100)`.

        Where an event names a step and the file already holds later ones, those lines stay; the note says up to where in
        `superseded_to_step`.
        """
        if self._file is None:
            return
        step = fields.get("step")
        if isinstance(step, int) and self._last_step > step:
            fields["superseded_to_step"] = self._last_step
            self._last_step = step
        self._append({"event": event} | fields)
        tqdm.write("  ".join([event, *(f"{name} {value}" for name, value in fields.items())]))

    def close(self, exit_code: int = 0) -> None:
        """Finish; call it again at will. Weights & Biases shows a run with another exit code as failed."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.finish(exit_code=exit_code)
            self._wandb = None

    def _append(self, line: dict[str, Any]) -> None:
        assert self._file is not None
        self._file.write(files.json_line(line | {"time": round(time.time(), 3)}) + "\n")


def read_metrics(path: Path, superseded: bool = True) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl` in the order of writing, null as NaN; none where there is no file.

    A last line that a crash tore is skipped. Without `superseded`, lines are left out whose step a later resume or fork took back.

    Raises:
        DataError: another line is not a JSON object with a step or an event.
    """
    lines: list[dict[str, Any]] = []
    texts = files.read_bytes(path, DataError, _LARGEST_MIB).split(b"\n") if path.exists() else [b""]
    for number, text in enumerate(texts, start=1):
        try:
            line: Any = files.parse_json(text) if text else None
        except ValueError as error:
            if number == len(texts):
                break
            raise DataError(f"{path} line {number}={text[:40]!r}: must be a JSON object; restore the file, or delete the line.") from error
        if text:
            known = isinstance(line, dict) and "event" in line
            stepped = not known or "superseded_to_step" in line
            files.check_fields(line, f"{path} line {number}", DataError, **({"step": int} if stepped else {}))
            lines.append(_with_nan(line))
    return lines if superseded else _without_superseded(lines)


def _without_superseded(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    kept: list[dict[str, Any]] = []
    for line in lines:
        if "superseded_to_step" in line:
            kept = [earlier for earlier in kept if "event" in earlier or earlier["step"] <= line["step"]]
        kept.append(line)
    return kept


def _with_nan(line: dict[str, Any]) -> dict[str, Any]:
    if "event" in line:
        return line
    nan = float("nan")
    return {
        name: [nan if x is None else x for x in value] if isinstance(value, list) else nan if value is None else value
        for name, value in line.items()
    }


def _drop_torn_line(path: Path) -> None:
    """What follows the last line end was torn by a crash; the next line must not be glued to it."""
    if path.exists():
        content = path.read_bytes()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            with path.open("r+b") as file:
                file.truncate(whole)


def _join_wandb(folder: Path, mode: str, project: str, run_id: str, config: dict[str, Any]) -> Any:
    """Start or continue the Weights & Biases run of this folder and run id; a fork's new run id becomes a run of its own."""
    import wandb

    token_path = folder / "wandb_id"
    token = token_path.read_text().strip() if token_path.exists() else ""
    if not token:
        token = uuid.uuid4().hex[:8]
        files.write_text(token_path, token + "\n")
    try:
        run = wandb.init(
            project=project,
            name=run_id,
            id=f"{run_id}-{token}",
            resume="allow",
            mode=mode,  # type: ignore[arg-type]
            dir=str(folder),
            config=config,
            settings=wandb.Settings(console="off", silent=True),
        )
    except wandb.Error as error:
        raise ConfigError(f"log.wandb={mode!r}: Weights & Biases did not start: {error}; log in, or set log.wandb=offline.") from error
    run.define_metric("*", step_metric="step")  # its own counter refuses the steps that a resumed run repeats
    return run


def _flat(numbers: Numbers) -> dict[str, float]:
    """A list `name` becomes `name/1`, `name/2`, ..."""
    flat: dict[str, float] = {}
    for name, value in numbers.items():
        flat |= {f"{name}/{i}": x for i, x in enumerate(value, start=1)} if isinstance(value, list) else {name: value}
    return flat


def _console_line(step: int, numbers: Numbers) -> str:
    """Each group (`train/`, `eval/`) is named once; what lies deeper, such as the numbers of one domain, is left to the file."""
    words, group = [f"step {step}"], ""
    for name, value in numbers.items():
        before, _, last = name.rpartition("/")
        if "/" not in before:
            words.append(f"{before}: {last} {_short(value)}" if before != group and before else f"{last} {_short(value)}")
            group = before
    return "  ".join(words)


def _short(value: float | list[float]) -> str:
    if isinstance(value, list):
        return "[" + " ".join(map(_short, value)) + "]"
    return str(int(value)) if math.isfinite(value) and value == int(value) else f"{value:.4g}"
