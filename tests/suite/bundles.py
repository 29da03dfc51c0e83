"""A bundle of every kind of task in the words of the tiny target, with the cases that are easily got wrong."""

import json
import random
from pathlib import Path
from typing import Any

from tests.texts import WORDS

HEADER = "Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description\n"


def say(choice: random.Random, low: int, high: int) -> str:
    return " ".join(choice.choice(WORDS) for _ in range(choice.randint(low, high)))


def multiple_choice(count: int, seed: int, options: int = 4) -> list[dict[str, Any]]:
    choice = random.Random(seed)
    return [
        {"query": say(choice, 2, 6), "choices": [say(choice, 1, 4) for _ in range(options)], "gold": choice.randrange(options)}
        for _ in range(count)
    ]


def strange_choices() -> list[dict[str, Any]]:
    """One token each, two alike, one the beginning of another, accents and emoji, none at all."""
    return [
        {"query": "the cat", "choices": ["a", "b", "c"], "gold": 1},
        {"query": "the dog", "choices": ["sat", "sat", "ran"], "gold": 2},
        {"query": "on a mat", "choices": ["the dog", "the dog ran to it"], "gold": 0},
        {"query": "naïve 日本", "choices": ["café 🙂", "café 🙃", "кот"], "gold": 0},
        {"query": "birds", "choices": ["sang", "sang"], "gold": 1},
        {"query": "it", "choices": ["", "of spring"], "gold": 1},
    ]


def schema(count: int, seed: int) -> list[dict[str, Any]]:
    choice = random.Random(seed)
    rows = [
        {"context_options": [say(choice, 1, 5), say(choice, 1, 5)], "continuation": say(choice, 1, 4), "gold": choice.randrange(2)}
        for _ in range(count)
    ]
    return [*rows, {"context_options": ["the cat", "the cat"], "continuation": "ran", "gold": 0}]


def language(count: int, seed: int) -> list[dict[str, Any]]:
    choice = random.Random(seed)
    rows = [{"context": f" {say(choice, 2, 9)} ", "continuation": say(choice, 1, 3)} for _ in range(count)]
    return [*rows, {"context": "", "continuation": "the cat"}]


TASKS: list[tuple[str, str, int, str | None, list[dict[str, Any]]]] = [
    ("choices_zero", "multiple_choice", 0, None, multiple_choice(12, 1)),
    ("choices_few", "multiple_choice", 2, "\nAnswer: ", multiple_choice(12, 2)),
    ("letters", "multiple_choice", 1, None, [{**row, "choices": ["yes", "no"], "gold": row["gold"] % 2} for row in multiple_choice(9, 3)]),
    ("strange", "multiple_choice", 0, None, strange_choices()),
    ("schema_zero", "schema", 0, None, schema(8, 4)),
    ("schema_few", "schema", 2, None, schema(8, 5)),
    ("language_zero", "language_modeling", 0, None, language(8, 6)),
    ("language_few", "language_modeling", 3, "\nAnswer: ", language(8, 7)),
]


def write_bundle(folder: Path) -> Path:
    (folder / "eval_data").mkdir(parents=True)
    listed, baselines = ["icl_tasks:"], [HEADER]
    for label, kind, shots, delimiter, rows in TASKS:
        listed += ["-", f"  label: {label}", f"  dataset_uri: words/{label}.jsonl", f"  num_fewshot: [{shots}]", f"  icl_task_type: {kind}"]
        if delimiter is not None:
            listed.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        baselines.append(f'{label},words,{kind},{shots},{len(rows)},{25 if kind == "multiple_choice" else 0},,"Words, “quoted”"\n')
        path = folder / "eval_data" / "words" / f"{label}.jsonl"
        path.parent.mkdir(exist_ok=True)
        path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    (folder / "core.yaml").write_text("\n".join(listed) + "\n")
    (folder / "eval_meta_data.csv").write_text("".join(baselines))
    return folder
