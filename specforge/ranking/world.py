"""A made-up world whose click probabilities are known, so that it is known how well they can be predicted.

A row shows one item. Each slot holds the sign of one of `ids` things, drawn with a skew, with these exceptions: slot 1 holds the item's
category; slot 2 holds its sign twice in half of the rows; the last slot holds category and label of the user's previous row, and is empty
in the first one. The click is drawn with

    logit p = bias + sum of the weights of the signs of slots 1 to S - 1 + history * sum(label - 0.3) / (1 + n)

where the last sum runs over the user's n earlier rows of the same category. All of it can be read off the rows, so the AUC of p itself is
what a perfect model would reach. A model that sees each row alone still sees the label before it; its oracle takes what this label says.

Shapes: U users, L rows of the longest, S slots, N rows in all.
"""

import argparse
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from specforge import files
from specforge.ranking.batch import UserRows
from specforge.ranking.metrics import auc_exact, bayes_auc

_TYPICAL_LABEL = 0.3


@dataclass(frozen=True)
class Sample:
    """Users of the world, whose rows follow one another: N in all."""

    users: list[UserRows]
    probability_N: np.ndarray
    """Of a click: float64."""
    alone_N: np.ndarray
    """The same as far as the row itself tells, with nothing of the user's past but the label before it."""

    def save(self, path: Path, prefix: str) -> None:
        """As a file of rows; user k is called `prefix` and k."""
        with path.open("w") as file:
            for number, user in enumerate(self.users):
                for time, line in enumerate(_lines(user)):
                    file.write(f"{prefix}{number},{time},{line}\n")

    def truth(self) -> dict[str, Any]:
        """What can be reached on the scored rows: the AUC expected of p, that of p on the labels as drawn, and that of a row alone."""
        scored_N = np.concatenate([user.scored_R for user in self.users])
        label_P = np.concatenate([user.label_R for user in self.users])[scored_N]
        probability_P = self.probability_N[scored_N]
        return {
            "users": len(self.users),
            "rows": len(scored_N),
            "scored_rows": int(scored_N.sum()),
            "ctr": float(label_P.mean()),
            "bayes_auc": bayes_auc(probability_P),
            "oracle_auc": auc_exact(probability_P, label_P),
            "alone_auc": auc_exact(self.alone_N[scored_N], label_P),
        }


