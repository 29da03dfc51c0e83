"""Spans against a plain restatement and by hand; cropping keeps ends, and refuses what it would lose."""

import random
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import pytest

from specforge.errors import DataError
from specforge.suite.prompts import Prompt
from specforge.suite.tokens import TaskTokens, tokenise
from tests.suite.sequential import rows_and_spans

BOS = 1


def pairs(texts: list[str]) -> list[list[int]]:
    """Two letters are a token, so that a continuation may begin within one."""
    return [[int.from_bytes(text[place : place + 2].encode(), "big") for place in range(0, len(text), 2)] for text in texts]


def letters(texts: list[str]) -> list[list[int]]:
    return [list(map(ord, text)) for text in texts]


def plain(text: str, add_special_tokens: bool) -> dict[str, Any]:
    return {"input_ids": pairs([text])[0]}


def prompt(before: Sequence[str], continuations: Sequence[str], gold: int = 0) -> Prompt:
    texts = tuple(start + continuation for start, continuation in zip(before, continuations, strict=True))
    return Prompt(texts, tuple(before), tuple(continuations), gold)


def random_prompt(choice: random.Random, kind: str) -> Prompt:
    """Of two letters and blanks, so that beginnings and endings are shared, and some texts are equal."""

    def say(longest: int) -> str:
        return "".join(choice.choice("ab ") for _ in range(choice.randint(0, longest)))

    if kind == "language_modeling":
        context = say(9).strip()
        continuation = say(5)
        return Prompt((f"{context} {continuation}",), (context,), (continuation,), 0)
    rows = choice.randint(2, 4)
    before = [say(6) + " "] * rows if kind == "multiple_choice" else [say(6) + " " for _ in range(rows)]
    told = [say(4) for _ in range(rows)] if kind == "multiple_choice" else [say(4)] * rows
    return prompt(before, told, choice.randrange(rows))


@pytest.mark.parametrize("kind", ["multiple_choice", "schema", "language_modeling"])
def test_rows_and_spans_are_the_plain_ones(kind: str) -> None:
    choice = random.Random(0)
    prompts = [random_prompt(choice, kind) for _ in range(200)]
    tokens = tokenise(prompts, kind, pairs, BOS)
    rows, spans = zip(*(rows_and_spans(prompt, kind, plain, BOS) for prompt in prompts), strict=True)
    assert len(tokens) == 200
    assert [[tokens.row(row).tolist() for row in tokens.rows_of(example)] for example in range(200)] == list(rows)
    assert [tokens.scored_R[row] for example in range(200) for row in tokens.rows_of(example)] == list(chain.from_iterable(spans))
    continuations = [(start, told) for prompt in prompts for start, told in zip(prompt.before, prompt.continuations, strict=True)]
    begins = [1 + len(pairs([start.rstrip()])[0]) for start, _ in continuations]
    assert tokens.continuation_R.tolist() == np.minimum(begins, tokens.lengths_R).tolist()
    assert tokens.chars_R.tolist() == [len(told) for _, told in continuations]
    assert tokens.gold_E.tolist() == [prompt.gold for prompt in prompts]
    assert {(array.dtype.name, array.ndim) for array in tokens.tensors().values()} == {("int32", 1), ("int64", 1)}
    assert tokens.row_start_R1.dtype == np.int64


