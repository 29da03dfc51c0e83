"""One number for time and quality, so that a lever which costs a little of the one for the other can be judged."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from specforge.errors import ConfigError


@dataclass(frozen=True)
class Term:
    """`weight` times `value` of the qualities that it needs."""

    weight: float
    needs: tuple[str, ...]
    value: Callable[..., float]


@dataclass(frozen=True)
class Guard:
    """Outside of [low, high] the whole score is 0."""

    quality: str
    low: float
    high: float = float("inf")


@dataclass(frozen=True)
class ScoreSpec:
    """latency_weight * (base - t) / base, never below 0, plus the terms of quality; 0 where a guard is violated."""

    name: str
    latency_weight: float
    base_s: float | None
    """None: the time of the reference in the same run."""
    terms: tuple[Term, ...]
    guards: tuple[Guard, ...]

    def score(self, seconds: float, reference_s: float, quality: Mapping[str, float]) -> float:
        """
        Args:
            seconds: synchronised.

        Raises:
            ConfigError: a quality that it needs was not measured.
        """
        self.require(quality)
        if self.violated(quality):
            return 0.0
        base_s = reference_s if self.base_s is None else self.base_s
        latency = self.latency_weight * max(0.0, (base_s - seconds) / base_s)
        return latency + sum(term.weight * term.value(*(quality[name] for name in term.needs)) for term in self.terms)

    def violated(self, quality: Mapping[str, float]) -> list[str]:
        return [
            f"{guard.quality} {quality[guard.quality]:.4g} is not in [{guard.low:g}, {guard.high:g}]"
            for guard in self.guards
            if not guard.low <= quality[guard.quality] <= guard.high
        ]

    def require(self, quality: Mapping[str, float]) -> None:
        needed = [*(name for term in self.terms for name in term.needs), *(guard.quality for guard in self.guards)]
        missing = [name for name in dict.fromkeys(needed) if name not in quality]
        if missing:
            raise ConfigError(f"--score={self.name}: needs {', '.join(missing)}, which this case does not measure; choose another score.")


def _contest_quality(auc: float, pcoc: float) -> float:
    return ((auc - 0.65) * 1000 + (0.15 - abs(pcoc - 1)) / 0.15 * 10) / 360


def _drafted(acc_len: float, draft_tokens: float) -> float:
    return (acc_len - 1) / draft_tokens


SCORES = {
    # Baidu CTI contest of 2026, inference of generative ranking: 5 minutes, AUC and PCOC of the scored rows.
    "contest": ScoreSpec(
        "contest",
        latency_weight=70,
        base_s=300.0,
        terms=(Term(30, ("auc", "pcoc"), _contest_quality),),
        guards=(Guard("auc", 0.65), Guard("pcoc", 0.85, 1.15)),
    ),
    # acc_len is committed tokens a round, of at most K + 1; a draft whose confidence is far off cannot be scheduled.
    "draft": ScoreSpec(
        "draft",
        latency_weight=70,
        base_s=None,
        terms=(Term(30, ("acc_len", "draft_tokens"), _drafted),),
        guards=(Guard("pcoc", 0.85, 1.15),),
    ),
}
