"""Embedding and head are read from the target's files alone, sharded or whole, tied or not."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from specforge.errors import FeatureError
from specforge.features.tables import TargetTables
from specforge.features.target import Target


def save(folder: Path, tied: bool = False, max_shard_size: str = "1GB") -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, bos_token_id=1, eos_token_id=[2, 5], rope_parameters={"rope_type": "default", "rope_theta": 123.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    model.save_pretrained(folder, max_shard_size=max_shard_size)
    return model


@pytest.mark.parametrize(("tied", "max_shard_size", "shards"), [(False, "1GB", 1), (False, "20KB", 7), (True, "1GB", 1)])
def test_tables_are_the_models(tmp_path: Path, tied: bool, max_shard_size: str, shards: int) -> None:
    model = save(tmp_path, tied, max_shard_size)
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    loads = Target.loads
    tables = TargetTables.read(tmp_path)
    assert Target.loads == loads
    assert torch.equal(tables.embedding, model.get_input_embeddings().weight)
    assert torch.equal(tables.head, model.get_output_embeddings().weight)
    assert (tables.head is tables.embedding) == tied


def test_shape_of_the_target(tmp_path: Path) -> None:
    save(tmp_path)
    config = TargetTables.read(tmp_path).config
    assert (config.hidden_size, config.intermediate_size, config.num_hidden_layers, config.vocab_size) == (32, 48, 4, 64)
    assert (config.num_attention_heads, config.num_key_value_heads, config.head_dim) == (4, 2, 8)
    assert (config.bos_token_id, config.eos_token_ids, config.rope_parameters["rope_theta"]) == (1, (2, 5), 123.0)


def test_unknown_names_are_shown(tmp_path: Path) -> None:
    save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["lm_head.qweight"] = weights.pop("lm_head.weight")
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    with pytest.raises(FeatureError, match=r"no head found, a key ending in lm_head.weight or .*lm_head.qweight"):
        TargetTables.read(tmp_path)


def test_embedding_of_an_extra_layer_is_not_mistaken(tmp_path: Path) -> None:
    model = save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["model.layers.0.extra.embed_tokens.weight"] = torch.zeros(64, 32)
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    assert torch.equal(TargetTables.read(tmp_path).embedding, model.get_input_embeddings().weight)


def test_index_cannot_name_files_outside(tmp_path: Path) -> None:
    folder = tmp_path / "target"
    save(folder, max_shard_size="20KB")
    index_path = folder / "model.safetensors.index.json"
    index = json.loads(index_path.read_text())
    index["weight_map"]["lm_head.weight"] = "../other.safetensors"
    index_path.write_text(json.dumps(index))
    with pytest.raises(FeatureError, match="must be relative"):
        TargetTables.read(folder)


def test_what_is_no_target_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"model.target_path=.*there is no config.json"):
        TargetTables.read(tmp_path)
    save(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"torn")
    with pytest.raises(FeatureError, match="not readable as safetensors"):
        TargetTables.read(tmp_path)
