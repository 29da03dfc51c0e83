"""From a real run to its report: what `specforge eval` keeps is what it printed, and the text is the target's own answer."""

import json
import resource
import shutil
from pathlib import Path

import pytest

from specforge.cli.__main__ import main
from specforge.cli.table import acceptance_table
from specforge.config import load_config
from specforge.eval.record import EvaluationRecord
from tests.report.page import read
from tests.report.runs import evaluation


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy without what other evaluations left, so that what one leaves is nobody else's."""
    return Path(shutil.copytree(trained, tmp_path / "run", symlinks=True, ignore=shutil.ignore_patterns("evaluations")))


def test_an_evaluation_is_kept_and_shown(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["eval", str(run / "config.yaml"), "--checkpoint", str(run / "latest"), "--live", "6"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    record = EvaluationRecord.read(run / "evaluations" / "run-step40.json")
    assert record.numbers.items() <= printed.items() and (record.step, record.run_id) == (40, "run")
    assert record.numbers["eval/walk_histogram"] == printed["eval/live/histogram"], "the walk and live decoding take the same rounds"
    assert printed["eval/live/histogram"] == printed["eval/live/predicted_histogram"]
    assert sum(record.numbers["eval/walk_histogram"]) == printed["eval/live/rounds"]

    survival = record.groups["raw"][-1]
    count = sum(group[0] for group in survival)
    ece = sum(abs(probability - right) for _, right, probability in survival) / count
    assert ece == pytest.approx(printed["eval/calibration/raw/ece"])
    assert sum(probability for *_, probability in survival) / sum(right for _, right, _ in survival) == pytest.approx(
        printed["eval/calibration/raw/pcoc"]
    )

    heldout = load_config(run / "config.yaml").data.eval_path
    said = {row["id"]: row["conversations"][-1]["content"] for row in map(json.loads, Path(heldout).read_text().splitlines())}
    rounds = [each for text in record.texts for each in text["rounds"]]
    assert len(record.texts) == 6 and len(rounds) == printed["eval/live/rounds"], "three samples of each of two domains are all"
    for text in record.texts:
        pieces = [text["first"], *(piece for each in text["rounds"] for piece in [*each["accepted"], each["own"]])]
        assert "".join(pieces) == said[text["id"]]

    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0
    page = read((tmp_path / "report.html").read_text())
    assert not list(page.all("figure", class_="absent"))
    assert f"{printed['eval/walk_acc_len']:.3f}" in [cell.text for cell in next(page.all("figure", class_="summary")).all("td")]


def test_where_nothing_can_be_written_it_is_measured_all_the_same(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A limit on the size of files refuses even root, as a full disk would."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8000, hard))
    try:
        code = main(["eval", str(run / "config.yaml"), "--checkpoint", str(run / "latest")])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    out, err = capsys.readouterr()
    assert code == 0 and json.loads(out.splitlines()[-1])["eval/samples"] == 6
    assert "this evaluation is not kept for `specforge report`" in err and "File too large" in err
    assert not list((run / "evaluations").iterdir())


def test_a_domain_is_printed_with_its_samples_and_intervals() -> None:
    lines = acceptance_table(evaluation(1.75)).splitlines()
    assert "walk, code                 1.625    1.312  12 samples, 95 %: draft 1.50..1.75, n-gram 1.00..1.50" in lines
    few = {
        name: value for name, value in evaluation(1.75).items() if not (name.startswith("eval/code/") and name.endswith(("_low", "_high")))
    }
    assert "walk, code                 1.625    1.312  12 samples" in acceptance_table(few).splitlines()
