"""A command as its users run it, in a process of its own, and what it cost."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from specforge.errors import SpecForgeError

_BETWEEN = """
import json, resource, subprocess, sys
code = subprocess.call(sys.argv[2:])
usage = resource.getrusage(resource.RUSAGE_CHILDREN)
with open(sys.argv[1], "w") as file:
    json.dump([code, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024], file)
"""
"""Linux hands the largest resident set of whoever starts a program on to that program; this one's is some 10 MiB."""


class Child(NamedTuple):
    printed: str
    cpu_s: float
    peak_mib: float


def run_child(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Child:
    """Run to the end, on one thread.

    Raises:
        SpecForgeError: it cannot be started, or fails; the last lines of what it said on stderr are in the message.
    """
    words = [str(word) for word in command]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said, tempfile.NamedTemporaryFile("r") as cost:
        between = [sys.executable, "-I", "-S", "-c", _BETWEEN, cost.name, *words]
        subprocess.run(between, env=environment, stdout=printed, stderr=said, check=False)
        printed.seek(0)
        said.seek(0)
        code, cpu_s, peak_mib = json.loads(cost.read() or "[null, 0, 0]")
        if code == 0:
            return Child(printed.read(), cpu_s, peak_mib)
        last = "\n".join(said.read().splitlines()[-5:])
    how = "cannot be run" if code is None else f"ended with {code}"
    raise SpecForgeError(f"`{' '.join(words)}` {how}; run it to see why. It said last:\n{last}")
