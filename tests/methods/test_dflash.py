"""DFlash against a slow form in float64 that builds each block by itself, and what its plan promises."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge import files
from specforge.config.methods import DFlashOptions
from specforge.distributed import World
from specforge.errors import ConfigError, SpecForgeError
from specforge.eval.evaluator import Evaluator
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.methods.base import Moment
from specforge.methods.dflash import DFlash, derive_config
from tests.slow_blocks import assert_equals_slow_form, ragged, sharpen, slow_losses, slow_outputs, slow_weights
from tests.tiny import AUX

SLIDING: dict[str, Any] = {"layers": 3, "layer_types": ("full_attention", "sliding_attention", "full_attention"), "sliding_window": 6}
SPARSE = {"experts": 3, "intermediate_size": 24, "balance_weight": 0.0}
LOSSES = ["ce", "kl", "tv", "lk_alpha", "lk_lambda", "dpace", "dpace_prefix", "dpace_continuation"]
MOMENT = Moment(seed=3, step=7, total_steps=10)


def make_dflash(target_path: Path, store: LocalFeatureStore, **options: Any) -> DFlash:
    """In float64, with sharp weights."""
    chosen: dict[str, Any] = {"block_size": 5, "anchors": 4, "layers": 2, "loss_chunk_rows": 7, "position_decay": 3.0, **options}
    method = DFlash.build(DFlashOptions(**chosen), TargetTables.read(target_path), store, 0).double()
    sharpen(method)
    return method


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["evaluation", "training"])
@pytest.mark.parametrize("options", [{"loss": loss} for loss in LOSSES] + [SLIDING, SPARSE], ids=str)
def test_blocks_equal_the_slow_form(options: dict[str, Any], moment: Moment | None, target_path: Path, store: LocalFeatureStore) -> None:
    method = make_dflash(target_path, store, **options)

    def slow_block(sample: SampleFeatures, anchor: int, drafts: int) -> tuple[torch.Tensor, list[float], torch.Tensor]:
        log_q_KV = (slow_outputs(method, sample, anchor)[1 : drafts + 1] @ method.head_VH.T).log_softmax(-1)
        factors, weights = slow_weights(method, sample, anchor, log_q_KV)
        losses = slow_losses(method, sample, anchor, log_q_KV)
        return sum((f * x for f, x in zip(factors, losses, strict=True)), torch.zeros(())), weights, log_q_KV

    assert_equals_slow_form(method, store, moment, slow_block)


def test_an_evaluation_begins_at_every_start(target_path: Path, store: LocalFeatureStore) -> None:
    method, batch = make_dflash(target_path, store), DraftBatch.pack(range(len(store)), ragged(store))
    mask, document = batch.loss_mask, torch.from_numpy(batch.documents.index_T)
    starts = (mask[:-1] & mask[1:] & (document[:-1] == document[1:])).nonzero()[:, 0]
    assert method.plan(batch).anchors_A.tolist() == starts.tolist()
    anchors_A = method.plan(DraftBatch.read(store, range(len(store)))).anchors_A
    numbers = Evaluator(store, World(), draft_tokens=4, micro_batch_tokens=40, bootstrap=0).evaluate(method)
    assert numbers["eval/starts"] == len(anchors_A)


def test_anchors_follow_from_seed_step_and_sample_alone(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_dflash(target_path, store)

    def drawn(numbers: list[int], moment: Moment) -> dict[int, list[int]]:
        batch = DraftBatch.read(store, numbers)
        anchors, first = method.plan(batch, moment).anchors_A, batch.documents.starts
        return {
            number: [a - start for a in anchors.tolist() if start <= a < end]
            for number, start, end in zip(numbers, first.tolist(), first[1:].tolist(), strict=False)
        }

    together = drawn([0, 1, 2, 3, 4, 5], MOMENT)
    assert together == {number: drawn([number], MOMENT)[number] for number in (5, 2, 0, 1, 3, 4)}
    assert together == drawn([3, 5, 1, 0, 4, 2], MOMENT)
    assert {len(anchors) for anchors in together.values()} == {1, 4}, "four, or all of a short sample"
    for moment in (replace(MOMENT, step=8), replace(MOMENT, seed=4)):
        assert drawn([0, 1, 2, 3, 4, 5], moment) != together
    assert len({tuple(drawn([5], replace(MOMENT, step=step))[5]) for step in range(20)}) > 10
    twins = method.plan(DraftBatch.pack([5, 6], [store.read(5)] * 2), MOMENT).anchors_A
    assert (twins[4:] - len(store.read(5).input_ids)).tolist() != twins[:4].tolist(), "the same text, another sample"
    everywhere = {a for step in range(60) for a in drawn([5], replace(MOMENT, step=step))[5]}
    assert everywhere == set(method.plan(DraftBatch.read(store, [5])).anchors_A.tolist())


def test_documents_do_not_leak(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_dflash(target_path, store, **SLIDING)

    def proposed(numbers: list[int]) -> list[torch.Tensor]:
        batch = DraftBatch.read(store, numbers)
        output = method(batch, method.plan(batch))
        return list(output.confidences_TK.split(batch.documents.lengths))

    for packed, alone in zip(proposed([1, 3, 0]), [proposed([number])[0] for number in (1, 3, 0)], strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_a_batch_without_a_start_weighs_nothing_and_still_has_gradients(target_path: Path, store: LocalFeatureStore) -> None:
    """No sample at all, and a sample of which no two neighbours are supervised."""
    method, lonely = make_dflash(target_path, store).float(), store.read(1)
    lonely = replace(lonely, loss_mask=torch.arange(len(lonely.input_ids)) % 2 == 0)
    for batch in (DraftBatch.empty(store.meta), DraftBatch.pack([1], [lonely])):
        for moment in (None, MOMENT):
            method.zero_grad()
            plan = method.plan(batch, moment)
            output = method(batch, plan)
            output.loss_sum.backward()
            assert (plan.weight, output.loss_sum.item(), output.tally["count"].sum()) == (0, 0, 0)
            assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 300}, r"block_size=300: the target has 256 positions"),
        ({"mask_token_id": 64}, r"mask_token_id=64: the target has 64 ids"),
        ({"mask_token_id": 31}, r"mask_token_id=31: occurs in the training rows"),
        ({"layers": 2, "layer_types": ("full_attention",)}, r"layer_types=\['full_attention'\]"),
        ({"sliding_window": 4}, r"sliding_window=4"),
        ({"block_size": 1}, r"block_size=1: must be at least 2"),
        ({"dpace_alpha": 0.0}, r"dpace_alpha=0.0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any], message: str, target_path: Path, store: LocalFeatureStore) -> None:
    with pytest.raises(SpecForgeError, match=message):
        make_dflash(target_path, store, **options)


def test_layer_types_out_of_a_stored_run(target_path: Path, store: LocalFeatureStore, tmp_path: Path) -> None:
    """JSON has lists where options and shapes say tuple."""
    options = DFlashOptions(**{**SLIDING, "layer_types": list(SLIDING["layer_types"])})
    tables = TargetTables.read(target_path)
    method = DFlash.build(options, tables, store, 0)
    files.write_json(tmp_path / "config.json", method.config_dict())
    assert DFlash.read(options, tables, tmp_path).draft.config == method.draft.config


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2, 4), (1, 2, 5)])
def test_layers_that_no_engine_hands_out_are_refused(layers: tuple[int, ...], target_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aux_layer_ids=\[.*\]: must lie between 1 and 3"):
        derive_config(DFlashOptions(), TargetTables.read(target_path), layers, 0)


def test_the_mask_token_is_the_highest_unused_id(target_path: Path, store: LocalFeatureStore) -> None:
    used = {int(token) for number in range(len(store)) for token in store.read(number).input_ids}
    assert make_dflash(target_path, store).draft.config.mask_token_id == max(set(range(64)) - used)
    assert make_dflash(target_path, store, mask_token_id=1).draft.config.mask_token_id == 1


def test_captured_layers() -> None:
    """The published five of 36, one of a single layer, and what a shallow target has."""
    for layers, of, expected in (
        (5, 36, (2, 10, 18, 26, 34)), (1, 36, (19,)), (2, 8, (2, 6)), (5, 8, (2, 3, 4, 5, 6)), (5, 4, AUX), (2, 4, (1, 3)), (5, 2, (1,))
    ):  # fmt: skip
        assert DFlashOptions(layers=layers).captured_layers(of) == expected
