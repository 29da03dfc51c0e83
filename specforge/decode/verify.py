"""Which drafted tokens the target accepts, and the token after them. Neither rule changes what the target says.

Shapes: B sequences, N nodes (node 0 is the last committed token), K drafts of a chain (N = K + 1), V vocabulary.
Ids of -1 are no proposal and never match.
"""

from typing import NamedTuple

import torch

from specforge.decode.sampling import Sampling, uniforms
from specforge.decode.tree import Tree
from specforge.features.generation import draw


class Verdict(NamedTuple):
    paths: list[list[int]]
    """Of each row, the nodes that are committed: node 0, then the accepted ones from the root down."""
    next_ids: list[int]
    """Of each row, the token that follows; it is no node."""


def follow(logits_BNV: torch.Tensor, ids_BN: torch.Tensor, tree: Tree, sampling: Sampling, generator: torch.Generator) -> Verdict:
    """The target chooses its own token at every node, and the walk goes to the child that has it (of several, the first).

    Lossless where the drafts are a function of the past alone, as those of a greedy draft are; sampled ones are for
    `accept_or_resample`. Waits for the device once.
    """
    own_BN = sampling.choose(logits_BNV, generator)
    paths, next_ids = [], []
    for own_N, ids_N, parent_N in torch.stack([own_BN, ids_BN, tree.parent_BN], dim=1).tolist():
        path, tip, wanted = [0], 0, own_N[0]
        for node, parent in enumerate(parent_N):
            if parent == tip and ids_N[node] == wanted:
                path.append(node)
                tip, wanted = node, own_N[node]
        paths.append(path)
        next_ids.append(wanted)
    return Verdict(paths, next_ids)


def accept_or_resample(
    logits_BNV: torch.Tensor, ids_BN: torch.Tensor, draft_probs_BKV: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> Verdict:
    """Speculative sampling of a chain of drafts that were drawn from `draft_probs_BKV` (Leviathan et al. 2023, arXiv 2211.17192,
    algorithm 1; Chen et al. 2023, arXiv 2302.01318, algorithm 2). Waits for the device once."""
    uniform_BN = uniforms(ids_BN.shape, generator)
    decided_B2 = torch.stack(judge(sampling.probabilities(logits_BNV), ids_BN[:, 1:], draft_probs_BKV, uniform_BN), dim=1)
    accepted, next_ids = zip(*decided_B2.tolist(), strict=True)
    return Verdict([list(range(count + 1)) for count in accepted], list(next_ids))


def judge(
    probs_BNV: torch.Tensor, drafts_BK: torch.Tensor, draft_probs_BKV: torch.Tensor, uniform_BN: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """The rule of `accept_or_resample` as a function of its uniforms: one for each draft, the last for the token after them.

    A draft x is accepted if u q(x) < p(x), so never where p is 0. The next token comes from max(p - q, 0) after a rejection (from p
    if that is 0 everywhere), and from p where nothing was proposed. Returns how many are accepted [B], and the next ids [B].
    """
    drafts_BK1 = drafts_BK.clamp_min(0)[..., None]
    p_BK, q_BK = (probs.gather(2, drafts_BK1)[..., 0].double() for probs in (probs_BNV[:, :-1], draft_probs_BKV))
    passed_BK = (drafts_BK >= 0) & (uniform_BN[:, :-1] * q_BK < p_BK)
    accepted_B = passed_BK.long().cumprod(dim=1).sum(dim=1)

    row_B = torch.arange(len(drafts_BK), device=drafts_BK.device)
    rejected_BN = torch.nn.functional.pad(drafts_BK >= 0, (0, 1))
    q_BV = torch.nn.functional.pad(draft_probs_BKV, (0, 0, 0, 1))[row_B, accepted_B] * rejected_BN[row_B, accepted_B, None]
    p_BV = probs_BNV[row_B, accepted_B]
    residual_BV = (p_BV - q_BV).clamp_min(0)
    residual_BV = torch.where(residual_BV.any(dim=-1, keepdim=True), residual_BV, p_BV)
    return accepted_B, draw(residual_BV, uniform_BN[:, -1])
