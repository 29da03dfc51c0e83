"""Counts of one sample against numbers worked out by hand, and against a decoder that is simulated token by token."""

import numpy as np
import pytest

from specforge.eval.acceptance import Columns, acceptance, answers, count_sample, domains_of
from specforge.eval.bootstrap import poisson_weights
from specforge.eval.walked import Walked, walked_answers


def test_answers_are_maximal_runs() -> None:
    mask = np.array([0, 1, 1, 0, 1, 0, 1, 1, 1], dtype=bool)
    assert answers(mask) == [(1, 2), (4, 4), (6, 8)]


def test_counts_by_hand() -> None:
    """One answer at tokens 2..6 (P=2, E=6), K=2; starts 2, 3, 4, 5.

    right: s=2: (1, 1)  s=3: (1, 0)  s=4: (0, 1)  s=5: (1, -)
    correct = (3, 2), exist = (4, 3), joint = (3, 1).
    Walk: s=2 accepts 2, takes 3 tokens, goes to 5; s=5 accepts 1, takes min(2, 6-5) = 1 token: 4 tokens in 2 rounds.
    With the first draft alone: s=2 accepts 1, goes to 4; s=4 accepts none, goes to 5; s=5 ends it: 3 rounds.
    """
    ids = np.array([9, 9, 10, 11, 12, 13, 14])
    mask = np.array([0, 0, 1, 1, 1, 1, 1], dtype=bool)
    argmax = np.array([0, 10, 11, 12, 13, 14, 0])
    proposals = np.full((7, 2), -1)
    proposals[2], proposals[3], proposals[4], proposals[5] = (11, 12), (12, 0), (0, 14), (14, 7)
    counts, columns = count_sample(ids, mask, argmax, proposals), Columns(2)
    assert counts[columns.correct].tolist() == [3, 2]
    assert counts[columns.exist].tolist() == [4, 3]
    assert counts[columns.joint].tolist() == [3, 1]
    assert counts[columns.starts] == 4
    assert (counts[columns.walk_tokens], counts[columns.walk_rounds].tolist()) == (4, [3, 2])
    assert counts[columns.walk_histogram].tolist() == [0, 1, 1], "the round at 5 accepts 1, the one at 2 accepts 2"
    assert (counts[columns.matches], counts[columns.supervised]) == (5, 5)
    numbers = acceptance(counts, columns)
    assert numbers["simulated_acc_len"] == pytest.approx(3 / 4 + 3 / 4 * 2 / 3)
    assert numbers["acc_len"] == pytest.approx(1 + 3 / 4 + 1 / 4)
    assert numbers["walk_acc_len"] == 2.0
    assert numbers["walk_acc_len_by_draft_tokens"] == [4 / 3, 2.0]


def test_the_example_of_the_concepts_page() -> None:
    """Nine places, hard ones in the middle: rounds begin at 1, 4, 5, 6 and 7."""
    ids_S, mask_S = np.arange(20, 31), np.arange(11) >= 1
    proposals_SK = np.full((11, 2), -1)
    for start in (1, 2, 3, 7, 8, 9):
        proposals_SK[start, 0] = ids_S[start + 1]
    for start in (1, 2, 3, 7, 8):
        proposals_SK[start, 1] = ids_S[start + 2]
    numbers = acceptance(count_sample(ids_S, mask_S, np.append(ids_S[1:], 0), proposals_SK), Columns(2))
    assert numbers["walk_acc_len"] == 9 / 5
    assert numbers["walk_histogram"] == [3, 0, 2]
    assert numbers["acc_len"] == pytest.approx(1 + 6 / 9 + 5 / 9)
    assert numbers["per_position_acc"] == [6 / 9, 5 / 8]
    assert numbers["simulated_acc_len"] == pytest.approx(6 / 9 + 6 / 9 * 5 / 8)


