"""The made-up world: its truth is that of the rows it writes."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest

from specforge.ranking.metrics import auc_exact, bayes_auc
from specforge.ranking.store import UserCache
from specforge.ranking.world import ClickWorld, Sample, main, write_world


@pytest.fixture(scope="module")
def sample() -> Sample:
    return ClickWorld(slots=6, ids=10).draw(1500, seed=1)


def labels(sample: Sample) -> np.ndarray:
    return np.concatenate([user.label_R for user in sample.users])


def test_labels_are_drawn_with_the_probabilities(sample: Sample) -> None:
    label_N, p_N = labels(sample), sample.probability_N
    for low, high in ((0.0, 0.1), (0.1, 0.2), (0.2, 0.4), (0.4, 0.7), (0.7, 1.0)):
        inside_N = (p_N >= low) & (p_N < high)
        assert inside_N.sum() > 200
        error = (label_N[inside_N] - p_N[inside_N]).sum() / np.sqrt((p_N * (1 - p_N))[inside_N].sum())
        assert abs(error) < 4  # standard deviations


def test_the_probability_can_be_read_off_the_rows() -> None:
    """Least squares of logit p over the counts of signs and the mean of earlier labels leaves nothing unexplained."""
    world = ClickWorld(slots=5, ids=8, categories=2)
    sample = world.draw(400, seed=2)
    columns = {sign: place for place, sign in enumerate(sorted({int(sign) for user in sample.users for sign in user.sign_V}))}
    design = []
    for user in sample.users:
        signs, past = np.split(user.sign_V, np.cumsum(user.count_RS.sum(1))[:-1]), dict[int, list[float]]()
        for row, label, count_S in zip(signs, user.label_R, user.count_RS):
            features = np.zeros(len(columns) + 2)
            np.add.at(features, [columns[int(sign)] for sign in row[: count_S[:-1].sum()]], 1)
            earlier = past.setdefault(int(row[0]), [])
            features[-2:] = 1, sum(earlier) / (1 + len(earlier))
            earlier.append(label - 0.3)
            design.append(features)
    logit_N = np.log(sample.probability_N / (1 - sample.probability_N))
    weight, *_ = np.linalg.lstsq(np.array(design), logit_N)
    assert np.abs(np.array(design) @ weight - logit_N).max() < 1e-9
    assert weight[-1] == pytest.approx(world.history)


def test_the_last_slot_says_what_the_row_before_was() -> None:
    sample = ClickWorld(slots=5, ids=8, categories=3).draw(100, seed=3)
    meaning = dict[int, tuple[int, bool]]()
    for user in sample.users:
        signs = np.split(user.sign_V, np.cumsum(user.count_RS.sum(1))[:-1])
        assert user.count_RS[0, -1] == 0 and (user.count_RS[1:, -1] == 1).all()
        for before, label, row in zip(signs[:-1], user.label_R[:-1], signs[1:]):
            assert meaning.setdefault(int(row[-1]), (int(before[0]), bool(label))) == (int(before[0]), bool(label))
    assert len(meaning) == 6


def test_history_is_worth_much_and_the_best_auc_is_what_p_reaches(sample: Sample) -> None:
    truth = sample.truth()
    assert truth["bayes_auc"] == bayes_auc(sample.probability_N) and truth["oracle_auc"] == auc_exact(sample.probability_N, labels(sample))
    assert truth["oracle_auc"] == pytest.approx(truth["bayes_auc"], abs=0.01)
    assert truth["alone_auc"] < truth["oracle_auc"] - 0.04
    blind = ClickWorld(slots=6, ids=10, history=0.0).draw(1500, seed=1).truth()
    assert blind["alone_auc"] == blind["oracle_auc"]


def test_the_last_rows_of_a_share_of_users_are_scored() -> None:
    sample = ClickWorld(slots=4).draw(2000, seed=4, scored_share=0.13, scored_rows=4)
    has_scored = [user.scored_R.any() for user in sample.users]
    assert 0.10 < np.mean(has_scored) < 0.16
    for user, has in zip(sample.users, has_scored):
        assert user.scored_R.tolist() == [has and place >= len(user) - 4 for place in range(len(user))]


def test_users_of_one_seed_are_the_same_and_signs_mean_the_same_for_all() -> None:
    first, again, others = (ClickWorld(slots=4).draw(20, seed) for seed in (1, 1, 2))
    assert all((one.sign_V == other.sign_V).all() for one, other in zip(first.users, again.users))
    assert (first.probability_N == again.probability_N).all()
    assert len(first.probability_N) != len(others.probability_N)
    known, seen = ({int(sign) for user in part.users for sign in user.sign_V} for part in (ClickWorld(slots=4).draw(500, 1), others))
    assert seen <= known


def test_what_is_written_is_what_was_drawn(tmp_path: Path) -> None:
    world = ClickWorld(slots=4)
    truth = write_world(tmp_path, 30, 5, world, eval_users=60)
    drawn = world.draw(60, 11, scored_share=0.13, scored_rows=4)
    stored = UserCache(tmp_path / "cache").get(tmp_path / "eval.csv", slots=4, filter_users=False)
    assert stored.ids == [f"eval{number}" for number in range(60)]
    for number, user in enumerate(drawn.users):
        read = stored.read(number)
        assert (read.sign_V == user.sign_V).all() and (read.count_RS == user.count_RS).all()
        assert (read.label_R == user.label_R).all() and (read.scored_R == user.scored_R).all()
    trained = UserCache(tmp_path / "cache").get(tmp_path / "train.csv", slots=4, filter_users=True)
    assert len(trained) == 30 and trained.scored_N.all()
    assert json.loads((tmp_path / "truth.json").read_text()) == truth
    with (tmp_path / "truth.csv").open() as file:
        rows = list(csv.reader(file))
    assert [float(row[2]) for row in rows] == drawn.probability_N.tolist()
    assert truth["oracle_auc"] == auc_exact(drawn.probability_N[stored.scored_N], stored.label_N[stored.scored_N])


def test_the_command_writes_the_world(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--users", "8", "--eval-users", "60"])
    assert json.loads(capsys.readouterr().out)["users"] == 60
    assert {path.name for path in tmp_path.iterdir()} == {"train.csv", "eval.csv", "truth.csv", "truth.json"}
