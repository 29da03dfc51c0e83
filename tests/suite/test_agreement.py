"""What a draft foresaw of a task's right rows, on a GPU as on a CPU."""

from pathlib import Path

import pytest
import torch

from specforge.distributed import World
from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from specforge.suite.agreement import draft_accepted
from tests.methods.test_contract import each_method, make
from tests.suite.ragged import ragged_task

TASK = ragged_task(seed=3, examples=12)


@each_method
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_foreseen_together_are_rows_foreseen_alone(device: str, name: str, answered_path: Path, answered: LocalFeatureStore) -> None:
    """A share of all scored positions, so the mean of the examples' shares, weighted by what is scored of each."""
    target = Target.load(answered_path, "float32", device)
    method = make(name, answered_path, answered).eval().to(device)
    world = World(device=torch.device(device))
    together = draft_accepted(target, method, TASK, range(len(TASK)), world)
    right = total = 0
    for example in range(len(TASK)):
        row = int(TASK.example_start_E1[example] + TASK.gold_E[example])
        scored = int(TASK.lengths_R[row] - max(TASK.scored_R[row], 2))
        if scored > 0:
            right += round(scored * draft_accepted(target, method, TASK, [example], world))
            total += scored
    assert total > 50 and together == right / total
