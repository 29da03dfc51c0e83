"""Examples of a task as right-padded batches, collated at a base size once and composed to any other size where they lie.

Shapes: B rows, S tokens of the longest, Q predictions (a token, and the row and column that predict it), E examples.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate, chain

import numpy as np
import torch
from torch.nn import functional as F

from specforge.suite.resident import OnDevice
from specforge.suite.tokens import TaskTokens

PADDING = 0


@dataclass(frozen=True)
class Batch(OnDevice):
    """Whole examples. What is needed to cut and join them is known on the host, so that doing it waits for no device."""

    ids_BS: torch.Tensor
    """int64, right-padded."""
    row_Q: torch.Tensor
    column_Q: torch.Tensor
    """Where a token is predicted: the column before its own."""
    token_Q: torch.Tensor
    place_Q: torch.Tensor
    """Its place among the predictions of the task; a row's are neighbours."""
    rows_E: tuple[int, ...]
    """Rows of each example."""
    lengths_B: tuple[int, ...]
    predictions_B: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.rows_E)

    @property
    def slots(self) -> int:
        return self.ids_BS.numel()

    def examples(self, begin: int, end: int) -> "Batch":
        """Some of the examples, without the columns that only others need."""
        rows = list(accumulate(self.rows_E, initial=0))
        first, last = rows[begin], rows[end]
        predictions = list(accumulate(self.predictions_B, initial=0))
        part = slice(predictions[first], predictions[last])
        return Batch(
            self.ids_BS[first:last, : max(self.lengths_B[first:last])], self.row_Q[part] - first, self.column_Q[part], self.token_Q[part],
            self.place_Q[part], self.rows_E[begin:end], self.lengths_B[first:last], self.predictions_B[first:last],
        )  # fmt: skip

    @classmethod
    def joined(cls, batches: Sequence["Batch"]) -> "Batch":
        """All of them below each other, as wide as the widest."""
        width = max(batch.ids_BS.shape[1] for batch in batches)
        above = accumulate((len(batch.lengths_B) for batch in batches), initial=0)
        return Batch(
            ids_BS=torch.cat([F.pad(batch.ids_BS, (0, width - batch.ids_BS.shape[1]), value=PADDING) for batch in batches]),
            row_Q=torch.cat([batch.row_Q + rows for batch, rows in zip(batches, above, strict=False)]),
            column_Q=torch.cat([batch.column_Q for batch in batches]),
            token_Q=torch.cat([batch.token_Q for batch in batches]),
            place_Q=torch.cat([batch.place_Q for batch in batches]),
            rows_E=tuple(chain.from_iterable(batch.rows_E for batch in batches)),
            lengths_B=tuple(chain.from_iterable(batch.lengths_B for batch in batches)),
            predictions_B=tuple(chain.from_iterable(batch.predictions_B for batch in batches)),
        )


def collate(tokens: TaskTokens, examples: Sequence[int]) -> Batch:
    """The examples of these numbers, in this order."""
    rows = np.concatenate([np.arange(*tokens.example_start_E1[example : example + 2]) for example in examples])
    lengths_B, first_B = tokens.lengths_R[rows], tokens.first_R[rows]
    ids_BS = np.full((len(rows), lengths_B.max()), PADDING, dtype=np.int64)
    for place, row in enumerate(rows):
        ids_BS[place, : lengths_B[place]] = tokens.row(row)
    counts_B = lengths_B - first_B
    row_Q = np.repeat(np.arange(len(rows)), counts_B)
    within_Q = np.arange(len(row_Q)) - np.repeat(np.cumsum(counts_B) - counts_B, counts_B)
    own_column_Q = first_B[row_Q] + within_Q
    return Batch(
        ids_BS=torch.from_numpy(ids_BS),
        row_Q=torch.from_numpy(row_Q),
        column_Q=torch.from_numpy(own_column_Q - 1),
        token_Q=torch.from_numpy(ids_BS[row_Q, own_column_Q]),
        place_Q=torch.from_numpy(tokens.prediction_start_R1[rows][row_Q] + within_Q),
        rows_E=tuple(np.diff(tokens.example_start_E1)[np.asarray(examples)].tolist()),
        lengths_B=tuple(lengths_B.tolist()),
        predictions_B=tuple(counts_B.tolist()),
    )


def by_length(tokens: TaskTokens, examples: Sequence[int]) -> list[int]:
    """Longest first, so that what does not fit into memory is known at once; of equals the earlier one."""
    longest_E = np.maximum.reduceat(tokens.lengths_R, tokens.example_start_E1[:-1])
    return sorted(examples, key=lambda example: (-longest_E[example], example))


def base_batches(tokens: TaskTokens, examples: Sequence[int], size: int) -> Iterator[Batch]:
    order = by_length(tokens, examples)
    return (collate(tokens, order[begin : begin + size]) for begin in range(0, len(order), size))


def compose(batches: Iterable[Batch], size: int) -> Iterator[Batch]:
    """The same examples in batches of `size`, the last one smaller: what `collate` would have made of them, bit by bit."""
    waiting: list[Batch] = []
    count = 0
    for batch in batches:
        waiting.append(batch)
        count += len(batch)
        if count < size:
            continue
        whole = Batch.joined(waiting)
        yield from (whole.examples(begin, begin + size) for begin in range(0, count - size + 1, size))
        waiting = [whole.examples(count - count % size, count)] if count % size else []
        count %= size
    if waiting:
        yield Batch.joined(waiting)
