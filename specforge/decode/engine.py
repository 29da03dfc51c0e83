"""Speculative decoding: rounds of drafting, one pass of the target over the drafts, and what it accepts.

The tokens are those of the target alone: its arg-max where the temperature is 0, samples of its distribution otherwise.

Shapes: B sequences, N nodes of a round, M committed rows, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from specforge.decode.drafter import Drafter, Proposal
from specforge.decode.sampling import Sampling
from specforge.decode.session import TargetSession
from specforge.decode.tree import Tree
from specforge.decode.verify import Verdict, accept_or_resample, follow
from specforge.features.target import Target
from specforge.layers.rows import to_device

GREEDY = Sampling()


@dataclass
class Decoded:
    """The continuation of one prompt."""

    ids: list[int] = field(default_factory=list)
    """New tokens; the first one is the target's alone and belongs to no round."""
    finished: bool = False
    """Whether the last token is an end token."""
    accepted: list[int] = field(default_factory=list)
    """Drafts that each round accepted and kept."""
    committed: list[int] = field(default_factory=list)
    """Tokens that each round added: the accepted ones and, unless they end the text, the target's own after them."""


Watch = Callable[[int, Sequence[int], int], None]
"""Called at each commit with the row, its new tokens, and how many of these, from the first, were drafted."""


class Decoder:
    """Continues prompts with a target and a drafter.

    Args:
        end_ids: tokens that end a continuation, as its last one.
        generator: for sampled tokens; on the target's device.
    """

    def __init__(
        self,
        target: Target,
        drafter: Drafter,
        *,
        end_ids: Collection[int] = (),
        sampling: Sampling = GREEDY,
        generator: torch.Generator | None = None,
    ) -> None:
        self._target, self._drafter = target, drafter
        self._end_ids, self._sampling = frozenset(end_ids), sampling
        self._generator = generator or torch.Generator(target.device)

    @torch.no_grad()
    def decode(self, prompts: Sequence[np.ndarray], max_new_tokens: int | Sequence[int], watch: Watch | None = None) -> list[Decoded]:
        """Continue all prompts ([S] ids each) together, each until an end token or for its number of tokens, at least one."""
        limits = [max_new_tokens] * len(prompts) if isinstance(max_new_tokens, int) else list(max_new_tokens)
        text_tokens = max(len(prompt) + limit for prompt, limit in zip(prompts, limits, strict=True))
        capacity = text_tokens + self._drafter.draft_nodes
        session = TargetSession(self._target, len(prompts), capacity, self._drafter.layer_ids, text_tokens)
        texts = [Decoded() for _ in prompts]

        block = session.prefill(prompts)
        device = block.last_BNH.device
        counts = [len(prompt) for prompt in prompts]
        last_B1H = torch.stack([last_NH[count - 1 : count] for last_NH, count in zip(block.last_BNH, counts, strict=True)])
        first_ids = follow(
            session.logits(last_B1H),
            torch.full((len(prompts), 1), -1, device=device),
            Tree.chain(len(prompts), 0, device),
            self._sampling,
            self._generator,
        ).next_ids
        for row, first in enumerate(first_ids):
            self._commit(texts[row], limits[row], [first])
            if watch is not None:
                watch(row, texts[row].ids, 0)
        self._drafter.begin(prompts, capacity)
        self._drafter.extend(
            _padded([[*prompt[1:], first] for prompt, first in zip(prompts, first_ids, strict=True)], device), block.aux_BNF, counts
        )

        while going := [row for row, text in enumerate(texts) if not text.finished and len(text.ids) < limits[row]]:
            proposal = self._drafter.propose()
            ids_BN = torch.cat([_padded([text.ids[-1:] for text in texts], device), proposal.ids_BK], 1)
            block = session.forward(ids_BN.clamp_min(0), proposal.tree)
            verdict = self._verdict(session.logits(block.last_BNH), proposal, ids_BN)
            paths, following = list[list[int]]([[]] * len(texts)), list[list[int]]([[]] * len(texts))
            for row in going:
                tokens = [*verdict.accepted_ids[row], verdict.next_ids[row]]
                kept = self._commit(texts[row], limits[row], tokens)
                texts[row].accepted.append(min(len(tokens) - 1, len(kept)))
                texts[row].committed.append(len(kept))
                if len(kept) == len(tokens):
                    paths[row], following[row] = verdict.paths[row], tokens
                if watch is not None:
                    watch(row, kept, texts[row].accepted[-1])
            if not any(paths):
                continue
            session.keep(paths)
            self._drafter.extend(_padded(following, device), _taken(block.aux_BNF, paths), [len(path) for path in paths])
        return texts

    def _verdict(self, logits_BNV: torch.Tensor, proposal: Proposal, ids_BN: torch.Tensor) -> Verdict:
        if proposal.probabilities_BKV is None:
            return follow(logits_BNV, ids_BN, proposal.tree, self._sampling, self._generator)
        return accept_or_resample(logits_BNV, ids_BN, proposal.probabilities_BKV, self._sampling, self._generator)

    def _commit(self, text: Decoded, limit: int, tokens: list[int]) -> list[int]:
        """Add the tokens, cut behind an end token and at the limit; returns what was added."""
        tokens = tokens[: limit - len(text.ids)]
        end = next((place for place, token in enumerate(tokens) if token in self._end_ids), None)
        if end is not None:
            tokens, text.finished = tokens[: end + 1], True
        text.ids += tokens
        return tokens


def _taken(x_BNF: torch.Tensor, paths: Sequence[Sequence[int]]) -> torch.Tensor:
    """Of each row the nodes of its path, padded with any: [B, longest, F]."""
    longest = max(len(path) for path in paths)
    if all(node == depth for path in paths for depth, node in enumerate(path)):
        return x_BNF[:, :longest]
    return x_BNF[torch.arange(len(paths), device=x_BNF.device)[:, None], _padded(paths, x_BNF.device)]


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> torch.Tensor:
    """Right-padded with zeros: int64 [B, longest]."""
    ids = np.zeros((len(rows), max(len(row) for row in rows)), dtype=np.int64)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
    return to_device(ids, device)
