"""`specforge bench train-step`: forward and backward against the matrix products in them."""

import argparse
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from specforge import files
from specforge.bench.blocks import BLOCK_SHAPES, BlockShape
from specforge.bench.blocks import measure as measure_blocks
from specforge.bench.synthetic import SHAPES, Shape
from specforge.bench.train_step import measure, state_mib
from specforge.errors import ConfigError

SIZES = list(dict.fromkeys(size.name for size in (*fields(Shape), *fields(BlockShape))))


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--method", choices=("eagle3", "dflash"), default="eagle3")
    parser.add_argument("--shape", choices=SHAPES, default="small", help="named sizes; the flags below change single ones")
    for size in SIZES:
        parser.add_argument(f"--{size.replace('_', '-')}", type=int, metavar="N")
    parser.add_argument("--repeats", type=int, default=60, help="the best of so many counts")
    parser.add_argument("--peer", type=Path, metavar="PYTHON", help="compare with `speculators` in the environment of scripts/peer.sh")


def run(given: argparse.Namespace) -> int:
    changed = {size: getattr(given, size) for size in SIZES if getattr(given, size) is not None}
    named: Any = BLOCK_SHAPES[given.shape] if given.method == "dflash" else SHAPES[given.shape]
    foreign = sorted(changed.keys() - {size.name for size in fields(named)})
    if foreign or (given.peer and given.method != "eagle3"):
        unknown = "peer" if not foreign else foreign[0].replace("_", "-")
        raise ConfigError(f"--{unknown}: means nothing to a step of {given.method}; leave it out.")
    shape = replace(named, **changed)
    if given.method == "dflash":
        print(files.json_line(measure_blocks(shape, given.repeats)))
        return 0
    numbers = measure(shape, given.repeats, given.peer)
    short, long = (state_mib(shape, tokens) for tokens in (1024, 2048))
    print(f"state kept for the backward: {short:.1f} MiB at 1,024 tokens a document, {long:.1f} MiB at 2,048: {long / short:.2f} times")
    print(files.json_line(numbers))
    return 0
