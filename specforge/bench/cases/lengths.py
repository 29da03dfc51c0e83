"""Lengths as those of users or conversations are: many short ones, few long ones."""

import numpy as np

SIGMA = 0.9
"""Of the logarithm of a length."""


def skewed_lengths(documents: int, tokens: int, seed: int = 0) -> tuple[int, ...]:
    """Lognormal shares of about `tokens`, each at least one token."""
    share_N = np.random.default_rng(seed).lognormal(sigma=SIGMA, size=documents)
    return tuple(np.maximum(1, (share_N * (tokens / share_N.sum())).round()).astype(int).tolist())
