"""`specforge report`: what it shows is what the files say, and nothing in a file becomes markup."""

import json
from pathlib import Path

import pytest

from specforge.cli.__main__ import main
from specforge.report.acceptance import survival_of
from specforge.report.chart import Chart, ticks
from tests.report.page import Element, read
from tests.report.runs import HOSTILE, write_run


def report(tmp_path: Path, *runs: Path) -> Element:
    out = tmp_path / "out" / "report.html"
    assert main(["report", *map(str, runs), "--out", str(out)]) == 0
    return read(out.read_text())


def cells(figure: Element, row: str) -> list[str]:
    return next([cell.text for cell in line.all("td")] for line in figure.all("tr") if next(line.all("th")).text == row)


def drawn(figure: Element, name: str) -> list[list[str]]:
    """What the pointer finds on a line: (x, y) as text."""
    series = json.loads(next(figure.all("svg")).attributes["data-series"])
    return next([point[2:] for point in one["points"]] for one in series if one["name"] == name)


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "a", "first", [1.0, 1.5, 1.75]))
    summary = next(page.all("figure", class_="summary"))
    row = ["1.750", "1.62–1.88", "1.375", "1.25–1.50", "1.719", "1.900", "0.600", "0.062", "20", "1,002", "2.00"]
    assert cells(summary, "first · eagle3") == row
    assert "first commits 1.75 tokens a round, 0.38 more than an n-gram drafter." in next(page.all("header")).text

    assert drawn(page.panel("Tokens per round"), "first") == [["0", "1.000"], ["10", "1.500"], ["20", "1.750"]]
    assert drawn(page.panel("Tokens per round"), "n-gram")[0][1] == "1.375"
    assert drawn(page.panel("Loss"), "first, training") == [["10", "4.000"], ["20", "2.000"]]
    assert drawn(page.panel("Throughput"), "first") == [["10", "1,001"], ["20", "1,002"]]
    assert drawn(page.panel("Peak memory"), "first") == [["10", "2.001"], ["20", "2.002"]]
    survival = page.panel("Survival by position")
    assert drawn(survival, "first, walk") == [["1", "0.500"], ["2", "0.200"]], "20 of 40 rounds accept one draft, 8 two"
    assert drawn(survival, "first, every start") == [["1", "0.600"], ["2", "0.300"]]
    assert drawn(survival, "n-gram, walk") == [["1", "0.250"], ["2", "0.100"]]
    assert "decoded 3 samples live: 1.719 tokens per round, the walk of the same samples 1.719" in survival.text
    assert [dot.attributes["data-tip"] for dot in survival.all("circle", class_="dot r0 ring")] == [
        "first, live: draft 1, 0.500", "first, live: draft 2, 0.250",
    ]  # fmt: skip
    bars = [bar.attributes["data-tip"] for bar in page.panel("Accepted drafts a round").all("rect")]
    assert bars == ["first: 20 rounds accept 0, 50.0%", "first: 12 rounds accept 1, 30.0%", "first: 8 rounds accept 2, 20.0%"]
    domains = page.panel("Tokens per round by domain")
    assert [dot.attributes["data-tip"] for dot in domains.all("circle")] == ["first on code: 1.625"]
    assert "n-gram on code: 1.312" in [mark.attributes.get("data-tip") for mark in domains.all("line")]
    assert "tree 2x2x4: 2.125" in page.panel("Tokens per round by chain length").text
    reliability = page.panel("Reliability of the confidence")
    assert drawn(reliability, "first") == [["0.2", "0.100"], ["0.5", "0.400"], ["0.9", "0.800"]]
    assert cells(reliability, "first, prefixes") == ["0.875", "1.250", "0.062", "0.188"]
    assert cells(reliability, "first, draft 2") == ["–", "1.500", "0.250", "0.375"]
    assert "heldout.jsonl" in page.panel("Origin").text and "resume: checkpoint first-step10, step 20" in page.panel("first").text


def test_tokens_of_an_answer(tmp_path: Path) -> None:
    """Two accepted drafts and the target's own token are the first round; the second one has only the target's."""
    page = report(tmp_path, write_run(tmp_path / "a", "first", [1.0, 1.5]))
    answer = next(page.all("pre", class_="answer"))
    assert answer.text == f"One two three four {HOSTILE}"
    assert [piece.text for piece in answer.all("span", class_="drafted")] == [" two", " three"]
    own = [piece.attributes["data-tip"] for piece in answer.all("span", class_="own")]
    assert own[1:] == ["no draft for this token", f"the draft said {HOSTILE!r}"]
    assert "2.00 tokens per round · 2 accepted" in next(page.all("h4")).text


