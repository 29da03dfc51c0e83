"""Rows to train on and rows to measure on, from prompts out of Python sources and the target's own answers.

python -m specforge.demo.rows --train 12000 --heldout 260 prompts.jsonl
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from specforge.demo.conversations import conversations
from specforge.demo.corpus import Split


def write_prompts(path: Path, train: int, heldout: int) -> None:
    """`train` prompts, and `heldout` ones from packages of which the others know nothing; the split is the first part of an id.

    Fewer where the sources of this machine give no more.
    """
    counts: tuple[tuple[Split, int], ...] = (("train", train), ("heldout", heldout))
    with path.open("w") as file:
        for split, count in counts:
            for row in conversations(split, count):
                row = {"id": f"{split}/{row['id']}", "domain": row["domain"], "conversations": row["conversations"]}
                file.write(json.dumps(row) + "\n")


def split_answers(answers: Path) -> tuple[int, int]:
    """Write `train.jsonl` and `heldout.jsonl` beside the answers to such prompts, and say how many rows each has."""
    rows: dict[str, list[str]] = {"train": [], "heldout": []}
    for line in answers.read_text().splitlines():
        rows[json.loads(line)["id"].split("/")[0]].append(line)
    for split, lines in rows.items():
        (answers.parent / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return len(rows["train"]), len(rows["heldout"])


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write prompts made from the Python sources of this machine.")
    parser.add_argument("out", type=Path, metavar="PROMPTS.jsonl")
    parser.add_argument("--train", type=int, default=0, help="prompts from packages to train on (default 0)")
    parser.add_argument("--heldout", type=int, default=0, help="prompts from packages that are held out (default 0)")
    given = parser.parse_args(argv)
    given.out.parent.mkdir(parents=True, exist_ok=True)
    write_prompts(given.out, given.train, given.heldout)


if __name__ == "__main__":
    main()