def test_an_oracle_reaches_the_longest_walk_and_a_mute_draft_walks_one_by_one() -> None:
    ids = np.arange(40) + 5
    mask = np.arange(40) >= 9
    argmax = np.append(ids[1:], 0)
    columns = Columns(3)
    oracle = np.stack([np.append(ids[k:], [0] * k) for k in (1, 2, 3)], 1)
    counts = count_sample(ids, mask, argmax, oracle)
    assert (counts[columns.walk_tokens], counts[columns.walk_rounds].tolist()) == (30, [15, 10, 8])
    mute = count_sample(ids, mask, argmax, np.full((40, 3), -1))
    assert (mute[columns.walk_tokens], mute[columns.walk_rounds].tolist()) == (30, [30] * 3)


def decoded(ids: np.ndarray, first: int, last: int, proposals: np.ndarray) -> tuple[int, int]:
    """A greedy chain decoder over a known text, one token at a time."""
    committed, rounds = first, 0
    while committed < last:
        rounds += 1
        for proposed in proposals[committed]:
            if committed == last or proposed != ids[committed + 1]:
                break
            committed += 1
        if committed < last:
            committed += 1
    return last - first, rounds


def test_walk_equals_a_decoder_on_random_drafts() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        tokens, drafts = int(rng.integers(4, 40)), int(rng.integers(1, 6))
        ids, argmax = rng.integers(0, 3, tokens), rng.integers(0, 3, tokens)
        mask = rng.random(tokens) < 0.8
        start = np.arange(tokens)
        proposals = np.stack([rng.integers(0, 3, tokens) for _ in range(drafts)], 1)
        counts = count_sample(ids, mask, argmax, proposals)
        columns = Columns(drafts)
        for length in range(1, drafts + 1):
            expected = [np.array([0, 0])]
            for first, last in answers(mask):
                rows = proposals[:, :length].copy()
                rows[start > last] = -1
                expected.append(np.array(decoded(ids, first, last, rows)))
            assert (counts[columns.walk_tokens], counts[columns.walk_rounds][length - 1]) == tuple(np.sum(expected, 0))
        assert counts[columns.walk_histogram].sum() == counts[columns.walk_rounds][-1]
        told = walked_answers(0, ids, mask, proposals)
        accepted = [count for answer in told for count in answer.accepted]
        assert np.bincount(accepted, minlength=drafts + 1).tolist() == counts[columns.walk_histogram].tolist()


def test_an_answer_round_by_round() -> None:
    """Tokens 2..7; at 2 both drafts are right, so the next round is at 5, whose first is wrong; at 6 the text ends before the second."""
    ids = np.array([9, 9, 10, 11, 12, 13, 14, 15])
    proposals = np.full((8, 2), -1)
    proposals[2], proposals[5], proposals[6] = (11, 12), (7, 15), (15, 8)
    told = walked_answers(3, ids, np.arange(8) >= 2, proposals)
    assert told == [Walked(3, 2, 7, accepted=[2, 0, 1], refused=[-1, 7, -1])]


def test_walk_is_left_out_where_the_text_is_not_the_targets() -> None:
    columns = Columns(1)
    counts = np.zeros(columns.width)
    counts[columns.supervised], counts[columns.walk_rounds], counts[columns.walk_tokens] = 100, 10, 20
    counts[columns.matches] = 97
    assert "walk_acc_len" not in acceptance(counts, columns)
    counts[columns.matches] = 98
    assert acceptance(counts, columns)["walk_acc_len"] == 2.0


def test_poisson_weights_depend_on_seed_and_id_only() -> None:
    weights = poisson_weights(1, "a", 4000)
    assert (weights == poisson_weights(1, "a", 4000)).all()
    assert (weights != poisson_weights(1, "b", 4000)).any()
    assert (weights != poisson_weights(2, "a", 4000)).any()
    assert abs(weights.mean() - 1) < 0.1
    assert abs(weights.var() - 1) < 0.15


def test_domains_by_the_names_of_numbers() -> None:
    names = [
        "eval/acc_len",
        "eval/math/algebra/acc_len",
        "eval/code/acc_len",
        "eval/code/walk_acc_len",
        "eval/ngram_acc_len",
        "perf/x/acc_len",
    ]
    assert domains_of(names) == ["code", "math/algebra"]