def test_nothing_from_a_run_becomes_markup(tmp_path: Path) -> None:
    """Name, domain, prompt, text and drafts, all of which are other people's words."""
    page = report(tmp_path, write_run(tmp_path / "a", HOSTILE, [1.0, 1.5], domain=HOSTILE))
    assert not list(page.all("img")) and not list(page.all("b")), "the parser sees no element of theirs"
    assert len(list(page.all("script"))) == len(list(page.all("style"))) == 1
    assert next(page.all("h1")).text == "What the draft is worth" and HOSTILE in next(page.all("title")).text
    assert f"{HOSTILE} on {HOSTILE}: 1.625" in next(page.panel("Tokens per round by domain").all("circle")).attributes["data-tip"]
    policy = next(meta for meta in page.all("meta") if "http-equiv" in meta.attributes).attributes["content"]
    assert policy.startswith("default-src 'none'; style-src 'sha256-") and "unsafe" not in policy
    urls = [
        value
        for tag in ("a", "script", "link", "svg")
        for each in page.all(tag)
        for name, value in each.attributes.items()
        if name in ("href", "src")
    ]
    assert urls and all(url.startswith("#") for url in urls)


def test_several_runs_over_each_other(tmp_path: Path) -> None:
    """Two of one name are told apart; runs on the same rows share one n-gram line."""
    runs = [
        write_run(tmp_path / "a", "same", [1.0, 1.5]),
        write_run(tmp_path / "b", "same", [1.0, 1.25], method="dflash"),
        write_run(tmp_path / "c", "third", [1.0, 1.125], recorded=False),
    ]
    page = report(tmp_path, *runs)
    names = [f"same ({runs[0]})", f"same ({runs[1]})", "third"]
    toggles = [(button.text, button.attributes["data-run"]) for button in page.all("button") if "data-run" in button.attributes]
    assert toggles == list(zip(names, ("r0", "r1", "r2"), strict=True))
    walks = page.panel("Tokens per round")
    assert [drawn(walks, name)[-1][1] for name in names] == ["1.500", "1.250", "1.125"]
    series = json.loads(next(walks.all("svg")).attributes["data-series"])
    assert [one["name"] for one in series].count("n-gram") == 1
    assert cells(page.panel("Settings that differ"), "method.name") == ["eagle3", "dflash", "eagle3"]
    assert (
        "Live decoding of third was never measured; measure it with specforge eval RUN/config.yaml"
        in page.panel("Survival by position").text
    )


def test_what_was_never_measured_is_said(tmp_path: Path) -> None:
    """A run that logged one loss and nothing else."""
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.5, "time": 1.0}\n')
    page = report(tmp_path, tmp_path / "bare")
    absent = {next(figure.all("h3")).text: figure.text for figure in page.all("figure", class_="absent")}
    assert {"Tokens per round", "Survival by position", "Reliability of the confidence", "Answers", "Peak memory"} <= absent.keys()
    assert all("Measure it with specforge" in text or "Measure it with torchrun" in text for text in absent.values())
    assert drawn(page.panel("Loss"), "bare, training") == [["1", "3.500"]]
    assert "bare has no walk yet." in page.text


def test_steps_that_were_taken_back_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "first", [1.0, 1.25])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "resume", "step": 0, "superseded_to_step": 10, "time": 1.0}\n')
        file.write('{"step": 10, "train/loss": 7.0, "time": 1.0}\n{"step": 20, "tra')
    assert drawn(report(tmp_path, run).panel("Loss"), "first, training") == [["10", "7.000"]], "and a torn last line is no line"


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1, "tra\n{"step": 2}\n', "metrics.jsonl line 1="),
        ("metrics.jsonl", '{"step": 1, "train/loss": "much"}\n', "train/loss='much' must be a number"),
        ("metrics.jsonl", '{"step": 1, "train/loss": 1, "train/accuracy": 2}\n', "train/accuracy=2 must be a list"),
        ("evaluations/step10.json", '{"format_version": 1', "step10.json: is not valid JSON"),
        ("evaluations/step10.json", '{"format_version": 9}', "format_version must be 1"),
        ("evaluations/step10.json", {"groups": {"raw": [["x"]]}}, "groups.raw=[['x']]"),
        ("evaluations/step10.json", {"groups": {"raw": [[[1.0, 5.0, 0.5]]]}}, "groups.raw=[[[1.0, 5.0, 0.5]]]"),
        ("evaluations/step10.json", {"texts": [{"id": "x"}]}, "domain is missing"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(name: str, content: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", "first", [1.0, 1.25])
    path = run / name
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) in (3, 5)
    assert said in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


def test_folders_that_are_no_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", "first", [1.0, 1.25])
    for words, code, said in (
        ([tmp_path / "none"], 5, "holds no metrics.jsonl; give the output_dir of a training"),
        ([run] * 9, 2, "9 runs were given; at most 8"),
        ([run, "--out", tmp_path], 2, "is a folder; name the file"),
    ):
        assert main(["report", *map(str, words)]) == code
        assert said in capsys.readouterr().err


def test_survival_and_ticks_by_hand() -> None:
    assert survival_of([5, 3, 2]) == [0.5, 0.2]
    assert survival_of([]) == survival_of([0, 0]) == []
    assert ticks(0.0, 1.0) == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1])
    assert ticks(1.0, 2.5) == pytest.approx([1, 1.5, 2, 2.5])
    chart = Chart("t", "x", "y", (0.0, 10.0), (0.0, 4.0))
    assert chart.at((0.0, 0.0)) == (46.0, 196.0) and chart.at((10.0, 4.0)) == (348.0, 22.0)
