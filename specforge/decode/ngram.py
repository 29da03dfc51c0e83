"""Prompt lookup: draft what followed the last time when the same few tokens were seen. It needs no model and no training.

The baseline that a trained draft must beat. Two forms that agree: `propose` for decoding, `proposals` for evaluation.
S tokens of a sequence, R starts, K draft tokens.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from specforge.errors import ConfigError

NO_PROPOSAL = -1


def propose(context_ids: Sequence[int], draft_tokens: int, max_ngram: int = 3, min_ngram: int = 1) -> list[int]:
    """Draft the tokens that followed the most recent earlier occurrence of the longest possible suffix of the context.

    The suffix has `max_ngram` down to `min_ngram` tokens. The occurrence may overlap the suffix, and what followed it ends
    where the context ends, so there may be fewer than `draft_tokens`; without an occurrence there are none.
    """
    _check(draft_tokens, max_ngram, min_ngram)
    context = list(context_ids)
    for length in range(min(max_ngram, len(context) - 1), min_ngram - 1, -1):
        suffix = context[-length:]
        for after in range(len(context) - 1, length - 1, -1):
            if context[after - length : after] == suffix:
                return context[after : after + draft_tokens]
    return []


def proposals(
    ids_S: Sequence[int] | npt.NDArray[np.integer], starts_R: Iterable[int], draft_tokens: int, max_ngram: int = 3, min_ngram: int = 1
) -> npt.NDArray[np.int64]:
    """`propose(ids[: s + 1])` for every start s, as rows [R, K] filled up with `NO_PROPOSAL`; linear in the sequence.

    Starts come in any order and lie in 0..S-1: start s is the last committed token, as in `specforge.eval`.
    """
    _check(draft_tokens, max_ngram, min_ngram)
    ids = np.asarray(ids_S, dtype=np.int64)
    starts = np.asarray(list(starts_R), dtype=np.int64)
    if starts.size and (starts.min() < 0 or starts.max() >= len(ids)):
        raise ConfigError(
            f"starts={starts.min()}..{starts.max()}: must lie in 0..{len(ids) - 1}, the positions of the sequence; drop the others."
        )
    drafts_RK = np.full((len(starts), draft_tokens), NO_PROPOSAL, dtype=np.int64)
    source_S = _continuations(ids.tolist(), max_ngram, min_ngram)
    for row, start in enumerate(starts.tolist()):
        if source_S[start] != NO_PROPOSAL:
            followed = ids[source_S[start] : min(source_S[start] + draft_tokens, start + 1)]
            drafts_RK[row, : len(followed)] = followed
    return drafts_RK


def _continuations(ids: list[int], max_ngram: int, min_ngram: int) -> list[int]:
    """For every position, where the text after the earlier occurrence of its longest n-gram begins."""
    lengths = range(max_ngram, min_ngram - 1, -1)
    seen: dict[int, dict[tuple[int, ...], int]] = {length: {} for length in lengths}
    found = [NO_PROPOSAL] * len(ids)
    for end in range(1, len(ids) + 1):
        for length in lengths:
            if length <= end:
                gram = tuple(ids[end - length : end])
                if found[end - 1] == NO_PROPOSAL:
                    found[end - 1] = seen[length].get(gram, NO_PROPOSAL)
                seen[length][gram] = end
    return found


def _check(draft_tokens: int, max_ngram: int, min_ngram: int) -> None:
    if draft_tokens < 0:
        raise ConfigError(f"draft_tokens={draft_tokens}: must not be negative; 4 is a common length.")
    if not 1 <= min_ngram <= max_ngram:
        raise ConfigError(f"min_ngram={min_ngram}, max_ngram={max_ngram}: must hold 1 <= min_ngram <= max_ngram; 1 and 3 are common.")
