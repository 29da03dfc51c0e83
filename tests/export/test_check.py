"""`specforge export --check`: whatever an engine would load wrongly or ignore is refused, and the cause is named."""

import ast
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.cli.__main__ import main
from specforge.errors import ExportError
from specforge.export.contract.folder import read_folder
from tests.export.conftest import Saved

Change = Callable[[Path], object]


def config(change: Callable[[dict[str, Any]], object]) -> Change:
    def act(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text())
        change(values)
        (folder / "config.json").write_text(json.dumps(values))

    return act


def tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Change:
    def act(folder: Path) -> None:
        values = load_file(folder / "model.safetensors")
        change(values)
        save_file({name: tensor.contiguous() for name, tensor in values.items()}, folder / "model.safetensors")

    return act


def renamed(values: dict[str, torch.Tensor]) -> None:
    for name in list(values):
        values[f"model.{name}"] = values.pop(name)


def truncated(folder: Path) -> None:
    data = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(data[:-100])


def rope(**changes: Any) -> Change:
    """In both forms; None takes a key away."""

    def act(values: dict[str, Any]) -> None:
        for part in (values["rope_parameters"], values["rope_scaling"]):
            part.update(changes)
            for key in [key for key, value in changes.items() if value is None]:
                part.pop(key)

    return config(act)


def prefixed(text: bytes) -> Change:
    def act(folder: Path) -> None:
        (folder / "config.json").write_bytes(text + (folder / "config.json").read_bytes())

    return act


def said_twice(folder: Path) -> None:
    """The last one is what is true: readers of JSON differ in which they take."""
    text = (folder / "config.json").read_text()
    (folder / "config.json").write_text('{"num_hidden_layers": 7,' + text.strip()[1:])


def indexed(folder: Path) -> None:
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"fc.weight": "../other.safetensors"}}))


def piped(folder: Path) -> None:
    """Reading it would wait for its writer."""
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")


def pickled(folder: Path) -> None:
    (folder / "mask_embedding.pt").write_bytes(b"")


def swapped(values: dict[str, torch.Tensor]) -> None:
    """Another vocabulary of the same size, in both tables: no shape tells, nor do the two contradict each other."""
    kept = torch.arange(len(values["d2t"])) + values["d2t"]
    other = torch.tensor(sorted({*range(64)} - {kept[-1].item()})[: len(kept)])
    values["d2t"], values["t2d"] = other - torch.arange(len(kept)), torch.zeros(64, dtype=torch.bool)
    values["t2d"][other] = True


