"""What sharing prefixes brings, side by side: the same tasks, without and with shots, one example at a time and as a prefix tree.

    scripts/prefix_demo.sh [--model FOLDER] [--examples N]

Every figure is of a process of its own on one thread. Seconds are those of scoring, memory is the peak of the resident set.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from specforge import files
from specforge.bench.child import run_child
from specforge.demo.bundle import write_bundle

TARGET = Path(__file__).parent / "target"
SETS = {
    "no shots": ("--tasks", "literal_zero"),
    "ten shots, a draw per example": ("--tasks", "literal_ten"),
    "ten shots, one block": ("--tasks", "literal_ten", "--shared-shots"),
}


def measure(words: Sequence[str]) -> dict[str, Any]:
    """The numbers of the one task that `specforge suite` scores, and `peak_mib`."""
    child = run_child([sys.executable, "-m", "specforge", "suite", *words])
    [task] = json.loads(child.printed.splitlines()[-1])["tasks"]
    return {**task, "peak_mib": child.peak_mib}


def _line(name: str, task: dict[str, Any], exact_s: float) -> str:
    counts = f"{task['accuracy']:>9.3f}{task['row_tokens']:>12,}{task['slots']:>10,}"
    return f"{name:<32}{task['mode']:<7}{counts}{task['seconds']:>9.2f}{exact_s / task['seconds']:>8.2f}{task['peak_mib']:>10.0f}"


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, default=TARGET, help="folder of a causal language model (default: the embedded target)")
    parser.add_argument("--examples", type=int, default=100, help="of each task (default 100)")
    given = parser.parse_args(argv)
    print(f"{'':<32}{'way':<7}{'accuracy':>9}{'row tokens':>12}{'slots':>10}{'seconds':>9}{'faster':>8}{'peak MiB':>10}")
    numbers: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        bundle = write_bundle(Path(folder) / "bundle", given.examples)
        words = ["--model", str(given.model), "--bundle", str(bundle), "--cache", str(Path(folder) / "tokens")]
        for name, more in SETS.items():
            measure([*words, *more, "--mode", "exact"])  # makes the tokens
            exact, tree = (measure([*words, *more, "--mode", mode]) for mode in ("exact", "tree"))
            numbers[name] = {"exact": exact, "tree": tree}
            print(_line(name, exact, exact["seconds"]), flush=True)
            print(_line("", tree, exact["seconds"]), flush=True)
    print(files.json_line(numbers))


if __name__ == "__main__":
    main()
