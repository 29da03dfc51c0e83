"""Verification: walks by hand and by recursion, the rule of acceptance by enumeration, whole texts by chi-square.

A tiny Markov target gives logits by the last token alone, so the probability of every text of three tokens is a product.
Verifiers that are wrong on purpose must fail the test that the right ones pass.
"""

from collections.abc import Callable
from functools import partial

import pytest
import torch

from specforge.decode.sampling import Sampling, uniforms
from specforge.decode.tree import Tree
from specforge.decode.verify import Verdict, accept_or_resample, follow, judge
from specforge.features.generation import draw

CPU = torch.device("cpu")
GREEDY = Sampling()


def rng(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def saying(own: list[list[int]], vocabulary: int = 10) -> torch.Tensor:
    """Logits whose arg-max at each node is the given token."""
    return torch.nn.functional.one_hot(torch.tensor(own), vocabulary).float()


# The walk


def walk(own: list[int], ids: list[list[int]] | list[int], parents: list[list[int]] | list[int]) -> Verdict:
    """`follow` over rows that share what the target says."""
    ids_BN, parent_BN = torch.tensor(ids).reshape(-1, len(own)), torch.tensor(parents).reshape(-1, len(own))
    rows = max(len(ids_BN), len(parent_BN))
    tree = Tree.of(parent_BN.expand(rows, -1), max_depth=len(own))
    return follow(saying([own] * rows), ids_BN.expand(rows, -1), tree, GREEDY, rng(0))


@pytest.mark.parametrize(
    ("own", "ids", "path", "next_id"),
    [
        ([1, 2, 3, 4], [0, 1, 2, 3], [0, 1, 2, 3], 4),
        ([1, 2, 3, 4], [0, 1, 2, 9], [0, 1, 2], 3),
        ([1, 2, 3, 4], [0, 9, 2, 3], [0], 1),  # what is right below a wrong draft does not count
        ([1, 2, 3, 4], [1, 9, 1, 2], [0], 1),
        ([1, 2, 3, 4], [0, 1, -1, 3], [0, 1], 2),  # no proposal ends the chain
        ([1, 2, 3, 4], [0, -1, -1, -1], [0], 1),
        ([7], [0], [0], 7),
    ],
)
def test_chains_by_hand(own: list[int], ids: list[int], path: list[int], next_id: int) -> None:
    verdict = follow(saying([own]), torch.tensor([ids]), Tree.chain(1, len(ids) - 1, CPU), GREEDY, rng(0))
    assert verdict == ([path], [[ids[node] for node in path[1:]]], [next_id])


@pytest.mark.parametrize(
    ("own", "ids", "parents", "path", "next_id"),
    [
        ([1, 5, 2, 3, 6], [0, 8, 1, 2, 9], [-1, 0, 0, 2, 2], [0, 2, 3], 3),  # the second child
        ([1, 2, 2, 5, 6], [0, 1, 1, 2, 2], [-1, 0, 0, 2, 1], [0, 1, 4], 6),  # of two equal children the first, and its child
        ([1, 2, 2, 5, 6], [0, 1, 1, 2, 7], [-1, 0, 0, 2, 1], [0, 1], 2),  # a dead end: the twin's child is not asked
        ([1, 2, 1, 4, 5], [0, 1, 2, 1, 1], [-1, 0, 1, 0, 2], [0, 1, 2, 4], 5),  # a late twin of node 1 is no child of node 2
        ([1, 2, 3, 4, 5], [0, 2, 3, 4, 1], [-1, 0, 0, 0, 0], [0, 4], 5),  # siblings: the last one
        ([1, 2, 3, 4, 5], [0, -1, -1, 1, 1], [-1, 0, 1, 2, 1], [0], 1),  # below no proposal there is nothing
        ([1, 2, 3, 4, 5], [0, 1, 1, 2, 3], [-1, 0, -1, 2, 1], [0, 1], 2),  # nodes without a parent are padding
    ],
)
def test_trees_by_hand(own: list[int], ids: list[int], parents: list[int], path: list[int], next_id: int) -> None:
    assert walk(own, ids, parents) == ([path], [[ids[node] for node in path[1:]]], [next_id])


def test_rows_have_their_own_outcome() -> None:
    ids = [[0, 1, 2, 3], [0, 1, 7, 3], [0, 3, 1, 2], [0, -1, -1, -1]]
    parents = [[-1, 0, 1, 2], [-1, 0, 1, 2], [-1, 0, 0, 2], [-1, 0, 1, 2]]
    assert walk([1, 2, 3, 4], ids, parents) == ([[0, 1, 2, 3], [0, 1], [0, 2], [0]], [[1, 2, 3], [1], [1], []], [4, 2, 3, 1])


def slow_walk(own: list[int], ids: list[int], parents: list[int], node: int = 0) -> tuple[list[int], int]:
    children = [child for child in range(len(ids)) if parents[child] == node and ids[child] == own[node]]
    if not children:
        return [node], own[node]
    below, next_id = slow_walk(own, ids, parents, children[0])
    return [node, *below], next_id


def test_random_trees_equal_the_recursive_walk() -> None:
    generator = rng(1)
    lengths = set()
    for nodes in range(1, 15):
        parents = [[-1, *(int(torch.randint(n, (), generator=generator)) for n in range(1, nodes))] for _ in range(30)]
        ids_BN = torch.randint(-1, 3, (30, nodes), generator=generator)
        own_BN = torch.randint(3, (30, nodes), generator=generator)
        verdict = follow(saying(own_BN.tolist()), ids_BN, Tree.of(torch.tensor(parents), nodes), GREEDY, generator)
        for row in range(30):
            expected = slow_walk(own_BN[row].tolist(), ids_BN[row].tolist(), parents[row])
            assert (verdict.paths[row], verdict.next_ids[row]) == expected
            assert verdict.accepted_ids[row] == ids_BN[row, verdict.paths[row][1:]].tolist()
            lengths.add(len(verdict.paths[row]))
    assert lengths >= {1, 2, 3, 4}


# The rule of acceptance


@pytest.mark.parametrize("seed", range(12))
def test_first_token_has_exactly_the_distribution_p(seed: int) -> None:
    """All drafts, coins and last uniforms of one round, each with its weight: no sampling is left.

    q's shares are powers of two, so min(1, p/q) is a multiple of 1/32; the residual's are multiples of 1/its sum.
    Midpoints of grids that fine measure every interval exactly.
    """
    generator = rng(seed)
    p_V = torch.randint(4 + seed, (64,), generator=generator).clamp_max(4).bincount(minlength=5).double() / 64
    q_V = torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16], dtype=torch.float64)[torch.randperm(5, generator=generator)]
    if seed == 0:
        p_V = q_V.clone()
    coins, lasts = 32, max(1, round(64 * float((p_V - q_V).clamp_min(0).sum())))
    draft, coin, last = torch.meshgrid(torch.arange(5), torch.arange(coins), torch.arange(lasts), indexing="ij")
    draft_X, rows = draft.flatten(), draft.numel()
    uniform_X2 = torch.stack([(coin.flatten() + 0.5) / coins, (last.flatten() + 0.5) / lasts], dim=1).double()
    after_V = torch.full((5,), 0.2, dtype=torch.float64)

    accepted_X, next_X = judge(torch.stack([p_V, after_V]).expand(rows, 2, 5), draft_X[:, None], q_V.expand(rows, 1, 5), uniform_X2)

    weight_X = q_V[draft_X] / (coins * lasts)
    emitted_X = torch.where(accepted_X == 1, draft_X, next_X)
    torch.testing.assert_close(torch.zeros_like(p_V).index_add(0, emitted_X, weight_X), p_V, rtol=0, atol=1e-12)
    variation = (p_V - q_V).abs().sum() / 2
    torch.testing.assert_close((weight_X * accepted_X).sum(), 1 - variation, rtol=0, atol=1e-12)