EAGLE: dict[str, tuple[Change, str]] = {
    "no fc": (tensors(lambda t: t.pop("fc.weight")), r"fc\.weight is missing"),
    "no head": (tensors(lambda t: t.pop("lm_head.weight")), r"lm_head\.weight is missing"),
    "no final norm": (tensors(lambda t: t.pop("norm.weight")), r": norm\.weight is missing"),
    "no d2t": (tensors(lambda t: t.pop("d2t")), r"d2t is missing"),
    "d2t counts": (tensors(lambda t: t.update(d2t=torch.arange(len(t["d2t"])))), r"d2t is 0, 1, 2.*offsets"),
    "d2t holds ids": (tensors(lambda t: t.update(d2t=t["d2t"] + torch.arange(len(t["d2t"])))), r"d2t holds offsets|disagree"),
    "d2t is int32": (tensors(lambda t: t.update(d2t=t["d2t"].int())), r"d2t is torch\.int32, must be torch\.int64"),
    "no such vocabulary": (tensors(lambda t: t.update(t2d=~t["t2d"])), r"d2t and t2d disagree on target id"),
    "another vocabulary": (tensors(swapped), r"SHA-256"),
    "fc of two layers": (tensors(lambda t: t.update({"fc.weight": t["fc.weight"][:, :64]})), r"fc\.weight has shape \[32, 64\].*32, 96"),
    "a name too many": (tensors(lambda t: t.update(extra=torch.zeros(1))), r"extra: no engine reads this"),
    "prefixed names": (tensors(renamed), r"is missing"),
    "not finite": (tensors(lambda t: t["fc.weight"].fill_(torch.nan)), r"fc\.weight holds numbers that are not finite"),
    "one norm of two": (tensors(lambda t: t["layers.1.input_layernorm.weight"].add_(1)), r"hidden_norm.*input_layernorm.*differ"),
    "weights changed": (tensors(lambda t: t["fc.weight"].add_(1)), r"SHA-256"),
    "truncated": (truncated, r"truncated or damaged"),
    "a pickle": (pickled, r"a pickle can execute"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"must be model\.safetensors alone"),
    "not json": (lambda folder: (folder / "config.json").write_text("{"), r"not valid JSON"),
    "nested rope alone": (config(lambda c: c.pop("rope_theta")), r"rope_theta is missing; RoPE must be flat too.*10000"),
    "flat rope alone": (config(lambda c: c.pop("rope_parameters")), r"rope_parameters is missing.*10000"),
    "two thetas": (config(lambda c: c.update(rope_theta=1e4)), r"rope_theta=10000.*the two must agree"),
    "two scalings": (config(lambda c: c["rope_scaling"].update(factor=2.0)), r"rope_scaling=.*the two must agree"),
    "another rope": (
        config(lambda c: (c.update(rope_theta=1e4), c["rope_parameters"].update(rope_theta=1e4))),
        r"trained with rope .*5000",
    ),
    "training length as context": (config(lambda c: c.update(max_position_embeddings=64)), r"trained with max_positions 256.*64"),
    "one count for both": (
        config(lambda c: c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[1, 2, 3])),
        r"mean hidden states \[2, 3, 4\] and \[1, 2, 3\]",
    ),
    "no layers for SGLang": (config(lambda c: c["eagle_config"].pop("eagle_aux_hidden_state_layer_ids")), r"SGLang captures its own"),
    "no layers for vLLM": (config(lambda c: c.pop("eagle_aux_hidden_state_layer_ids")), r"vLLM captures its own"),
    "other layers": (
        config(lambda c: (
            c.update(eagle_aux_hidden_state_layer_ids=[1, 2, 4]), c["eagle_config"].update(eagle_aux_hidden_state_layer_ids=[0, 1, 3])
        )),
        r"trained with hidden_state_ids \(1, 2, 3\)",
    ),
    "layers descend": (
        config(lambda c: c.update(eagle_aux_hidden_state_layer_ids=[3, 2, 1])), r"layer_ids=\[3, 2, 1\]; must ascend",
    ),
    "a norm unsaid": (config(lambda c: c.pop("fc_norm")), r"fc_norm is missing; must be said"),
    "a norm ignored": (config(lambda c: c.update(fc_norm=False)), r"fc_norm\.0\.weight.*no engine reads"),
    "normed residual": (config(lambda c: c.update(norm_before_residual=True)), r"norm_before_residual=True; must be False"),
    "residual unsaid": (config(lambda c: c.pop("norm_before_residual")), r"norm_before_residual is missing"),
    "tied head": (config(lambda c: c.update(tie_word_embeddings=True)), r"tie_word_embeddings=True"),
    "no draft vocabulary": (config(lambda c: c.pop("draft_vocab_size")), r"draft_vocab_size is missing"),
    "unknown class": (config(lambda c: c.update(architectures=["LlamaForCausalLM"])), r"architectures=.*must be a list of one of"),
    "rope of a word": (config(lambda c: c.update(rope_scaling="yarn")), r"rope_scaling='yarn'.*the two must agree"),
    "rope without factor": (rope(factor=None), r"factor is missing; must be a positive number"),
    "rope of a word for a number": (rope(factor="8"), r"factor='8'; must be a positive number"),
    "rope of half a head": (rope(partial_rotary_factor=0.5), r"partial_rotary_factor=0\.5; engines act on it"),
    "rope of two types": (rope(type="yarn"), r"type='yarn'; rope_type says llama3"),
    "class is no word": (config(lambda c: c.update(architectures=[["x"]])), r"architectures=\[\['x'\]\]; must be a list of one of"),
    "layers without end": (config(lambda c: c.update(num_hidden_layers=10**12)), r"num_hidden_layers=10+; .*from 1 to 1024"),
    "eps of a thousand digits": (config(lambda c: c.update(rms_norm_eps=10**1000)), r"rms_norm_eps=10+; must be a positive number"),
    "quantised": (config(lambda c: c.update(quantization_config={"quant_method": "fp8"})), r"quantization_config=.*engines act on it"),
    "no such type": (config(lambda c: c.update(torch_dtype="int8")), r"torch_dtype='int8'; must be one of float32"),
    "two types": (config(lambda c: c.update(dtype="float16")), r"dtype='float16'; torch_dtype says otherwise"),
    "an index": (indexed, r"index\.json: engines look for weights where it says"),
    "a key twice": (said_twice, r"a key occurs twice"),
    "a byte order mark": (prefixed(b"\xef\xbb\xbf"), r"not valid JSON"),
    "a pipe": (piped, r"config\.json: is no file"),
    "another eps": (config(lambda c: c.update(rms_norm_eps=1e-2)), r"config\.json: its SHA-256"),
}  # fmt: skip

