"""What a bundle says is read as written, and whatever is wrong in it is said with file and line."""

import json
from pathlib import Path
from typing import Any

import pytest

from specforge.errors import ConfigError, DataError
from specforge.suite.bundle import Example, Task, read_examples, read_tasks
from tests.suite.bundles import HEADER

CHOICE = {"query": "the cat", "choices": ["sat", "ran"], "gold": 1}
SCHEMA = {"context_options": ["the cat", "the dog"], "continuation": "ran", "gold": 0}
LANGUAGE = {"context": " the cat ", "continuation": " sat "}


def entry(label: str, kind: str = "multiple_choice", shots: Any = (0,), uri: str = "words/a.jsonl", **more: Any) -> dict[str, Any]:
    return {"label": label, "icl_task_type": kind, "num_fewshot": list(shots), "dataset_uri": uri, **more}


def write(folder: Path, tasks: Any, baselines: str = "a,,,,,25,,\nb,,,,,50,,\n") -> Path:
    (folder / "core.yaml").write_text(json.dumps({"icl_tasks": tasks}))  # JSON is YAML
    (folder / "eval_meta_data.csv").write_text(HEADER + baselines)
    return folder


def refusal(folder: Path, tasks: Any = None, **given: Any) -> str:
    """What is said of the bundle, its folder shown as FOLDER."""
    if tasks is not None:
        write(folder, tasks, **given)
    with pytest.raises(DataError) as error:
        read_tasks(folder)
    return str(error.value).replace(str(folder), "FOLDER")


def task_of(folder: Path, kind: str, lines: str) -> Task:
    (folder / "rows.jsonl").write_text(lines)
    return Task("a", kind, folder / "rows.jsonl", 0, " ", 25.0)


# -- reading -----------------------------------------------------------------------------------------------------------


def test_tasks_as_written(tmp_path: Path) -> None:
    tasks = [
        entry("b", "language_modeling", [10], continuation_delimiter="\nAnswer: ", has_categories=True),
        entry("a", "schema", [3], "local_data/words/b.jsonl"),
    ]
    assert read_tasks(write(tmp_path, tasks)) == [
        Task("b", "language_modeling", tmp_path / "eval_data/words/a.jsonl", 10, "\nAnswer: ", 50.0),
        Task("a", "schema", tmp_path / "eval_data/words/b.jsonl", 3, " ", 25.0),
    ]


def test_several_numbers_of_shots_are_several_tasks(tmp_path: Path) -> None:
    write(tmp_path, [entry("a", shots=[0, 10]), entry("b", shots=[5])])
    assert [(task.label, task.shots, task.baseline_pct) for task in read_tasks(tmp_path)] == [
        ("a-0shot", 0, 25.0),
        ("a-10shot", 10, 25.0),
        ("b", 5, 50.0),
    ]
    assert [(task.label, task.shots) for task in read_tasks(tmp_path, shots=2)] == [("a", 2), ("b", 2)]


def test_chosen_tasks_keep_the_bundles_order(tmp_path: Path) -> None:
    write(tmp_path, [entry("b"), entry("c"), entry("a")], "a,,,,,1,,\nb,,,,,2,,\n")  # c, not asked for, needs no baseline
    assert [task.label for task in read_tasks(tmp_path, ["a", "b"])] == ["b", "a"]
    with pytest.raises(ConfigError, match=r"--tasks x y: .* has b, c, a; choose of these"):
        read_tasks(tmp_path, ["y", "a", "x"])


def test_baselines_beside_commas_quotes_and_breaks(tmp_path: Path) -> None:
    rows = 'a,"x, “y”",,10,1,"12.5",,"One, ""two""\nthree"\r\nb,,,,,9.1,,\n'
    assert [task.baseline_pct for task in read_tasks(write(tmp_path, [entry("a"), entry("b")], rows))] == [12.5, 9.1]


def test_corrected_baselines_stand_beside_the_bundles(tmp_path: Path) -> None:
    labels = {"commonsense_qa": 40.3, "agi_eval_lsat_ar": 25.0, "bigbench_language_identification": 25.0, "boolq": 62.0}
    rows = "commonsense_qa,,,,,20,,\nagi_eval_lsat_ar,,,,,20,,\nbigbench_language_identification,,,,,9.1,,\nboolq,,,,,62,,\n"
    tasks = read_tasks(write(tmp_path, [entry(label) for label in labels], rows))
    assert [task.baseline_pct for task in tasks] == [20, 20, 9.1, 62]
    assert {task.label: task.baseline_v2_pct for task in tasks} == labels


