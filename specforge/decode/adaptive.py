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

import numpy as np

from specforge.decode.costs import CostCurve
from specforge.models.calibration import EPSILON, Calibration

_MEMORY_ROUNDS = 1024
"""Rounds after which what was seen weighs 1/e. Then long drafts are tried again too, as they were at first."""
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
        self._reached_K, self._survived_K = [0.0] * costs.draft_tokens, [0.0] * costs.draft_tokens
        self._tokens = self._seconds = 0.0
        self.rounds = np.zeros((costs.draft_tokens + 1, costs.draft_tokens + 1), dtype=np.int64)
        """Rounds so far, by tokens drafted and drafts verified."""

    def begin(self, rows: int) -> None:
        self._going = [True] * rows
        self._round_s: float | None = None

    def start(self) -> None:
        self._survival_B = [float(going) for going in self._going]
        self._sums = [sum(self._survival_B)]
        """Expected tokens a_0 = 1, a_1, ... of a position, over the rows."""
        self._rate = (self._sums[0] + self._tokens) / (self.costs.seconds(0, 0) + self._seconds)
        sums_K = zip(self._survived_K, self._reached_K, strict=True)
        self._chance_K = [(_SURE_DRAFTS + survived) / (_SURE_DRAFTS + reached) for survived, reached in sums_K]

    def goes_on(self) -> bool:
        """Whether the best plan that drafts on beats the best use of what is drafted."""
        done, promised, survival = len(self._sums) - 1, sum(self._sums), self._sums[-1]
        best = -math.inf
        for length, chance in enumerate(self._chance_K[done:], done + 1):
            survival *= chance
            promised += survival
            seconds = self.costs.seconds(length, length) - self.costs.draft_s[done]
            best = max(best, promised - self._rate * seconds)
        return best > max(self._worth())

    def drafted(self, confidence_B: Sequence[float]) -> None:
        """One more token was drafted, whose draft gives it these probabilities."""
        place = len(self._sums) - 1
        scale, bias = self._calibration.scale[place], self._calibration.bias[place]
        self._survival_B = [
            survival * calibrated(confidence, scale, bias) for survival, confidence in zip(self._survival_B, confidence_B, strict=True)
        ]
        self._reached_K[place] += self._sums[-1]
        self._sums.append(sum(self._survival_B))
        self._survived_K[place] += self._sums[-1]

    def verified(self) -> int:
        """How many drafts of the round to verify; the round is drafted."""
        worth = self._worth()
        drafted, kept = len(worth) - 1, worth.index(max(worth))
        self.rounds[drafted, kept] += 1
        self._round_s = self.costs.seconds(drafted, kept)
        return kept

    def saw(self, counts: Sequence[int]) -> None:
        """What the round committed, a row; zero for a row that has ended. After `begin`, the prompts."""
        self._going = [count > 0 for count in counts]
        if self._round_s is None:
            return
        kept = math.exp(-1 / _MEMORY_ROUNDS)
        self._tokens = kept * self._tokens + sum(counts)
        self._seconds = kept * self._seconds + self._round_s
        self._reached_K = [kept * reached for reached in self._reached_K]
        self._survived_K = [kept * survived for survived in self._survived_K]

    def _worth(self) -> list[float]:
        """Expected tokens less what the time of verifying is worth, by drafts verified."""
        promised = np.cumsum(self._sums).tolist()
        return [tokens - self._rate * seconds for tokens, seconds in zip(promised, self.costs.verify_s, strict=False)]


def calibrated(probability: float, scale: float, bias: float) -> float:
    """One number of `Calibration.apply`."""
    probability = min(max(probability, EPSILON), 1 - EPSILON)
    return 1 / (1 + math.exp(-bias - scale * (math.log(probability) - math.log1p(-probability))))
