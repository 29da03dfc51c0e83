"""A round of speculative decoding waits for the device in its verdict alone: neither target nor drafter reads a value back."""

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from specforge.config.methods import METHODS
from specforge.decode import tree as tree_module
from specforge.decode.drafter import Drafter
from specforge.decode.sampling import Sampling
from specforge.decode.session import TargetSession
from specforge.decode.tree import Tree, TreeShape
from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from specforge.methods.base import Method
from tests.decode.test_session import make_target
from tests.methods.test_contract import each_method, entry, make
from tests.sync_free import value_read

PROMPTS = [np.arange(3, 12), np.arange(5, 9)]
CAPACITY = 40
PATHS = [[0, 2], [0]]
"""The nodes that each row keeps. The first row's kept draft has to move."""


@pytest.fixture(autouse=True)
def _no_chains_of_others() -> Iterator[None]:
    """Chains are made once a process, but these have no values."""
    tree_module._chain.cache_clear()
    yield
    tree_module._chain.cache_clear()


@pytest.fixture(autouse=True)
def _not_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes fake tensors for a trace and leaves out the reads of a real forward."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: False)


@torch.no_grad()
def a_round_and_a_proposal(drafter: Drafter, target: Target) -> None:
    session = TargetSession(target, len(PROMPTS), CAPACITY, drafter.layer_ids)
    counts, following_BM = [len(prompt) for prompt in PROMPTS], torch.ones(len(PROMPTS), max(map(len, PROMPTS)), dtype=torch.long)
    drafter.begin(PROMPTS, CAPACITY)
    drafter.extend(following_BM, session.prefill(PROMPTS).aux_BNF, counts)
    proposal = drafter.propose()
    block = session.forward(torch.cat([following_BM[:, :1], proposal.ids_BK], 1).clamp_min(0), proposal.tree)
    session.logits(block.last_BNH)
    session.keep(PATHS)
    drafter.extend(following_BM[:, :2], block.aux_BNF[:, :2], [len(path) for path in PATHS])
    drafter.propose()


@each_method
@pytest.mark.parametrize("sampled", [False, True])
def test_a_chain_reads_nothing(sampled: bool, name: str, answered_path: Path, answered: LocalFeatureStore) -> None:
    def run(target: Target, method: Method) -> None:
        a_round_and_a_proposal(entry(name).load_drafter()(method, 3, Sampling(temperature=1.0) if sampled else None), target)

    assert value_read(run, checked(Target.load(answered_path, "float32")), make(name, answered_path, answered)) is None


@pytest.mark.parametrize("name", [name for name, entry in METHODS.items() if entry.tree_drafter])
def test_a_tree_reads_nothing(name: str, answered_path: Path, answered: LocalFeatureStore) -> None:
    def run(target: Target, method: Method) -> None:
        a_round_and_a_proposal(METHODS[name].load_tree_drafter()(method, TreeShape(depth=3, top_k=2, nodes=5)), target)

    assert value_read(run, checked(Target.load(answered_path, "float32")), make(name, answered_path, answered)) is None


@pytest.mark.parametrize("kind", ["llama-eager", "mistral", "qwen3", "gemma3"])
def test_windows_read_nothing(kind: str) -> None:
    """Of layers that all slide, and of some."""

    def run(target: Target) -> None:
        session = TargetSession(target, len(PROMPTS), CAPACITY)
        session.prefill(PROMPTS)
        for _ in range(2):
            session.forward(torch.ones(len(PROMPTS), 4, dtype=torch.long), Tree.chain(len(PROMPTS), 3, target.device))
            session.keep(PATHS)

    assert value_read(run, checked(make_target(kind))) is None


def checked(target: Target) -> Target:
    """What is read once a target comes first."""
    target.require_plain_head(PROMPTS[0])
    return target
