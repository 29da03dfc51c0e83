"""`--draft-tokens auto` and `specforge bench decode` on a calibrated draft."""

import json
import shutil
from pathlib import Path

import pytest

from specforge.cli.__main__ import main
from specforge.cli.demo import CALM

PROMPTS = ["the cat sat on a mat", "birds sang of spring"]


@pytest.fixture(scope="module")
def calibrated(prepared: tuple[Path, list[str]], trained: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder, settings = prepared
    run = tmp_path_factory.mktemp("calibrated") / "run"
    shutil.copytree(trained, run, symlinks=True)
    assert main(["eval", str(folder / "c.yaml"), *settings, f"output_dir={run}", "--checkpoint", str(run / "latest"), "--calibrate"]) == 0
    return run


def test_generate_auto(prepared: tuple[Path, list[str]], calibrated: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--target", str(prepared[0] / "target"), "--draft", str(calibrated / "latest"), "--prompt", *PROMPTS]
    assert main(["generate", *words, "--max-new-tokens", "24", "--draft-tokens", "auto", "--batch", "2"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["same_texts"] == 2
    assert numbers["draft_tokens"] == 3
    assert len(numbers["costs"]["draft_s"]) == len(numbers["costs"]["verify_s"]) == 4
    assert 0 <= numbers["mean_verified"] <= numbers["mean_drafted"] <= 3


@pytest.mark.parametrize(
    ("draft", "words", "code", "says"),
    [
        ("trained", [], 5, "specforge eval --calibrate"),
        ("calibrated", ["--draft-sampling", "sampled", "--temperature", "1"], 2, "arg-max drafts"),
        ("ngram", [], 2, "arg-max drafts"),
        ("none", [], 2, "arg-max drafts"),
    ],
)
def test_generate_auto_refuses(
    draft: str,
    words: list[str],
    code: int,
    says: str,
    prepared: tuple[Path, list[str]],
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    name = str(request.getfixturevalue(draft) / "latest") if draft in ("trained", "calibrated") else draft
    words = ["--target", str(prepared[0] / "target"), "--draft", name, "--prompt", PROMPTS[0], "--draft-tokens", "auto", *words]
    capsys.readouterr()
    assert main(["generate", *words]) == code
    out, err = capsys.readouterr()
    assert says in err
    assert not out


def test_bench_decode(
    prepared: tuple[Path, list[str]], calibrated: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own sums: rates of fixed lengths on the curve, and the oracle's, which pays for accepted drafts only."""
    for name, value in CALM.items():
        monkeypatch.setenv(name, value)
    folder, settings = prepared
    words = [str(folder / "c.yaml"), *settings, f"output_dir={calibrated}", "--checkpoint", str(calibrated / "latest")]
    assert main(["bench", "decode", *words, "--laps", "1", "--prompts", "4"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert numbers["same_texts"]
    costs, rates = numbers["costs"], numbers["tokens_per_s_on_curve"]
    for length in range(4):
        seconds = costs["draft_s"][length] + costs["verify_s"][length]
        assert rates[f"K={length}"] == pytest.approx(numbers["tokens_per_round"][f"K={length}"] / seconds)
    assert numbers["tokens_per_round"]["K=0"] == numbers["tokens_per_round"]["target alone"] == 1
    assert rates["oracle"] >= rates["K=3"]
    for shares in numbers["profile"].values():
        assert sum(shares[f"{part}_share"] for part in ("target", "draft", "engine")) == pytest.approx(1)
        assert all(share > 0 for share in shares.values())
