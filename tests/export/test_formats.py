"""Every draft in every layout that an engine loads: the same network, the trained logits, and refusals with their reason."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from specforge.cli.__main__ import main
from specforge.distributed import World
from specforge.export.contract.folder import read_folder
from tests.export.checkpoints import ROPES, save
from tests.export.conftest import Saved
from tests.ranks import run_ranks

DRAFTS: list[tuple[str, dict[str, Any]]] = [
    ("eagle3", {}),
    ("eagle3", {"layers": 2, "fc_norm": True, "norm_output": True}),
    ("eagle3", {"norm_before_fc": True, "head": "frozen"}),
    ("eagle3", {"draft_vocab_size": 0, "rope": "yarn"}),
    ("peagle", {"layers": 2, "fc_norm": True, "rope": "linear"}),
    ("dflash", {"layers": 2}),
    ("dflash", {"rope": "yarn", "layers": 2, "layer_types": ("sliding_attention", "full_attention"), "sliding_window": 3}),
    ("domino", {"layers": 2, "rope": "default"}),
    ("dspark", {"layers": 2}),
    ("dspark", {"markov_head": "gated"}),
    ("dspark", {"markov_head": "rnn"}),
]
LAYOUTS = {
    "eagle3": {"hf", "sglang", "vllm", "speculators"},
    "peagle": {"hf", "vllm", "speculators"},
    "dflash": {"hf", "sglang", "vllm", "speculators"},
    "domino": {"hf", "sglang"},
    "dspark": {"hf", "sglang", "vllm", "speculators"},
}


def layouts_of(name: str, options: dict[str, Any]) -> set[str]:
    for_sglang_alone = "layer_types" in options or options.get("markov_head", "vanilla") != "vanilla"
    return LAYOUTS[name] - ({"vllm", "speculators"} if for_sglang_alone else set())


@pytest.mark.parametrize(("name", "options"), DRAFTS, ids=str)
def test_all_layouts_are_one_network_with_the_trained_logits(name: str, options: dict[str, Any], exported: Saved) -> None:
    """What was captured, the shape and each tensor; and the check of logits that every export makes is sharp in float32."""
    first = None
    for to in sorted(layouts_of(name, options)):
        folder = exported(name, to, **options)
        served = read_folder(folder)
        assert served.network.kind == name and served.network.hidden_state_ids == (1, 2, 3)
        assert json.loads((folder / "specforge.json").read_text())["verification"]["largest_difference"] < 1e-5
        assert main(["export", "--check", str(folder)]) == 0
        first = first or served
        assert served.network == first.network and served.tensors.keys() == first.tensors.keys()
        assert all(torch.equal(tensor, first.tensors[key]) for key, tensor in served.tensors.items())
        chain = name in ("eagle3", "peagle")
        tables = {"hf": {"embed_tokens.weight"} | (set() if chain else {"lm_head.weight"})}
        tables["speculators"] = {"embed_tokens.weight"} if chain else set()
        assert set(served.tables) == tables.get(to, set())


@pytest.mark.parametrize(("name", "options"), DRAFTS, ids=str)
def test_what_an_engine_cannot_serve_is_refused_with_the_reason(
    name: str, options: dict[str, Any], saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    reasons = {
        ("peagle", "sglang"): "SGLang has no P-EAGLE",
        ("domino", "vllm"): "vLLM has no Domino",
        ("domino", "speculators"): "vLLM has no Domino",
        ("dspark", "vllm"): "vanilla Markov head",
        ("dspark", "speculators"): "vanilla Markov head",
        ("dflash", "vllm"): "direction of attention",
        ("dflash", "speculators"): "direction of attention",
    }
    for to in {"hf", "sglang", "vllm", "speculators"} - layouts_of(name, options):
        assert main(["export", "--checkpoint", str(saved(name, **options)), "--to", to, "--out", str(tmp_path / "out")]) == 6
        error = capsys.readouterr().err
        assert reasons[name, to] in error and "choose --to" in error
        assert not (tmp_path / "out").exists() and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["eagle3", "dflash"])
def test_a_draft_of_experts_is_refused_in_every_format(name: str, saved: Saved, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for to in ("hf", "sglang", "vllm", "speculators"):
        assert main(["export", "--checkpoint", str(saved(name, experts=4)), "--to", to, "--out", str(tmp_path / "out")]) == 6
        assert "mixtures of 4 experts" in (error := capsys.readouterr().err) and "no other format helps" in error


def test_shards_of_two_ranks_become_one_file(stores: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a process group, and equal to what one rank saved."""

    def refuse(*_: Any, **__: Any) -> None:
        pytest.fail("an export asks for no process group")

    target, store = stores("llama3")
    run_ranks(save, "eagle3", target, store.folder, tmp_path / "two", {}, world=2)
    save(World(), "eagle3", target, store.folder, tmp_path / "one", {})
    assert len(list((tmp_path / "two" / "r-step0" / "draft").glob("*.safetensors"))) == 2
    monkeypatch.setattr(dist, "init_process_group", refuse)
    found = []
    for run in ("one", "two"):
        words = ["export", "--checkpoint", str(tmp_path / run / "latest"), "--to", "sglang", "--out", str(tmp_path / f"{run}-out")]
        assert main(words) == 0
        found.append(read_folder(tmp_path / f"{run}-out").tensors)
    assert all(torch.equal(tensor, found[0][key]) for key, tensor in found[1].items())


@pytest.mark.parametrize("rope", ROPES)
def test_rope_is_said_in_both_forms(rope: str, exported: Saved) -> None:
    for to in ("sglang", "speculators"):
        config = json.loads((exported("eagle3", to, rope=rope) / "config.json").read_text())
        layers = config.get("transformer_layer_config", config)
        assert layers["rope_theta"] == 5000.0 and layers["rope_parameters"] == ROPES[rope]
        scaling = {key: value for key, value in ROPES[rope].items() if key != "rope_theta"}
        assert layers["rope_scaling"] == (None if rope == "default" else scaling)
        assert layers["max_position_embeddings"] == 256


def test_both_countings_of_layers(exported: Saved) -> None:
    """The tiny draft reads hidden states 1, 2 and 3, the outputs of layers 0, 1 and 2."""
    config = json.loads((exported("eagle3", "sglang") / "config.json").read_text())
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2, 3]
    assert config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] == [0, 1, 2]
    config = json.loads((exported("dflash", "vllm") / "config.json").read_text())
    assert config["dflash_config"]["target_layer_ids"] == [layer - 1 for layer in config["eagle_aux_hidden_state_layer_ids"]]


def test_what_the_row_of_the_anchor_does_is_said_where_it_is_read(exported: Saved) -> None:
    """At the top level; vLLM wants no true one among DFlash's own keys."""
    for name, to, drafts in (("dflash", "vllm", False), ("dflash", "speculators", False), ("dspark", "vllm", True)):
        config = json.loads((exported(name, to) / "config.json").read_text())
        assert config["sample_from_anchor"] is drafts and "sample_from_anchor" not in config.get("dflash_config", {})


def test_who_reads_a_folder(exported: Saved) -> None:
    """SGLang does not know the layout of speculators, and its Domino computes in bfloat16 alone."""
    for to, engines in (("vllm", ["sglang", "vllm"]), ("speculators", ["vllm"])):
        assert json.loads((exported("eagle3", to) / "specforge.json").read_text())["loaded_by"] == engines
    assert "--dtype bfloat16" in (exported("domino", "sglang") / "README.md").read_text()
