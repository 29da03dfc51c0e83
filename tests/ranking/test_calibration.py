"""The shift of a ranking model's logits."""

import numpy as np
import pytest
import torch

from specforge.distributed import World
from specforge.errors import DataError
from specforge.ranking.calibration import fit_shift
from specforge.ranking.metrics import auc_exact
from tests.ranks import run_ranks


def skewed(rows: int = 4000) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits that are 0.8 too large, and clicks."""
    generator = torch.Generator().manual_seed(0)
    true_P = torch.randn(rows, generator=generator).double() * 2 - 1
    return true_P + 0.8, torch.rand(rows, generator=generator) < true_P.sigmoid()


def test_predicted_clicks_are_as_many_as_clicks_and_the_order_stays() -> None:
    logit_P, label_P = skewed()
    assert logit_P.sigmoid().sum() / label_P.sum() > 1.2
    shift = fit_shift(logit_P, label_P, World())
    assert (logit_P + shift).sigmoid().sum().item() == pytest.approx(label_P.sum().item(), rel=1e-12)
    assert shift == pytest.approx(-0.8, abs=0.15)
    assert auc_exact((logit_P + shift).numpy(), label_P.numpy()) == auc_exact(logit_P.numpy(), label_P.numpy())


def test_of_equal_logits_it_is_the_logit_of_the_rate() -> None:
    """3 clicks in 12 rows of logit 2: sigmoid(2 + b) = 1/4, so b = log(1/3) - 2."""
    label_P = torch.arange(12) < 3
    assert fit_shift(torch.full((12,), 2.0), label_P, World()) == pytest.approx(np.log(1 / 3) - 2, abs=1e-12)


def of_rank(world: World) -> float:
    logit_P, label_P = skewed()
    return fit_shift(logit_P[world.rank :: 2], label_P[world.rank :: 2], world)


def test_ranks_agree() -> None:
    alone = fit_shift(*skewed(), World())
    assert run_ranks(of_rank) == pytest.approx([alone, alone], abs=1e-12)


@pytest.mark.parametrize("label", [0, 1])
def test_one_kind_of_row_is_refused(label: int) -> None:
    with pytest.raises(DataError, match="needs both kinds"):
        fit_shift(torch.zeros(5), torch.full((5,), label), World())
