"""Domino against a slow form in float64, and how its two losses share the training."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F

from specforge.config.methods import DominoOptions
from specforge.errors import ConfigError
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.methods.base import Moment
from specforge.methods.domino import Domino
from tests.slow_blocks import assert_equals_slow_form, sharpen, slow_losses, slow_outputs, slow_weights

MOMENT = Moment(seed=3, step=2, total_steps=10)


def make_domino(target_path: Path, store: LocalFeatureStore, **options: Any) -> Domino:
    """In float64, with sharp weights."""
    chosen: dict[str, Any] = {
        "block_size": 4, "anchors": 4, "layers": 2, "loss_chunk_rows": 7, "position_decay": 3.0, "gru_hidden_dim": 6, "emb_dim": 5,
        "base_decay": 0.5, **options,
    }  # fmt: skip
    method = Domino.build(DominoOptions(**chosen), TargetTables.read(target_path), store, 0).double()
    sharpen(method)
    return method


def slow_corrections(method: Domino, sample: SampleFeatures, anchor: int, outputs_KH: torch.Tensor) -> torch.Tensor:
    """[K, V], by torch's own cell."""
    state, tensors, corrections = torch.zeros(1, 6, dtype=torch.float64), dict(method.draft.named_parameters()), []
    for k, output in enumerate(outputs_KH):
        word = method.embedding_VH[int(sample.input_ids[anchor + k])].double()[None]
        state = torch.gru_cell(word, state, tensors["prefix_gru.weight_ih_l0"], tensors["prefix_gru.weight_hh_l0"])
        inner = F.silu(tensors["embed_proj.0.weight"] @ torch.cat([output, state[0]]))
        corrections.append(tensors["embed_proj.2.weight"] @ inner * (k > 0))
    return torch.stack(corrections)


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["evaluation", "training"])
@pytest.mark.parametrize("loss", ["ce", "kl", "lk_lambda", "dpace"])
def test_blocks_equal_the_slow_form(loss: str, moment: Moment | None, target_path: Path, store: LocalFeatureStore) -> None:
    method = make_domino(target_path, store, loss=loss)
    share = 0.0 if moment is None else 1 - 2 / 5

    def slow_block(sample: SampleFeatures, anchor: int, drafts: int) -> tuple[torch.Tensor, list[float], torch.Tensor]:
        outputs_KH = slow_outputs(method, sample, anchor)[:drafts]
        base_KV = outputs_KH @ method.head_VH.T
        final_KV = (base_KV + slow_corrections(method, sample, anchor, outputs_KH)).log_softmax(-1)
        factors, weights = slow_weights(method, sample, anchor, final_KV)
        losses = (slow_losses(method, sample, anchor, each) for each in (final_KV, base_KV.log_softmax(-1)))
        mixed = [(1 - share) * final + share * base for final, base in zip(*losses, strict=True)]
        return sum((f * x for f, x in zip(factors, mixed, strict=True)), torch.zeros(())), weights, final_KV

    assert_equals_slow_form(method, store, moment, slow_block)


def test_the_base_loss_fades(target_path: Path, store: LocalFeatureStore) -> None:
    """From all of the loss to nothing, on a line; an evaluation measures what is decoded."""
    for base_decay, expected in ((1.0, [1.0, 0.9, 0.5, 0.1, 0.0]), (0.5, [1.0, 0.8, 0.0, 0.0, 0.0]), (0.01, [1.0, 0.0, 0.0, 0.0, 0.0])):
        method = make_domino(target_path, store, base_decay=base_decay)
        assert [method.base_share(Moment(0, step, 10)) for step in (0, 1, 5, 9, 10)] == pytest.approx(expected)
        assert method.base_share(None) == 0


def test_a_new_draft_corrects_nothing(target_path: Path, store: LocalFeatureStore) -> None:
    method = Domino.build(DominoOptions(layers=1), TargetTables.read(target_path), store, 0)
    assert not method.draft.correction_VE.any()
    assert all(p.any() for name, p in method.draft.named_parameters() if name != "embed_proj.2.weight")


def test_tensors_have_the_names_of_the_engines(target_path: Path, store: LocalFeatureStore) -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in make_domino(target_path, store).draft.state_dict().items()}
    assert {name: shape for name, shape in shapes.items() if not name.startswith("layers.")} == {
        "fc.weight": (32, 96), "hidden_norm.weight": (32,), "norm.weight": (32,), "prefix_gru.weight_ih_l0": (18, 32),
        "prefix_gru.weight_hh_l0": (18, 6), "embed_proj.0.weight": (5, 38), "embed_proj.2.weight": (64, 5),
    }  # fmt: skip


@pytest.mark.parametrize("options", [{"gru_hidden_dim": 0}, {"emb_dim": 0}, {"base_decay": 0.0}, {"base_decay": 1.5}], ids=str)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"method.options.{next(iter(options))}="):
        DominoOptions(**options)
