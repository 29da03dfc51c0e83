"""Files of rows as a person would write them."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from specforge.ranking.batch import UserRows
from specforge.ranking.store import UserCache, UserStore


def write(folder: Path, *lines: str, name: str = "rows.csv") -> Path:
    path = folder / name
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


def store(folder: Path, lines: Sequence[str], *, slots: int = 3, filter_users: bool = True, max_rows: int = 0) -> UserStore:
    return UserCache(folder / "cache").get(write(folder, *lines), slots=slots, filter_users=filter_users, max_rows=max_rows)


def bags(user: UserRows) -> list[list[list[int]]]:
    """The signs of each slot of each row."""
    cut = np.split(user.sign_V, np.cumsum(user.count_RS))
    return [[cut[row * user.count_RS.shape[1] + slot].tolist() for slot in range(user.count_RS.shape[1])] for row in range(len(user))]


def random_lines(users: int, seed: int, *, slots: int = 3, scored_share: float = 0.4) -> list[str]:
    """Users of 1 to 9 rows whose lines are shuffled; a share of them has its last two rows scored."""
    draw, lines = np.random.default_rng(seed), []
    for user in range(users):
        rows, scored = int(draw.integers(1, 10)), draw.random() < scored_share
        for row in range(rows):
            pairs = " ".join(f"{slot}:{draw.integers(0, 2**31)}" for slot in range(1, slots + 1) for _ in range(draw.integers(0, 3)))
            lines.append(f"u{user},{row},{draw.integers(0, 2)},{int(scored and row >= rows - 2)},{pairs}")
    return [lines[place] for place in draw.permutation(len(lines))]
