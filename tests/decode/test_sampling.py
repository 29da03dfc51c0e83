"""Temperature, top-k and top-p against a token-by-token reference; draws at the borders of the distribution."""

import math

import pytest
import torch

from specforge.decode.sampling import Sampling, uniforms
from specforge.errors import ConfigError
from specforge.features.generation import draw


def reference(logits: list[float], sampling: Sampling) -> list[float]:
    """One row, in Python's floats: tokens by falling logit and rising id, cut twice, renormalised."""
    order = sorted(range(len(logits)), key=lambda token: (-logits[token], token))
    order = order[: sampling.top_k or len(order)]
    weights = {token: math.exp((logits[token] - max(logits)) / sampling.temperature) for token in order}
    total = sum(weights.values())
    mass, nucleus = 0.0, []
    for token in order:
        nucleus.append(token)
        mass += weights[token] / total
        if sampling.top_p < 1 and mass >= sampling.top_p:
            break
    total = sum(weights[token] for token in nucleus)
    return [weights[token] / total if token in nucleus else 0.0 for token in range(len(logits))]


@pytest.mark.parametrize("distinct", [3, 1000], ids=["ties", "distinct"])
@pytest.mark.parametrize("top_p", [1.0, 0.97, 0.613, 0.2, 1e-6])
@pytest.mark.parametrize("top_k", [0, 1, 3, 7, 11, 50])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
def test_probabilities_equal_the_reference(temperature: float, top_k: int, top_p: float, distinct: int) -> None:
    generator = torch.Generator().manual_seed(distinct)
    logits_BNV = torch.randint(distinct, (3, 4, 11), generator=generator).double() * (4 / distinct)
    sampling = Sampling(temperature, top_k, top_p)
    probs_BNV = sampling.probabilities(logits_BNV)
    expected_BNV = torch.tensor([[reference(row, sampling) for row in rows] for rows in logits_BNV.tolist()], dtype=torch.float64)
    assert torch.equal(probs_BNV == 0, expected_BNV == 0)
    torch.testing.assert_close(probs_BNV, expected_BNV, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("sampling", "logits", "expected"),
    [
        (Sampling(1.0, top_k=2), [0, 1, 1, 1], [0, 0.5, 0.5, 0]),  # of equal logits the lowest ids
        (Sampling(1.0, top_k=2), [0, 0, 5, 0], [1 / (1 + math.exp(5)), 0, 1 / (1 + math.exp(-5)), 0]),
        (Sampling(1.0, top_p=0.5), [2, 2, 2, 2], [0.5, 0.5, 0, 0]),  # reached exactly: no third
        (Sampling(1.0, top_p=0.51), [2, 2, 2, 2], [1 / 3, 1 / 3, 1 / 3, 0]),
        (Sampling(1.0, top_k=2, top_p=0.5), [2, 2, 2, 2], [1, 0, 0, 0]),  # half of what top-k left
        (Sampling(1.0, top_k=9), [3, 3], [0.5, 0.5]),
        (Sampling(1.0, top_k=3), [-math.inf, 1, -math.inf, -math.inf], [0, 1, 0, 0]),
        (Sampling(1.0, top_p=1e-9), [1, 3, 3, 0], [0, 1, 0, 0]),
        (Sampling(0.0, top_k=3, top_p=0.9), [1, 3, 3, 0], [0, 1, 0, 0]),  # greedy: the first arg-max
        (Sampling(1e-4), [-900, 900, 899], [0, 1, 0]),
    ],
)
def test_by_hand(sampling: Sampling, logits: list[float], expected: list[float]) -> None:
    probs_V = sampling.probabilities(torch.tensor(logits, dtype=torch.float64))
    torch.testing.assert_close(probs_V, torch.tensor(expected, dtype=torch.float64), rtol=1e-14, atol=0)


def test_top_p_1_keeps_tokens_whose_share_is_lost_in_rounding() -> None:
    logits_V = torch.tensor([0.0, 40.0, 0.0], dtype=torch.float64)  # 1 - 8e-18 rounds to 1
    assert (Sampling(1.0, top_k=3).probabilities(logits_V) > 0).tolist() == [True, True, True]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(0.7), Sampling(0.7, top_k=4, top_p=0.8)])
