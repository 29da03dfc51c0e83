"""Progress without a terminal, with one, and on other ranks."""

import os
import pty
import sys
import termios

import pytest

from specforge.distributed import World
from specforge.log import progress
from specforge.log.progress import LineProgress


def test_lines_say_how_far_and_end_with_the_total(capsys: pytest.CaptureFixture[str]) -> None:
    with LineProgress(total=20, initial=10, description="train", every_s=0.0) as bar:
        bar.set_postfix({"loss": 2.34567, "stage": "warm"})
        bar.update(4)
        bar.update(6)
    lines = [line.split("  ") for line in capsys.readouterr().err.splitlines()]
    assert [line[:2] for line in lines] == [["train", "14/20"], ["train", "20/20"]]
    assert lines[0][2].endswith("/s")
    assert lines[0][3].endswith(" left")
    assert lines[0][4:] == ["loss 2.346", "stage warm"]


def test_a_short_loop_prints_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with progress(3, 0, "eval", World()) as bar:
        for _ in range(3):
            bar.update()
    assert capsys.readouterr().err == ""


def test_other_ranks_are_silent_on_a_terminal_too(monkeypatch: pytest.MonkeyPatch) -> None:
    assert drawn_on_a_terminal(monkeypatch, World(rank=1, size=2)) == ""
    assert "train:  67%" in drawn_on_a_terminal(monkeypatch, World(rank=0, size=2))


def drawn_on_a_terminal(monkeypatch: pytest.MonkeyPatch, world: World) -> str:
    reader, writer = pty.openpty()
    termios.tcsetwinsize(writer, (24, 80))
    with os.fdopen(writer, "w", buffering=1) as terminal, monkeypatch.context() as patch:
        patch.setattr(sys, "stderr", terminal)
        with progress(3, 1, "train", world) as bar:
            bar.update()
            bar.set_postfix({"loss": "2.3"})
        print("end", file=terminal)
        drawn = ""
        while "end" not in drawn:
            drawn += os.read(reader, 65536).decode()
    os.close(reader)
    return drawn.partition("end")[0]
