"""Answers and scores worked out by hand."""

import math
from typing import Any

import numpy as np
import pytest

from specforge.suite.rules import Rule, answer, centred, class_scores
from specforge.suite.tokens import TaskTokens

NAN = float("nan")


def task(
    examples: list[list[tuple[int, int, int]]],
    chars: list[int] | None = None,
    num_bytes: list[int] | None = None,
    gold: list[int] | None = None,
) -> TaskTokens:
    """Each row by its length, where CORE's span begins, and where its continuation begins."""
    lengths, scored, continuation = np.array([row for rows in examples for row in rows]).T
    ones = [1] * len(lengths)

    def array(values: Any) -> np.ndarray:
        return np.array(values, dtype=np.int32)

    return TaskTokens(
        array(np.zeros(lengths.sum())), np.concatenate([[0], np.cumsum(lengths)]), array(scored), array(continuation),
        array(chars or ones), array(num_bytes or ones), array(np.cumsum([0, *map(len, examples)])),
        array(gold or [0] * len(examples)), array([0]),
    )  # fmt: skip


def of_losses(*losses: float) -> tuple[TaskTokens, np.ndarray]:
    """One example of rows that have such a loss each; NaN: nothing to score."""
    tokens = task([[(2, 2 if math.isnan(loss) else 1, 2) for loss in losses]])
    return tokens, np.array([-loss for loss in losses if not math.isnan(loss)])


TINY = task([[(5, 3, 2), (6, 3, 2)]], chars=[4, 16], num_bytes=[8, 16], gold=[1])
"""Tokens 2, 3, 4 and 2, 3, 4, 5 are predicted; CORE leaves token 2 out, which both rows share."""
LOGP = np.array([-1.0, -4.0, -2.0, -1.0, -3.0, -2.5, -2.0])


@pytest.mark.parametrize(
    ("rule", "losses", "predicted"),
    [
        ("mean_token", [(4 + 2) / 2, (3 + 2.5 + 2) / 3], 1),
        ("sum", [1 + 4 + 2, 1 + 3 + 2.5 + 2], 0),
        ("per_char", [7 / 4, 8.5 / 16], 1),
        ("per_byte", [7 / 8, 8.5 / 16], 1),
    ],
)
def test_rules_by_hand(rule: Rule, losses: list[float], predicted: int) -> None:
    said = answer(TINY, LOGP, np.zeros(7, dtype=bool), rule)
    assert said.loss_R.tolist() == pytest.approx(losses, rel=1e-15)
    assert said.predicted_E.tolist() == [predicted]
    assert said.right_E.tolist() == [predicted == 1]
    assert said.margin_E.tolist() == pytest.approx([abs(losses[0] - losses[1])], rel=1e-14)


def test_lengths_of_nothing_divide_by_one() -> None:
    tokens = task([[(3, 2, 2), (3, 2, 2)]], chars=[0, 2], num_bytes=[0, 4])
    for rule, losses in (("per_char", [3.0, 1.0]), ("per_byte", [3.0, 0.5])):
        assert answer(tokens, np.array([-3.0, -2.0]), np.zeros(2, dtype=bool), rule).loss_R.tolist() == losses


@pytest.mark.parametrize(
    "losses",
    [
        (2.0, 1.0), (NAN, 1.0), (1.0, NAN), (NAN, NAN), (NAN, 1.0, 2.0), (2.0, NAN, 1.0), (1.0, NAN, 2.0), (2.0, 1.0, NAN),
        (2.0, NAN, NAN), (1.0, 1.0), (2.0, 1.0, 1.0),
    ],
)  # fmt: skip
def test_the_smallest_is_pythons(losses: tuple[float, ...]) -> None:
    """NaN wins in the first place and nowhere else; of equals the first one."""
    tokens, logp = of_losses(*losses)
    said = answer(tokens, logp, np.zeros(len(logp), dtype=bool))
    np.testing.assert_equal(said.loss_R, losses)
    values = said.loss_R.tolist()
    assert said.predicted_E.tolist() == [values.index(min(values))]
    assert said.predicted_E[0] == (0 if math.isnan(losses[0]) else np.nanargmin(losses))


