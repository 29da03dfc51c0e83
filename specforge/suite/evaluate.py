"""A suite from tasks to results: tokens are made one task ahead, forwards run in one stream, a result comes with its last forward."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch

from specforge.distributed import World
from specforge.log.progress import Progress
from specforge.suite.batches import base_batches, compose
from specforge.suite.bundle import Task
from specforge.suite.forest import plant
from specforge.suite.prompts import Draw
from specforge.suite.rules import Answers, Rule, answer, centred, class_scores
from specforge.suite.scoring import Model, Predictions
from specforge.suite.token_cache import TokenCache
from specforge.suite.tokens import TaskTokens

Mode = Literal["auto", "exact", "batched", "tree"]
BASE_EXAMPLES = 4
WORTH_A_TREE = 1.15
"""Tokens of all rows over nodes of their tree from which on `auto` takes the tree."""


@dataclass(frozen=True)
class Manner:
    """How a suite is scored; no choice but `rule` changes an answer."""

    mode: Mode = "auto"
    rule: Rule = "mean_token"
    batch_examples: int = BASE_EXAMPLES
    piece_tokens: int = 512
    """Of a forward over a piece of the tree."""


@dataclass(frozen=True)
class TaskResult:
    task: Task
    mode: Mode
    """The one that was taken."""
    tokens: TaskTokens
    answers: Answers
    row_tokens: int
    """Of all rows, were each read whole."""
    slots: int
    """That forwards had room for, on all ranks."""
    seconds: float

    def numbers(self) -> dict[str, Any]:
        accuracy = self.answers.accuracy
        numbers: dict[str, Any] = {
            "task": self.task.label, "mode": self.mode, "examples": len(self.tokens), "accuracy": accuracy,
            "centred": centred(accuracy, self.task.baseline_pct), "centred_v2": centred(accuracy, self.task.baseline_v2_pct),
            "empty_spans": int(np.isnan(self.answers.loss_R).sum()), "row_tokens": self.row_tokens, "slots": self.slots,
            "seconds": self.seconds,
        }  # fmt: skip
        if self.tokens.classes[0]:
            numbers["classes"] = [vars(scores) for scores in class_scores(self.tokens.gold_E, self.answers.predicted_E)]
        return numbers


def evaluate(
    model: Model, tasks: Sequence[Task], cache: TokenCache, draw: Draw, manner: Manner, world: World, progress: Progress
) -> Iterator[TaskResult]:
    """The result of each task, on every rank; `progress` counts token slots.

    Raises:
        DataError: a task cannot be read or tokenised, or does not fit the model's context.
    """
    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting: Future[TaskTokens] | None = None
        for place, task in enumerate(tasks):
            waiting = waiting or ahead.submit(cache.get, task, draw)
            tokens = waiting.result().cropped(model.longest, task.label)
            waiting = ahead.submit(cache.get, tasks[place + 1], draw) if place + 1 < len(tasks) else None
            progress.set_postfix({"task": task.label})
            yield _score(model, task, tokens, manner, world, progress)


def _score(model: Model, task: Task, tokens: TaskTokens, manner: Manner, world: World, progress: Progress) -> TaskResult:
    began_s = time.perf_counter()
    found, slots = Predictions(tokens, model.target), 0
    examples = shares(tokens, world.size)[world.rank]
    mode, forwards = _plan(model, tokens, examples, manner, found)
    for done in forwards:
        slots += done
        progress.update(done)
    logp_Q, is_best_Q = found.reduced(world)
    total_slots = int(world.sum_(torch.tensor([slots])).item())
    seconds = time.perf_counter() - began_s
    return TaskResult(task, mode, tokens, answer(tokens, logp_Q, is_best_Q, manner.rule), len(tokens.token_N), total_slots, seconds)


def _plan(model: Model, tokens: TaskTokens, examples: Sequence[int], manner: Manner, found: Predictions) -> tuple[Mode, Iterator[int]]:
    """The mode that was taken, and the slots of its forwards, each when it is done."""
    if manner.mode in ("auto", "tree") and examples and not model.why_no_tree:
        forest = plant(tokens, examples, manner.piece_tokens)
        read = sum(len(tokens.row(row)) for example in examples for row in tokens.rows_of(example))
        if manner.mode == "tree" or read >= WORTH_A_TREE * forest.unique_tokens:
            return "tree", model.tree_forwards(forest, found)
    size = 1 if manner.mode == "exact" else manner.batch_examples
    batches = compose(base_batches(tokens, examples, BASE_EXAMPLES), size)
    return "exact" if size == 1 else "batched", model.batch_forwards(batches, found)


def shares(tokens: TaskTokens, ranks: int) -> list[list[int]]:
    """Which examples each rank scores: the longest go first, each to the rank that has least to do."""
    work_E = np.maximum.reduceat(tokens.lengths_R, tokens.example_start_E1[:-1])
    given, load = [list[int]() for _ in range(ranks)], [0] * ranks
    for example in np.argsort(-work_E, kind="stable").tolist():
        rank = load.index(min(load))
        given[rank].append(example)
        load[rank] += int(work_E[example])
    return given
