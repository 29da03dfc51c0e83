"""What a round of decoding costs on this machine, by how much it drafts and how much of that it verifies.

Shapes: B sequences, K drafts of a chain.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch

from specforge.decode.drafter import Drafter, Proposal
from specforge.decode.engine import Decoder
from specforge.errors import ConfigError
from specforge.features.target import Target


def measured_tokens(draft_tokens: int) -> int:
    """How many tokens `measure_costs` adds to a prompt; drafts that are all right take at least four rounds for them."""
    return max(4 * (draft_tokens + 1), 12)


@dataclass(frozen=True)
class CostCurve:
    """Seconds of a round for a batch of one size: `draft_s[j] + verify_s[n]` where j tokens are drafted and n <= j of them verified.

    Raises:
        ConfigError: the two differ in length, do not begin with a round that takes time, or fall.
    """

    draft_s: tuple[float, ...]
    """Of drafting 0, 1, ... K tokens."""
    verify_s: tuple[float, ...]
    """Of everything else in a round that verifies 0, 1, ... K drafts."""

    def __post_init__(self) -> None:
        falls = any(after < before for curve in (self.draft_s, self.verify_s) for before, after in pairwise(curve))
        if falls or not 0 < len(self.draft_s) == len(self.verify_s) or self.draft_s[0] < 0 or self.verify_s[0] <= 0:
            raise ConfigError(
                f"cost curve draft_s={self.draft_s}, verify_s={self.verify_s}: must be seconds of 0, 1, ... K drafts, as many of the one "
                "as of the other, none below that of fewer drafts, verify_s above 0; measure it again."
            )

    @property
    def draft_tokens(self) -> int:
        return len(self.draft_s) - 1

    def seconds(self, drafted: int, verified: int) -> float:
        return self.draft_s[drafted] + self.verify_s[verified]


class TimedDrafter:
    """Another drafter, and when it was asked and had answered, the device settled at both."""

    def __init__(self, drafter: Drafter, clock: Callable[[], float]) -> None:
        self._drafter, self._clock = drafter, clock
        self.layer_ids, self.draft_nodes = drafter.layer_ids, drafter.draft_nodes
        self.asked_s: list[float] = []
        self.answered_s: list[float] = []
        """Of the rounds since `begin`."""

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        self.asked_s.clear()
        self.answered_s.clear()
        self._drafter.begin(prompts, capacity_tokens)

    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        self._device = next_ids_BM.device
        self._drafter.extend(next_ids_BM, aux_BMF, counts)

    def propose(self) -> Proposal:
        self.asked_s.append(self._now())
        proposal = self._drafter.propose()
        self.answered_s.append(self._now())
        return proposal

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return self._clock()


def measure_costs(
    target: Target,
    drafter_of: Callable[[int], Drafter],
    draft_tokens: int,
    prompts: Sequence[np.ndarray],
    *,
    laps: int = 3,
    clock: Callable[[], float] = time.perf_counter,
) -> CostCurve:
    """Decode the prompts, as a batch, with `drafter_of(k)` for k = 0, 1, ... K in turn, and take the median round of each.

    The turns share out what else the machine is doing. Rounds end before the next `propose`, so the drafter's `extend` belongs to
    `verify_s`; the first round of a decoding is not counted. Where noise makes more drafts look cheaper, they cost what fewer do.
    """
    drafters = [TimedDrafter(drafter_of(length), clock) for length in range(draft_tokens + 1)]
    draft_s: list[list[float]] = [[] for _ in drafters]
    verify_s: list[list[float]] = [[] for _ in drafters]
    for _ in range(laps):
        for length, drafter in enumerate(drafters):
            Decoder(target, drafter).decode(prompts, measured_tokens(length))
            asked, answered = np.array(drafter.asked_s[1:]), np.array(drafter.answered_s[1:])
            draft_s[length] += (answered - asked).tolist()
            verify_s[length] += (asked[1:] - answered[:-1]).tolist()
    medians = [np.maximum.accumulate([float(np.median(rounds)) for rounds in parts]).tolist() for parts in (draft_s, verify_s)]
    return CostCurve(*map(tuple, medians))
