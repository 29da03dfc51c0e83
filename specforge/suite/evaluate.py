"""A suite from tasks to results: tokens are made one task ahead, forwards run in one stream, a result comes with its last forward."""

import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any, Literal, NamedTuple, Self, cast

import numpy as np
import torch

from specforge.distributed import World
from specforge.errors import DataError
from specforge.log.progress import Progress
from specforge.suite.agreement import draft_accepted
from specforge.suite.batches import Batch, base_batches, compose
from specforge.suite.bundle import Task
from specforge.suite.forest import Forest, TreePiece, plant, trie_of
from specforge.suite.prompts import Draw
from specforge.suite.resident import RESIDENT_BYTES, Resident
from specforge.suite.rules import Answers, Rule, answer, centred, class_scores, continuation_logp
from specforge.suite.scoring import Model, Predictions
from specforge.suite.token_cache import TokenCache
from specforge.suite.tokens import TaskTokens
from specforge.suite.trie import Trie

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
            "shots": min(self.task.shots, len(self.tokens) - 1),
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


class _Work(NamedTuple):
    """The forwards over some examples of a task, on the device."""

    mode: Mode
    """The one that was taken."""
    forwards: Iterable[Batch] | Iterable[TreePiece]
    forest: Forest | None
    """None: batches."""
    unique_tokens: int
    examples: int

    def done(self, model: Model, found: Predictions) -> Iterator[tuple[int, int]]:
        """Slots of each forward when it is done, and how many of the unique tokens are done by then."""
        parts, all_parts = 0, self.forest.slots if self.forest else self.examples
        for forward in self._run(model, found):
            parts += forward.slots if isinstance(forward, TreePiece) else len(forward)
            yield forward.slots, self.unique_tokens * parts // all_parts

    def _run(self, model: Model, found: Predictions) -> Iterator[Batch] | Iterator[TreePiece]:
        if self.forest:
            return model.tree_forwards(self.forest, cast(Iterable[TreePiece], self.forwards), found)
        return model.batch_forwards(cast(Iterable[Batch], self.forwards), found)


class _Said(NamedTuple):
    mode: Mode
    logp_Q: np.ndarray
    is_best_Q: np.ndarray
    slots: int


