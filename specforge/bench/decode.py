"""Whether drafting as many tokens as pay for their time beats every fixed number of them, and where the time of a round goes.

First the cost of a round is measured. Then each answer is decoded by all competitors in turn, several laps, and every (answer,
competitor) counts with its shortest lap; prompts do not count. From the same rounds comes the rate on the cost curve, which is free
of noise: tokens over the sum of what each round costs there. One thread; on a CPU, CPU time of the process.

The oracle is the fixed chain of K whose every round is charged only for the drafts that were accepted.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from functools import wraps
from typing import Any

import numpy as np
import torch

from specforge.decode.adaptive import AdaptiveLength
from specforge.decode.costs import CostCurve, TimedDrafter, measure_costs
from specforge.decode.drafter import Drafter, NoDrafter
from specforge.decode.engine import Decoded, Decoder
from specforge.decode.statistics import Rounds
from specforge.features.target import Target
from specforge.models.calibration import Calibration

DrafterOf = Callable[[int, AdaptiveLength | None], Drafter]
"""A drafter of a fixed number of tokens, or of at most so many."""


ALONE, ADAPTIVE, RAW = "target alone", "adaptive", "adaptive, raw"

Prompt = tuple[np.ndarray, int]
"""Ids [S], and how many tokens to add."""


class Competitor:
    """One way of drafting, and what became of its rounds."""

    def __init__(self, target: Target, drafter: Drafter, clock: Callable[[], float]) -> None:
        self.drafter, self._clock = TimedDrafter(drafter, clock), clock
        self._decoder = Decoder(target, self.drafter)
        self.texts: list[Decoded] = []
        self.best_s: dict[int, float] = {}
        """Shortest time of the rounds of each prompt."""

    def decode(self, number: int, prompt_S: np.ndarray, limit: int) -> None:
        (text,) = self._decoder.decode([prompt_S], limit)
        if text.committed:
            spent_s = self._clock() - self.drafter.asked_s[0]
            self.best_s[number] = min(self.best_s.get(number, spent_s), spent_s)
            self.texts.append(text)


def measure(
    target: Target,
    drafter_of: DrafterOf,
    draft_tokens: int,
    calibration: Calibration,
    prompts: Sequence[Prompt],
    laps: int,
) -> dict[str, Any]:
    """The numbers of the JSON line."""
    torch.set_num_threads(1)
    clock = time.perf_counter if target.device.type == "cuda" else time.process_time
    costs = measure_costs(target, lambda length: drafter_of(length, None), draft_tokens, [prompts[0][0]], laps=4 * laps, clock=clock)
    raw = Calibration((1.0,) * draft_tokens, (0.0,) * draft_tokens)
    rules = {ADAPTIVE: AdaptiveLength(calibration, costs), RAW: AdaptiveLength(raw, costs)}
    drafters: dict[str, Drafter] = {ALONE: NoDrafter()}
    drafters |= {f"K={length}": drafter_of(length, None) for length in range(draft_tokens + 1)}
    drafters |= {name: drafter_of(draft_tokens, rule) for name, rule in rules.items()}
    competitors = {name: Competitor(target, drafter, clock) for name, drafter in drafters.items()}
    names = list(competitors)
    for lap in range(laps):
        for number, prompt in enumerate(prompts):
            first = (lap + number) % len(names)
            for name in names[first:] + names[:first]:
                competitors[name].decode(number, *prompt)

    longest = f"K={draft_tokens}"
    rounds = {name: Rounds.of(each.texts, draft_tokens) for name, each in competitors.items()}
    fixed = {f"K={length}": rounds[f"K={length}"].rounds * costs.seconds(length, length) for length in range(draft_tokens + 1)}
    adapted = {name: float((rule.rounds * _seconds(costs)).sum()) for name, rule in rules.items()}
    on_curve = {name: rounds[name].tokens / seconds for name, seconds in (fixed | adapted).items()}
    on_curve["oracle"] = rounds[longest].tokens / float(rounds[longest].histogram @ np.diag(_seconds(costs)))
    measured = {name: rounds[name].tokens / laps / sum(each.best_s.values()) for name, each in competitors.items()}
    return {
        "prompts": len(prompts), "tokens": rounds[longest].tokens // laps, "laps": laps, "costs": asdict(costs),
        "tokens_per_round": {name: each.tokens / max(each.rounds, 1) for name, each in rounds.items()},
        "tokens_per_s_on_curve": on_curve, "tokens_per_s": measured,
        "to_best_fixed_on_curve": _to_best_fixed(on_curve), "to_best_fixed": _to_best_fixed(measured),
        "rounds": {name: rule.rounds.tolist() for name, rule in rules.items()},
        "same_texts": all(_ids(each) == _ids(competitors[ALONE]) for each in competitors.values()),
        "profile": {
            name: profile(target, drafter_of(draft_tokens, rule), prompts, clock)
            for name, rule in ((longest, None), (ADAPTIVE, rules[ADAPTIVE]))
        },
    }  # fmt: skip


def table(numbers: Mapping[str, Any]) -> str:
    costs = numbers["costs"]
    lines = [
        f"{numbers['prompts']} answers, {numbers['tokens']} tokens in rounds, greedy, batch 1; best of {numbers['laps']} laps",
        "a round in ms, by drafts       " + "".join(f"{drafts:>8}" for drafts in range(len(costs["draft_s"]))),
        "  drafting them                " + "".join(f"{1e3 * seconds:>8.2f}" for seconds in costs["draft_s"]),
        "  verifying them, and the rest " + "".join(f"{1e3 * seconds:>8.2f}" for seconds in costs["verify_s"]),
        f"{'':<18}{'tokens/round':>14}{'tokens/s on curve':>20}{'tokens/s':>12}",
    ]
    columns = ("tokens_per_round", "tokens_per_s_on_curve", "tokens_per_s")
    for name in numbers["tokens_per_s"] | numbers["tokens_per_s_on_curve"]:
        lengths = (f"{numbers[column][name]:.3f}" if name in numbers[column] else "-" for column in columns)
        lines.append("{:<18}{:>14}{:>20}{:>12}".format(name, *lengths))
    for name, measured in numbers["to_best_fixed"].items():
        lines.append(f"{name} / best fixed length: {numbers['to_best_fixed_on_curve'][name]:.3f} on the curve, {measured:.3f} measured")
    lines += [
        f"time of a round, {name}: target {of['target_share']:.1%}, draft {of['draft_share']:.1%}, engine {of['engine_share']:.1%}"
        for name, of in numbers["profile"].items()
    ]
    return "\n".join(lines)


def _seconds(costs: CostCurve) -> np.ndarray:
    """By tokens drafted and drafts verified."""
    return np.add.outer(costs.draft_s, costs.verify_s)


def _ids(competitor: Competitor) -> list[list[int]]:
    return [text.ids for text in competitor.texts]


def _to_best_fixed(rates: Mapping[str, float]) -> dict[str, float]:
    best = max(rate for name, rate in rates.items() if name.startswith("K="))
    return {name: rates[name] / best for name in (ADAPTIVE, RAW)}


def profile(
    target: Target,
    drafter: Any,
    prompts: Sequence[Prompt],
    clock: Callable[[], float],
) -> dict[str, float]:
    """Share of the rounds' time in the target's network, in the draft's and in the rest; milliseconds of a round.

    The networks are the target's decoder and head, and the draft's layers, head and fusion of features. The rest is the engine: masks,
    caches, verification, decisions, and the clock itself.
    """
    spent_s, rounds, whole_s = {"target": 0.0, "draft": 0.0}, 0, 0.0
    parts: list[tuple[str, Any, str]] = [("target", target.decoder, "forward"), ("target", target, "logits")]
    parts += [("draft", drafter, name) for name in ("_rows", "_read")] + [("draft", drafter._draft, "fuse")]
    for prompt_S, new_tokens in prompts:
        timed = TimedDrafter(drafter, clock)
        with _clocked(parts, spent_s, clock, timed.asked_s):
            (text,) = Decoder(target, timed).decode([prompt_S], new_tokens)
            ended_s = clock()
        if text.committed:
            rounds, whole_s = rounds + len(text.committed), whole_s + ended_s - timed.asked_s[0]
    shares = {f"{name}_share": seconds / whole_s for name, seconds in spent_s.items()}
    return {**shares, "engine_share": 1 - sum(shares.values()), "round_ms": 1e3 * whole_s / rounds}


@contextmanager
def _clocked(
    parts: Sequence[tuple[str, Any, str]], spent_s: dict[str, float], clock: Callable[[], float], rounds: Sequence[float]
) -> Iterator[None]:
    """Adds up how long calls of these methods take, by name, once there were `rounds`."""

    def clocked(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(call)
        def timed_call(*given: Any, **named: Any) -> Any:
            began_s = clock()
            result = call(*given, **named)
            spent_s[name] += (clock() - began_s) if rounds else 0.0
            return result

        return timed_call

    for name, owner, method in parts:
        owner.__dict__[method] = clocked(name, getattr(owner, method))
    try:
        yield
    finally:
        for _, owner, method in parts:
            del owner.__dict__[method]
