"""Folders as others publish them: their layouts, names, data types and shards, and what they leave out."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.errors import ExportError
from specforge.export.reading import Imported, read_layout
from specforge.features.tables import TargetTables
from tests.export.checkpoints import ROPES
from tests.export.conftest import Saved
from tests.tiny import make_target


@pytest.fixture(scope="module")
def tables(stores: Any) -> TargetTables:
    return TargetTables.read(stores("default")[0])


def rewrite(folder: Path, config: Callable[[dict[str, Any]], object], name: Callable[[str], str] = str) -> dict[str, torch.Tensor]:
    """Another configuration, other names, in bfloat16, without our record; the tensors as they are now."""
    values = json.loads((folder / "config.json").read_text())
    config(values)
    (folder / "config.json").write_text(json.dumps(values))
    tensors = load_file(folder / "model.safetensors")
    tensors = {name(key): each.bfloat16() if each.is_floating_point() else each for key, each in tensors.items()}
    save_file(tensors, folder / "model.safetensors")
    (folder / "specforge.json").unlink()
    return tensors


def read_dflash(folder: Path, tables: TargetTables) -> Imported:
    return read_layout(folder, tables, None)


def test_a_dflash_draft_in_two_shards(exported: Saved, tables: TargetTables) -> None:
    """What its authors write: the block's keys in one place, flat RoPE, bfloat16, an index, and names that begin with `model.`."""
    folder = exported("dflash", "sglang", layers=2, rope="default")
    ours = (
        "eagle_aux_hidden_state_layer_ids", "target_layer_ids", "target_hidden_size", "draft_vocab_size", "mask_token_id",
        "rope_parameters", "torch_dtype", "sample_from_anchor",
    )  # fmt: skip

    def published(values: dict[str, Any]) -> None:
        for key in ours:
            values.pop(key)
        values["dflash_config"] = {key: values["dflash_config"][key] for key in ("mask_token_id", "target_layer_ids")}
        values |= {"dtype": "bfloat16", "auto_map": {"AutoModel": "dflash.DFlashDraftModel"}, "attention_dropout": 0.0}

    tensors = rewrite(folder, published, lambda name: f"model.{name}")
    (folder / "model.safetensors").unlink()
    shards = [dict(list(tensors.items())[part::2]) for part in (0, 1)]
    for number, shard in enumerate(shards):
        save_file(shard, folder / f"model-0000{number + 1}-of-00002.safetensors")
    imported = read_dflash(folder, tables)
    assert imported.options.block_size == 4 and imported.options.mask_token_id == 63 and imported.config.aux_layer_ids == (1, 2, 3)
    assert all(torch.equal(imported.tensors[name.removeprefix("model.")], tensor) for name, tensor in tensors.items())

    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ExportError, match="missing, too many"):
        read_dflash(folder, tables)


def test_a_mask_token_that_is_a_word(exported: Saved, tables: TargetTables) -> None:
    folder = exported("dflash", "sglang", rope="default")

    def worded(values: dict[str, Any]) -> None:
        values.pop("mask_token_id")
        values["dflash_config"] = {"target_layer_ids": [0, 1, 2], "mask_token": "<|MASK|>"}

    rewrite(folder, worded)
    with pytest.raises(ExportError, match=r"only mask_token '<\|MASK\|>'; write the id"):
        read_dflash(folder, tables)


@pytest.mark.parametrize(("layers", "captured"), [(1, (5,)), (2, (2, 6)), (3, (2, 4, 6))])
def test_layers_that_nobody_says(layers: int, captured: tuple[int, ...], exported: Saved, tmp_path: Path) -> None:
    """Of layers 0 to 7 engines hand to DFlash drafts of 1, 2 and 3 layers the outputs of 4; of 1 and 5; of 1, 3 and 5. To EAGLE-3 those of
    1, 3 and 4."""
    deep = TargetTables.read(make_target(tmp_path / "target", num_hidden_layers=8, rope_parameters=ROPES["default"]))

    def silent(values: dict[str, Any]) -> None:
        for key in ("eagle_aux_hidden_state_layer_ids", "target_layer_ids", "block_size"):
            values.pop(key, None)
        values["dflash_config"] = {"mask_token_id": 63}

    folder = exported("dflash", "sglang", layers=layers, rope="default")
    tensors = rewrite(folder, silent)
    tensors["fc.weight"] = tensors["fc.weight"][:, :32].repeat(1, len(captured))
    tables = {"embed_tokens.weight": deep.embedding, "lm_head.weight": deep.head}
    save_file(tensors | tables, folder / "model.safetensors")
    imported = read_layout(folder, deep, None)
    assert imported.config.aux_layer_ids == captured and imported.options.block_size == 16

    folder = exported("eagle3", "sglang", rope="default")
    rewrite(folder, lambda values: (values.pop("eagle_aux_hidden_state_layer_ids"), values.pop("eagle_config")))
    assert read_layout(folder, deep, 3).config.aux_layer_ids == (2, 4, 5)


def test_norms_by_their_old_and_nested_names(exported: Saved, tables: TargetTables) -> None:
    old = {f"fc_norm.{number}.weight": f"aux_norm_{word}.weight" for number, word in enumerate(("low", "mid", "high"))}
    folder = exported("eagle3", "sglang", fc_norm=True, rope="default")
    plain = load_file(folder / "model.safetensors")
    rewrite(folder, lambda values: (values.pop("fc_norm"), values.update(use_aux_norm=True)), lambda name: old.get(name, name))
    imported = read_layout(folder, tables, 3)
    assert imported.options.fc_norm and torch.equal(imported.tensors["fc_norm.1.weight"], plain["fc_norm.1.weight"].bfloat16())

    for change in ({"tie_word_embeddings": True}, {"eagle_config": {"use_aux_hidden_state": False}}):
        (folder / "config.json").write_text(json.dumps({**json.loads((folder / "config.json").read_text()), **change}))
        with pytest.raises(ExportError, match="its head is its embedding, or it captures no layers"):
            read_layout(folder, tables, 3)

    folder = exported("eagle3", "vllm", norm_before_fc=True, rope="default")
    rewrite(folder, lambda values: values.pop("norm_before_fc"))
    assert read_layout(folder, tables, 3).options.norm_before_fc


@pytest.mark.parametrize(
    ("change", "cause"),
    [
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"is_causal": True}, "is_causal=True"),
        ({"attention_sink_bias": True}, "attention_sink_bias=True"),
        ({"dflash_config": {"output_multiplier": 2.0, "mask_token_id": 63}}, "output_multiplier=2.0"),
        ({"quantization_config": {"quant_method": "fp8"}}, "quantization_config="),
        ({"num_hidden_layers": 10**12}, "weights are 14 tensors"),
        ({"rope_scaling": "yarn", "rope_parameters": None}, "rope_scaling='yarn' must be of type dict"),
        ({"architectures": {"a": 1}}, "is a draft of kind 'none'"),
        (
            {"eagle_aux_hidden_state_layer_ids": [2, 3, 4], "target_layer_ids": None, "dflash_config": {"mask_token_id": 63}},
            r"reads hidden states \(2, 3, 4\); of a target of 4 layers",
        ),
    ],
    ids=str,
)
def test_what_a_draft_here_is_not(change: dict[str, Any], cause: str, exported: Saved, tables: TargetTables) -> None:
    folder = exported("dflash", "sglang", rope="default")
    rewrite(folder, lambda values: values.update(change))
    with pytest.raises(ExportError, match=cause):
        read_dflash(folder, tables)
