"""The learning rate at steps whose value is worked out by hand."""

import pytest

from specforge.config.schema import TrainConfig
from specforge.training.schedule import learning_rate


def test_warm_up_and_decay() -> None:
    """Warm-up of 4 steps to 1 gives a quarter more each; then 8 steps of decay, of which half are over at step 8."""
    for schedule, halfway, last in (("constant", 1.0, 1.0), ("linear", 0.5, 0.125), ("cosine", 0.5, 0.5 * (1 - 0.9238795325))):
        config = TrainConfig(learning_rate=1.0, warmup_steps=4, schedule=schedule)
        assert [learning_rate(config, step, 12) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
        assert learning_rate(config, 4, 12) == 1.0
        assert learning_rate(config, 8, 12) == pytest.approx(halfway)
        assert learning_rate(config, 11, 12) == pytest.approx(last)


def test_without_warm_up_the_first_step_has_the_full_rate() -> None:
    assert learning_rate(TrainConfig(learning_rate=1.0), 0, 10) == 1.0
