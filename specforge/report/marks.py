"""One shape a run, so that runs are told apart without their colours."""

import math

Outline = list[tuple[float, float]]


def _star(points: int, inner: float, turn: float = 0.0) -> Outline:
    """Corners on the unit circle, the first one on top, and between neighbours one at the distance `inner`."""
    corners = []
    for number in range(2 * points):
        distance, angle = inner if number % 2 else 1.0, turn + number * math.pi / points
        corners.append((distance * math.sin(angle), -distance * math.cos(angle)))
    return corners


def _polygon(corners: int, turn: float = 0.0) -> Outline:
    return _star(corners, 1.0, turn)[::2]


_SHAPES = (
    _polygon(16),
    _polygon(4, math.pi / 4),
    _polygon(3),
    _polygon(4),
    _polygon(3, math.pi),
    _star(4, 0.4),
    _star(4, 0.4, math.pi / 4),
    _star(5, 0.45),
)
MOST_RUNS = len(_SHAPES)
"""As many have a shape and a colour of their own."""


def outline(run: int, x: float, y: float, radius: float) -> str:
    """The path of the shape of run number `run`, around a place of a picture."""
    return "M" + "L".join(f"{x + radius * across:.1f},{y + radius * down:.1f}" for across, down in _SHAPES[run]) + "Z"
