"""`specforge report`: what it shows is what the files say, and nothing in a file becomes markup."""

import json
from pathlib import Path

import pytest

from specforge.cli.__main__ import main
from specforge.report.acceptance import survival_of
from specforge.report.chart import Chart, short, ticks
from specforge.report.confidence import wilson
from specforge.report.marks import MOST_RUNS, outline
from specforge.report.training import MOST_POINTS, thinned
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


def levels(figure: Element) -> dict[str, str]:
    """Lines of one value, and the classes of each."""
    series = json.loads(next(figure.all("svg")).attributes["data-series"])
    return {one["level"]: one["class"] for one in series if "level" in one}


def facts(page: Element) -> list[list[str]]:
    """What the cards at the top say of each run."""
    return [[fact.text for fact in card.all("li")] for card in next(page.all("header")).all("article")]


def test_numbers_are_those_of_the_files(tmp_path: Path) -> None:
    page = report(tmp_path, write_run(tmp_path / "a", "first", [1.0, 1.5, 1.75]))
    summary = next(page.all("figure", class_="summary"))
    row = ["1.750", "1.62–1.88", "1.375", "1.25–1.50", "1.719", "1.900", "0.600", "0.062", "20", "20", "1,002", "2.00"]
    assert cells(summary, "first · eagle3") == row

    assert drawn(page.panel("Tokens per round"), "first") == [["0", "1.000"], ["10", "1.500"], ["20", "1.750"]]
    assert levels(page.panel("Tokens per round")) == {"1.375": "ngram dashed n0"}
    assert drawn(page.panel("Loss"), "first, training") == [["10", "4.000"], ["20", "2.000"]]
    assert drawn(page.panel("Throughput"), "first") == [["10", "1,001"], ["20", "1,002"]]
    assert drawn(page.panel("Peak memory"), "first") == [["10", "2.001"], ["20", "2.002"]]
    survival = page.panel("Survival by position")
    assert drawn(survival, "first, walk") == [["1", "0.500"], ["2", "0.200"]], "20 of 40 rounds accept one draft, 8 two"
    assert drawn(survival, "first, every start") == [["1", "0.600"], ["2", "0.300"]]
    assert drawn(survival, "n-gram, walk") == [["1", "0.250"], ["2", "0.100"]]
    assert "decoded 3 samples live: 1.719 tokens per round, the walk of the same samples 1.719" in survival.text
    assert [dot.attributes["data-tip"] for dot in survival.all("path", class_="dot r0 ring")] == [
        "first, live: draft 1, 0.500", "first, live: draft 2, 0.250",
    ]  # fmt: skip
    assert drawn(survival, "first, walk, live samples") == [["1", "0.500"], ["2", "0.250"]]
    bars = [bar.attributes["data-tip"] for bar in page.panel("Accepted drafts a round").all("rect")]
    assert bars == [
        f"first: {rounds} rounds accept {k}, share {share}" for k, rounds, share in ((0, 20, "0.500"), (1, 12, "0.300"), (2, 8, "0.200"))
    ]
    domains = page.panel("Tokens per round by domain")
    assert [dot.attributes["data-tip"] for dot in domains.all("path")] == ["first on code: 1.625, 95 %: 1.50–1.75"]
    assert [word.text for word in domains.all("text") if "tick" not in word.attributes["class"]][1:] == ["code · 12 samples", "1.625"]
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
    assert f"{HOSTILE} on {HOSTILE}: 1.625" in next(page.panel("Tokens per round by domain").all("path")).attributes["data-tip"]
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
    assert toggles == list(zip(names, "012", strict=True))
    walks = page.panel("Tokens per round")
    assert [drawn(walks, name)[-1][1] for name in names] == ["1.500", "1.250", "1.125"]
    assert levels(walks) == {"1.375": "ngram dashed n0 n1 n2"}, "it stays until all three are hidden"
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
    assert "Not evaluated yet." in next(page.all("header")).text and facts(page) == [[]]


