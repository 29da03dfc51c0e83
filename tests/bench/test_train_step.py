"""The floor is counted as by hand, the numbers have their names, and what is kept for the backward is linear in tokens."""

import json
import math

import pytest

from specforge.bench.blocks import BlockShape, make_dflash
from specforge.bench.blocks import counted_flops as counted_block_flops
from specforge.bench.synthetic import SHAPES, Shape, counted_flops, make_batch, make_method
from specforge.bench.train_step import measure, state_mib
from specforge.cli.__main__ import main
from specforge.layers import attention

TINY = Shape(
    hidden=8, intermediate=6, heads=2, kv_heads=1, head_dim=4, vocab=20, draft_vocab=10, documents=2, tokens=6, draft_tokens=2, prompt=3
)  # fmt: skip


def test_counted_flops_by_hand() -> None:
    """Tokens 3, 4, 5 of each document are supervised: rows 1, 2, 3 at step 0 (targets 3, 4, 5) and 0, 1, 2 there and at step 1.

    Step 0 computes rows 0..3, since row 0 is needed at step 1 (target 3); step 1 computes rows 0, 1, 2. For each document:
    keys and values of 6 tokens, 16 x 8 each; rows 4 and 3, each q 16 x 8, o 8 x 8, feed-forward 3 x 8 x 6; keys and values
    of 3 own rows; heads 8 x 10 at 3 + 3 supervised rows; attention pairs 1+2+3+4 and (1+2+3) + 3 own keys; 3 teachers.
    """
    linear = 6 * 128 + 7 * (128 + 64 + 144) + 3 * 128 + 6 * 80
    attention = (10 + 6 + 3) * 2 * 4
    expected = 2 * (6 * linear + 12 * attention + 4 * 6 * 3 * 64 + 2 * 3 * 80)
    method = make_method(TINY)
    batch = make_batch(TINY, method)
    assert counted_flops(TINY, method.plan(batch), batch.documents) == expected


def test_counted_flops_of_the_small_shape() -> None:
    """12.46 GFLOP were counted with every row at every step; the rows at the documents' ends, 2 + j at step j, are not needed."""
    shape = SHAPES["small"]
    every_row = 6 * 249_856 * 1024 * 7 + 12 * 128 * 128 * 1024 + 1536 * (131_584 * 7 + 1024 * 21) + 2 * 1024 * 128 * 256
    assert every_row == pytest.approx(12.46e9, rel=1e-3)
    method = make_method(shape)
    batch = make_batch(shape, method)
    counted = counted_flops(shape, method.plan(batch), batch.documents)
    assert 0.96 * every_row < counted < every_row


def test_the_command_ends_in_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in vars(TINY).items()]
    assert main(["bench", "train-step", *flags, "--repeats=1"]) == 0
    *_, growth, last = capfd.readouterr().out.splitlines()
    assert "at 1,024 tokens" in growth
    numbers = json.loads(last)
    assert set(numbers) == {"ms", "floor_ms", "ratio_to_floor", "half_supervised_ratio", "peak_rss_mb", "peer_ratio", "loss"}
    assert numbers["peer_ratio"] is None
    assert numbers["ratio_to_floor"] == pytest.approx(numbers["ms"] / numbers["floor_ms"])


def test_the_loss_is_kl() -> None:
    """A draft that knows nothing, of a target that knows nothing: both are near-uniform over ten ids, so KL is small, CE is not."""
    loss = measure(TINY, 1, None)["loss"]
    assert loss is not None
    assert 0 < loss < TINY.draft_tokens * math.log(10)


@pytest.mark.parametrize(("kept_keys", "linear"), [(attention.KEPT_KEYS, True), (4096, False)])
def test_state_grows_with_tokens_and_not_with_their_square(kept_keys: int, linear: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: with every attention weight kept, it grows with their square."""
    monkeypatch.setattr(attention, "KEPT_KEYS", kept_keys)
    short, long = (state_mib(TINY, tokens) for tokens in (2048, 4096))
    assert (long / short < 2) == linear


def test_counted_flops_of_blocks_by_hand() -> None:
    """Both documents have all their starts as anchors: 3 and 4, with 3, 4 tokens before them, and drafts for tokens 4, 5 and 5.

    Two layers of 2 blocks of 3 rows a document. Context: 4 tokens' keys and values, 8 x 8. Rows: q 8 x 8, k and v 8 x 8; o 8 x 8 and
    feed-forward 3 x 8 x 6, of 6 rows in the first layer and 3 drafts in the last. Pairs: 3 x 6 + 3 x 7, then 2 x 6 + 7.
    """
    shape = BlockShape(
        hidden=8, intermediate=6, heads=2, kv_heads=1, head_dim=4, vocab=20, layers=2, block_size=3, anchors=9,
        documents=2, tokens=6, prompt=3,
    )  # fmt: skip
    method, batch = make_dflash(shape)
    plan = method.plan(batch)
    assert plan.anchors_A.tolist() == [3, 4, 9, 10]
    fusion, head = 4 * 4 * 2 * 64, 4 * 3 * 8 * 20
    context = 6 * 4 * 64
    first = context + 4 * (6 * 64 + 6 * 64) + 6 * 6 * (64 + 144) + 12 * 8 * 39
    last = context + 6 * (3 * 64 + 6 * 64) + 6 * 3 * (64 + 144) + 12 * 8 * 19
    assert counted_block_flops(shape, plan, batch.documents) == 2 * (fusion + head + first + last)


def test_the_step_of_dflash_ends_in_one_json_object(capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--tokens=20", "--hidden=16", "--heads=2", "--kv-heads=1", "--head-dim=8", "--vocab=40", "--repeats=1"]
    assert main(["bench", "train-step", "--method=dflash", *flags]) == 0
    numbers = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert set(numbers) == {"ms", "floor_ms", "ratio_to_floor", "peak_rss_mb", "loss"}
    assert 0 < numbers["loss"] < 3 * math.log(40)
    assert main(["bench", "train-step", "--method=dflash", "--draft-tokens=3"]) == 2
    assert "--draft-tokens: means nothing to a step of dflash" in capfd.readouterr().err
