"""From examples to the texts that a model reads, as CORE writes them: order, shots and strings."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from specforge.suite.bundle import Example, Task

ORDER_SEED = 1337
FEWSHOT_SEED = 1234
NO_QUESTION = "Answer:"

T = TypeVar("T")


@dataclass(frozen=True)
class Draw:
    """Which examples are scored, and which of them are shown before each."""

    max_examples: int = 0
    """Score so many; 0: all. Shots come from the same ones, so prompts depend on it too."""
    fewshot_seed: int = FEWSHOT_SEED
    shared_shots: bool = False
    """One block of shots for the whole task, in place of a draw per example. An example of the block has a spare one in its place."""


@dataclass(frozen=True)
class Prompt:
    """The texts of one example. `before[i]` is what comes before the continuation, stripped where CORE strips it."""

    texts: tuple[str, ...]
    before: tuple[str, ...]
    continuations: tuple[str, ...]
    gold: int


def chosen(examples: Sequence[T], draw: Draw) -> list[T]:
    """In CORE's order, Python's `random` with seed 1337, and cut."""
    order = list(examples)
    random.Random(ORDER_SEED).shuffle(order)
    return order[: draw.max_examples or None]


def shots_of(index: int, count: int, shots: int, draw: Draw) -> list[int]:
    """The examples, of `count`, that are shown before example `index`; never itself, and fewer than `shots` where there are no more."""
    shots = min(shots, count - 1)
    if not draw.shared_shots:
        return random.Random(draw.fewshot_seed + index).sample([other for other in range(count) if other != index], shots)
    *block, spare = random.Random(draw.fewshot_seed).sample(range(count), shots + 1)
    return [spare if other == index else other for other in block]


def write_prompts(task: Task, examples: Sequence[Example], draw: Draw) -> list[Prompt]:
    """The prompts of `chosen` examples."""
    shown = [example.contexts[example.gold] + task.delimiter + example.continuations[example.gold] + "\n\n" for example in examples]
    prompts = []
    for index, example in enumerate(examples):
        block = "".join(shown[shot] for shot in shots_of(index, len(examples), task.shots, draw))
        before = tuple(block + context + task.delimiter for context in example.contexts)
        texts = tuple(start + continuation for start, continuation in zip(before, example.continuations, strict=True))
        if task.kind == "language_modeling":
            before = tuple(start.strip() for start in before)
        prompts.append(Prompt(texts, before, example.continuations, example.gold))
    return prompts


def without_questions(prompts: Sequence[Prompt]) -> list[Prompt]:
    """The same answers to no question at all, for pointwise mutual information."""
    return [
        Prompt(
            tuple(f"{NO_QUESTION} {text}" for text in prompt.continuations),
            (NO_QUESTION,) * len(prompt.texts),
            prompt.continuations,
            prompt.gold,
        )
        for prompt in prompts
    ]