BLOCK: dict[str, tuple[Change, str]] = {
    "no fc": (tensors(lambda t: t.pop("fc.weight")), r"fc\.weight is missing"),
    "no query norm": (tensors(lambda t: t.pop("layers.0.self_attn.q_norm.weight")), r"q_norm\.weight is missing"),
    "no mask token": (config(lambda c: c.pop("mask_token_id")), r"mask_token_id is missing"),
    "two mask tokens": (config(lambda c: c["dflash_config"].update(mask_token_id=1)), r"mask_token_id=1; must be"),
    "a mask token beyond": (config(lambda c: c.update(mask_token_id=64)), r"mask_token_id=64; must be an id of the target"),
    "one count for both": (config(lambda c: c["dflash_config"].update(target_layer_ids=[1, 2, 3])), r"mean hidden states \[2, 3, 4\]"),
    "causal": (config(lambda c: c["dflash_config"].update(causal=True)), r"causal=True; must be False"),
    "no layer types": (config(lambda c: c.pop("layer_types")), r"layer_types is missing"),
    "two block sizes": (config(lambda c: c["dflash_config"].update(block_size=16)), r"block_size=16; must be 4"),
    "causal by its other name": (config(lambda c: c.update(is_causal=True)), r"is_causal=True; engines act on it"),
    "causal by its nested name": (config(lambda c: c["dflash_config"].update(is_causal=True)), r"is_causal=True; engines act on it"),
    "nested layer types": (
        config(lambda c: c["dflash_config"].update(layer_types=["sliding_attention"] * 2)),
        r"layer_types=.*dflash_config says",
    ),
    "layer types are no words": (config(lambda c: c.update(layer_types=[[], []])), r"layer_types=\[\[\], \[\]\]; must say"),
    "a window of nothing": (config(lambda c: c.update(sliding_window=8)), r"sliding_window=8; no layer slides"),
    "slides": (config(lambda c: c.update(use_sliding_window=True)), r"use_sliding_window=True; must be False"),
    "sinks": (config(lambda c: c["dflash_config"].update(attention_sink_bias=True)), r"attention_sink_bias=True; engines act on it"),
    "Domino by its flat name": (config(lambda c: c.update(projector_type="domino")), r"projector_type is missing; must be 'domino'"),
    "anchor's row unsaid": (config(lambda c: c.pop("sample_from_anchor")), r"sample_from_anchor is missing; must be False"),
    "the last layer": (config(lambda c: c.update(num_target_layers=3)), r"num_target_layers=3; hidden state 3"),
}