def one_round(p: list[list[float]], drafts: list[int], q: list[list[float]], uniform: list[float]) -> tuple[int, int]:
    double = partial(torch.tensor, dtype=torch.float64)
    draft_probs_BKV = double([q]).reshape(1, len(drafts), len(p[0]))
    accepted_B, next_B = judge(double([p]), torch.tensor([drafts], dtype=torch.long), draft_probs_BKV, double([uniform]))
    return int(accepted_B), int(next_B)


@pytest.mark.parametrize(
    ("p", "drafts", "q", "uniform", "accepted", "next_id"),
    [
        ([[0, 1], [0, 1]], [0], [[1, 0]], [0.0, 0.0], 0, 1),  # p = 0 is rejected by a coin of 0 too
        ([[0.5, 0.5], [0, 1]], [0], [[1, 0]], [0.5, 0.0], 0, 1),  # u q < p, strictly
        ([[0.5, 0.5], [0, 1]], [0], [[1, 0]], [0.5 - 2**-54, 0.0], 1, 1),
        ([[0.2, 0.8], [1, 0]], [0], [[0.2, 0.8]], [1 - 2**-53, 0.9], 1, 0),  # p = q accepts every coin
        ([[0.4, 0.4], [0, 1]], [0], [[0.5, 0.5]], [0.9, 0.6], 0, 1),  # nothing is left of p - q: from p
        ([[0.4, 0.4], [0, 1]], [0], [[0.5, 0.5]], [0.9, 0.4], 0, 0),
        ([[0.5, 0.5], [0, 1]], [-1], [[1, 0]], [0.0, 0.4], 0, 0),  # no proposal: from p, whatever q says
        ([[1, 0], [1, 0], [0.3, 0.7]], [0, -1], [[1, 0], [0, 1]], [0.0, 0.0, 0.0], 1, 0),
        ([[1, 0], [1, 0], [0, 1]], [1, 0], [[0.5, 0.5], [1, 0]], [0.0, 0.0, 0.0], 0, 0),  # what is right below a wrong one
        ([[0.3, 0.7]], [], [], [0.5], 0, 1),
    ],
)
def test_judge_by_hand(p: list, drafts: list[int], q: list, uniform: list[float], accepted: int, next_id: int) -> None:
    assert one_round(p, drafts, q, uniform) == (accepted, next_id)