def test_at_least_float32(sampling: Sampling, dtype: torch.dtype) -> None:
    logits_BV = torch.randn(2, 9, generator=torch.Generator().manual_seed(0)).to(dtype)
    probs_BV = sampling.probabilities(logits_BV)
    assert probs_BV.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    wide_BV = sampling.probabilities(logits_BV.double())
    torch.testing.assert_close(probs_BV.double(), wide_BV, rtol=1e-6, atol=0)


def test_choose_is_the_arg_max_or_a_sample() -> None:
    logits_BV = torch.tensor([[1.0, 3.0, 3.0, 0.0]]).repeat(4000, 1)
    generator = torch.Generator().manual_seed(0)
    assert set(Sampling().choose(logits_BV, generator).tolist()) == {1}
    sampling = Sampling(2.0, top_k=3)
    counts_V = sampling.choose(logits_BV, generator).bincount(minlength=4)
    expected_V = 4000 * sampling.probabilities(logits_BV[0])
    assert counts_V[3] == 0 and ((counts_V - expected_V)[:3].abs() < 4 * expected_V[:3].sqrt()).all()
    assert torch.equal(sampling.choose(logits_BV, generator.manual_seed(7)), sampling.choose(logits_BV, generator.manual_seed(7)))


LAST = 1 - 2**-53
"""The largest number that `uniforms` gives."""


@pytest.mark.parametrize(
    ("weights", "uniform", "expected"),
    [
        ([0, 2, 0, 2, 0], 0.0, 1),  # no leading zero, though nothing lies below it
        ([0, 2, 0, 2, 0], 0.5, 3),  # each token owns the lower border of its interval
        ([0, 2, 0, 2, 0], 0.5 - 2**-54, 1),
        ([0, 2, 0, 2, 0], LAST, 3),  # and no trailing zero
        ([0, 0, 1e-30, 0, 0], LAST, 2),
        ([0.1] * 10, LAST, 9),
        ([1, 1e-8], LAST, 1),  # the sums are float64
        ([0.1] * 3 + [0.7, 0], LAST, 3),
        ([1, 1, 1, 1], 0.75, 3),
        ([5], 0.0, 0),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_draws_at_the_border(weights: list[float], uniform: float, expected: int, dtype: torch.dtype) -> None:
    assert draw(torch.tensor([weights], dtype=dtype), torch.tensor([uniform], dtype=torch.float64)).tolist() == [expected]


def test_a_grid_of_uniforms_draws_every_token_by_its_weight() -> None:
    weights_V = torch.tensor([3.0, 0.0, 5.0, 1.0, 0.0, 7.0])
    grid = (torch.arange(1600, dtype=torch.float64) + 0.5) / 1600
    assert draw(weights_V.expand(1600, -1), grid).bincount(minlength=6).tolist() == [300, 0, 500, 100, 0, 700]


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_no_border_of_a_large_vocabulary_draws_a_zero(device: str) -> None:
    generator = torch.Generator().manual_seed(2)
    weights_BV = torch.rand(400, 20_000, generator=generator) * (torch.rand(400, 20_000, generator=generator) < 0.3)
    cumulated_BV = weights_BV.cumsum(dim=1, dtype=torch.float64)
    border_B1 = cumulated_BV.gather(1, torch.randint(20_000, (400, 1), generator=generator))
    uniform_B = (border_B1 / cumulated_BV[:, -1:]).squeeze(1).clamp_max(LAST)
    drawn_B = draw(weights_BV.to(device), uniform_B.to(device)).cpu()
    assert (weights_BV.gather(1, drawn_B[:, None]) > 0).all()


def test_uniforms_are_float64_and_repeat_with_the_seed() -> None:
    first, again = (uniforms((2, 3), torch.Generator().manual_seed(5)) for _ in range(2))
    assert first.dtype == torch.float64 and torch.equal(first, again) and (first >= 0).all() and (first < 1).all()


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1: must be 0 \(greedy\) or a number from 1e-4"),
        ({"temperature": 1e-9}, "temperature=1e-09"),
        ({"temperature": math.nan}, "temperature=nan"),
        ({"temperature": math.inf}, "temperature=inf"),
        ({"top_k": -1}, "top_k=-1: must not be negative; 0 keeps all"),
        ({"top_p": 0.0}, r"top_p=0\.0: must lie in \(0, 1\]; 1 keeps all"),
        ({"top_p": 1.01}, r"top_p=1\.01"),
        ({"top_p": math.nan}, "top_p=nan"),
    ],
)
def test_a_wrong_value_is_named(keys: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Sampling(**keys)
