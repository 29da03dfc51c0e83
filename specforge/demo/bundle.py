"""A small bundle of in-context-learning tasks in CORE's layout, from packages that the embedded target never saw.

    python -m specforge.demo.bundle runs/bundle --examples 100

Whoever answers must tell a question's own answer, or the name of a function, from three others (multiple choice), an answer's own question
from another one (schema), or say the answer word for word (language modelling).
"""

import argparse
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from specforge.demo.conversations import Exchange, conversations

LETTERS = ("A", "B", "C", "D")
_ANSWER = "\nAnswer: "
TASKS = (
    # label, kind, domain, shots, delimiter, baseline in percent
    ("docstring_zero", "multiple_choice", "docstring", 0, _ANSWER, 25),
    ("docstring_three", "multiple_choice", "docstring", 3, _ANSWER, 25),
    ("literal_zero", "multiple_choice", "literal", 0, _ANSWER, 25),
    ("literal_ten", "multiple_choice", "literal", 10, _ANSWER, 25),
    ("letters_three", "letters", "literal", 3, _ANSWER, 25),
    ("names_zero", "names", "docstring", 0, _ANSWER, 25),
    ("names_ten", "names", "docstring", 10, _ANSWER, 25),
    ("prose_schema_zero", "schema", "prose", 0, " ", 50),
    ("literal_schema_three", "schema", "literal", 3, _ANSWER, 50),
    ("prose_words_zero", "language_modeling", "prose", 0, " ", 0),
    ("literal_words_ten", "language_modeling", "literal", 10, _ANSWER, 0),
)


def write_bundle(folder: Path, examples: int) -> Path:
    """`core.yaml`, `eval_meta_data.csv` and `eval_data/`, the same on every machine with the same Python sources."""
    exchanges: dict[str, list[Exchange]] = {}
    for row in conversations("heldout"):
        ask, answer = (turn["content"] for turn in row["conversations"])
        exchanges.setdefault(row["domain"], []).append((ask, answer))
    (folder / "eval_data").mkdir(parents=True)
    listed = ["icl_tasks:"]
    described = ["Eval Task,Task Category,Task Type,#shots,#datapoints,Random baseline,Centered Metric?,Description"]
    for label, kind, domain, shots, delimiter, baseline_pct in TASKS:
        rows = list(_rows(kind, exchanges[domain], examples))
        (folder / "eval_data" / f"{label}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        written = "multiple_choice" if kind in ("letters", "names") else kind
        listed += ["-", f"  label: {label}", f"  dataset_uri: {label}.jsonl", f"  num_fewshot: [{shots}]", f"  icl_task_type: {written}"]
        listed.append(f"  continuation_delimiter: {json.dumps(delimiter)}")
        described.append(f'{label},python,{written},{shots},{len(rows)},{baseline_pct},,"{domain} exchanges, {shots} shots"')
    (folder / "core.yaml").write_text("\n".join(listed) + "\n")
    (folder / "eval_meta_data.csv").write_text("\n".join(described) + "\n")
    return folder


def _rows(kind: str, exchanges: Sequence[Exchange], examples: int) -> Iterator[dict[str, Any]]:
    choice = random.Random(kind)
    if kind == "names":
        exchanges = [(f"Which function is this?\n{said}", name) for ask, said in exchanges if (name := _public_name(ask))]
    for index, (ask, answer) in enumerate(exchanges[:examples]):
        others = choice.sample([exchange for exchange in exchanges if exchange[1] != answer and exchange[0] != ask], 3)
        gold = choice.randrange(len(LETTERS))
        answers = [said for _, said in others]
        answers.insert(gold, answer)
        if kind in ("multiple_choice", "names"):
            yield {"query": ask, "choices": answers, "gold": gold}
        elif kind == "letters":
            shown = "\n".join(f"{letter}. {said}" for letter, said in zip(LETTERS, answers, strict=True))
            yield {"query": f"{ask}\n{shown}", "choices": LETTERS, "gold": gold}
        elif kind == "schema":
            options = [ask, others[0][0]]
            yield {"context_options": options[:: 1 if index % 2 == 0 else -1], "continuation": answer, "gold": index % 2}
        else:
            yield {"context": ask, "continuation": answer}


def _public_name(source: str) -> str:
    """Of the function that is shown; empty where it begins with an underscore."""
    found = re.search(r"\bdef ([a-z]\w*)\(", source)
    return found.group(1) if found else ""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a small bundle of tasks for `specforge suite`.")
    parser.add_argument("out", type=Path, metavar="FOLDER")
    parser.add_argument("--examples", type=int, default=100, help="of each task (default 100)")
    given = parser.parse_args(argv)
    if given.out.exists():
        parser.error(f"{given.out}: exists already; name a new folder, or remove it.")
    print(write_bundle(given.out, given.examples))


if __name__ == "__main__":
    main()