def test_examples_of_every_kind(tmp_path: Path) -> None:
    """In file order, without empty lines; contexts of language modelling alone are stripped; what else is there is left alone."""
    for kind, row, expected in (
        ("multiple_choice", {**CHOICE, "query": " the cat ", "category": 3}, Example((" the cat ",) * 2, ("sat", "ran"), 1)),
        ("schema", {**SCHEMA, "continuation": " ran "}, Example(("the cat", "the dog"), (" ran ",) * 2, 0)),
        ("language_modeling", {**LANGUAGE, "aliases": ["x"]}, Example(("the cat",), (" sat ",), 0)),
    ):
        other = {**row, "continuation": "to it"} if kind != "multiple_choice" else {**row, "query": "to it"}
        first, second = read_examples(task_of(tmp_path, kind, f"\n{json.dumps(row)}\r\n  \n{json.dumps(other, ensure_ascii=False)}"))
        assert first == expected
        assert second != first


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_files_that_are_missing(tmp_path: Path) -> None:
    assert "core.yaml': there is no such file; give the path of a YAML file. A bundle has it at its top." in refusal(tmp_path)
    write(tmp_path, [entry("a")])
    [task] = read_tasks(tmp_path)
    with pytest.raises(DataError, match=r"eval_data/words/a\.jsonl: there is no such file"):
        read_examples(task)
    (tmp_path / "eval_meta_data.csv").unlink()
    assert refusal(tmp_path).startswith("FOLDER/eval_meta_data.csv: there is no such file")


@pytest.mark.parametrize(
    ("tasks", "said"),
    [
        ([], "FOLDER/core.yaml: icl_tasks must be a list of tasks"),
        (None, "FOLDER/core.yaml: icl_tasks must be a list of tasks"),
        (["a"], "FOLDER/core.yaml: task 1: must be an object with label, dataset_uri, icl_task_type, num_fewshot, not 'a'."),
        ([entry("a"), {"label": "b"}], "FOLDER/core.yaml: task 2: dataset_uri is missing; it needs label, dataset_uri,"),
        ([entry(3)], "FOLDER/core.yaml: task 1: label=3: must be of type str."),
        ([entry("a") | {"num_fewshot": 3}], "FOLDER/core.yaml: task 1: num_fewshot=3: must be of type list."),
        ([entry("a", shots=[])], "FOLDER/core.yaml: task 1 ('a'): num_fewshot=[]: must be a list of numbers of shots"),
        ([entry("a", shots=[True])], "FOLDER/core.yaml: task 1 ('a'): num_fewshot=[True]: must be a list of numbers of shots"),
        ([entry("a", shots=[-1])], "FOLDER/core.yaml: task 1 ('a'): num_fewshot=[-1]: must be a list of numbers of shots"),
        (
            [entry("a", "generation")],
            "task 1 ('a'): icl_task_type='generation': must be one of multiple_choice, schema, language_modeling.",
        ),
        ([entry("a", continuation_delimiter=3)], "FOLDER/core.yaml: task 1 ('a'): continuation_delimiter=3: must be a text."),
        ([entry("a"), entry("b"), entry("a")], "FOLDER/core.yaml: label 'a' occurs twice; give each task its own."),
        ([entry("a", shots=[1, 2]), entry("a", shots=[3])], "FOLDER/core.yaml: label 'a' occurs twice; give each task its own."),
        ([entry("a", shots=[1, 2, 1])], "FOLDER/core.yaml: label 'a-1shot' occurs twice; give each task its own."),
        ([entry("c")], "FOLDER/eval_meta_data.csv: task 'c' has no row there; add its random baseline."),
        ([entry("a", uri="../a.jsonl")], "file name '../a.jsonl' listed in FOLDER/eval_data: must be relative and stay inside"),
        ([entry("a", uri="local_data/../../a")], "file name '../../a' listed in FOLDER/eval_data: must be relative and stay inside"),
        ([entry("a", uri="/etc/passwd")], "file name '/etc/passwd' listed in FOLDER/eval_data: must be relative and stay inside"),
    ],
)
def test_a_list_that_breaks_a_rule(tmp_path: Path, tasks: Any, said: str) -> None:
    assert said in refusal(tmp_path, tasks or {})


@pytest.mark.parametrize(
    ("text", "said"),
    [("", "icl_tasks must be a list"), ("icl_tasks: 2024-13-45", "is not YAML"), ("icl_tasks: {? [a]: b}", "is not YAML")],
    ids=["empty", "month 13", "key that is a list"],
)
def test_a_list_that_yaml_refuses(tmp_path: Path, text: str, said: str) -> None:
    write(tmp_path, [])
    (tmp_path / "core.yaml").write_text(text)
    assert f"FOLDER/core.yaml: {said}" in refusal(tmp_path)


