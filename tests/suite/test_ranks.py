"""Ranks share examples out and agree with one that scores all; what cannot be scored is said."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from specforge.distributed import World
from specforge.errors import DataError
from specforge.features.target import Target
from specforge.log.progress import progress
from specforge.suite.bundle import Task, read_tasks
from specforge.suite.evaluate import Evaluation, Manner, Mode, TaskResult, shares
from specforge.suite.prompts import Draw
from specforge.suite.scoring import Model
from specforge.suite.token_cache import TokenCache
from tests.ranks import run_ranks
from tests.suite.bundles import write_bundle
from tests.suite.ragged import ragged_task
from tests.texts import make_text_target


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_target(tmp_path_factory.mktemp("ranks") / "target")


@pytest.fixture(scope="module")
def tasks(target: Path) -> list[Task]:
    return read_tasks(write_bundle(target.parent / "bundle"))


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 7, 50])
def test_shares_cover_each_example_once(ranks: int) -> None:
    """Longest first to whoever has least, so no rank is ahead of another by more than one example."""
    tokens = ragged_task(5, 40)
    given = shares(tokens, range(40), ranks)
    assert len(given) == ranks
    assert sorted(example for share in given for example in share) == list(range(40))
    longest = [max(len(tokens.row(row)) for row in tokens.rows_of(example)) for example in range(40)]
    expected = [list[int]() for _ in range(ranks)]
    for example in sorted(range(40), key=lambda example: -longest[example]):
        min(expected, key=lambda share: sum(longest[other] for other in share)).append(example)
    assert given == expected
    work = [sum(longest[example] for example in share) for share in given]
    assert max(work) - min(work) <= max(longest)
    assert sorted(map(tuple, shares(tokens, [3, 1], 2))) == [(1,), (3,)], "of two examples each rank scores one"


def score(world: World, target: Path, tasks: list[Task], calls: Path, modes: tuple[Mode, ...], draw: Draw) -> list[list[TaskResult]]:
    """All tasks in several modes; whoever loads the tokenizer leaves a letter in `calls`."""

    def load() -> Any:
        with calls.open("a") as file:
            file.write("x")
        return AutoTokenizer.from_pretrained(target)

    model, cache = Model(Target.load(target, "float32")), TokenCache(calls.parent / "cache", target, load, "eos")
    evaluation = Evaluation(cache, draw, world)
    with progress(None, world=world) as bar:
        return [list(evaluation.results(model, tasks, Manner(mode, batch_examples=3), bar)) for mode in modes]


@pytest.mark.parametrize(("world", "draw"), [(2, Draw()), (4, Draw(max_examples=3))], ids=["2 ranks", "4 ranks, 3 examples"])
def test_ranks_agree_with_one(world: int, draw: Draw, target: Path, tasks: list[Task], tmp_path: Path) -> None:
    """One rank of four has nothing to score. Alone in a forward, an example gets the same bits wherever it is scored."""
    modes: tuple[Mode, ...] = ("exact", "batched", "tree", "auto")
    (tmp_path / "one").mkdir()
    (tmp_path / "many").mkdir()
    alone = score(World(), target, tasks, tmp_path / "one" / "calls", modes, draw)
    for of_rank in run_ranks(score, target, tasks, tmp_path / "many" / "calls", modes, draw, world=world):
        for mode, expected, found in zip(modes, alone, of_rank, strict=True):
            assert [result.task for result in found] == tasks
            for one, other in zip(expected, found, strict=True):
                np.testing.assert_allclose(
                    other.answers.loss_R, one.answers.loss_R, rtol=0, atol=0 if mode == "exact" else 2e-5, err_msg=one.task.label
                )
                for name in ("predicted_E", "right_E", "is_greedy_R"):
                    assert getattr(other.answers, name).tolist() == getattr(one.answers, name).tolist(), (mode, one.task.label, name)
                assert (other.row_tokens, len(other.tokens)) == (one.row_tokens, len(one.tokens))
                assert other.slots == one.slots if mode == "exact" else other.slots > 0
    assert (tmp_path / "many" / "calls").read_text() == "x" * len(tasks), "each task is tokenised by one of the ranks, once"


@pytest.mark.parametrize("mode", ["exact", "batched", "tree", "auto"])
def test_nothing_to_predict(mode: Mode, target: Path, tmp_path: Path) -> None:
    """Choices without a letter have no tokens; the first one is the answer."""
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "the cat", "choices": ["", ""], "gold": 1}) + "\n")
    task = Task("empty", "multiple_choice", tmp_path / "rows.jsonl", 0, "", 50.0)
    [[result]] = score(World(), target, [task], tmp_path / "calls", (mode,), Draw())
    assert np.isnan(result.answers.loss_R).all()
    assert (result.answers.predicted_E.tolist(), result.numbers()["centred"], result.numbers()["empty_spans"]) == ([0], -1.0, 2)


def test_tokens_that_the_model_does_not_know_are_said(target: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"context": "the", "continuation": "zebra"}) + "\n")
    task, tokenizer = Task("zoo", "language_modeling", tmp_path / "rows.jsonl", 0, " ", 0.0), AutoTokenizer.from_pretrained(target)
    known = len(tokenizer)
    tokenizer.add_tokens(["zebra"])
    model, cache = Model(Target.load(target, "float32")), TokenCache(tmp_path, target, lambda: tokenizer, "eos")
    with pytest.raises(DataError, match=rf"task 'zoo': the tokenizer gives token {known} and the model knows {known}; give"):
        next(Evaluation(cache, Draw(), World()).results(model, [task], Manner(), progress(None)))