@pytest.mark.parametrize(
    ("kind", "before", "continuations", "scored", "continuation", "lengths"),
    [
        ("multiple_choice", ["q: "] * 2, ["cat", "cow"], [5, 5], [3, 3], [7, 7]),  # a shared letter is not scored by CORE
        ("multiple_choice", ["q: "] * 2, ["cat", "cats"], [7, 7], [3, 3], [7, 8]),  # one a beginning of the other
        ("multiple_choice", ["q: "] * 3, ["cat", "cats", "x"], [4, 4, 4], [3, 3, 3], [7, 8, 5]),
        ("multiple_choice", ["q: "] * 2, ["cat", "cat"], [7, 7], [3, 3], [7, 7]),
        ("multiple_choice", ["q: "] * 2, ["", "a"], [4, 4], [3, 3], [4, 5]),  # the blank is of the continuation, as harnesses see it
        ("multiple_choice", ["q:"] * 2, ["", "a"], [3, 3], [3, 3], [3, 4]),
        ("schema", ["he ", "she "], ["ran"], [1, 2], [3, 4], [7, 8]),  # the ending that is shared begins within the contexts
        ("schema", ["a ", "b "], ["ran"], [2, 2], [2, 2], [6, 6]),
        ("schema", ["a ", "a "], ["ran"], [0, 0], [2, 2], [6, 6]),  # to the beginning, and past it
        ("schema", ["xa", "a"], [""], [2, 1], [3, 2], [3, 2]),
        ("language_modeling", ["a b"], [" cd"], [4], [4], [7]),
        ("language_modeling", ["a b"], [""], [4], [4], [4]),
    ],
)
def test_spans_by_hand(
    kind: str, before: list[str], continuations: list[str], scored: list[int], continuation: list[int], lengths: list[int]
) -> None:
    """One token a letter, after one for the beginning."""
    tokens = tokenise([prompt(before, continuations * (len(before) // len(continuations)))], kind, letters, BOS)
    assert tokens.lengths_R.tolist() == lengths
    assert (tokens.scored_R.tolist(), tokens.continuation_R.tolist()) == (scored, continuation)
    first = [max(min(pair), 1) for pair in zip(scored, continuation, strict=True)]
    assert tokens.first_R.tolist() == first
    counts = [length - begin for length, begin in zip(lengths, first, strict=True)]
    assert tokens.prediction_start_R1.tolist() == [sum(counts[:row]) for row in range(len(counts) + 1)]


def test_a_token_across_the_border_counts_from_what_is_shared() -> None:
    """`ab` + `c` is [ab][c], but `abc` + `d` is [ab][cd] where `abc` alone is [ab][c]."""
    for context, told, scored, continuation in (("ab", "c", 2, 2), ("abc", "d", 2, 3), ("abc", "", 3, 3)):
        tokens = tokenise([prompt([context], [told])], "language_modeling", pairs, BOS)
        assert (tokens.scored_R.tolist(), tokens.continuation_R.tolist()) == ([scored], [continuation])


def test_a_continuation_that_makes_the_text_shorter_begins_at_its_end() -> None:
    """`abc` has a token for each letter and `abcd` is a single one, as tokenizers of words have it."""

    def words(texts: list[str]) -> list[list[int]]:
        return [[9] if text == "abcd" else list(map(ord, text)) for text in texts]

    tokens = tokenise([prompt(["abc"], ["d"])], "language_modeling", words, BOS)
    assert (tokens.row(0).tolist(), tokens.scored_R.tolist(), tokens.continuation_R.tolist()) == ([BOS, 9], [1], [2])


def test_without_a_token_in_front() -> None:
    tokens = tokenise([prompt(["a b"], ["cd"])], "language_modeling", letters, None)
    assert tokens.row(0).tolist() == letters(["a bcd"])[0]
    assert (tokens.scored_R.tolist(), tokens.continuation_R.tolist()) == ([3], [3])


def test_lengths_are_of_the_continuation_as_written() -> None:
    tokens = tokenise([prompt(["q "] * 3, [" né", "日本 ", "🙂"])], "multiple_choice", letters, BOS)
    assert tokens.chars_R.tolist() == [3, 3, 1]
    assert tokens.bytes_R.tolist() == [4, 7, 4]


def test_places_are_classes_where_all_choose_between_the_same() -> None:
    same = [prompt(["x "] * 2, ["yes", "no"]), prompt(["y "] * 2, ["yes", "no"], 1)]
    turned = [*same, prompt(["z "] * 2, ["no", "yes"])]
    for prompts, kind, classes in (
        (same, "multiple_choice", 1), (turned, "multiple_choice", 0), (same[:1], "multiple_choice", 0), (same, "schema", 0),
    ):  # fmt: skip
        assert tokenise(prompts, kind, letters, BOS).classes.tolist() == [classes]


# -- cropping ----------------------------------------------------------------------------------------------------------


def ragged() -> TaskTokens:
    """Rows of 5, 8, 12, 7 and 9 tokens."""
    return tokenise(
        [prompt(["Q1 "] * 2, ["x", "yyyy"]), prompt(["Qu 22 "] * 3, ["zzzzz", "", "vv"])], "multiple_choice", letters, BOS
    )  # fmt: skip


@pytest.mark.parametrize("longest", [6, 7, 8, 9, 11])
def test_cropped_rows_are_the_last_tokens(longest: int) -> None:
    whole = ragged()
    assert whole.lengths_R.tolist() == [5, 8, 12, 7, 9]
    cut = whole.cropped(longest, "a")
    for row, length in enumerate(whole.lengths_R.tolist()):
        lost = max(length - longest, 0)
        assert cut.row(row).tolist() == whole.row(row)[lost:].tolist()
        for name in ("scored_R", "continuation_R"):
            assert getattr(cut, name)[row] == getattr(whole, name)[row] - lost
    for name, array in whole.tensors().items():
        assert getattr(cut, name).dtype == array.dtype
        if name not in ("token_N", "row_start_R1", "scored_R", "continuation_R"):
            assert getattr(cut, name).tolist() == array.tolist()


def test_what_fits_is_left_alone() -> None:
    whole = ragged()
    assert whole.cropped(12, "a") is whole


def test_a_span_that_does_not_fit_is_refused() -> None:
    """Five tokens of the third row are scored, so five must be read before the last of them: one more than is scored."""
    assert ragged().cropped(6, "a").scored_R.tolist()[2:] == [1, 6, 4]
    with pytest.raises(DataError, match=r"task 'a', example 1: 5 of its 12 tokens are scored and the model reads 5; take"):
        ragged().cropped(5, "a")


def test_a_row_without_a_span_may_lose_everything_but_its_end() -> None:
    tokens = tokenise([prompt(["long context "] * 2, ["cat", "cat"])], "multiple_choice", letters, BOS)
    cut = tokens.cropped(2, "a")
    assert (cut.lengths_R.tolist(), cut.scored_R.tolist(), cut.continuation_R.tolist()) == ([2, 2], [2, 2], [0, 0])
    assert cut.first_R.tolist() == [1, 1]
