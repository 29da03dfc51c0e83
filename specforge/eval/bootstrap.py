"""Intervals by the Poisson bootstrap: weights depend on (seed, sample id) only, so replicates add up over ranks."""

import hashlib

import numpy as np


def poisson_weights(seed: int, sample_id: str, replicates: int) -> np.ndarray:
    """How often each replicate draws this sample: int64 [replicates], Poisson with mean 1."""
    key = int.from_bytes(hashlib.sha256(sample_id.encode()).digest()[:8])
    return np.random.default_rng([seed, key]).poisson(1.0, replicates)


def interval(values: np.ndarray) -> tuple[float, float]:
    """The central 95 % of the replicates, NaN left out."""
    low, high = np.nanquantile(values, [0.025, 0.975])
    return float(low), float(high)
