"""`specforge COMMAND`: a table of commands, each a module of its own that is imported when it is called.

Exit codes: 0 done, 1 failed, 2 wrong usage or configuration, 3 data, 4 features, 5 checkpoint, 6 export, 7 non-finite.
"""

import importlib
import io
import os
import sys
from collections.abc import Sequence

from specforge import __version__
from specforge.errors import SpecForgeError

COMMANDS = {
    "train": "train a draft model (under torchrun for several processes)",
    "prepare": "tokenise, show, regenerate answers with the target, capture its features",
    "produce": "make features for a training that reads them while it runs (features.source=shared)",
    "eval": "measure a checkpoint on held-out answers",
    "generate": "decode prompts with a draft and with the target alone, and compare",
    "export": "write a draft as serving engines load it, or check such a folder",
    "import": "read an EAGLE-3 or DFlash draft that was made elsewhere",
    "report": "what runs measured, as one HTML file",
    "doctor": "say what this machine and a configuration lack for training",
    "bench": "speed and memory of a training step, as ratios within one run",
    "suite": "score a language model on an in-context-learning suite",
    "demo": "the whole story in minutes: embedded target, train, kill, resume, measure",
    "compare": "every method on the embedded target: equal rows, steps and parameters, one table",
}


def usage() -> str:
    lines = [
        f"specforge {__version__}: train and evaluate draft models for speculative decoding",
        "",
        "usage: specforge COMMAND [options]",
        "",
    ]
    lines += [f"  {name:<10}{text}" for name, text in COMMANDS.items()]
    return "\n".join([*lines, "", "`specforge COMMAND --help` explains one."])


def main(arguments: Sequence[str] | None = None) -> int:
    words = list(sys.argv[1:] if arguments is None else arguments)
    if not words or words[0] in ("-h", "--help"):
        print(usage())
        return 0 if words else 2
    if words[0] == "--version":
        print(__version__)
        return 0
    if words[0] not in COMMANDS:
        print(f"specforge: {words[0]!r} is no command; choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    command = importlib.import_module(f"specforge.cli.{words[0]}")
    try:
        return command.run(words[1:])
    except SpecForgeError as error:
        if os.environ.get("RANK", "0") == "0":
            print(f"specforge {words[0]}: {error}", file=sys.stderr)
        return error.exit_code


def run_and_exit() -> None:
    """The process entry. A rank leaves without Python's finalisation, in which a gloo thread that still lets go of a tensor aborts."""
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # read when torch is loaded; threads that spin starve each other on busy cores
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(line_buffering=True)  # in a file or a pipe too a line is there when it is printed
    code = main()
    if "RANK" in os.environ:  # set by torchrun, and for the other launchers by World.join
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


if __name__ == "__main__":
    run_and_exit()
