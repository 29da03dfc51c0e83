"""The scores, by numbers that were published or worked out by hand."""

import pytest

from specforge.bench.score import SCORES
from specforge.errors import ConfigError

CONTEST, DRAFT = SCORES["contest"], SCORES["draft"]


def test_published_scores_of_the_contest() -> None:
    """89.96 s scored 58.86. The latency part is 70 (300 - 89.96) / 300 = 49.01, which leaves 9.85 for a quality that allows an AUC
    between 0.7582, with a perfect PCOC, and 0.7682, with one at the border."""
    assert CONTEST.score(89.96, 1.0, {"auc": 0.65, "pcoc": 1.15}) == pytest.approx(49.009, abs=1e-3)
    assert CONTEST.score(89.96, 1.0, {"auc": 0.75820, "pcoc": 1.0}) == pytest.approx(58.86, abs=5e-3)
    assert CONTEST.score(89.96, 1.0, {"auc": 0.76820, "pcoc": 0.85}) == pytest.approx(58.86, abs=5e-3)
    assert CONTEST.score(0.0, 1.0, {"auc": 0.7582, "pcoc": 1.0}) == pytest.approx(79.85, abs=5e-3)


def test_what_a_point_of_the_contest_costs() -> None:
    """A point is 300 / 70 = 4.286 s, or 360 / 30 / 1000 = 0.012 of AUC; all of PCOC is worth 300 / 360 = 0.833 points."""
    at = {"auc": 0.75, "pcoc": 1.0}
    base = CONTEST.score(100.0, 1.0, at)
    assert CONTEST.score(100.0 - 300 / 70, 1.0, at) - base == pytest.approx(1.0)
    assert CONTEST.score(100.0, 1.0, {**at, "auc": 0.762}) - base == pytest.approx(1.0)
    assert base - CONTEST.score(100.0, 1.0, {**at, "pcoc": 1.15}) == pytest.approx(5 / 6)


@pytest.mark.parametrize(("auc", "pcoc", "named"), [(0.649, 1.0, "auc 0.649"), (0.75, 1.16, "pcoc 1.16"), (0.75, 0.84, "pcoc 0.84")])
def test_a_guard_leaves_nothing(auc: float, pcoc: float, named: str) -> None:
    quality = {"auc": auc, "pcoc": pcoc}
    assert CONTEST.score(1.0, 1.0, quality) == 0
    [violated] = CONTEST.violated(quality)
    assert violated.startswith(named)


def test_time_beyond_the_base_costs_no_quality() -> None:
    quality = {"auc": 0.75, "pcoc": 1.0}
    assert CONTEST.score(300.0, 1.0, quality) == CONTEST.score(400.0, 1.0, quality) == pytest.approx(30 * 110 / 360)


def test_a_draft_is_held_against_its_reference() -> None:
    """Half the reference's time, and 2 of 4 drafts accepted a round: 70 / 2 + 30 / 2."""
    quality = {"acc_len": 3.0, "draft_tokens": 4.0, "pcoc": 1.1}
    assert DRAFT.score(0.5, 1.0, quality) == pytest.approx(50.0)
    assert DRAFT.score(1.0, 1.0, quality) == pytest.approx(15.0)
    assert DRAFT.score(0.5, 1.0, {**quality, "pcoc": 1.2}) == 0


def test_a_score_of_what_was_not_measured_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"--score=draft: needs draft_tokens, pcoc, which this case does not measure"):
        DRAFT.score(1.0, 1.0, {"acc_len": 2.0})
