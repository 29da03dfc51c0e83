"""One embedding_bag for all slots against an embedding and a segment sum for each, and against sums by hand.

A bag of n signs is n - 1 sums, each rounded to at most u of the magnitudes added: u = 2^-24 in float32, 2^-9 in bfloat16. The gradient of a
row is a sum over the n bags that it is in.
"""

import json

import numpy as np
import pytest
import torch

from specforge.errors import ConfigError, DataError
from specforge.layers.slots import SlotBags, SlotConfig, SlotEmbedding

ROWS, WIDTH, SLOTS = 11, 6, 3
TOKENS: dict[str, list[list[list[int]]]] = {
    "one token": [[[3], [4, 5], [10]]],
    "an empty slot": [[[3], [], [1]], [[], [], [2]], [[7, 8], [], []]],
    "no token": [],
    "no sign at all": [[[], [], []], [[], [], []]],
    "duplicate signs": [[[3, 3], [3], [4, 4, 4]], [[3], [4], []]],
    "sign 0": [[[0], [0, 5], []], [[5], [0, 0], [11]]],
    "signs beyond the table and negative": [[[11, 2**62 + 5], [-1], [10]], [[-(2**63)], [2**63 - 1], [-11, 25]]],
}
DTYPES = [torch.float32, torch.bfloat16]


def bags(tokens: list[list[list[int]]]) -> SlotBags:
    signs = [sign for token in tokens for bag in token for sign in bag]
    counts = [len(bag) for token in tokens for bag in token]
    return SlotBags.of(np.array(signs, dtype=np.int64), np.array(counts, dtype=np.int64).reshape(-1, SLOTS))


def embedding(policy: str, implementation: str = "fused", dtype: torch.dtype = torch.float32) -> SlotEmbedding:
    torch.manual_seed(0)
    return SlotEmbedding(SlotConfig(SLOTS, ROWS, WIDTH, policy), implementation).to(dtype)


def plain_row(sign: int, policy: str) -> int:
    """Python's remainder is that of the divisor's sign."""
    return min(max(sign, 0), ROWS - 1) if policy == "clamp" else sign % ROWS


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("policy", ["clamp", "modulo"])
@pytest.mark.parametrize("case", TOKENS)
@pytest.mark.parametrize("implementation", ["fused", "per_slot"])
def test_each_form_is_the_sum_of_rows(implementation: str, case: str, policy: str, dtype: torch.dtype) -> None:
    tokens, slots = TOKENS[case], embedding(policy, implementation, dtype)
    out_NX = slots(bags(tokens))
    assert out_NX.shape == (len(tokens), SLOTS * WIDTH) and out_NX.dtype == dtype
    direction_NX = torch.randn(out_NX.shape).to(dtype)
    (grad_Rd,) = torch.autograd.grad(out_NX, slots.table, direction_NX)
    table, u = slots.table.detach().double(), torch.finfo(dtype).eps / 2
    most = max((len(bag) for token in tokens for bag in token), default=0)
    expected_Rd, magnitude_Rd = torch.zeros(2, ROWS, WIDTH, dtype=torch.float64)
    for number, token in enumerate(tokens):
        for slot, bag in enumerate(token):
            part = slice(slot * WIDTH, (slot + 1) * WIDTH)
            rows = [plain_row(sign, policy) for sign in bag]
            expected, magnitude = table[rows].sum(0), table[rows].abs().sum(0)
            assert ((out_NX[number, part].double() - expected).abs() <= most * u * magnitude).all()
            for row in filter(None, rows):
                expected_Rd[row] += direction_NX[number, part]
                magnitude_Rd[row] += direction_NX[number, part].abs()
    assert ((grad_Rd.double() - expected_Rd).abs() <= 8 * u * magnitude_Rd).all()


def test_the_gradient_of_a_popular_sign_is_not_added_up_in_bf16() -> None:
    """1000 weights of 0.5 are 500, which bfloat16 holds; a running sum of them in bfloat16 stands still at 128."""
    slots = embedding("modulo", dtype=torch.bfloat16)
    out_NX = slots(bags([[[5], [], []]] * 1000))
    (grad_Rd,) = torch.autograd.grad(out_NX, slots.table, torch.full_like(out_NX, 0.5))
    assert grad_Rd[5].tolist() == [500.0] * WIDTH


def test_the_padding_row_is_zero_and_learns_nothing() -> None:
    slots = embedding("modulo")
    assert not slots.table[0].any() and slots.table[1:].all()
    (grad_Rd,) = torch.autograd.grad(slots(bags(TOKENS["sign 0"])).sum(), slots.table)
    assert not grad_Rd[0].any() and grad_Rd[5].tolist() == [2.0] * WIDTH


def test_both_forms_read_a_padding_row_that_is_not_zero() -> None:
    """Foreign weights may have one; then, too, no form may differ from another, nor training from use."""
    fused, plain = embedding("clamp"), embedding("clamp", "per_slot")
    for slots in (fused, plain):
        slots.table.data[0] = 1.0
    layout = bags(TOKENS["sign 0"])
    with torch.no_grad():
        unlearned_NX = fused(layout)
    torch.testing.assert_close(fused(layout), plain(layout))
    torch.testing.assert_close(fused(layout), unlearned_NX)
    assert fused(layout)[0, :WIDTH].tolist() == [1.0] * WIDTH


def test_the_same_after_a_round_trip_of_the_state() -> None:
    fused, plain = embedding("modulo"), embedding("modulo", "per_slot")
    plain.reset_parameters()
    layout = bags(TOKENS["signs beyond the table and negative"])
    assert not plain(layout).equal(fused(layout))
    plain.load_state_dict(fused.state_dict())
    torch.testing.assert_close(plain(layout), fused(layout))


def test_what_a_checkpoint_stores_refuses_another_policy() -> None:
    config = SlotConfig(SLOTS, ROWS, WIDTH, "modulo")
    stored = json.loads(json.dumps(config.stored()))
    config.refuse_other(stored)
    with pytest.raises(ConfigError, match=r"signid_mode='clamp': the checkpoint was trained with 'modulo'.*set signid_mode='modulo'"):
        SlotConfig(SLOTS, ROWS, WIDTH, "clamp").refuse_other(stored)
    with pytest.raises(ConfigError, match=r"rows=12: the checkpoint was trained with 11"):
        SlotConfig(SLOTS, 12, WIDTH, "modulo").refuse_other(stored)
    with pytest.raises(ConfigError, match=r"signid_mode='modulo'.*None"):
        config.refuse_other({key: value for key, value in stored.items() if key != "signid_mode"})


def test_what_does_not_exist_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match=r"signid_mode='hash'.*clamp, modulo"):
        SlotConfig(SLOTS, ROWS, WIDTH, "hash")
    with pytest.raises(ConfigError, match=r"slots='fast'.*fused, per_slot"):
        embedding("clamp", "fast")


def test_counts_that_are_not_those_of_the_signs_are_refused() -> None:
    with pytest.raises(DataError, match="adds up to 3, but there are 2 signs"):
        SlotBags.of(np.array([1, 2]), np.array([[1, 2, 0]]))
