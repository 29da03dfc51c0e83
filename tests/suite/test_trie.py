"""The trie holds every row once, and its pieces visit every node once with all of its ancestors in sight."""

import numpy as np
import pytest

from specforge.suite.trie import Trie, build, pieces


def random_rows(rng: np.random.Generator, count: int, longest: int) -> list[np.ndarray]:
    """Rows that share beginnings of all lengths; some are equal, some are the beginning of another."""
    rows = [rng.integers(0, 5, rng.integers(1, longest)).astype(np.int32)]
    while len(rows) < count:
        before = rows[rng.integers(len(rows))]
        kept = before[: rng.integers(0, len(before) + 1)]
        rows.append(np.concatenate([kept, rng.integers(0, 5, rng.integers(0, longest // 2)).astype(np.int32)])[:longest])
        if not len(rows[-1]):
            rows.pop()
    return rows


def comb(teeth: int) -> list[np.ndarray]:
    """Row i is i ones and a two: a fork at every token."""
    return [np.array([1] * teeth_below + [2], dtype=np.int32) for teeth_below in range(teeth)]


@pytest.mark.parametrize("seed", range(5))
def test_rows_are_paths(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 60, 30)
    trie = build(rows)
    assert len(trie) == len({tuple(row[:length]) for row in rows for length in range(1, len(row) + 1)})
    for row, path in zip(rows, trie.path_R, strict=True):
        assert trie.token_M[path].tolist() == row.tolist()
        assert trie.depth_M[path].tolist() == list(range(len(row)))


def above(trie: Trie, node: int) -> set[int]:
    """The node and those above it, by the one-integer rule."""
    return {k for k in range(node + 1) if node < trie.exit_M[k]}


@pytest.mark.parametrize("seed", range(5))
def test_one_integer_is_the_whole_mask(seed: int) -> None:
    rows = random_rows(np.random.default_rng(seed), 30, 20)
    trie = build(rows)
    for path in trie.path_R:
        for place, node in enumerate(path.tolist()):
            assert above(trie, node) == set(path[: place + 1].tolist())


@pytest.mark.parametrize("budget", [1, 3, 10, 50, 10_000])
@pytest.mark.parametrize("case", ["random", "comb", "block"])
def test_every_node_is_visited_once_below_its_ancestors(case: str, budget: int) -> None:
    rng = np.random.default_rng(7)
    block = rng.integers(0, 9, 40).astype(np.int32)
    rows = {
        "random": random_rows(rng, 80, 25),
        "comb": comb(1200),
        "block": [np.concatenate([block, rng.integers(0, 9, 6).astype(np.int32)]) for _ in range(30)],
    }[case]
    trie = build(rows)
    path: list[int] = []
    visited: list[int] = []
    for piece in pieces(trie, budget):
        nodes = piece.nodes.tolist()
        del path[piece.past :]
        assert len(path) == piece.past
        inside = set(nodes)
        for node in nodes[:: max(len(nodes) // 20, 1)]:
            assert above(trie, node) - inside == set(path), "what is not in the piece is in the cache, and nothing else is"
        if piece.kept:
            assert trie.depth_M[nodes].tolist() == list(range(piece.past, piece.past + len(nodes))), "a chain"
            path += nodes
        visited += nodes
    assert sorted(visited) == list(range(len(trie)))


def test_a_block_that_all_rows_share_is_a_stem() -> None:
    block = np.arange(400, dtype=np.int32)
    rows = [np.concatenate([block, np.array([500 + example, choice], dtype=np.int32)]) for example in range(100) for choice in range(4)]
    trie = build(rows)
    first, *rest = pieces(trie, 128)
    assert first.kept and len(first.nodes) == 400 and len(trie) == 400 + 100 * 5
    assert [len(piece.nodes) for piece in rest] == [125] * 4 and {piece.past for piece in rest} == {400}
