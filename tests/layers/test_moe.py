"""Every way to compute a mixture of experts against the loop in float64, and the gate against its formula.

Tolerances are those of rounding. A number that n roundings lead to, each of at most u of the magnitudes that are added up, is off by at
most n * u times what the same network gives for the magnitudes of all its inputs. In float32 (u = 2^-24) each product of a sum may be
rounded; in bfloat16 (u = 2^-9) sums are formed in float32 and rounded once. What enters the ReLU is a small odd number of halves and exact
in both, so that no way may disagree on what passes.
"""

import math

import pytest
import torch
from torch import nn

from specforge.errors import CheckpointError, ConfigError
from specforge.layers import experts as experts_module
from specforge.layers.expert_keys import stack_experts, unstack_experts
from specforge.layers.experts import FORMS, Experts, Picks
from specforge.layers.moe import IMPLEMENTATIONS, SparseMoE, balance_loss

WIDTH, INNER, GROUPS = 16, 24, 4
PICKED = {
    "one token": torch.tensor([[2, 0]]),
    "one expert for all": torch.full((9, 1), 1),
    "an expert without tokens": torch.tensor([[0, 3], [3, 1], [1, 0], [0, 1], [3, 0]]),
    "both picks in one group": torch.tensor([[2, 2], [0, 3], [1, 1], [2, 1], [1, 2], [2, 2]]),
}


def inputs(group_TK: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """x, the experts' weights, weights of the picks that do not add up to one."""
    generator = torch.Generator().manual_seed(0)

    def whole(*shape: int) -> torch.Tensor:
        return torch.randint(-1, 2, shape, generator=generator).double()

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    tensors = [whole(len(group_TK), WIDTH), whole(GROUPS, INNER, WIDTH), whole(GROUPS, INNER) + 0.5]
    tensors += [normal(GROUPS, INNER, WIDTH), normal(GROUPS, WIDTH), torch.rand(group_TK.shape, generator=generator)]
    return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)