def test_steps_that_were_taken_back_are_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "a", "first", [1.0, 1.25])
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "resume", "step": 0, "superseded_to_step": 10, "time": 1.0}\n')
        file.write('{"step": 10, "train/loss": 7.0, "time": 1.0}\n{"step": 20, "tra')
    assert drawn(report(tmp_path, run).panel("Loss"), "first, training") == [["10", "7.000"]], "and a torn last line is no line"


WALK = {"eval/walk_acc_len_by_draft_tokens": [1.5]}


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("metrics.jsonl", '{"step": 1, "tra\n{"step": 2}\n', "metrics.jsonl line 1="),
        ("metrics.jsonl", '{"step": 1, "train/loss": "much"}\n', "train/loss='much' must be a number"),
        ("metrics.jsonl", '{"step": 1, "train/loss": 1, "train/accuracy": 2}\n', "train/accuracy=2 must be a list"),
        ("evaluations/step10.json", '{"format_version": 1', "step10.json: is not valid JSON"),
        ("evaluations/step10.json", '{"format_version": 9}', "format_version must be 2"),
        ("evaluations/step10.json", {"groups": {"raw": [["x"]]}}, "groups.raw=[['x']]"),
        ("evaluations/step10.json", {"groups": {"raw": [[[1.0, 5.0, 0.5]]]}}, "groups.raw=[[[1.0, 5.0, 0.5]]]"),
        ("evaluations/step10.json", {"texts": [{"id": "x"}]}, "domain is missing"),
        ("evaluations/step10.json", {"numbers": {**WALK, "eval/trees": {"2x2x4": "long"}}}, "eval/trees/2x2x4='long' must be a number"),
        ("evaluations/step10.json", {"numbers": {**WALK, "eval/trees": [2.0]}}, "eval/trees=[2.0] must be an object"),
        ("config.yaml", "run_id: r\noutput_dir: o\nmethod: {name: of-the-future}\n", "of-the-future"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(name: str, content: object, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "a", "first", [1.0, 1.25])
    path = run / name
    path.write_text(content if isinstance(content, str) else json.dumps(json.loads(path.read_text()) | content))
    assert main(["report", str(run), "--out", str(tmp_path / "report.html")]) in (2, 3, 5)
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
    assert [short(value) for value in (0.25, 4045.0, 12500.0, 120_000.0, 2_500_000.0)] == ["0.25", "4,045", "12.5k", "120k", "2.5M"]
    chart = Chart("t", "x", "y", (0.0, 10.0), (0.0, 4.0))
    assert chart.at((0.0, 0.0)) == (46.0, 196.0) and chart.at((10.0, 4.0)) == (348.0, 22.0)


def test_intervals_of_shares_by_hand() -> None:
    """Of no success in n draws the upper bound is z^2 / (n + z^2); half of the draws is its own centre."""
    assert wilson(0.0, 10) == pytest.approx((0.0, 1.96**2 / (10 + 1.96**2)))
    low, high = wilson(0.5, 100)
    assert (low + high) / 2 == pytest.approx(0.5) and high - low == pytest.approx(1.96 / (100 + 1.96**2) ** 0.5)


def test_every_run_has_a_shape_of_its_own() -> None:
    assert len({outline(run, 0.0, 0.0, 5.0) for run in range(MOST_RUNS)}) == MOST_RUNS
    assert outline(3, 10.0, 10.0, 5.0) == "M10.0,5.0L15.0,10.0L10.0,15.0L5.0,10.0Z", "a diamond"


def test_a_peak_stays_in_a_thinned_curve() -> None:
    points = [(step, 1.0) for step in range(100_000)]
    points[54_321], points[77_777] = (54_321, 9.0), (77_777, 0.0)
    kept = thinned(points)
    assert len(kept) <= MOST_POINTS + 1 and kept == sorted(kept)
    assert {(54_321, 9.0), (77_777, 0.0), points[0], points[-1]} <= set(kept)
    assert thinned(points[:MOST_POINTS]) == points[:MOST_POINTS]


def test_what_the_draft_is_worth(tmp_path: Path) -> None:
    """Above the n-gram drafter's 1.25..1.50, in it, and below it; which checkpoint it is; what rounds accept."""
    runs = [write_run(tmp_path / name, name, [1.0, walk]) for name, walk in (("above", 1.75), ("within", 1.5), ("below", 1.0625))]
    for run in runs[:2]:
        write_best(run, "step10", 10, 1.75)
    write_best(runs[2], "step5", 5, 1.5)
    above, within, below = facts(report(tmp_path, *runs))
    assert above == [
        "0.375 above an n-gram drafter's 1.375 (95 %: 1.25–1.50): the intervals do not touch",
        "Live decoding of 3 samples: 1.719; the walk of the same samples is 1.719",
        "50 % of the rounds accept no draft, 20 % accept all 2",
        "Numbers of step10, the best and the last one evaluated: a longer training may bring more",
        "Training waited for data 25 % of its time",
    ]
    assert within[0] == "Not told apart from an n-gram drafter's 1.375 (95 %: 1.25–1.50): the intervals overlap"
    assert below[0] == "0.312 below an n-gram drafter's 1.375 (95 %: 1.25–1.50): the n-gram drafter costs nothing and is better"
    assert below[3] == "Numbers of step10, which is not the best checkpoint: that is step5"


def write_best(run: Path, checkpoint: str, step: int, score: float) -> None:
    (run / checkpoint).mkdir()
    (run / checkpoint / "manifest.json").write_text("{}")
    best = {"checkpoint": checkpoint, "step": step, "score": score, "metric": "eval/walk_acc_len", "metrics": {}}
    (run / "best_meta.json").write_text(json.dumps(best))


def test_runs_that_do_not_compare(tmp_path: Path) -> None:
    """Other targets, other rows, other lengths are said; the same ones, or none at all, are not."""
    runs = [write_run(tmp_path / name, name, [1.0, 1.5]) for name in ("a", "b")]
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "metrics.jsonl").write_text('{"step": 1, "train/loss": 3.5, "time": 1.0}\n')
    assert not list(report(tmp_path, *runs, tmp_path / "bare").all("p", class_="warning"))
    config, record = runs[1] / "config.yaml", runs[1] / "evaluations" / "step10.json"
    config.write_text(config.read_text().replace("/models/target", "/models/other"))
    stored = json.loads(record.read_text())
    stored["numbers"] |= {"eval/samples": 9, "eval/draft_tokens": 3}
    record.write_text(json.dumps(stored))
    assert [warning.text for warning in report(tmp_path, *runs, tmp_path / "bare").all("p", class_="warning")] == [
        "Different targets, so acceptance and loss do not compare: /models/target (a); /models/other (b).",
        "Measured on different held-out answers, so small differences mean nothing: "
        "7 samples with 100 places to draft from (a); 9 samples with 100 places to draft from (b).",
        "Chains of different length, of which the longer one can accept more: 2 drafts (a); 3 drafts (b).",
    ]


def test_the_state_is_that_of_the_branch_that_goes_on(tmp_path: Path) -> None:
    """A fork from step 10 stands at step 20, whatever its parent reached."""
    run = write_run(tmp_path / "a", "fork", [1.0, 1.25])
    for name, ranks in (("first-step30", 8), ("fork-step20", 2)):
        (run / name).mkdir()
        (run / name / "manifest.json").write_text("{}")
        (run / name / "state.json").write_text(json.dumps({"world_size": ranks}))
    assert cells(report(tmp_path, run).panel("Origin"), "ranks of the training") == ["2"]


def test_a_report_replaces_reports_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, out = write_run(tmp_path / "a", "a", [1.0, 2.0]), tmp_path / "page.html"
    out.write_text("<!doctype html>\n<title>mine</title>")
    assert main(["report", str(run), "--out", str(out)]) == 2
    assert "is not overwritten; name another file" in capsys.readouterr().err and "mine" in out.read_text()
    out.unlink()
    assert [main(["report", str(run), "--out", str(out)]) for _ in range(2)] == [0, 0]
