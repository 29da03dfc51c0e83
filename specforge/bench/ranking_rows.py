"""Peak memory of reading rows: the stream with its user filter, against a reader that keeps every row as Python objects."""

import argparse
import json
import tempfile
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from specforge.ranking.store import write_store
from specforge.ranking.world import ClickWorld


def naive_rows(path: Path) -> list[dict[str, Any]]:
    """Every row, parsed, with its signs by slot."""
    rows = []
    with path.open() as lines:
        for line in lines:
            user, time, label, scored, pairs = line.rstrip("\n").split(",")
            signs = dict[int, list[int]]()
            for pair in pairs.split():
                slot, sign = pair.split(":")
                signs.setdefault(int(slot), []).append(int(sign))
            rows.append({"user": user, "time": int(time), "label": label == "1", "scored": scored == "1", "signs": signs})
    return rows


def measure(folder: Path, users: int = 2000, seed: int = 0) -> dict[str, float]:
    """Peaks in MB as `tracemalloc` sees them, of one file whose rows are shuffled and of whose users 13 % have scored rows."""
    world, source = ClickWorld(), folder / "rows.csv"
    world.draw(users, seed, scored_share=0.13, scored_rows=4).save(folder / "ordered.csv", "u")
    lines = (folder / "ordered.csv").read_text().splitlines(keepends=True)
    source.write_text("".join(lines[place] for place in np.random.default_rng(seed).permutation(len(lines))))
    rows = len(lines)
    del lines
    for name in ("filtered", "whole"):
        (folder / name).mkdir()
    filtered_mb = _peak_mb(lambda: write_store(source, folder / "filtered", slots=world.slots, filter_users=True))
    whole_mb = _peak_mb(lambda: write_store(source, folder / "whole", slots=world.slots, filter_users=False))
    naive_mb = _peak_mb(lambda: naive_rows(source))
    return {
        "rows": rows, "file_mb": source.stat().st_size / 1e6, "naive_mb": naive_mb, "stream_mb": filtered_mb,
        "stream_of_all_users_mb": whole_mb, "ratio": naive_mb / filtered_mb,
    }  # fmt: skip


def _peak_mb(read: Callable[[], object]) -> float:
    tracemalloc.start()
    try:
        read()
        return tracemalloc.get_traced_memory()[1] / 1e6
    finally:
        tracemalloc.stop()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--users", type=int, default=2000)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="ranking-rows-") as name:
        print(json.dumps(measure(Path(name), given.users)))


if __name__ == "__main__":
    main()
