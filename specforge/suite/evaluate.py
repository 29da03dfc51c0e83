"""A suite from tasks to results: tokens are made one task ahead, forwards run in one stream, a result comes with its last forward."""

import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any, Literal, NamedTuple, Self

import numpy as np
import torch

from specforge.distributed import World
from specforge.log.progress import Progress
from specforge.suite.agreement import draft_accepted
from specforge.suite.batches import base_batches, compose
from specforge.suite.bundle import Task
from specforge.suite.forest import plant
from specforge.suite.prompts import Draw
from specforge.suite.rules import Answers, Rule, answer, centred, class_scores, continuation_logp
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
    audit_examples: int = 0
    """So many of each task are scored in `exact` too."""


@dataclass(frozen=True)
class Audit:
    """Some examples of a task scored in `exact` too, and what the difference could have changed."""

    examples: int
    largest_difference: float
    """Of a loss, in nats."""
    at_risk: list[int]
    """Examples of the whole task whose answer leads by no more than twice that."""

    @classmethod
    def of(cls, examples: int, exact_X: np.ndarray, loss_X: np.ndarray, margin_E: np.ndarray) -> Self:
        difference = float(np.nan_to_num(np.abs(exact_X - loss_X)).max(initial=0.0))
        return cls(examples, difference, np.flatnonzero(margin_E <= 2 * difference).tolist())


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
    audit: Audit | None = None
    draft_accepted: float | None = None
    """Share of the scored positions that a draft foresaw."""

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
        if self.audit:
            numbers["audit"] = vars(self.audit)
        if self.draft_accepted is not None:
            numbers["draft_accepted"] = self.draft_accepted
        return numbers


def evaluate(
    model: Model, tasks: Sequence[Task], cache: TokenCache, draw: Draw, manner: Manner, world: World, progress: Progress, draft: Any = None
) -> Iterator[TaskResult]:
    """The result of each task, on every rank; `progress` counts token slots.

    Args:
        draft: a trained method whose first drafts are compared with the model's choices.

    Raises:
        DataError: a task cannot be read or tokenised, or does not fit the model's context.
    """

    def tokens_of(task: Task) -> tuple[TaskTokens, TaskTokens | None]:
        no_question = manner.rule == "pmi" and task.kind == "multiple_choice"
        return cache.get(task, draw), cache.get(task, draw, no_question=True) if no_question else None

    with ThreadPoolExecutor(max_workers=1) as ahead:
        waiting = [ahead.submit(tokens_of, task) for task in tasks[:1]]
        for task, following in zip_longest(tasks, tasks[1:]):
            tokens, no_question = waiting.pop().result()
            if following is not None:
                waiting.append(ahead.submit(tokens_of, following))
            progress.set_postfix({"task": task.label})
            cropped = tokens.cropped(model.longest, task.label)
            result = _score(model, task, cropped, no_question, manner, world, progress)
            if draft is not None:
                own = shares(cropped, range(len(cropped)), world.size)[world.rank]
                result = replace(result, draft_accepted=draft_accepted(model.target, draft, cropped, own, world))
            yield result


def _score(
    model: Model, task: Task, tokens: TaskTokens, no_question: TaskTokens | None, manner: Manner, world: World, progress: Progress
) -> TaskResult:
    began_s = time.perf_counter()
    said = _ask(model, tokens, range(len(tokens)), manner, world, progress)
    slots, no_question_R = said.slots, None
    if no_question is not None:
        beside = _ask(model, no_question, range(len(no_question)), manner, world, progress)
        slots, no_question_R = slots + beside.slots, continuation_logp(no_question, beside.logp_Q)
    answers = answer(tokens, said.logp_Q, said.is_best_Q, manner.rule, no_question_R)
    seconds = time.perf_counter() - began_s
    audit = None
    if manner.audit_examples:
        chosen = np.unique(np.linspace(0, len(tokens) - 1, manner.audit_examples).round().astype(int)).tolist()
        exact = _ask(model, tokens, chosen, replace(manner, mode="exact"), world, progress)
        again = answer(tokens, exact.logp_Q, exact.is_best_Q, manner.rule, no_question_R)
        rows = np.concatenate([np.asarray(tokens.rows_of(example)) for example in chosen])
        audit = Audit.of(len(chosen), again.loss_R[rows], answers.loss_R[rows], answers.margin_E)
    return TaskResult(task, said.mode, tokens, answers, len(tokens.token_N), slots, seconds, audit)


class _Said(NamedTuple):
    mode: Mode
    logp_Q: np.ndarray
    is_best_Q: np.ndarray
    slots: int


def _ask(model: Model, tokens: TaskTokens, examples: Sequence[int], manner: Manner, world: World, progress: Progress) -> _Said:
    """What the model says of some examples, each asked by one rank; 0 and false of all others."""
    found, slots = Predictions(tokens, model.target), 0
    mode, forwards = _plan(model, tokens, shares(tokens, examples, world.size)[world.rank], manner, found)
    for done in forwards:
        slots += done
        progress.update(done)
    return _Said(mode, *found.reduced(world), slots=int(world.sum_(torch.tensor([slots])).item()))


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


def shares(tokens: TaskTokens, examples: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of the examples each rank scores: the longest go first, each to the rank that has least to do."""
    work_E = np.maximum.reduceat(tokens.lengths_R, tokens.example_start_E1[:-1])
    given, load = [list[int]() for _ in range(ranks)], [0] * ranks
    for example in sorted(examples, key=lambda example: -work_E[example]):
        rank = load.index(min(load))
        given[rank].append(example)
        load[rank] += int(work_E[example])
    return given