class Evaluation:
    """Of any models of one tokenizer, as often as wanted: what a first time made stays in memory and on the device.

    Args:
        draft: a trained method whose first drafts are compared with the model's choices.
        resident_bytes: how much of the suite stays on the device.
    """

    def __init__(self, cache: TokenCache, draw: Draw, world: World, draft: Any = None, resident_bytes: int = RESIDENT_BYTES) -> None:
        self.cache, self.draw, self.world, self.draft = cache, draw, world, draft
        self.resident = Resident(world.device, resident_bytes)
        self._tries: dict[str, Trie] = {}
        self._forests: dict[str, Forest] = {}

    def results(
        self, model: Model, tasks: Sequence[Task], manner: Manner, progress: Progress, ahead_tasks: int = 1
    ) -> Iterator[TaskResult]:
        """The result of each task, on every rank, when its last forward is done; `progress` counts unique tokens.

        Args:
            ahead_tasks: of so many tasks the tokens are made while one is scored.

        Raises:
            DataError: a task cannot be read or tokenised, or does not fit the model's context.
        """
        with ThreadPoolExecutor(max_workers=1) as ahead:
            coming = iter(tasks)
            waiting = deque(ahead.submit(self._tokens, model, task, manner) for task in islice(coming, ahead_tasks))
            for number, task in enumerate(tasks, 1):
                waiting.extend(ahead.submit(self._tokens, model, following, manner) for following in islice(coming, 1))
                progress.set_postfix({"task": f"{number}/{len(tasks)} {task.label}"})
                yield self._score(model, task, *waiting.popleft().result(), manner, progress)

    def preload(self, model: Model, tasks: Sequence[Task], manner: Manner) -> None:
        """Do all that comes before the first forward of each task, so that scoring them moves nothing to the device."""
        for task in tasks:
            tokens, no_question = self._tokens(model, task, manner)
            for of_task, what in ((tokens, "all"), (no_question, "no question")):
                if of_task is not None:
                    own = shares(of_task, range(len(of_task)), self.world.size)[self.world.rank]
                    self._work(model, self._name(model, task, what), of_task, own, manner)

    def _tokens(self, model: Model, task: Task, manner: Manner) -> tuple[TaskTokens, TaskTokens | None]:
        """A task's rows as the model reads them, and for pointwise mutual information its answers to no question."""
        without = manner.rule == "pmi" and task.kind == "multiple_choice"
        no_question = self.cache.get(task, self.draw, no_question=True) if without else None
        return _read(model, task, self.cache.get(task, self.draw)), no_question and _read(model, task, no_question)

    def _name(self, model: Model, task: Task, what: str) -> str:
        return f"{self.cache.key(task, self.draw)} {model.longest} {what}"

    def _score(
        self, model: Model, task: Task, tokens: TaskTokens, no_question: TaskTokens | None, manner: Manner, progress: Progress
    ) -> TaskResult:
        def ask(tokens: TaskTokens, examples: Sequence[int], manner: Manner, what: str) -> _Said:
            return self._ask(model, self._name(model, task, what), tokens, examples, manner, progress)

        began_s, every = time.perf_counter(), range(len(tokens))
        said = ask(tokens, every, manner, "all")
        slots, no_question_R = said.slots, None
        if no_question is not None:
            beside = ask(no_question, every, manner, "no question")
            slots, no_question_R = slots + beside.slots, continuation_logp(no_question, beside.logp_Q)
        answers = answer(tokens, said.logp_Q, said.is_best_Q, manner.rule, no_question_R)
        seconds = time.perf_counter() - began_s
        audit, accepted = None, None
        if manner.audit_examples:
            chosen = np.unique(np.linspace(0, len(tokens) - 1, manner.audit_examples).round().astype(int)).tolist()
            exact = ask(tokens, chosen, replace(manner, mode="exact"), f"audit {manner.audit_examples}")
            again = answer(tokens, exact.logp_Q, exact.is_best_Q, manner.rule, no_question_R)
            rows = np.concatenate([np.asarray(tokens.rows_of(example)) for example in chosen])
            audit = Audit.of(len(chosen), again.loss_R[rows], answers.loss_R[rows], answers.margin_E)
        if self.draft is not None:
            own = shares(tokens, every, self.world.size)[self.world.rank]
            accepted = draft_accepted(model.target, self.draft, tokens, own, self.world)
        return TaskResult(task, said.mode, tokens, answers, len(tokens.token_N), slots, seconds, audit, accepted)

    def _ask(self, model: Model, name: str, tokens: TaskTokens, examples: Sequence[int], manner: Manner, progress: Progress) -> _Said:
        """What the model says of some examples, each asked by one rank; 0 and false of all others."""
        found, slots, told = Predictions(tokens, model.target), 0, 0
        own = shares(tokens, examples, self.world.size)[self.world.rank]
        work = self._work(model, name, tokens, own, manner)
        for of_forward, done in work.done(model, found):
            slots += of_forward
            progress.update(done - told)
            told = done
        return _Said(work.mode, *found.reduced(self.world), slots=int(self.world.sum_(torch.tensor([slots])).item()))

    def _work(self, model: Model, name: str, tokens: TaskTokens, examples: Sequence[int], manner: Manner) -> _Work:
        if name not in self._tries:
            self._tries[name] = trie_of(tokens, examples)
        trie = self._tries[name]
        if manner.mode in ("auto", "tree") and len(trie) and not model.why_no_tree:
            read = sum(len(tokens.row(row)) for example in examples for row in tokens.rows_of(example))
            if manner.mode == "tree" or read >= WORTH_A_TREE * len(trie):
                name_of_tree = f"{name} tree {manner.piece_tokens}"
                if name_of_tree not in self._forests:
                    self._forests[name_of_tree] = plant(tokens, examples, manner.piece_tokens, trie)
                forest = self._forests[name_of_tree]
                return _Work("tree", self.resident.get(name_of_tree, lambda: forest.pieces), forest, len(trie), len(examples))
        size = 1 if manner.mode == "exact" else manner.batch_examples
        base = self.resident.get(f"{name} batches", lambda: base_batches(tokens, examples, BASE_EXAMPLES))
        return _Work("exact" if size == 1 else "batched", compose(base, size), None, len(trie), len(examples))


def _read(model: Model, task: Task, tokens: TaskTokens) -> TaskTokens:
    """Rows as the model reads them: at most as long as it can, of tokens that it knows."""
    if (largest := int(tokens.token_N.max())) >= model.target.vocab_size:
        raise DataError(
            f"task {task.label!r}: the tokenizer gives token {largest} and the model knows {model.target.vocab_size}; "
            "give --tokenizer the folder of the model's own."
        )
    return tokens.cropped(model.longest, task.label)


def shares(tokens: TaskTokens, examples: Sequence[int], ranks: int) -> list[list[int]]:
    """Which of the examples each rank scores: the longest go first, each to the rank that has least to do."""
    work_E = np.maximum.reduceat(tokens.lengths_R, tokens.example_start_E1[:-1])
    given, load = [list[int]() for _ in range(ranks)], [0] * ranks
    for example in sorted(examples, key=lambda example: -work_E[example]):
        rank = load.index(min(load))
        given[rank].append(example)
        load[rank] += int(work_E[example])
    return given
