"""Experts made one: exact copies change nothing, others by what the report says; the gate never changes."""

import pytest
import torch

from specforge.errors import ConfigError
from specforge.layers import experts
from specforge.layers.expert_merge import merge_experts
from specforge.layers.experts import FORMS, Experts, Picks
from specforge.layers.moe import SparseMoE

WIDTH, INNER = 16, 24


def doubled(noise: float) -> SparseMoE:
    """8 experts, of which 4 to 7 are 0 to 3 again, with noise of that share of a weight's spread."""
    torch.manual_seed(0)
    moe = SparseMoE(WIDTH, INNER, 8, 2, "loop").eval()
    with torch.no_grad():
        moe.gate.weight.mul_(5)
        for weight in moe.experts:
            weight[4:] = weight[:4] + noise * weight[:4].std() * torch.randn_like(weight[:4])
    return moe


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_copies_merge_without_a_change(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tolerances as in `test_moe`; some tokens pick an expert and its copy, whose weights then add up."""
    monkeypatch.setattr(experts, "CAPACITY_FACTOR", 4)
    moe = doubled(0.0).to(dtype)
    merged, report = merge_experts(moe, 0.9)
    assert report.members == ((0, 4), (1, 5), (2, 6), (3, 7)) and report.sizes == (2, 2, 2, 2)
    assert report.cosine == pytest.approx((1.0,) * 4, abs=1e-6)
    assert "8 experts became 4" in str(report) and "experts 0, 4 are one: cosine 1.0000" in str(report)
    assert merged.gate.weight.equal(moe.gate.weight) and merged.gate.bias.equal(moe.gate.bias)
    assert all(one.equal(other[:4]) for one, other in zip(merged.experts, moe.experts))
    x_TD = torch.randn(200, WIDTH).to(dtype)
    (weight_TK, expert_TK), picks = moe.route(x_TD)[0], merged.route(x_TD)[0]
    assert picks.weight_TK.equal(weight_TK) and picks.group_TK.equal(expert_TK % 4)
    assert (picks.group_TK[:, 0] == picks.group_TK[:, 1]).any()
    exact_TD, magnitude_TD = (
        FORMS["loop"](
            change(x_TD.double()), Experts(*(change(each.double()) for each in moe.experts)), Picks(weight_TK.double(), expert_TK)
        )[0]
        for change in (lambda x: x, torch.abs)
    )
    roundings = 8 + (WIDTH + INNER if dtype == torch.float32 else 0)
    for name in FORMS:
        out_TD, _ = FORMS[name](x_TD, merged.experts, picks)
        assert ((out_TD.double() - exact_TD).abs() <= roundings * torch.finfo(dtype).eps / 2 * magnitude_TD).all(), name


def test_the_mean_answers_for_its_group() -> None:
    """Expert 0 is (1, 0, ...), expert 1 (0.8, 0.6, ...), expert 2 (0, 1, ...): cosines 0.8, 0.6 and 0."""
    moe = SparseMoE(2, 1, 3, 1)
    with torch.no_grad():
        for weight in moe.experts:
            weight.zero_()
        moe.up_GID.copy_(torch.tensor([[[1.0, 0.0]], [[0.8, 0.6]], [[0.0, 1.0]]]))
    merged, report = merge_experts(moe, 0.7)
    assert report.members == ((0, 1), (2,)) and report.cosine == pytest.approx((0.8, 1.0))
    torch.testing.assert_close(merged.up_GID[:, 0], torch.tensor([[0.9, 0.3], [0.0, 1.0]]))
    assert merged.groups == (0, 0, 1)
    assert merge_experts(moe, 0.5)[1].members == ((0, 1), (2,))  # expert 2 is like expert 1, but not like the first of its group
    assert merge_experts(moe, 0.81)[1].members == ((0,), (1,), (2,))


def test_what_is_merged_may_merge_again() -> None:
    torch.manual_seed(0)
    moe = SparseMoE(WIDTH, INNER, 4, 2, groups=(0, 0, 1, 2))
    with torch.no_grad():
        for weight in moe.experts:
            weight[2] = weight[0]
    again, report = merge_experts(moe, 0.99)
    assert again.groups == (0, 0, 1, 0) and report.members == ((0, 1, 3), (2,)) and len(again.up_GID) == 2


def test_near_copies_leave_an_error() -> None:
    """A merge at a cosine of 0.98 is far from free."""
    moe, x_TD = doubled(0.2), torch.randn(200, WIDTH)
    merged, report = merge_experts(moe, 0.9)
    assert all(0.9 < cosine < 0.99 for cosine in report.cosine)
    out_TD, expected_TD = merged(x_TD).out_TD, moe(x_TD).out_TD
    assert 0.03 < (out_TD - expected_TD).norm() / expected_TD.norm() < 0.3


def test_a_merged_mixture_survives_its_state() -> None:
    merged, _ = merge_experts(doubled(0.0), 0.9)
    other = SparseMoE(WIDTH, INNER, 8, 2, "loop", groups=merged.groups).eval()
    other.load_state_dict(merged.state_dict())
    x_TD = torch.randn(30, WIDTH)
    assert other(x_TD).out_TD.equal(merged(x_TD).out_TD)


def test_a_threshold_of_one_merges_nothing() -> None:
    """Not even copies, whose cosine rounding may take beyond 1."""
    for seed in range(20):
        torch.manual_seed(seed)
        moe = SparseMoE(WIDTH, INNER, 8, 2)
        with torch.no_grad():
            for weight in moe.experts:
                weight[4:] = weight[:4]
        assert merge_experts(moe, 1.0)[1].sizes == (1,) * 8, seed


@pytest.mark.parametrize("threshold", [0.0, -1.0, 1.5])
def test_a_threshold_that_is_no_likeness_is_refused(threshold: float) -> None:
    with pytest.raises(ConfigError, match="merge_threshold"):
        merge_experts(doubled(0.0), threshold)
