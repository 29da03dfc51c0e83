"""`specforge report RUN... --out report.html`: what runs measured, as one HTML file that needs nothing else."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from specforge import files
from specforge.errors import ConfigError


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge report", description="Show what runs measured: one HTML file without a network. Nothing is measured anew."
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="the output_dir of a training; several are laid over each other")
    parser.add_argument("--out", type=Path, default=Path("report.html"), help="the file to write (default report.html)")
    given = parser.parse_args(words)

    from specforge.report.marks import MOST_RUNS
    from specforge.report.page import GENERATOR, page
    from specforge.report.run import Run

    if len(given.runs) > MOST_RUNS:
        raise ConfigError(
            f"RUN: {len(given.runs)} runs were given; at most {MOST_RUNS} can be told apart by colour and shape, so leave some out."
        )
    if given.out.is_dir():
        raise ConfigError(f"--out={str(given.out)!r}: is a folder; name the file, report.html for instance.")
    if given.out.exists() and GENERATOR.encode() not in given.out.read_bytes()[:1000]:
        raise ConfigError(f"--out={str(given.out)!r}: is there already, is no report, and is not overwritten; name another file.")
    html = page([Run.read(folder) for folder in given.runs])
    with files.writable(given.out.parent):
        given.out.parent.mkdir(parents=True, exist_ok=True)
        files.write_text(given.out, html)
    shown = "1 run" if len(given.runs) == 1 else f"{len(given.runs)} runs"
    print(f"{given.out}: {shown}, {len(html.encode()) / 2**10:.0f} KiB; open it in a browser")
    return 0
