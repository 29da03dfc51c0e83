"""The ranking model on a world whose best possible AUC is known, as the command line trains and calibrates it.

Nothing is learnt by chance here: what a run reaches lies between the oracle of the same labels and what a row alone can tell, and the
wrong row for a sign undoes it.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge.config import Levers
from specforge.log.run_log import read_metrics
from specforge.ranking.batch import UserRows
from specforge.ranking.load import load_ranking_model
from specforge.ranking.world import ClickWorld, Sample
from tests.ranking.small import make_batch, make_model
from tests.ranking.test_load import stored

pytestmark = pytest.mark.long
CONFIG = Path(__file__).parents[2] / "configs" / "ranking" / "synthetic.yaml"


def rows_alone(sample: Sample) -> Sample:
    """Each scored row as a user of its own."""
    alone = []
    for user in sample.users:
        signs_R = np.split(user.sign_V, np.cumsum(user.count_RS.sum(1))[:-1])
        for row in np.flatnonzero(user.scored_R):
            one = slice(row, row + 1)
            alone.append(UserRows(signs_R[row], user.count_RS[one], user.label_R[one], user.scored_R[one]))
    return Sample(alone, sample.probability_N, sample.alone_N)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """Rows of 9,600 users, as many as 200 steps of 48 see, and of 3,000 others, whose last eight rows are scored; and these' truth."""
    folder, of_clicks = tmp_path_factory.mktemp("world"), ClickWorld()
    train, heldout = of_clicks.draw(9600, 0), of_clicks.draw(3000, 1, scored_share=1.0, scored_rows=8)
    for name, sample in (("train", train), ("eval", heldout)):
        sample.save(folder / f"{name}.csv", name)
        rows_alone(sample).save(folder / f"{name}-alone.csv", name)
    return folder, heldout.truth()


def specforge(command: str, folder: Path, run: str, *words: str, rows: str = "") -> str:
    """The output of a command on the world's files."""
    settings = [f"data.train_path={folder / f'train{rows}.csv'}", f"data.eval_path={folder / f'eval{rows}.csv'}"]
    settings += [f"data.cache_dir={folder / 'rows'}", f"output_dir={folder / run}", "train.eval_every=0"]
    called = [sys.executable, "-m", "specforge", command, str(CONFIG), *settings, *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(called, env=environment, check=True, capture_output=True, text=True).stdout


def last(folder: Path, run: str, name: str) -> float:
    return [line[name] for line in read_metrics(folder / run / "metrics.jsonl") if name in line][-1]


def test_a_run_reaches_the_oracle_and_needs_history_and_the_right_rows(world: tuple[Path, dict[str, Any]]) -> None:
    folder, truth = world
    specforge("train", folder, "packed")
    auc = last(folder, "packed", "eval/auc_exact")
    assert truth["oracle_auc"] - auc < 0.008, (truth, auc)

    specforge("train", folder, "alone", "train.batch_samples=1152", rows="-alone")
    floor = last(folder, "alone", "eval/auc_exact")
    assert truth["alone_auc"] - 0.02 < floor < truth["alone_auc"] + 0.005, "the floor is not low because it was badly trained"
    assert auc - floor >= 0.04, (auc, floor)

    specforge("train", folder, "clamp", "levers.signid_mode=clamp", "train.steps=100")
    clamped = last(folder, "clamp", "eval/auc_exact")
    assert auc - clamped >= 0.1, (auc, clamped)

    out = specforge("eval", folder, "packed", "--checkpoint", str(folder / "packed" / "latest"), "--calibrate")
    numbers = json.loads(out.splitlines()[-1])
    assert 0.95 <= numbers["eval/calibration/shifted/pcoc"] <= 1.05, numbers
    assert numbers["eval/calibration/shifted/gauc"] == numbers["eval/calibration/raw/gauc"]
    print(json.dumps({"oracle": truth["oracle_auc"], "auc": auc, "alone": floor, "clamp": clamped, **numbers}))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the compiler's own imports and traces
@pytest.mark.skipif(not shutil.which("g++"), reason="torch.compile needs a C++ compiler")
def test_a_compiled_model_predicts_the_same(tmp_path: Path) -> None:
    """Batches of other shapes, without a scored row and of a single row among them."""
    model = make_model()
    compiled = load_ranking_model(stored(tmp_path / "m", model), Levers(compile=True), strict=True).model
    for lengths in ((7, 0, 1, 40, 19), (3,), (300, 1, 0, 150), (1,)):
        batch = make_batch(lengths)
        with torch.no_grad():
            torch.testing.assert_close(compiled(batch).logit_P, model(batch).logit_P, rtol=0, atol=1e-5)
