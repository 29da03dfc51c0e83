"""The scorer reads nothing back until a task's forwards are done; then it reads everything at once.

What is read once a model, whether its head is plain and whether it can score a tree, comes before.
"""

from collections import deque

import pytest
import torch

from specforge.features.target import Target
from specforge.suite.batches import base_batches, compose
from specforge.suite.forest import Forest, plant
from specforge.suite.scoring import Model, Predictions
from tests.suite.ragged import ragged_task
from tests.suite.test_scoring import MAKERS, make_model
from tests.sync_free import value_read

TASK = ragged_task(seed=0, examples=4)


@pytest.fixture(autouse=True)
def _not_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes fake tensors for a trace and leaves out the reads of a real forward."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: False)


def in_batches(model: Model, found: Predictions) -> None:
    deque(model.batch_forwards(compose(base_batches(TASK, range(len(TASK)), 4), 3), found), maxlen=0)


def as_a_tree(model: Model, forest: Forest, found: Predictions) -> None:
    deque(model.tree_forwards(forest, forest.pieces, found), maxlen=0)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MAKERS)
def test_scoring_reads_nothing(name: str, attention: str) -> None:
    target = make_model(name, attention)
    model, found = Model(target), Predictions(TASK, target)
    forest = plant(TASK, range(len(TASK)), 8)
    assert any(piece.kept for piece in forest.pieces) and not all(piece.kept for piece in forest.pieces)
    assert value_read(in_batches, model, found) is None
    assert value_read(as_a_tree, model, forest, found) is None
