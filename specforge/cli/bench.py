"""`specforge bench NAME`: speed and memory, as ratios within one run.

It runs in a process whose allocator and threads are set as those of the quickstart's training are.
"""

import argparse
import importlib
import os
import subprocess
import sys
from collections.abc import Sequence

from specforge.cli.demo import CALM

BENCHES = {
    "run": ("case", "a case in several ways: equal outputs, both clocks, score, profile, experiment log"),
    "train-step": ("train_step", "forward and backward against the matrix products in them; float32, one thread"),
    "loss-memory": ("loss_memory", "growth of the resident set in the loss, chunked and naive: 4,096 tokens, a vocabulary of 128,256"),
    "save": ("save", "how long a checkpoint keeps training waiting, against writing it at once"),
    "decode": ("decode", "draft lengths that adapt against every fixed one, and where a round's time goes"),
}
"""Each a module of `specforge.cli.benches`."""


def parse(words: Sequence[str]) -> argparse.Namespace:
    """Of the benches only the one that is asked for is imported."""
    whole = argparse.ArgumentParser(prog="specforge bench", description="The last line of the output is one JSON object.")
    benches = whole.add_subparsers(dest="bench", required=True)
    for name, (module_name, about) in BENCHES.items():
        one = benches.add_parser(name, help=about, formatter_class=argparse.RawDescriptionHelpFormatter)
        if words and name == words[0]:
            module = importlib.import_module(f"specforge.cli.benches.{module_name}")
            one.description = module.__doc__
            module.arguments(one)
            one.set_defaults(run=module.run)
    return whole.parse_args(words)


def run(words: Sequence[str]) -> int:
    given = parse(words)
    if any(os.environ.get(name) != value for name, value in CALM.items()):
        return subprocess.run([sys.executable, "-m", "specforge", "bench", *words], env={**os.environ, **CALM}, check=False).returncode
    code: int = given.run(given)
    return code
