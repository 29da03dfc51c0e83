"""One experiment: every configuration is held against the reference of its problem, and those that agree are timed by turns."""

import math
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from specforge.bench.case import Case, Configuration, Outputs, Work, largest_difference
from specforge.bench.log import Row
from specforge.bench.profile import Profile, profile
from specforge.bench.score import ScoreSpec
from specforge.bench.timer import Times, clock_of, interleaved


@dataclass
class Measured:
    configuration: Configuration
    work: Work
    difference: float
    quality: Mapping[str, float]
    times: Times | None = None
    """None: the outputs differ from the reference's."""
    profile: Profile | None = None


def measure(
    case: Case,
    configurations: Sequence[Configuration],
    rounds: int,
    device: torch.device,
    spec: ScoreSpec | None = None,
    profiled: bool = False,
) -> list[Measured]:
    """
    Args:
        configurations: each problem's reference before its others (`sweep.with_references`).

    Raises:
        ConfigError: the score needs a quality that the case does not measure.
    """
    expected: dict[str, Outputs] = {}
    found = []
    for configuration in configurations:
        work = case.prepare(configuration, device)
        outputs = work.run()
        reference = expected.setdefault(str(case.at_reference(configuration)), outputs)
        quality = work.quality(outputs)
        if spec is not None:
            spec.require(quality)
        found.append(Measured(configuration, work, largest_difference(outputs, reference), quality))
    agreeing = [each for each in found if agrees(case, each)]
    for each, times in zip(agreeing, interleaved([each.work.run for each in agreeing], rounds, device), strict=True):
        each.times = times
        each.profile = profile(each.work.run, device) if profiled else None
    return found


def agrees(case: Case, measured: Measured) -> bool:
    return measured.difference <= case.tolerance(measured.configuration)


def rows(case: Case, measured: Sequence[Measured], rounds: int, device: torch.device, spec: ScoreSpec | None = None) -> list[Row]:
    """What `measure` found, for the log."""
    medians_s = {str(each.configuration): each.times.median_s for each in measured if each.times is not None}
    about = surroundings(device)
    return [
        Row(
            case=case.name, levers=dict(each.configuration.levers), levers_hash=case.digest(each.configuration),
            problem=dict(each.configuration.problem), command=command(case, each.configuration, rounds, spec), **about, rounds=rounds,
            difference=_finite(each.difference), tolerance=case.tolerance(each.configuration),
            **_outcome(case, each, medians_s[str(case.at_reference(each.configuration))], spec),
            quality={name: _finite(value) for name, value in each.quality.items()},
            synchronisations=sum(each.profile.synchronisations.values()) if each.profile else None,
            score_name=spec.name if spec else None,
        )
        for each in measured
    ]  # fmt: skip


def command(case: Case, configuration: Configuration, rounds: int, spec: ScoreSpec | None) -> str:
    """What measures this one configuration, and its reference, again."""
    words = [f"--lever {name}={choice}" for name, choice in configuration.levers.items()]
    words += [f"--sweep {name}={value}" for name, value in configuration.problem.items() if value != case.problem[name]]
    return " ".join(["specforge bench run", case.name, *words, f"--rounds {rounds}", *([f"--score {spec.name}"] if spec else [])])


def surroundings(device: torch.device) -> dict[str, Any]:
    """The fields of a row that are those of the run."""
    return {
        "commit": _commit(), "date": datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S"), "host": platform.node(), "machine": _machine(device),
        "torch": torch.__version__, "threads": torch.get_num_threads(), "clock": clock_of(device)[0],
    }  # fmt: skip


def _outcome(case: Case, measured: Measured, reference_s: float, spec: ScoreSpec | None) -> dict[str, Any]:
    """Times, score and verdict."""
    times = measured.times
    if times is None:
        nothing = dict.fromkeys(("dispatch_ms", "synchronised_ms", "minimum_ms", "spread", "times_faster", "score"))
        return {**nothing, "verdict": "differs from the reference, not timed"}
    verdict = "faster" if times.median_s < reference_s else "slower than the reference"
    if measured.configuration == case.at_reference(measured.configuration):
        verdict = "reference"
    violated = spec.violated(measured.quality) if spec else []
    return {
        "dispatch_ms": 1e3 * times.median_dispatch_s, "synchronised_ms": 1e3 * times.median_s, "minimum_ms": 1e3 * times.minimum_s,
        "spread": times.spread, "times_faster": reference_s / times.median_s,
        "score": spec.score(times.median_s, reference_s, measured.quality) if spec else None,
        "verdict": f"scores 0: {'; '.join(violated)}" if violated else verdict,
    }  # fmt: skip


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _machine(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    folder = Path(__file__).parents[1]

    def git(*words: str) -> str | None:
        try:
            done = subprocess.run(["git", "-C", str(folder), *words], capture_output=True, text=True, check=False)
        except FileNotFoundError:
            return None
        return done.stdout.strip() if done.returncode == 0 else None

    head = git("rev-parse", "--short=12", "HEAD")
    return head and head + ("+" if git("status", "--porcelain", "--", ".") else "")
