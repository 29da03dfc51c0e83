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
    accepted_ids: list[list[int]]
    """Of each row, the tokens of the accepted nodes: one fewer than its path has nodes."""
    next_ids: list[int]
    """Of each row, the token that follows; it is no node."""


def follow(logits_BNV: torch.Tensor, ids_BN: torch.Tensor, tree: Tree, sampling: Sampling, generator: torch.Generator) -> Verdict:
    """The target chooses its own token at every node, and the walk goes to the child that has it (of several, the first).

    Lossless for all drafts that do not know the target's draws. A draft x that was sampled from q is accepted with p(x) here, with
    min(1, p(x) / q(x)) by `accept_or_resample`. The generator is on the device of the logits. Waits for the device once.
    """
    verdict = Verdict([], [], [])
    own_BN = sampling.choose(logits_BNV, generator)
    for own_N, ids_N, parent_N in torch.stack([own_BN, ids_BN, tree.parent_BN], dim=1).tolist():
        path, accepted_ids, next_id = [0], [], own_N[0]
        for node, parent in enumerate(parent_N):
            if parent == path[-1] and ids_N[node] == next_id:
                path.append(node)
                accepted_ids.append(next_id)
                next_id = own_N[node]
        verdict.paths.append(path)
        verdict.accepted_ids.append(accepted_ids)
        verdict.next_ids.append(next_id)
    return verdict


def accept_or_resample(
    logits_BNV: torch.Tensor, ids_BN: torch.Tensor, draft_probs_BKV: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> Verdict:
    """Speculative sampling of a chain of drafts that were drawn from `draft_probs_BKV` (Leviathan et al. 2023, arXiv 2211.17192,
    algorithm 1; Chen et al. 2023, arXiv 2302.01318, algorithm 2).

    Whether there is a proposal at a position may depend on the tokens before it, not on the token drawn there: to withhold
    unlikely draws would change the text. The generator is on the device of the logits. Waits for the device once.
    """
    uniform_BN = uniforms(ids_BN.shape, generator)
    accepted_B, next_B = judge(sampling.probabilities(logits_BNV), ids_BN[:, 1:], draft_probs_BKV, uniform_BN)
    verdict = Verdict([], [], [])
    for accepted, next_id, *ids_N in torch.cat([accepted_B[:, None], next_B[:, None], ids_BN], dim=1).tolist():
        verdict.paths.append(list(range(accepted + 1)))
        verdict.accepted_ids.append(ids_N[1 : accepted + 1])
        verdict.next_ids.append(next_id)
    return verdict


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