SPECULATORS: dict[str, tuple[Change, str]] = {
    "no layers": (config(lambda c: c.pop("transformer_layer_config")), r"transformer_layer_config is missing"),
    "no target": (config(lambda c: c["speculators_config"].pop("verifier")), r"verifier is missing"),
    "no embedding": (tensors(lambda t: t.pop("embed_tokens.weight")), r"embed_tokens\.weight is missing; speculators would go on"),
    "no number of drafts": (
        config(lambda c: c["speculators_config"]["proposal_methods"][0].pop("speculative_tokens")), r"speculative_tokens is missing",
    ),
    "nested rope alone": (config(lambda c: c["transformer_layer_config"].pop("rope_scaling")), r"rope_scaling is missing"),
    "SGLang's count": (config(lambda c: c.update(eagle_aux_hidden_state_layer_ids=[0, 1, 2])), r"means the embeddings"),
    "other layers": (config(lambda c: c.update(eagle_aux_hidden_state_layer_ids=[1, 2, 4])), r"trained with hidden_state_ids \(1, 2, 3\)"),
    "no captured layers": (config(lambda c: c.pop("eagle_aux_hidden_state_layer_ids")), r"eagle_aux_hidden_state_layer_ids is missing"),
    "residual unsaid": (config(lambda c: c.pop("norm_before_residual")), r"norm_before_residual is missing"),
    "lossy": (
        config(lambda c: c["speculators_config"]["proposal_methods"][0].update(accept_tolerance=0.5)), r"accept_tolerance=0\.5; must be",
    ),
    "another method": (config(lambda c: c["speculators_config"].update(algorithm="dflash")), r"algorithm='dflash'; must be 'eagle3'"),
}  # fmt: skip


SPECULATORS_BLOCK: dict[str, tuple[Change, str]] = {
    "layer types beside the layers": (
        config(lambda c: c.update(layer_types=c["transformer_layer_config"].pop("layer_types"))), r"layer_types is missing",
    ),
    "rnn": (config(lambda c: c.update(markov_head_type="rnn")), r"markov_head_type='rnn'; must be 'vanilla'"),
    "longer than the block": (
        config(lambda c: c["speculators_config"]["proposal_methods"][0].update(speculative_tokens=5)), r"speculative_tokens=5; .* to 4",
    ),
}  # fmt: skip


def assert_refused(folder: Path, change: Change, cause: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["export", "--check", str(folder)]) == 0
    change(folder)
    capsys.readouterr()
    assert main(["export", "--check", str(folder)]) == 6
    assert re.search(cause, capsys.readouterr().err)


@pytest.mark.parametrize("mutation", EAGLE)
def test_a_changed_eagle3_folder(mutation: str, exported: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(exported("eagle3", "sglang", layers=2, fc_norm=True), *EAGLE[mutation], capsys)


@pytest.mark.parametrize("mutation", BLOCK)
def test_a_changed_block_folder(mutation: str, exported: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(exported("dflash", "vllm", layers=2), *BLOCK[mutation], capsys)


@pytest.mark.parametrize("mutation", SPECULATORS)
def test_a_changed_speculators_folder(mutation: str, exported: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(exported("eagle3", "speculators"), *SPECULATORS[mutation], capsys)


@pytest.mark.parametrize("mutation", SPECULATORS_BLOCK)
def test_a_changed_block_folder_of_speculators(mutation: str, exported: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    assert_refused(exported("dspark", "speculators"), *SPECULATORS_BLOCK[mutation], capsys)


@pytest.mark.parametrize("direction", ["causal", "is_causal"])
def test_one_direction_for_layers_of_two(direction: str, exported: Saved, capsys: pytest.CaptureFixture[str]) -> None:
    """Sliding layers look back alone, full ones do not, and either key would give all layers one direction."""
    folder = exported("dflash", "sglang", rope="yarn", layers=2, layer_types=("sliding_attention", "full_attention"), sliding_window=3)
    assert_refused(folder, config(lambda c: c["dflash_config"].update({direction: False})), "give all layers one direction", capsys)


def test_d2t_that_counts_is_named_where_nothing_else_is_known(exported: Saved) -> None:
    """Without record and manifest, as from somebody else; and the whole vocabulary has zeros."""
    folder = exported("eagle3", "sglang", draft_vocab_size=0, rope="yarn")
    for name in ("specforge.json", "manifest.json"):
        (folder / name).unlink()
    assert not read_folder(folder).tensors["d2t"].any()
    tensors(lambda t: t.update(d2t=torch.arange(64)))(folder)
    with pytest.raises(ExportError, match="d2t is 0, 1, 2"):
        read_folder(folder)


def test_the_reader_shares_nothing_with_the_writer() -> None:
    """It imports torch, safetensors, the error class and itself."""
    folder = Path(__file__).parents[2] / "specforge" / "export" / "contract"
    allowed = ("specforge.errors", "specforge.export.contract")
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert all(not name.startswith(("specforge", "transformers")) or name.startswith(allowed) for name in names), path