def outcome(name: str, group_TK: torch.Tensor, tensors: tuple[torch.Tensor, ...], direction: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """The mixture and the gradients of all inputs."""
    x_TD, *weights, weight_TK = tensors
    out_TD, lost = FORMS[name](x_TD, Experts(*weights), Picks(weight_TK, group_TK))
    assert lost.shape == () and lost == 0
    return out_TD.detach(), *torch.autograd.grad(out_TD, tensors, direction.to(out_TD.dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", PICKED)
@pytest.mark.parametrize("name", FORMS)
def test_each_form_equals_the_loop(name: str, case: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(experts_module, "CAPACITY_FACTOR", GROUPS)
    group_TK = PICKED[case]
    tensors = inputs(group_TK, dtype)
    direction = torch.randn(len(group_TK), WIDTH, generator=torch.Generator().manual_seed(1)).to(dtype)
    got = outcome(name, group_TK, tensors, direction)
    exact, magnitude = (
        outcome(
            "loop", group_TK, tuple(change(tensor.detach().double()).requires_grad_() for tensor in tensors), change(direction.double())
        )
        for change in (lambda x: x, torch.abs)
    )
    in_sums = WIDTH + INNER + group_TK.numel() if dtype == torch.float32 else 0
    roundings = in_sums + 6 + group_TK.shape[1]
    tolerance = roundings * torch.finfo(dtype).eps / 2
    for number, (one, other, scale) in enumerate(zip(got, exact, magnitude, strict=True)):
        assert one.dtype == dtype
        assert ((one.double() - other).abs() <= tolerance * scale).all(), f"output {number}"


@pytest.mark.parametrize("name", FORMS)
def test_gradients_of_many_tokens_are_not_added_up_in_bf16(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """1000 weights of 0.5 are 500, which bfloat16 holds; a running sum of them in bfloat16 stands still at 128."""
    monkeypatch.setattr(experts_module, "CAPACITY_FACTOR", GROUPS)
    group_TK = torch.full((1000, 1), 1)
    x_TD, *weights, weight_TK = inputs(group_TK, torch.bfloat16)
    out_TD, _ = FORMS[name](x_TD, Experts(*weights), Picks(torch.full_like(weight_TK, 0.5), group_TK))
    (grad_GD,) = torch.autograd.grad(out_TD, weights[-1], torch.ones_like(out_TD))
    assert grad_GD.tolist() == [[500.0 * (group == 1)] * WIDTH for group in range(GROUPS)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FORMS)
def test_no_token_has_no_answer(name: str, dtype: torch.dtype) -> None:
    x_TD, *weights, weight_TK = inputs(torch.zeros(0, 2, dtype=torch.int64), dtype)
    out_TD, lost = FORMS[name](x_TD, Experts(*weights), Picks(weight_TK, torch.zeros(0, 2, dtype=torch.int64)))
    assert out_TD.shape == (0, WIDTH) and out_TD.dtype == dtype and lost == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_token_gives_every_weight_a_gradient(implementation: str, dtype: torch.dtype) -> None:
    """Other ranks may have tokens, and the reduction waits for all."""
    moe = mixture(implementation).to(dtype)
    moe(torch.zeros(0, WIDTH, dtype=dtype)).out_TD.sum().backward()
    assert all(parameter.grad is not None and not parameter.grad.any() for parameter in moe.parameters())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_picks_without_a_place_are_counted_and_answer_zero(dtype: torch.dtype) -> None:
    """8 tokens ask one of 4 experts, which has ceil(1.5 * 8 / 4) = 3 places: the first three tokens get theirs."""
    group_TK = torch.full((8, 1), 2)
    x_TD, *weights, weight_TK = inputs(group_TK, dtype)
    out_TD, lost = FORMS["capacity"](x_TD, Experts(*weights), Picks(weight_TK, group_TK))
    assert lost == 5
    expected_TD, _ = FORMS["loop"](x_TD[:3], Experts(*weights), Picks(weight_TK[:3], group_TK[:3]))
    torch.testing.assert_close(out_TD[:3], expected_TD)
    assert not out_TD[3:].any()
    for of_all, of_three in zip(*(torch.autograd.grad(out.sum(), [x_TD, *weights], retain_graph=True) for out in (out_TD, expected_TD))):
        torch.testing.assert_close(of_all, of_three)


def mixture(implementation: str = "loop", top_k: int = 2, **options: object) -> SparseMoE:
    torch.manual_seed(0)
    return SparseMoE(WIDTH, INNER, GROUPS, top_k, implementation, **options).eval()


def test_weights_are_the_softmax_of_all_experts() -> None:
    """Logits log 1, log 2, log 4, log 3: shares 0.1, 0.2, 0.4, 0.3; the two picked add up to 0.7."""
    moe = mixture()
    with torch.no_grad():
        moe.gate.weight.zero_()
        moe.gate.bias.copy_(torch.tensor([1.0, 2.0, 4.0, 3.0]).log())
    picks, share_TE = moe.route(torch.ones(3, WIDTH))
    assert picks.group_TK.tolist() == [[2, 3]] * 3
    torch.testing.assert_close(picks.weight_TK, torch.tensor([[0.4, 0.3]] * 3))
    torch.testing.assert_close(share_TE, torch.tensor([[0.1, 0.2, 0.4, 0.3]] * 3))
    torch.testing.assert_close(moe(torch.ones(3, WIDTH)).importance_E, torch.tensor([0.3, 0.6, 1.2, 0.9]))


def test_balance_is_spread_over_mean() -> None:
    """1 and 3: mean 2, standard deviation (of a sample) sqrt(2)."""
    torch.testing.assert_close(balance_loss(torch.tensor([1.0, 3.0])), torch.tensor(math.sqrt(2) / 2), rtol=1e-6, atol=0)
    assert balance_loss(torch.tensor([2.0, 2.0])) == 0
    assert balance_loss(torch.tensor([2.0])) == 0
    torch.testing.assert_close(
        balance_loss(torch.tensor([[1.0, 3.0], [2.0, 2.0]])), torch.tensor([math.sqrt(2) / 2, 0.0]), rtol=1e-6, atol=0
    )


def test_noise_is_for_training() -> None:
    """Of two equal logits, log(share / share) has a standard deviation of 0.1 * sqrt(2), which 20,000 draws know to 0.0007."""
    moe = SparseMoE(WIDTH, INNER, 2, 2)
    nn.init.zeros_(moe.gate.weight)
    nn.init.zeros_(moe.gate.bias)
    torch.manual_seed(0)
    x_TD = torch.ones(20_000, WIDTH)
    noisy_TK, still_TK = (moe.train(training).route(x_TD)[0].weight_TK for training in (True, False))
    ratio_T = (noisy_TK[:, 0] / noisy_TK[:, 1]).log()
    assert abs(ratio_T.square().mean().sqrt().item() - 0.1 * math.sqrt(2)) < 0.003
    assert (still_TK == 0.5).all()


@pytest.mark.parametrize("groups", [None, (0, 1, 0, 2)])
def test_a_group_is_one_expert(groups: tuple[int, ...] | None) -> None:
    """In the mixture, and in what its weights and its gate learn."""
    moe, x_TD = mixture(groups=groups), torch.randn(40, WIDTH)
    expected_TD = torch.zeros_like(x_TD)
    for token, shares_E in enumerate(moe.gate(x_TD).softmax(-1)):
        for expert in shares_E.argsort(descending=True)[:2].tolist():
            group = moe.groups[expert]
            hidden_I = (moe.up_GID[group] @ x_TD[token] + moe.up_bias_GI[group]).relu()
            expected_TD[token] += shares_E[expert] * (hidden_I @ moe.down_GID[group] + moe.down_bias_GD[group])
    direction_TD = torch.randn(40, WIDTH)
    expected = torch.autograd.grad(expected_TD, list(moe.parameters()), direction_TD)
    for name in IMPLEMENTATIONS:
        if name != "capacity":
            same = mixture(name, groups=groups)
            out_TD = same(x_TD).out_TD
            torch.testing.assert_close(out_TD, expected_TD, rtol=1e-5, atol=1e-5)
            got = torch.autograd.grad(out_TD, list(same.parameters()), direction_TD)
            for one, other in zip(got, expected, strict=True):
                torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5)


def test_the_mixture_reports_what_it_lost() -> None:
    moe = mixture("capacity")
    nn.init.zeros_(moe.gate.weight)
    moe.gate.bias.data[:] = torch.tensor([9.0, 8.0, 0.0, 0.0])
    assert moe(torch.randn(8, WIDTH)).overflow == 2 * (8 - 6)  # ceil(1.5 * 16 / 4) = 6 places


def test_auto_says_what_it_chose_and_why() -> None:
    moe = SparseMoE(64, 128, 8, 2)
    free = SparseMoE(64, 128, 8, 2, sync_free=True).bfloat16()
    odd = SparseMoE(6, 128, 8, 2, "grouped")
    few, many = torch.zeros(16, 64), torch.zeros(17, 64)
    assert moe.choice(few).name == "dense" and "16 tokens x 64 x 128" in moe.choice(few).reason
    assert moe.choice(many).name == "sorted" and "17 tokens" in moe.choice(many).reason
    assert free.choice(many.bfloat16()).name == "grouped" and "no value" in free.choice(many.bfloat16()).reason
    assert free.choice(many.double()).name == "dense" and "does not take torch.float64" in free.choice(many.double()).reason
    assert odd.choice(torch.zeros(500, 6)).name == "sorted" and "16 bytes" in odd.choice(torch.zeros(500, 6)).reason
    assert odd.choice(torch.zeros(5, 6)).name == "dense" and "16 bytes" in odd.choice(torch.zeros(5, 6)).reason
    assert mixture("grouped").choice(torch.zeros(500, WIDTH)).reason == "as configured"
    assert odd(torch.randn(500, 6)).out_TD.shape == (500, 6)


def test_a_torch_without_grouped_products_falls_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(torch.nn.functional, "grouped_mm")
    x_TD = torch.randn(500, WIDTH)
    assert "has no grouped_mm" in mixture("grouped").choice(x_TD).reason
    torch.testing.assert_close(mixture("grouped")(x_TD).out_TD, mixture("loop")(x_TD).out_TD)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"moe='fast'.*auto, loop"):
        SparseMoE(8, 8, 2, 1, "fast")


def test_stacked_weights_are_those_of_linear_layers() -> None:
    """The keys of an expert load into two `nn.Linear`, and come back the same."""
    moe, x_TD = mixture(), torch.randn(5, WIDTH)
    state = {"norm.weight": torch.ones(3), **{f"layers.0.moe.{key}": value for key, value in moe.state_dict().items()}}
    single = unstack_experts(state)
    assert {key.rpartition("experts.")[2] for key in single if "experts.3" in key} == {
        "3.fc1.weight", "3.fc1.bias", "3.fc2.weight", "3.fc2.bias",
    }  # fmt: skip
    fc1, fc2 = nn.Linear(WIDTH, INNER), nn.Linear(INNER, WIDTH)
    for name, layer in (("fc1", fc1), ("fc2", fc2)):
        layer.load_state_dict({key: single[f"layers.0.moe.experts.3.{name}.{key}"] for key in ("weight", "bias")})
    picks = Picks(torch.ones(5, 1), torch.full((5, 1), 3))
    torch.testing.assert_close(FORMS["loop"](x_TD, moe.experts, picks)[0], fc2(fc1(x_TD).relu()))
    back = stack_experts(single)
    assert back.keys() == state.keys()
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_ten_experts_stack_by_number() -> None:
    state = SparseMoE(4, 4, 11, 1).state_dict()
    back = stack_experts(dict(sorted(unstack_experts(state).items())))  # experts.10 sorts before experts.2
    assert all(torch.equal(back[key], state[key]) for key in state)


def test_a_missing_key_of_an_expert_is_named() -> None:
    single = unstack_experts({f"moe.{key}": value for key, value in mixture().state_dict().items()})
    del single["moe.experts.1.fc2.bias"]
    with pytest.raises(CheckpointError, match=r"moe\.experts\.1\.fc2\.bias: is missing"):
        stack_experts(single)


def test_an_expert_of_any_number_is_refused_at_once() -> None:
    with pytest.raises(CheckpointError, match=r"^experts\.0\.fc1\.weight: is missing, but experts up to 1000000000000 are there"):
        stack_experts({f"experts.{10**12}.fc1.weight": torch.zeros(INNER, WIDTH)})


def test_experts_of_different_shapes_are_refused_by_name() -> None:
    single = unstack_experts({f"moe.{key}": value for key, value in mixture().state_dict().items()})
    single["moe.experts.2.fc1.weight"] = torch.zeros(INNER, WIDTH + 1)
    with pytest.raises(CheckpointError, match=r"moe\.experts\.2\.fc1\.weight: has the shape \[24, 17\], that of expert 0 \[24, 16\]"):
        stack_experts(single)
