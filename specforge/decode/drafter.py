"""What the decoder asks of every drafter, and the two drafters that learned nothing.

Shapes: B sequences, M committed rows of a call, N nodes of a tree, K drafts of a chain, A*H features of a row, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch

from specforge.decode.ngram import NO_PROPOSAL, propose
from specforge.decode.tree import Tree
from specforge.errors import ConfigError
from specforge.methods.base import Method


@dataclass(frozen=True)
class Proposal:
    """What a drafter would like to have verified, below the last committed token of each sequence."""

    ids_BK: torch.Tensor
    """Token of each node but the root, int64; -1: nothing. K = N - 1."""
    tree: Tree
    probabilities_BKV: torch.Tensor | None = None
    """Distributions that the drafts of a chain were sampled from; None: each is a function of what is committed."""


class Drafter(Protocol):
    """State of B sequences. A row is a token in the target's cache, and carries the token after it, as training does."""

    layer_ids: tuple[int, ...]
    """Layers of the target whose features it wants, as indices into Hugging Face `hidden_states`."""
    draft_nodes: int
    """Largest number of drafts of a round."""

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        """Forget everything; `extend` gives the prompts' rows next."""
        ...

    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        """The first `counts[b]` rows of sequence b were committed; zero for one that has ended."""
        ...

    def propose(self) -> Proposal: ...


def require_trained_for(method: Method, draft_tokens: int) -> None:
    """Raises ConfigError where a block, or the depths, of a draft are fewer than the tokens asked for."""
    if draft_tokens > method.draft_tokens and not method.drafts_longer:
        raise ConfigError(
            f"--draft-tokens {draft_tokens}: this draft was trained for {method.draft_tokens} and cannot draft more; ask for fewer."
        )


class NoDrafter:
    """Decodes with the target alone: the baseline, one token a round."""

    layer_ids: tuple[int, ...] = ()
    draft_nodes = 0

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        self._rows = len(prompts)

    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        self._device = next_ids_BM.device

    def propose(self) -> Proposal:
        return Proposal(torch.empty(self._rows, 0, dtype=torch.long, device=self._device), Tree.chain(self._rows, 0, self._device))


class NgramDrafter:
    """Prompt lookup (`specforge.decode.ngram`) in everything that is committed."""

    layer_ids: tuple[int, ...] = ()

    def __init__(self, draft_tokens: int) -> None:
        self.draft_nodes = draft_tokens

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        self._contexts = [prompt[:1].tolist() for prompt in prompts]

    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        self._device = next_ids_BM.device
        for context, ids, count in zip(self._contexts, next_ids_BM.tolist(), counts, strict=True):
            context += ids[:count]

    def propose(self) -> Proposal:
        drafts_BK = np.full((len(self._contexts), self.draft_nodes), NO_PROPOSAL)
        for row, context in enumerate(self._contexts):
            found = propose(context, self.draft_nodes)
            drafts_BK[row, : len(found)] = found
        return Proposal(torch.from_numpy(drafts_BK).to(self._device), Tree.chain(*drafts_BK.shape, self._device))
