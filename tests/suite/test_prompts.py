"""Order, shots and strings against CORE's rules, restated and written out by hand."""

import random
from pathlib import Path

import pytest

from specforge.suite.bundle import Example, Task
from specforge.suite.prompts import Draw, Prompt, chosen, shots_of, write_prompts

CHOICES = [
    Example(("Q0",) * 2, ("yes", "no"), 1),
    Example(("Q1 ",) * 2, ("up", "down"), 0),
    Example(("Q2",) * 3, ("a", "b", "c"), 2),
]
SCHEMAS = [Example(("A0", "B0"), ("end",) * 2, 1), Example(("A1", "B1 "), ("stop",) * 2, 0), Example(("A2", "B2"), ("rest",) * 2, 1)]
LANGUAGE = [Example(("one",), ("two",), 0), Example(("three",), ("four ",), 0), Example(("",), ("six",), 0)]
# With three examples and two shots, these are the draws of Random(1234), Random(1235) and Random(1236).
BEFORE = [[2, 1], [2, 0], [1, 0]]


def task(kind: str, shots: int, delimiter: str = " ") -> Task:
    return Task("a", kind, Path("unused"), shots, delimiter, 0.0)


@pytest.mark.parametrize("limit", [0, 1, 7, 50, 99])
def test_order_is_shuffled_by_1337_and_cut(limit: int) -> None:
    expected = list(range(50))
    random.Random(1337).shuffle(expected)
    assert chosen(range(50), Draw(limit)) == (expected[:limit] if limit > 0 else expected)
    assert chosen(range(50), Draw()) != list(range(50))


@pytest.mark.parametrize(("count", "shots"), [(30, 10), (30, 1), (11, 10), (5, 10), (1, 3), (4, 0)])
@pytest.mark.parametrize("seed", [1234, 7])
def test_shots_are_drawn_by_seed_plus_index(count: int, shots: int, seed: int) -> None:
    """Of all others, in the order of the draw; no more than there are."""
    for index in range(count):
        others = [*range(index), *range(index + 1, count)]
        expected = random.Random(seed + index).sample(others, min(shots, count - 1))
        assert shots_of(index, count, shots, Draw(fewshot_seed=seed)) == expected


@pytest.mark.parametrize(("count", "shots"), [(30, 10), (11, 10), (5, 10), (1, 3), (4, 0)])
def test_shared_shots_are_one_block(count: int, shots: int) -> None:
    """Who stands in the block sees the one spare example in its own place; all others see the block itself."""
    draws = [shots_of(index, count, shots, Draw(shared_shots=True)) for index in range(count)]
    *block, spare = random.Random(1234).sample(range(count), min(shots, count - 1) + 1)
    for index, draw in enumerate(draws):
        assert len(draw) == len(set(draw)) == min(shots, count - 1) and index not in draw
        assert draw == [spare if other == index else other for other in block]
    assert sum(draw == block for draw in draws) == count - len(block)


@pytest.mark.parametrize("shared", [False, True])
def test_prompts_hold_the_shots_of_their_draw(shared: bool) -> None:
    """Each block is found again by reading its answers backwards from the prompt."""
    examples = [Example((f"Q{number}",) * 2, (f"A{number}", "-"), 0) for number in range(12)]
    draw = Draw(shared_shots=shared)
    for index, prompt in enumerate(write_prompts(task("multiple_choice", 4, "="), examples, draw)):
        shown = [int(line.split("=A")[1]) for line in prompt.texts[0].split("\n\n")]
        assert shown == [*shots_of(index, 12, 4, draw), index]
        assert prompt.texts[1].endswith(f"\n\nQ{index}=-")


def test_the_draws_written_out_below() -> None:
    assert [shots_of(index, 3, 2, Draw()) for index in range(3)] == BEFORE


def test_multiple_choice_by_hand() -> None:
    assert write_prompts(task("multiple_choice", 0), CHOICES, Draw())[1] == Prompt(
        ("Q1  up", "Q1  down"), ("Q1  ", "Q1  "), ("up", "down"), 0
    )
    block = "Q1 \nA: up\n\nQ0\nA: no\n\nQ2\nA: "
    assert write_prompts(task("multiple_choice", 2, "\nA: "), CHOICES, Draw())[2] == Prompt(
        (block + "a", block + "b", block + "c"), (block,) * 3, ("a", "b", "c"), 2
    )


def test_schema_by_hand() -> None:
    assert write_prompts(task("schema", 0), SCHEMAS, Draw())[1] == Prompt(("A1 stop", "B1  stop"), ("A1 ", "B1  "), ("stop",) * 2, 0)
    assert write_prompts(task("schema", 2), SCHEMAS, Draw())[0] == Prompt(
        ("B2 rest\n\nA1 stop\n\nA0 end", "B2 rest\n\nA1 stop\n\nB0 end"),
        ("B2 rest\n\nA1 stop\n\nA0 ", "B2 rest\n\nA1 stop\n\nB0 "),
        ("end",) * 2,
        1,
    )


def test_language_modelling_by_hand() -> None:
    """What stands before the continuation is stripped as a whole; the text is not."""
    plain = write_prompts(task("language_modeling", 0, "\nA: "), LANGUAGE, Draw())
    assert plain[0] == Prompt(("one\nA: two",), ("one\nA:",), ("two",), 0)
    assert plain[2] == Prompt(("\nA: six",), ("A:",), ("six",), 0)
    shown = write_prompts(task("language_modeling", 2), LANGUAGE, Draw())
    assert shown[1] == Prompt((" six\n\none two\n\nthree four ",), ("six\n\none two\n\nthree",), ("four ",), 0)
    assert shown[2] == Prompt(("three four \n\none two\n\n six",), ("three four \n\none two",), ("six",), 0)
