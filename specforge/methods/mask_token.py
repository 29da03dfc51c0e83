"""The id whose embedding stands for a token that is not known yet."""

import numpy as np

from specforge.errors import ConfigError
from specforge.features.source import FeatureStore


def unused_token(wanted: int, store: FeatureStore, vocab_size: int) -> int:
    """The id `wanted`, or the highest if that is negative, that no row of `store` contains.

    Raises:
        ConfigError: a row contains it, or all ids are taken.
    """
    used_V = np.zeros(vocab_size, dtype=bool)
    for number in range(len(store)):
        used_V[store.tokens(number)[0].numpy()] = True
    free = np.flatnonzero(~used_V)
    if 0 <= wanted < vocab_size and used_V[wanted]:
        other = f"such as {free[-1]}" if len(free) else "but this target has none left"
        raise ConfigError(f"method.options.mask_token_id={wanted}: occurs in the training rows; choose an id that does not, {other}.")
    if wanted < 0 and not len(free):
        raise ConfigError(
            f"method.options.mask_token_id={wanted}: the training rows contain all {vocab_size} ids; reserve one of the target's."
        )
    return wanted if wanted >= 0 else int(free[-1])


def require_known(mask_token_id: int, vocab_size: int) -> None:
    """Raise ConfigError unless the target has such an id."""
    if mask_token_id >= vocab_size:
        raise ConfigError(
            f"method.options.mask_token_id={mask_token_id}: the target has {vocab_size} ids; choose one below, or leave it out."
        )
