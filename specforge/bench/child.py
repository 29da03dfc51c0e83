"""A command as its users run it, in a process of its own, and what it cost."""

import os
import resource
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from specforge.errors import SpecForgeError


class Child(NamedTuple):
    printed: str
    usage: resource.struct_rusage

    @property
    def cpu_s(self) -> float:
        return self.usage.ru_utime + self.usage.ru_stime

    @property
    def peak_mib(self) -> float:
        return self.usage.ru_maxrss / 1024


def run_child(command: Sequence[str | Path], env: Mapping[str, str] | None = None) -> Child:
    """Run to the end, on one thread.

    Raises:
        SpecForgeError: it cannot be started, or fails; the last lines of what it said on stderr are in the message.
    """
    with tempfile.TemporaryFile("w+") as printed, tempfile.TemporaryFile("w+") as said:
        try:
            process = subprocess.Popen(command, env={**os.environ, "OMP_NUM_THREADS": "1", **(env or {})}, stdout=printed, stderr=said)
        except OSError as cause:
            raise SpecForgeError(f"{command[0]}: cannot be run ({cause}); give the path of a program.") from cause
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        printed.seek(0)
        said.seek(0)
        if status:
            last = "\n".join(said.read().splitlines()[-5:])
            raise SpecForgeError(
                f"`{' '.join(map(str, command))}` ended with {process.returncode}; run it to see why. It said last:\n{last}"
            )
        return Child(printed.read(), usage)
