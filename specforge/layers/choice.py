"""Which implementation computes, where several give the same numbers."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Choice:
    """A fallback is a choice other than the one asked for."""

    name: str
    """As the layer's table of implementations calls it."""
    reason: str
    """Why, for a reader."""
