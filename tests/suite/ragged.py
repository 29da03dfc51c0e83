"""Tasks of random tokens, of many lengths."""

import numpy as np

from specforge.suite.tokens import TaskTokens


def ragged_task(seed: int, examples: int, equal: bool = False) -> TaskTokens:
    """Examples of one to five rows of 2 to 30 tokens; a third of the rows have nothing to score."""
    rng = np.random.default_rng(seed)
    sizes = np.full(examples, 3) if equal else rng.integers(1, 6, examples)
    lengths = np.full(sizes.sum(), 9) if equal else rng.integers(2, 31, sizes.sum())
    scored = np.where(rng.random(len(lengths)) < 1 / 3, lengths, rng.integers(0, lengths + 1))
    return TaskTokens(
        token_N=rng.integers(0, 50, lengths.sum()).astype(np.int32),
        row_start_R1=np.concatenate([[0], np.cumsum(lengths)]),
        scored_R=scored.astype(np.int32),
        continuation_R=np.maximum(scored, rng.integers(0, lengths + 1)).astype(np.int32),
        chars_R=np.ones(len(lengths), dtype=np.int32),
        bytes_R=np.ones(len(lengths), dtype=np.int32),
        example_start_E1=np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32),
        gold_E=np.zeros(examples, dtype=np.int32),
        classes=np.zeros(1, dtype=np.int32),
    )
