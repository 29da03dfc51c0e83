"""`specforge bench loss-memory`: growth of the resident set in the loss, chunked and naive."""

import argparse

from specforge import files
from specforge.bench.loss_memory import measure_both


def arguments(parser: argparse.ArgumentParser) -> None:
    pass


def run(given: argparse.Namespace) -> int:
    print(files.json_line(measure_both()))
    return 0
