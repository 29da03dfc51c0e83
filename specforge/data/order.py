"""The global order of samples: infinite, deterministic, and addressed by one integer.

Epoch e is a permutation drawn from (seed, e). A run's whole data state is its position, the number of samples consumed so far,
which means the same at any number of ranks and at any batch size.
"""

import numpy as np

from specforge.errors import DataError

_EPOCHS_KEPT = 2
"""A step may cross one epoch border, so two permutations serve every call of a forward walk."""


class SampleOrder:
    """Sample numbers 0..num_samples-1, each exactly once an epoch. Raises DataError where there is no sample."""

    def __init__(self, num_samples: int, seed: int) -> None:
        if num_samples < 1:
            raise DataError(f"num_samples={num_samples}: an order needs at least one sample; check that the data set is not empty.")
        self.num_samples = num_samples
        self.seed = seed
        self._epochs: dict[int, np.ndarray] = {}

    def ids(self, position: int, count: int) -> np.ndarray:
        """The `count` consecutive sample numbers from global `position` on: int64 [count], crossing epochs where needed."""
        first_epoch = position // self.num_samples
        last_epoch = max(position, position + count - 1) // self.num_samples
        epochs = [self._epoch(epoch) for epoch in range(first_epoch, last_epoch + 1)]
        start = position - first_epoch * self.num_samples
        return np.concatenate(epochs)[start : start + count]

    def _epoch(self, epoch: int) -> np.ndarray:
        if epoch not in self._epochs:
            self._epochs[epoch] = _permutation(self.num_samples, self.seed, epoch)
            while len(self._epochs) > _EPOCHS_KEPT:
                del self._epochs[next(iter(self._epochs))]
        return self._epochs[epoch]


def _permutation(num_samples: int, seed: int, epoch: int) -> np.ndarray:
    """Sort by raw 64-bit draws: NumPy promises that raw streams never change, which it does not for `Generator.permutation`."""
    keys = np.random.PCG64(np.random.SeedSequence([seed, epoch])).random_raw(num_samples)
    return np.argsort(keys, kind="stable")