@pytest.mark.parametrize("number", ["", "chance", "nan", "inf", "100", "-1"])
def test_baselines_that_nothing_can_be_centred_on(tmp_path: Path, number: str) -> None:
    said = refusal(tmp_path, [entry("a")], baselines=f'b,,,,,50,,"two\nlines"\na,,,,,{number},,\n')
    assert said.startswith(f"FOLDER/eval_meta_data.csv:4: Random baseline={number!r}: must be a number, in percent")


def test_a_table_of_another_kind(tmp_path: Path) -> None:
    write(tmp_path, [entry("a")])
    (tmp_path / "eval_meta_data.csv").write_text("Eval Task,Baseline\na,25\n")
    assert "FOLDER/eval_meta_data.csv:1: the header must name 'Eval Task' and 'Random baseline'" in refusal(tmp_path)
    (tmp_path / "eval_meta_data.csv").write_text(f'{HEADER}a,,,,,25,,"{"x" * 200_000}"\n')
    assert "FOLDER/eval_meta_data.csv: is not CSV (field larger than field limit" in refusal(tmp_path)
    (tmp_path / "eval_meta_data.csv").write_text(f"{HEADER}a,words\n")
    assert "FOLDER/eval_meta_data.csv:2: Random baseline=None: must be a number" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("kind", "row", "said"),
    [
        ("multiple_choice", {"query": "the cat", "gold": 0}, "choices is missing; it needs query, choices, gold."),
        ("multiple_choice", [CHOICE], "must be an object with query, choices, gold, not [{'query'"),
        ("multiple_choice", {**CHOICE, "query": 3}, "query=3: must be of type str."),
        ("multiple_choice", {**CHOICE, "choices": "sat"}, "choices='sat': must be of type list."),
        ("multiple_choice", {**CHOICE, "choices": ["sat"]}, "choices=['sat']: must be a list of two texts or more."),
        ("multiple_choice", {**CHOICE, "choices": ["sat", 3]}, "choices=['sat', 3]: must be a list of two texts or more."),
        ("multiple_choice", {**CHOICE, "gold": True}, "gold=True: must be of type int."),
        ("multiple_choice", {**CHOICE, "gold": 1.0}, "gold=1.0: must be of type int."),
        ("multiple_choice", {**CHOICE, "gold": 2}, "gold=2: must be the index of one of the 2 texts, from 0 to 1."),
        ("multiple_choice", {**CHOICE, "gold": -1}, "gold=-1: must be the index of one of the 2 texts, from 0 to 1."),
        ("multiple_choice", {**CHOICE, "choices": ["a", "\ud800"]}, "holds half of a surrogate pair"),
        ("schema", {"context_options": ["a", "b"], "gold": 0}, "continuation is missing; it needs context_options, continuation, gold."),
        ("schema", {**SCHEMA, "context_options": ["the cat"]}, "context_options=['the cat']: must be a list of two texts or more."),
        ("schema", {**SCHEMA, "gold": False}, "gold=False: must be of type int."),
        ("schema", {**SCHEMA, "gold": 2}, "gold=2: must be the index of one of the 2 texts"),
        ("language_modeling", {"context": "the cat"}, "continuation is missing; it needs context, continuation."),
        ("language_modeling", {**LANGUAGE, "context": None}, "context=None: must be of type str."),
    ],
)
def test_an_example_that_breaks_a_rule(tmp_path: Path, kind: str, row: Any, said: str) -> None:
    good = {"multiple_choice": CHOICE, "schema": SCHEMA, "language_modeling": LANGUAGE}[kind]
    task = task_of(tmp_path, kind, f"{json.dumps(good)}\n\n{json.dumps(row)}\n")
    with pytest.raises(DataError) as error:
        read_examples(task)
    assert str(error.value).startswith(f"{task.path}:3: {said}")


@pytest.mark.parametrize("line", [b"{", b"\xff", b'{"gold": 0, "gold": 1}', b"[" * 9999])
def test_a_line_that_is_not_json(tmp_path: Path, line: bytes) -> None:
    task = task_of(tmp_path, "multiple_choice", "")
    task.path.write_bytes(json.dumps(CHOICE).encode() + b"\n" + line)
    with pytest.raises(DataError, match=r"rows\.jsonl:2: is not JSON \("):
        read_examples(task)


@pytest.mark.parametrize("lines", ["", "\n \n"])
def test_a_file_without_examples(tmp_path: Path, lines: str) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl: holds no examples; a task needs at least one"):
        read_examples(task_of(tmp_path, "schema", lines))
