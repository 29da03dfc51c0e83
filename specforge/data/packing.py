"""The samples of one global step, assigned to ranks and micro-batches within a token budget."""

import heapq
from collections.abc import Sequence

from specforge.errors import DataError


def pack(lengths: Sequence[int], budget_tokens: int, ranks: int) -> list[list[list[int]]]:
    """Assign every sample to one micro-batch: `result[rank][micro]` lists indices into `lengths`, ascending.

    `lengths` are in tokens. All ranks get equally many micro-batches (some possibly empty) and none exceeds `budget_tokens`.
    Bins are as few as longest-first placement allows, a multiple of `ranks`, and dealt out so that the micro-batches that
    ranks run at the same time are about equally long. Deterministic. Raises DataError for a sample longer than the budget.
    """
    longest = max(lengths, default=0)
    if longest > budget_tokens:
        raise DataError(
            f"A sample of {longest} tokens exceeds train.micro_batch_tokens={budget_tokens}: "
            "a sample is never split; raise the budget or shorten the samples (data.max_length, of rows data.max_rows)."
        )
    rounds = max(1, -(-sum(lengths) // (budget_tokens * ranks)))
    while (bins := _place(lengths, budget_tokens, rounds * ranks)) is None:
        rounds += 1
    bins.sort(key=lambda members: (-sum(lengths[index] for index in members), members))
    return [[bins[micro * ranks + _seat(rank, micro, ranks)] for micro in range(rounds)] for rank in range(ranks)]


def _place(lengths: Sequence[int], budget_tokens: int, num_bins: int) -> list[list[int]] | None:
    """Longest first, each into the bin that holds least; None where one fits nowhere."""
    bins: list[list[int]] = [[] for _ in range(num_bins)]
    loads = [(0, number) for number in range(num_bins)]
    for index in sorted(range(len(lengths)), key=lambda index: (-lengths[index], index)):
        load, number = loads[0]
        if load + lengths[index] > budget_tokens:
            return None
        heapq.heapreplace(loads, (load + lengths[index], number))
        bins[number].append(index)
    return [sorted(members) for members in bins]


def _seat(rank: int, micro: int, ranks: int) -> int:
    """Deal to and fro, so that no rank gets the longest bin of every round."""
    return rank if micro % 2 == 0 else ranks - 1 - rank
