"""How many tokens to draft in a round, and how many of them to verify: as many as pay for their time.

A round that drafts j tokens and verifies n of them takes C = D(j) + V(n) seconds (`CostCurve`) and brings one token and the accepted
drafts. Draft i is accepted if all before it are and it is right: with the calibrated confidences c, with probability a_i = c_1 ... c_i.
So E[tokens] = 1 + a_1 + ... + a_n. Rounds are renewals: the best long-run rate r* = max E[tokens] / E[seconds] is the number for which
the best policy has E[tokens] - r* E[seconds] = 0 (Dinkelbach 1967), so within a round a second is worth r* tokens. With j drafted, n = n*
of the largest a_1 + ... + a_n - r V(n) should be verified. Drafting on to m > j promises a_1 + ... + a_j + a_j (p_(j+1) + p_(j+1) p_(j+2)
+ ...) - r V(m) - r (D(m) - D(j)), where p_i is the mean of c_i weighted by a_(i-1); it goes on while the best m promises more than n*.

r and p are running means over what is decoded, older rounds forgotten. That finds r*: a policy made for r yields a rate above r while r
is too low and below r while it is too high. Rates are of the curve's seconds, not the clock's, so noise changes no decision.

A batch is drafted and verified together, so its rows share j and n: a_i is the sum over rows that are still decoded. What is drafted
next depends on earlier rounds and, within a round, on distributions given tokens before; drafts are a function of the past, so the text
stays the target's own. One decision needs its confidences on the host: a wait for the device at each drafted token, none on a CPU. To
decide once a round, from older confidences, would save the waits and not see the round's first surprise, which is most of the gain.

Shapes: B sequences, K drafts of a chain.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from specforge.decode.costs import CostCurve
from specforge.models.calibration import EPSILON, Calibration

_MEMORY_ROUNDS = 1024
"""Rounds after which what was seen weighs 1/e. Then long drafts are tried again too, as they were at first."""
_LESSON_ROUNDS = 16
"""Rounds between two looks at what was seen."""
_SURE_DRAFTS = 8.0
"""What is known of a position before anything was seen: so many drafts, all sure, lest a bad start ends the learning."""


class AdaptiveLength:
    """The rule of one decoder. It learns from round to round and from text to text.

    A drafter calls `begin`; in each round `start`, then `drafted` for as long as it `goes_on`, then `verified`; and `saw` for what
    the round committed. All of it is on the host.

    Args:
        calibration: of the draft, for at least the curve's K positions.
        costs: for as many sequences as are decoded together.
    """

    def __init__(self, calibration: Calibration, costs: CostCurve) -> None:
        self.costs, self._calibration = costs, calibration
        self.rounds = np.zeros((costs.draft_tokens + 1, costs.draft_tokens + 1), dtype=np.int64)
        """Rounds so far, by tokens drafted and drafts verified."""
        self._reached_K, self._survived_K = [0.0] * costs.draft_tokens, [0.0] * costs.draft_tokens
        self._tokens = self._seconds = 0.0
        self._lesson_rounds = 0

    def begin(self, rows: int) -> None:
        self._going = [1.0] * rows
        self._round_s: float | None = None
        self._plan()

    def start(self) -> None:
        self._survival_B = self._going
        self._expected = sum(self._going)
        """a_j of the last drafted token, over the rows."""
        self._worth = [-self._verify[0]]
        """Expected tokens less the worth of the time of verifying, by drafts verified."""

    def goes_on(self) -> bool:
        """Whether the best plan that drafts on beats the best use of what is drafted."""
        worth, expected = self._worth, self._expected
        least = max(worth) - worth[-1]
        return any(expected * tokens - price > least for tokens, price in self._ahead[len(worth) - 1])

    def drafted(self, confidence_B: Sequence[float]) -> None:
        """One more token was drafted, whose draft gives it these probabilities."""
        place = len(self._worth) - 1
        scale, bias = self._calibration.scale[place], self._calibration.bias[place]
        self._survival_B = [
            survival * calibrated(confidence, scale, bias) for survival, confidence in zip(self._survival_B, confidence_B, strict=True)
        ]
        self._reached_K[place] += self._expected
        self._expected = sum(self._survival_B)
        self._survived_K[place] += self._expected
        self._worth.append(self._worth[-1] + self._expected - self._verify[place + 1] + self._verify[place])

    def verified(self) -> int:
        """How many drafts of the round to verify; the round is drafted."""
        drafted, kept = len(self._worth) - 1, self._worth.index(max(self._worth))
        self.rounds[drafted, kept] += 1
        self._round_s = self.costs.seconds(drafted, kept)
        return kept

    def saw(self, counts: Sequence[int]) -> None:
        """What the round committed, a row; zero for a row that has ended. After `begin`, the prompts."""
        self._going = [float(count > 0) for count in counts]
        if self._round_s is not None:
            self._tokens += sum(counts)
            self._seconds += self._round_s
            self._lesson_rounds += 1
            if self._lesson_rounds == _LESSON_ROUNDS:
                self._forget()
                self._plan()

    def numbers(self) -> dict[str, Any]:
        """The cost curve, and the mean over rounds of tokens drafted and drafts verified."""
        places, rounds = np.arange(len(self.rounds)), max(int(self.rounds.sum()), 1)
        drafted, verified = (float(self.rounds.sum(axis) @ places) / rounds for axis in (1, 0))
        return {"costs": asdict(self.costs), "mean_drafted": drafted, "mean_verified": verified}

    def _forget(self) -> None:
        kept = math.exp(-_LESSON_ROUNDS / _MEMORY_ROUNDS)
        self._tokens, self._seconds, self._lesson_rounds = kept * self._tokens, kept * self._seconds, 0
        self._reached_K, self._survived_K = ([kept * number for number in sums] for sums in (self._reached_K, self._survived_K))

    def _plan(self) -> None:
        """What drafting on promises, for an a_j of 1, and what the time for it is worth: by tokens drafted, of each length beyond."""
        rate = (len(self._going) + self._tokens) / (self.costs.seconds(0, 0) + self._seconds)
        draft, self._verify = ([rate * seconds for seconds in part] for part in (self.costs.draft_s, self.costs.verify_s))
        sums_K = zip(self._survived_K, self._reached_K, strict=True)
        chance_K = [(_SURE_DRAFTS + survived) / (_SURE_DRAFTS + reached) for survived, reached in sums_K]
        price = [drafting + verifying for drafting, verifying in zip(draft, self._verify, strict=True)]
        self._ahead = [
            [(float(tokens), price[length] - price[done]) for length, tokens in enumerate(np.cumsum(np.cumprod(chance_K[done:])), done + 1)]
            for done in range(len(price))
        ]


def calibrated(probability: float, scale: float, bias: float) -> float:
    """One number of `Calibration.apply`."""
    probability = min(max(probability, EPSILON), 1 - EPSILON)
    return 1 / (1 + math.exp(-bias - scale * (math.log(probability) - math.log1p(-probability))))
