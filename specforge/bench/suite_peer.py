"""lm-evaluation-harness on the texts and the model of a task, in its own environment and process (`scripts/peer.sh lm-eval` makes it).

Both programs go from text to result as their users start them, on one thread, what they load included. The slope between two numbers of
examples is what an example costs; answers and log-probabilities are compared one by one.
"""

import json
import os
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from specforge import files
from specforge.bench.child import run_child
from specforge.errors import ConfigError, DataError
from specforge.suite.bundle import Task, read_examples
from specforge.suite.prompts import Draw, chosen, write_prompts

TOLERANCE_NATS = 1e-4
FEWER = 5
"""The smaller number of examples is this part of the larger one."""
_OFFLINE = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}


def interpreter() -> Path:
    """Where `scripts/peer.sh lm-eval` puts it.

    Raises:
        ConfigError: it is not there.
    """
    python = Path(os.environ.get("SPECFORGE_PEER_VENV") or Path(__file__).parents[2] / ".venv-lm-eval") / "bin" / "python"
    if not python.exists():
        raise ConfigError(f"--peer lm-eval: there is no {python}; make it with scripts/peer.sh lm-eval.")
    return python


def compare(python: Path, model: Path, bundle: Path, task: Task, draw: Draw, dtype: str) -> dict[str, Any]:
    """CPU seconds an example of both, and where they differ.

    Raises:
        ConfigError: the task is not multiple choice.
        DataError: it has too few examples for a slope.
    """
    if task.kind != "multiple_choice":
        raise ConfigError(f"--peer lm-eval: task {task.label!r} is not multiple choice; choose others by --tasks.")
    most = len(chosen(read_examples(task), draw))
    if most < 2 * FEWER:
        raise DataError(f"--peer lm-eval: task {task.label!r} has {most} examples; give {2 * FEWER} or more.")
    (few, many), (peer_few, peer_many) = (
        [of_program(replace(draw, max_examples=count)) for count in (most // FEWER, most)]
        for of_program in (
            lambda draw: _ours(model, bundle, task, draw, dtype),
            lambda draw: _theirs(python, model, task, draw, dtype),
        )
    )
    ours_s, theirs_s = ((larger[0] - smaller[0]) / (most - most // FEWER) for smaller, larger in ((few, many), (peer_few, peer_many)))
    (_, logp_R, answers_E), (_, peer_logp_R, peer_answers_E) = many, peer_many
    return {
        "task": task.label, "shots": task.shots, "examples": [most // FEWER, most], "cpu_ms_per_example": 1e3 * ours_s,
        "peer_cpu_ms_per_example": 1e3 * theirs_s, "times_less": theirs_s / ours_s,
        "largest_difference": float(np.abs(logp_R - peer_logp_R).max()),
        "answered_otherwise": np.flatnonzero(answers_E != peer_answers_E).tolist(),
    }  # fmt: skip


_Outcome = tuple[float, np.ndarray, np.ndarray]
"""CPU seconds, log-probability of each choice, place of each answer."""


def _ours(model: Path, bundle: Path, task: Task, draw: Draw, dtype: str) -> _Outcome:
    with tempfile.TemporaryDirectory() as folder:
        words = ["--model", str(model), "--bundle", str(bundle), "--tasks", task.label, "--num-shots", str(task.shots), "--rule", "sum"]
        words += ["--max-per-task", str(draw.max_examples), "--fewshot-seed", str(draw.fewshot_seed), "--dtype", dtype, "--bos", "none"]
        words += ["--out", folder, "--cache", f"{folder}/tokens", *(["--shared-shots"] if draw.shared_shots else [])]
        child = run_child([sys.executable, "-m", "specforge", "suite", *words])
        [examples] = (Path(folder) / "examples").iterdir()
        lines = [json.loads(line) for line in examples.read_text().splitlines()]
    logp_R = -np.array([loss for line in lines for loss in line["losses"]])
    return child.cpu_s, logp_R, np.array([line["predicted"] for line in lines])


def _theirs(python: Path, model: Path, task: Task, draw: Draw, dtype: str) -> _Outcome:
    """Its shots are ours, written into each question, and its first token is none."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prompts = write_prompts(task, chosen(read_examples(task), draw), draw)
        rows = [{"query": prompt.before[0], "choices": prompt.continuations, "gold": prompt.gold} for prompt in prompts]
        files.write_text(folder / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        described = {
            "task": "specforge", "dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(folder / "rows.jsonl")}},
            "test_split": "test", "output_type": "multiple_choice", "doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}",
            "doc_to_target": "gold", "target_delimiter": "", "metric_list": [{"metric": "acc"}],
        }  # fmt: skip
        files.write_json(folder / "specforge.yaml", described)  # JSON is YAML too
        words = ["--model", "hf", "--model_args", f"pretrained={model},dtype={dtype}", "--device", "cpu", "--tasks", "specforge"]
        words += ["--include_path", str(folder), "--output_path", str(folder / "out"), "--log_samples"]
        child = run_child([python, "-m", "lm_eval", *words], {**_OFFLINE, "HF_HOME": str(folder / "home")})
        [samples] = (folder / "out").rglob("samples_*.jsonl")
        lines = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda line: int(line["doc_id"]))
    logp = [[float(response[0][0]) for response in line["resps"]] for line in lines]
    return child.cpu_s, np.array([of_choice for of_row in logp for of_choice in of_row]), np.array([np.argmax(of_row) for of_row in logp])


def verdict(numbers: dict[str, Any]) -> list[str]:
    """What is wrong, a sentence each."""
    label, faults = numbers["task"], []
    if numbers["answered_otherwise"]:
        faults.append(f"{label}: lm-evaluation-harness answers examples {numbers['answered_otherwise'][:5]} otherwise")
    if not numbers["largest_difference"] <= TOLERANCE_NATS:
        faults.append(f"{label}: log-probabilities differ by {numbers['largest_difference']:.1e}")
    return faults
