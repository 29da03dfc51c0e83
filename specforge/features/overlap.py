"""Held-out samples that are trained on too, found by what they hold and not by what they are called."""

import hashlib
from collections.abc import Collection
from typing import Protocol

import numpy as np
import torch

_NAMED_IDS = 5


class LabelledTokens(Protocol):
    """Numbered samples of which the tokens can be read: every store of features, and encoded samples without any."""

    ids: list[str]
    lengths: np.ndarray
    supervised: np.ndarray

    def tokens(self, number: int) -> tuple[torch.Tensor, torch.Tensor]: ...


def why_not_held_out(heldout: LabelledTokens, train: LabelledTokens, excluded: Collection[str] = ()) -> str | None:
    """The sentence that names held-out samples which `train` holds too, with the same tokens and mask; None where there are none.

    Tokens are read only of training samples that are as long as a held-out one and have as many supervised tokens.

    Args:
        excluded: ids of samples that are not trained on.
    """
    counts = set(_counts(heldout))
    trained = {
        _content(train, number)
        for number, (name, own) in enumerate(zip(train.ids, _counts(train), strict=True))
        if own in counts and name not in excluded
    }
    both = [name for number, name in enumerate(heldout.ids) if _content(heldout, number) in trained]
    if not both:
        return None
    named = ", ".join(both[:_NAMED_IDS]) + (", ..." if len(both) > _NAMED_IDS else "")
    return (
        f"{len(both)} of {len(heldout.ids)} held-out samples are trained on too: {named}; what is accepted there says little about "
        "new text, so take them out of the training rows or out of the held-out ones."
    )


def _counts(samples: LabelledTokens) -> list[tuple[int, int]]:
    return list(zip(samples.lengths.tolist(), samples.supervised.tolist(), strict=True))


def _content(samples: LabelledTokens, number: int) -> bytes:
    ids_S, mask_S = samples.tokens(number)
    return hashlib.sha256(ids_S.numpy().tobytes() + mask_S.numpy().tobytes()).digest()