@dataclass(frozen=True)
class ClickWorld:
    """
    Args:
        categories: 1: a user's mean click rate is what history tells. 4: it takes a look at the earlier rows of like content.
        history: how much it weighs.
    """

    slots: int = 28
    ids: int = 40
    categories: int = 1
    history: float = 4.0
    weight_std: float = 0.16
    bias: float = -1.2
    mean_rows: float = 24.0
    longest: int = 96
    seed: int = 0

    def draw(self, users: int, seed: int, *, scored_share: float = 1.0, scored_rows: int = 0) -> Sample:
        """
        Args:
            seed: of the users; the world's own says what signs mean.
            scored_share: how many users have scored rows.
            scored_rows: the last rows of such a user, which count; 0: all.
        """
        of_world, of_users = np.random.default_rng([self.seed, 0]), np.random.default_rng([self.seed, 1, seed])
        weight_SI = of_world.normal(0.0, self.weight_std, (self.slots - 1, self.ids))
        sign_SI = of_world.integers(1, 2**31 - 1, (self.slots - 1, self.ids))
        sign_of_action_C2 = of_world.integers(1, 2**31 - 1, (self.categories, 2))

        rows_U = np.exp(of_users.normal(np.log(self.mean_rows) - 0.18, 0.6, users)).round().clip(1, self.longest).astype(np.int64)
        shape, slot_S = (users, int(rows_U.max())), np.arange(self.slots - 1)
        twice_UL, chance_UL = of_users.random(shape) < 0.5, of_users.random(shape)
        id_ULS = np.empty((*shape, self.slots - 1), dtype=np.int16)
        row_UL = np.full(shape, self.bias)
        for slot in slot_S:
            id_ULS[..., slot] = of_users.random(shape) ** 1.5 * self.ids
            if slot == 0:
                id_ULS[..., 0] %= self.categories
            row_UL += weight_SI[slot, id_ULS[..., slot]] * (1 + twice_UL * (slot == 1))
        history_UL, label_UL = self._clicks(id_ULS[..., 0], row_UL, chance_UL)

        exists_UL = np.arange(row_UL.shape[1]) < rows_U[:, None]
        before_UL = np.concatenate([np.full((users, 1), -1), label_UL[:, :-1]], 1)
        expected_UL = np.zeros_like(history_UL)
        for before in (-1, 0, 1):
            alike_UL = exists_UL & (before_UL == before)
            expected_UL[alike_UL] = history_UL[alike_UL].mean() if alike_UL.any() else 0.0

        last_scored_U = np.where(of_users.random(users) < scored_share, scored_rows or self.longest, 0)
        made = []
        for user, rows in enumerate(rows_U.tolist()):
            count_RS = np.ones((rows, self.slots), dtype=np.int16)
            count_RS[:, 1] += twice_UL[user, :rows]
            count_RS[0, -1] = 0
            action_R = sign_of_action_C2[np.roll(id_ULS[user, :rows, 0], 1), before_UL[user, :rows]]
            sign_RS = np.concatenate([sign_SI[slot_S, id_ULS[user, :rows]], action_R[:, None]], 1)
            scored_R = np.arange(rows) >= rows - last_scored_U[user]
            made.append(UserRows(sign_RS.ravel().repeat(count_RS.ravel()), count_RS, label_UL[user, :rows].astype(bool), scored_R))
        probability_N, alone_N = (_sigmoid((row_UL + past_UL)[exists_UL]) for past_UL in (history_UL, expected_UL))
        return Sample(made, probability_N, alone_N)

    def _clicks(self, category_UL: np.ndarray, row_UL: np.ndarray, chance_UL: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What history adds to each logit, and the labels, row after row."""
        history_UL, label_UL = np.zeros_like(row_UL), np.zeros(row_UL.shape, dtype=np.int64)
        sum_UC, number_UC = np.zeros((len(row_UL), self.categories)), np.zeros((len(row_UL), self.categories))
        every_U = np.arange(len(row_UL))
        for place in range(row_UL.shape[1]):
            here = every_U, category_UL[:, place]
            history_UL[:, place] = self.history * sum_UC[here] / (1 + number_UC[here])
            label_UL[:, place] = chance_UL[:, place] < _sigmoid(row_UL[:, place] + history_UL[:, place])
            sum_UC[here] += label_UL[:, place] - _TYPICAL_LABEL
            number_UC[here] += 1
        return history_UL, label_UL


def _sigmoid(logit: np.ndarray) -> np.ndarray:
    return 1.0 / (1.0 + np.exp(-logit))


def _lines(user: UserRows) -> Sequence[str]:
    """Label, scored and signs of each row."""
    slot_V = np.broadcast_to(np.arange(1, user.count_RS.shape[1] + 1), user.count_RS.shape).ravel().repeat(user.count_RS.ravel())
    pairs = [f"{slot}:{sign}" for slot, sign in zip(slot_V.tolist(), user.sign_V.tolist())]
    ends = np.cumsum(user.count_RS.sum(1)).tolist()
    flags = zip(user.label_R.tolist(), user.scored_R.tolist())
    return [f"{label:d},{scored:d},{' '.join(pairs[begin:end])}" for begin, end, (label, scored) in zip([0, *ends], ends, flags)]


def write_world(folder: Path, users: int, seed: int, world: ClickWorld | None = None, eval_users: int = 0) -> dict[str, Any]:
    """Into `folder`: `train.csv`, every row of which is scored; `eval.csv` of other users, 13 % of whom have their last four rows scored;
    `truth.csv`: user, time, probability and what a row alone tells, of the rows of `eval.csv`; `truth.json`, which is returned: the
    `Sample.truth` of `eval.csv`."""
    world = world or ClickWorld()
    folder.mkdir(parents=True, exist_ok=True)
    world.draw(users, 2 * seed).save(folder / "train.csv", "train")
    heldout = world.draw(eval_users or users, 2 * seed + 1, scored_share=0.13, scored_rows=4)
    heldout.save(folder / "eval.csv", "eval")
    of_row = zip(heldout.probability_N.tolist(), heldout.alone_N.tolist())
    with (folder / "truth.csv").open("w") as file:
        for number, user in enumerate(heldout.users):
            for time in range(len(user)):
                file.write("eval{},{},{!r},{!r}\n".format(number, time, *next(of_row)))
    truth = heldout.truth()
    files.write_json(folder / "truth.json", truth)
    return truth


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Write a made-up world of clicks whose best possible AUC is known.")
    parser.add_argument("--out", type=Path, required=True, help="folder for train.csv, eval.csv, truth.csv, truth.json")
    parser.add_argument("--users", type=int, default=2000, help="users to train on")
    parser.add_argument("--eval-users", type=int, default=0, help="users to evaluate on; 0: as many")
    parser.add_argument("--categories", type=int, default=1, help="1: easy; 4: history must be searched for like content")
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args(arguments)
    world = ClickWorld(categories=chosen.categories)
    print(files.json_line(write_world(chosen.out, chosen.users, chosen.seed, world, chosen.eval_users)))


if __name__ == "__main__":
    main()