def test_greedy_target_accepts_its_arg_max_only() -> None:
    logits_BNV = saying([[3, 4, 5], [3, 4, 5]])
    q_BKV = torch.full((2, 2, 10), 0.1)
    verdict = accept_or_resample(logits_BNV, torch.tensor([[0, 3, 4], [0, 3, 5]]), q_BKV, GREEDY, rng(0))
    assert verdict == ([[0, 1, 2], [0, 1]], [[3, 4], [3]], [5, 4])


# Whole texts

VOCABULARY, TEXT = 5, 3
TARGET_VV = 1.2 * torch.randn(VOCABULARY, VOCABULARY, generator=rng(11), dtype=torch.float64)
DRAFT_VV = TARGET_VV + 1.5 * torch.randn(VOCABULARY, VOCABULARY, generator=rng(12), dtype=torch.float64)
FULL, CUT = Sampling(1.0), Sampling(0.8, top_k=4, top_p=0.9)
Accept = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, Sampling, torch.Generator], Verdict]
Follow = Callable[[torch.Tensor, torch.Tensor, Tree, Sampling, torch.Generator], Verdict]


def greedy_chain(verify: Follow, anchor_B: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> Verdict:
    ids = [anchor_B]
    for _ in range(3):
        ids.append(DRAFT_VV.argmax(dim=1)[ids[-1]])
    return verify(TARGET_VV[torch.stack(ids, 1)], torch.stack(ids, 1), Tree.chain(len(anchor_B), 3, CPU), sampling, generator)


def greedy_tree(verify: Follow, anchor_B: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> Verdict:
    """Two of the draft's best below the root, two and one below these, and a twin of node 1 with a child of its own."""
    parents, ranks = [-1, 0, 0, 2, 1, 1, 0, 6], [0, 1, 0, 0, 0, 1, 1, 2]
    best_VV = DRAFT_VV.argsort(dim=1, descending=True)
    ids = [anchor_B]
    for parent, rank in zip(parents[1:], ranks[1:], strict=True):
        ids.append(best_VV[ids[parent], rank])
    tree = Tree.of(torch.tensor([parents]).expand(len(anchor_B), -1), 2)
    return verify(TARGET_VV[torch.stack(ids, 1)], torch.stack(ids, 1), tree, sampling, generator)


def sampled_chain(verify: Accept, anchor_B: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> Verdict:
    """Three drafts; behind a token 3 nothing is proposed."""
    ids, probs = [anchor_B], []
    for _ in range(3):
        probs.append(sampling.probabilities(DRAFT_VV[ids[-1].clamp_min(0)]))
        drawn_B = draw(probs[-1], uniforms(anchor_B.shape, generator))
        stopped_B = (ids[-1] == 3) | (ids[-1] < 0)
        ids.append(torch.where(stopped_B, -1, drawn_B))
    ids_BN = torch.stack(ids, 1)
    return verify(TARGET_VV[ids_BN.clamp_min(0)], ids_BN, torch.stack(probs, 1), sampling, generator)


def follow_sampled(
    logits_BNV: torch.Tensor, ids_BN: torch.Tensor, _: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> Verdict:
    return follow(logits_BNV, ids_BN, Tree.chain(len(ids_BN), ids_BN.shape[1] - 1, CPU), sampling, generator)


def accept_always(
    logits_BNV: torch.Tensor, ids_BN: torch.Tensor, _: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> Verdict:
    accepted_B = (ids_BN[:, 1:] >= 0).long().cumprod(1).sum(1)
    probs_BV = sampling.probabilities(logits_BNV)[torch.arange(len(ids_BN)), accepted_B]
    next_ids = draw(probs_BV, uniforms(accepted_B.shape, generator)).tolist()
    counts = accepted_B.tolist()
    return Verdict([[*range(n + 1)] for n in counts], [ids[1 : n + 1] for ids, n in zip(ids_BN.tolist(), counts, strict=True)], next_ids)


def wrong_residual(
    logits_BNV: torch.Tensor, ids_BN: torch.Tensor, draft_probs_BKV: torch.Tensor, sampling: Sampling, generator: torch.Generator
) -> Verdict:
    """After a rejection from p, not from max(p - q, 0)."""
    verdict = accept_or_resample(logits_BNV, ids_BN, draft_probs_BKV, sampling, generator)
    accepted_B = torch.tensor([len(path) - 1 for path in verdict.paths])
    probs_BV = sampling.probabilities(logits_BNV)[torch.arange(len(ids_BN)), accepted_B]
    return verdict._replace(next_ids=draw(probs_BV, uniforms(accepted_B.shape, generator)).tolist())


def off_by_one(verify: Accept | Follow) -> Callable:
    """Each node is judged by the logits of the node before it."""
    return lambda logits_BNV, *rest: verify(torch.cat([logits_BNV[:, :1], logits_BNV[:, :-1]], 1), *rest)


def p_value(propose: Callable, verify: Callable, sampling: Sampling, texts: int) -> tuple[float, float]:
    """Chi-square of three-token texts, each decoded in rounds behind token 1, against their product of probabilities.

    Returns the p-value and the tokens of the first round.
    """
    generator = rng(5)
    ids = [[1] for _ in range(texts)]
    tokens_first_round = 0.0
    while going := [row for row, text in enumerate(ids) if len(text) <= TEXT]:
        verdict = propose(verify, torch.tensor([ids[row][-1] for row in going]), sampling, generator)
        for row, path, accepted_ids, next_id in zip(going, verdict.paths, verdict.accepted_ids, verdict.next_ids, strict=True):
            assert len(path) == len(accepted_ids) + 1
            ids[row] += [*accepted_ids, next_id]
        tokens_first_round = tokens_first_round or sum(map(len, ids)) / texts - 1
    counts = sum(VOCABULARY**n * torch.tensor([text[TEXT - n] for text in ids]) for n in range(TEXT)).bincount(minlength=VOCABULARY**TEXT)

    p_VV = sampling.probabilities(TARGET_VV)
    return chi_square(counts, texts * torch.einsum("a,ab,bc->abc", p_VV[1], p_VV, p_VV).flatten()), tokens_first_round


def chi_square(counts: torch.Tensor, expected: torch.Tensor) -> float:
    """The p-value of counts; 0 where something happened that never does."""
    if counts[expected == 0].any():
        return 0.0
    common = expected >= 5  # the others are one cell
    counts, expected = (torch.cat([x[common], x[~common].sum()[None]]).double() for x in (counts, expected))
    counts, expected = counts[expected > 0], expected[expected > 0]
    statistic = ((counts - expected) ** 2 / expected).sum()
    freedom = torch.tensor((len(expected) - 1) / 2, dtype=torch.float64)
    return float(torch.special.gammaincc(freedom, statistic / 2))


@pytest.mark.parametrize(
    ("propose", "verify", "sampling"),
    [
        (greedy_chain, follow, FULL),
        (greedy_tree, follow, FULL),
        (greedy_tree, follow, CUT),
        (sampled_chain, accept_or_resample, FULL),
        (sampled_chain, accept_or_resample, CUT),
        (sampled_chain, follow_sampled, FULL),
    ],
)
def test_texts_have_the_targets_distribution(propose: Callable, verify: Callable, sampling: Sampling) -> None:
    probability, tokens_a_round = p_value(propose, verify, sampling, texts=40_000)
    assert probability > 1e-3
    assert tokens_a_round > 1.2  # drafts were accepted


@pytest.mark.parametrize("sampling", [FULL, CUT], ids=["full", "cut"])
@pytest.mark.parametrize(
    ("propose", "verify"),
    [
        (greedy_chain, off_by_one(follow)),
        (greedy_tree, off_by_one(follow)),
        (sampled_chain, off_by_one(accept_or_resample)),
        (sampled_chain, accept_always),
        (sampled_chain, wrong_residual),
    ],
    ids=["chain-off_by_one", "tree-off_by_one", "sampled-off_by_one", "sampled-accept_always", "sampled-wrong_residual"],
)
def test_wrong_verifiers_fail_the_same_test(propose: Callable, verify: Callable, sampling: Sampling) -> None:
    assert p_value(propose, verify, sampling, texts=10_000)[0] < 1e-9


def test_accepting_by_p_over_q_accepts_more_than_following_does() -> None:
    """Tokens of the first draft position by the formulas: 1 + sum min(p, q) and 1 + sum p q."""
    p_V, q_V = (FULL.probabilities(table[1]) for table in (TARGET_VV, DRAFT_VV))
    anchor_B = torch.ones(40_000, dtype=torch.long)
    for verify, expected in ((accept_or_resample, torch.minimum(p_V, q_V).sum()), (follow_sampled, (p_V * q_V).sum())):
        verdict = sampled_chain(verify, anchor_B, FULL, rng(3))
        share = sum(len(path) > 1 for path in verdict.paths) / len(anchor_B)
        assert abs(share - float(expected)) < 4 * (0.25 / len(anchor_B)) ** 0.5
