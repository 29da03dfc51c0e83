"""A small suite of made-up tasks, scored by the embedded target in each mode; tokens are ready, as in a second evaluation."""

import json
import random
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer

from specforge.bench.case import Case, Configuration, Lever, Outputs, Quality, Work
from specforge.bench.cases.embedded import FOLDER, load_embedded
from specforge.distributed import World
from specforge.log.progress import LineProgress
from specforge.suite.bundle import Task, read_tasks
from specforge.suite.evaluate import BASE_EXAMPLES, Evaluation, Manner
from specforge.suite.prompts import Draw
from specforge.suite.scoring import Model
from specforge.suite.token_cache import TokenCache

WORDS = ("name", "value", "self", "return", "list", "file", "path", "index", "error", "string", "number", "line", "key", "print")
CHOICES = 4


class SuiteCase(Case):
    def __init__(self) -> None:
        levers = {
            "mode": Lever(("exact", "batched", "tree", "auto"), "exact", "auto"),
            "batch_examples": Lever((), str(BASE_EXAMPLES), str(BASE_EXAMPLES)),
            "piece_tokens": Lever((), "512", "512"),
        }
        super().__init__("suite", levers, {"examples": 12, "shots": 4})

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        levers, problem = configuration.levers, configuration.problem
        folder = _bundle(int(problem["examples"]), int(problem["shots"]))
        tasks, model = read_tasks(Path(folder.name)), Model(load_embedded(device))
        manner = Manner(levers["mode"], batch_examples=int(levers["batch_examples"]), piece_tokens=int(levers["piece_tokens"]))  # type: ignore[arg-type]
        evaluation = Evaluation(_tokens(folder.name), Draw(shared_shots=True), World(device=device))
        evaluation.preload(model, tasks, manner)

        def run() -> Outputs:
            return _answers(evaluation, model, tasks, manner)

        def quality(outputs: Outputs) -> Quality:
            right = torch.cat([outputs[name] for name in outputs if name.startswith("right")])
            return {"accuracy": float(right.double().mean())}

        return Work(run, quality)

    def tolerance(self, configuration: Configuration) -> float:
        return 1e-4


def _answers(evaluation: Evaluation, model: Model, tasks: list[Task], manner: Manner) -> dict[str, torch.Tensor]:
    found = {}
    for result in evaluation.results(model, tasks, manner, LineProgress(None, every_s=float("inf"))):
        found[f"loss {result.task.label}"] = torch.from_numpy(result.answers.loss_R)
        found[f"right {result.task.label}"] = torch.from_numpy(result.answers.right_E)
    return found


def _tokens(folder: str) -> TokenCache:
    return TokenCache(Path(folder) / "tokens", FOLDER, lambda: AutoTokenizer.from_pretrained(FOLDER, local_files_only=True), "eos")


@cache
def _bundle(examples: int, shots: int) -> TemporaryDirectory[str]:
    """One multiple-choice task and one of language modelling, in random words; removed with the process."""
    folder, draw = TemporaryDirectory(), random.Random(0)
    root = Path(folder.name)
    (root / "eval_data").mkdir()

    def say(words: int) -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    rows: dict[str, list[dict[str, Any]]] = {
        "multiple_choice": [
            {"query": say(8), "choices": [say(3) for _ in range(CHOICES)], "gold": draw.randrange(CHOICES)} for _ in range(examples)
        ],
        "language_modeling": [{"context": say(10), "continuation": say(2)} for _ in range(examples)],
    }
    listed, baselines = (
        ["icl_tasks:"],
        ["Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description"],
    )
    for kind, of_kind in rows.items():
        (root / "eval_data" / f"{kind}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in of_kind))
        listed += ["-", f"  label: {kind}", f"  dataset_uri: {kind}.jsonl", f"  num_fewshot: [{shots}]", f"  icl_task_type: {kind}"]
        baselines.append(f"{kind},words,{kind},{shots},{examples},{100 // CHOICES if kind == 'multiple_choice' else 0},,made up")
    (root / "core.yaml").write_text("\n".join(listed) + "\n")
    (root / "eval_meta_data.csv").write_text("\n".join(baselines) + "\n")
    return folder
