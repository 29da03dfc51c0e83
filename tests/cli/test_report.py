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
from tests.texts import make_text_target


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


def test_another_target_is_refused_before_it_is_loaded(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_text_target(tmp_path / "target", seed=1)
    assert main(["eval", str(run / "config.yaml"), f"model.target_path={other}", "--checkpoint", str(run / "latest")]) == 5
    message = capsys.readouterr().err
    assert "fingerprint" in message and message.rstrip().endswith("give the target of its training.")
    assert not (run / "evaluations").exists()


def test_an_evaluation_of_other_rows_has_a_record_of_its_own(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["eval", str(run / "config.yaml"), "--checkpoint", str(run / "latest")]
    record = run / "evaluations" / "run-step40.json"
    assert main([*command, "--live", "6"]) == 0
    first = EvaluationRecord.read(record)
    assert main([*command, "eval.max_samples=2"]) == 0
    printed = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) == 0

    assert EvaluationRecord.read(record) == first and len(list(record.parent.iterdir())) == 2
    origin = next(read((tmp_path / "report.html").read_text()).all("figure", class_="origin"))
    assert f"walk {printed['eval/walk_acc_len']:.3f} on 2 samples" in origin.text


def test_a_plain_evaluation_keeps_what_live_decoding_showed(run: Path) -> None:
    command = ["eval", str(run / "config.yaml"), "--checkpoint", str(run / "latest")]
    assert [main([*command, "--live", "6"]), main([*command, "eval.draft_tokens=1"])] == [0, 0]
    assert "eval/live/rounds" not in EvaluationRecord.read(run / "evaluations" / "run-step40.json").numbers, "other drafts, other rounds"
    assert [main([*command, "--live", "6"]), main(command)] == [0, 0]
    assert "eval/live/rounds" in EvaluationRecord.read(run / "evaluations" / "run-step40.json").numbers
