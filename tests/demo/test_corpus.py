"""Packages are on one side only, near copies on neither, and rows are what their domain says."""

import ast
import json
import re
from functools import cache
from pathlib import Path

import pytest

from specforge.demo import conversations as conversations_module
from specforge.demo import corpus, rows
from specforge.demo.conversations import DOMAINS, RULES, conversations
from specforge.demo.corpus import Document

MODULES = ("argparse", "ast", "calendar", "configparser", "csv", "dataclasses", "locale", "optparse", "statistics", "textwrap")


def body(seed: int) -> str:
    return "".join(f"value_{seed}_{line} = compute({seed} + {line})\n" for line in range(40))


@pytest.fixture
def installation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Sixty packages of one file each; some are copies of the first."""
    for number in range(60):
        folder = tmp_path / f"package{number}"
        folder.mkdir()
        (folder / "code.py").write_text(body(0 if number % 10 == 0 else number))
    files = [(path.parent.name, tmp_path, path) for path in sorted(tmp_path.rglob("*.py"))]
    monkeypatch.setattr(corpus, "_sources", lambda: iter(files))
    monkeypatch.setattr(corpus, "_divided", cache(corpus._divided.__wrapped__))
    return tmp_path


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> None:
    """Conversations about ten modules of the standard library instead of the whole corpus."""
    folder = Path(ast.__file__).parent
    chosen = tuple(Document(name, f"{name}.py", (folder / f"{name}.py").read_text()) for name in MODULES)
    monkeypatch.setattr(conversations_module, "documents", lambda split: chosen)


def test_packages_are_on_one_side_only(installation: Path) -> None:
    sides = {split: {document.package for document in corpus.documents(split)} for split in ("train", "heldout")}
    assert sides["train"] and sides["heldout"]
    assert not sides["train"] & sides["heldout"]


def test_copies_are_taken_once(installation: Path) -> None:
    texts = [document.text for split in ("train", "heldout") for document in corpus.documents(split)]
    assert texts.count(body(0)) == 1
    assert len(texts) == 60 - 5


def test_prompts_of_both_sides_in_one_file(library: None, tmp_path: Path) -> None:
    path = tmp_path / "new" / "prompts.jsonl"
    rows.main([str(path), "--train", "6", "--heldout", "3"])
    written = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["id"].split("/")[0] for row in written] == ["train"] * 6 + ["heldout"] * 3
    assert [row["domain"] for row in written[:4]] == list(DOMAINS)
    answers = tmp_path / "answers.jsonl"
    answers.write_text(path.read_text())
    assert rows.split_answers(answers) == (6, 3)
    assert (tmp_path / "heldout.jsonl").read_text().splitlines() == path.read_text().splitlines()[6:]


def test_rows_are_conversations(library: None) -> None:
    rows = list(conversations("heldout"))
    assert {row["domain"] for row in rows} == set(DOMAINS)
    assert len({row["id"] for row in rows}) == len({row["conversations"][0]["content"] for row in rows}) == len(rows) > 100
    for row in rows:
        user, assistant = row["conversations"]
        assert (user["role"], assistant["role"]) == ("user", "assistant")
        assert row["package"] in MODULES
        assert user["content"].strip() and assistant["content"].strip()
        assert len(user["content"]) < 700 and len(assistant["content"]) < 200


def test_rows_are_the_same_every_time_and_take_turns(library: None) -> None:
    first, again = list(conversations("train", limit=40)), list(conversations("train", limit=40))
    assert first == again
    assert [row["domain"] for row in first] == [*DOMAINS] * 10


def test_completions_continue_the_module(library: None) -> None:
    sources = {name: re.sub(r"\s+", " ", (Path(ast.__file__).parent / f"{name}.py").read_text()) for name in MODULES}
    completions = [row for row in conversations("train") if row["domain"] == "complete"]
    for row in completions:
        head, answer = (re.search(r"```python\n(.*)\n```", turn["content"], re.DOTALL)[1] for turn in row["conversations"])
        assert re.sub(r"\s+", " ", f"{head}\n{answer}").strip() in sources[row["package"]]


def expected(rule: str, value: list | dict) -> str:
    """The rules once more, written another way."""
    items = list(value)
    answers = {
        "Reverse this list.": lambda: str(list(reversed(items))),
        "Sort this list.": lambda: str([x for _, x in sorted(zip(items, items))]),
        "Turn this list into a tuple.": lambda: str((*items,)),
        "Write this list as JSON.": lambda: json.JSONEncoder().encode(items),
        "Write every string of this list in capitals.": lambda: str([str.upper(x) if type(x) is str else x for x in items]),
        "Give the first and the last item.": lambda: " and ".join(map(repr, (items[0], items[-1]))),
        "How many items are in this list?": lambda: f"There are {sum(1 for _ in items)} items.",
        "Number the items of this list.": lambda: "\n".join(f"{place + 1}. {x}" for place, x in enumerate(items)),
        "List the keys of this dictionary.": lambda: str([*value.keys()]),
        "List the values of this dictionary.": lambda: str([value[key] for key in value]),
        "Swap keys and values.": lambda: str(dict(zip(value.values(), value.keys()))),
        "Write this dictionary as JSON.": lambda: json.JSONEncoder().encode(value),
    }
    return answers[rule]()


def test_literals_obey_their_rule(library: None) -> None:
    rows = [row for row in conversations("train", per_document=50) if row["domain"] == "literal"]
    met = set()
    for row in rows:
        rule, shown = row["conversations"][0]["content"].split("\n", 1)
        met.add(rule)
        assert row["conversations"][1]["content"] == expected(rule, ast.literal_eval(shown))
    assert met <= set(RULES) and len(met) >= 6