@pytest.mark.parametrize(
    ("losses", "margin"),
    [((2.0, 1.0), 1.0), ((3.0, 1.0, 1.5), 0.5), ((1.0, 1.0), 0.0), ((2.0, NAN), NAN), ((NAN, 2.0), NAN), ((1.0,), math.inf)],
)
def test_margins(losses: tuple[float, ...], margin: float) -> None:
    tokens, logp = of_losses(*losses)
    np.testing.assert_equal(answer(tokens, logp, np.zeros(len(logp), dtype=bool)).margin_E, [margin])


def test_a_text_without_rivals_is_right_where_every_token_is_the_likeliest() -> None:
    """Spans of 2, 2, 1 and 0 tokens; each row has one prediction more, which CORE's span leaves out."""
    tokens = task([[(5, 3, 2)], [(5, 3, 2)], [(4, 3, 2)], [(3, 3, 2)]])
    best = np.array([0, 1, 1, 1, 1, 0, 1, 0, 0], dtype=bool)
    said = answer(tokens, -np.arange(9.0), best)
    assert said.is_greedy_R.tolist() == said.right_E.tolist() == [True, False, False, True]
    np.testing.assert_equal(said.loss_R, [1.5, 4.5, 7.0, NAN])
    assert said.accuracy == 0.5
    assert answer(tokens, -np.arange(9.0), best, "sum").loss_R.tolist() == [3.0, 12.0, 13.0, 8.0]


def test_greedy_rows_do_not_make_a_choice_right() -> None:
    tokens, logp = of_losses(2.0, 1.0)
    said = answer(tokens, logp, np.array([True, False]))
    assert (said.is_greedy_R.tolist(), said.right_E.tolist()) == ([True, False], [False])


def test_nothing_predicts_the_first_token() -> None:
    """Texts that are all one ending are scored by nobody, however long; their continuations are."""
    tokens = task([[(4, 0, 2), (4, 0, 2)]])
    logp = -np.arange(1.0, 7.0)
    np.testing.assert_equal(answer(tokens, logp, np.zeros(6, dtype=bool)).loss_R, [NAN, NAN])
    assert answer(tokens, logp, np.zeros(6, dtype=bool), "sum").loss_R.tolist() == [5.0, 11.0]
    from_the_first = task([[(3, 1, 0), (3, 1, 0)]])
    assert answer(from_the_first, logp[:4], np.zeros(4, dtype=bool), "sum").loss_R.tolist() == [3.0, 7.0]


@pytest.mark.parametrize(
    ("accuracy", "baseline", "expected"), [(1.0, 25.0, 1.0), (0.25, 25.0, 0.0), (0.0, 50.0, -1.0), (0.5, 0.0, 0.5), (0.7, 40.0, 0.5)]
)
def test_centred(accuracy: float, baseline: float, expected: float) -> None:
    assert centred(accuracy, baseline) == pytest.approx(expected, abs=1e-15)


def test_class_scores_by_hand() -> None:
    """Class 0: 2 of 3 said are right, of 4 there are; 1: 1 of 3, of 2; 2: none of 1, of 1; 3: never said, of 0 and 1."""
    gold = np.array([0, 0, 0, 0, 1, 1, 2, 3])
    said = np.array([0, 0, 1, 2, 0, 1, 1, 4])
    expected = [
        (2 / 3, 2 / 4, 2 * (2 / 3 * 1 / 2) / (2 / 3 + 1 / 2)), (1 / 3, 1 / 2, 2 * (1 / 6) / (5 / 6)), (0, 0, 0), (0, 0, 0), (0, 0, 0),
    ]  # fmt: skip
    found = [(scores.precision, scores.recall, scores.f1) for scores in class_scores(gold, said)]
    assert found == [pytest.approx(row, rel=1e-15) for row in expected]
    assert found[0][2] == pytest.approx(4 / 7) and found[1][2] == pytest.approx(0.4)
