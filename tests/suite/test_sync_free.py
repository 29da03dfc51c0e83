"""The scorer reads nothing back until a task's forwards are done; then it reads everything at once.

What is read once a model, whether its head is plain and whether it can score a tree, comes before. A model that can score none is asked as
transformers has it, which reads whether positions jump, once a forward.
"""

from collections import deque
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from specforge.suite.agreement import foreseen
from specforge.suite.batches import base_batches, compose
from specforge.suite.forest import Forest, plant
from specforge.suite.scoring import Model, Predictions
from tests.methods.test_contract import each_method, make
from tests.suite.ragged import ragged_task
from tests.suite.test_scoring import make_model
from tests.sync_free import value_read

RAGGED = ragged_task(seed=2, examples=2)
TASK = replace(RAGGED, token_N=RAGGED.token_N // 40)
"""Of two tokens only, so that rows begin alike."""


@pytest.fixture
def _not_tracing(monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers takes fake tensors for a trace and leaves out the reads of a real forward."""
    monkeypatch.setattr("transformers.masking_utils.is_tracing", lambda tensor=None: False)


def in_batches(model: Model, found: Predictions) -> None:
    deque(model.batch_forwards(compose(base_batches(TASK, range(len(TASK)), 4), 1), found), maxlen=0)


def as_a_tree(model: Model, forest: Forest, found: Predictions) -> None:
    deque(model.tree_forwards(forest, forest.pieces, found), maxlen=0)


@pytest.mark.usefixtures("_not_tracing")
@pytest.mark.parametrize(("name", "attention"), [("llama", "sdpa"), ("qwen3", "eager"), ("gpt2", "sdpa")])
def test_scoring_reads_nothing(name: str, attention: str) -> None:
    target = make_model(name, attention)
    model, found = Model(target), Predictions(TASK, target)
    forest = plant(TASK, range(len(TASK)), 8)
    assert [(piece.past, piece.slots, piece.kept) for piece in forest.pieces] == [(0, 1, True), (1, 13, False), (1, 3, False)]
    assert value_read(in_batches, model, found) is None
    assert value_read(as_a_tree, model, forest, found) is None


def test_a_capture_reads_nothing(target_path: Path) -> None:
    """Of its own: told of padding, transformers looks once whether there is any."""
    target = Target.load(target_path, "float32")
    sequences = [np.arange(3, 3 + length) for length in (5, 1, 9)]
    target.require_plain_head(sequences[0])
    assert value_read(lambda target: target.capture(sequences, (1, 3)), target) is None


@each_method
def test_what_a_draft_foresaw_is_not_read(name: str, target_path: Path, answered: LocalFeatureStore) -> None:
    method, batch = make(name, target_path, answered).eval().requires_grad_(False), DraftBatch.read(answered, [0, 1])
    assert value_read(foreseen, method, batch, method.plan(batch)) is None
