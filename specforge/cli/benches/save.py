"""`specforge bench save`: how long a checkpoint keeps training waiting."""

import argparse
from pathlib import Path

from specforge import files
from specforge.bench.save import measure


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path(), help="folder to write into (default: the current one)")
    parser.add_argument("--repeats", type=int, default=10, help="saves of each kind")


def run(given: argparse.Namespace) -> int:
    print(files.json_line(measure(given.out, given.repeats)))
    return 0
