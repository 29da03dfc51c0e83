"""Out to engines and back: the same acceptance to the last count; what is no such draft is refused."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.cli.__main__ import main
from specforge.cli.compose import build_controller, evaluate_checkpoint
from specforge.config import load_config
from specforge.distributed import World

DFLASH = "method: {name: dflash, options: {block_size: 4, layers: 2, anchors: 8}}\n"


@pytest.fixture(scope="module", params=["eagle3", "dflash"])
def run(request: pytest.FixtureRequest, prepared: tuple[Path, list[str]], trained: Path, tmp_path_factory: Any) -> tuple[Any, Path]:
    """The configuration of a run, and its folder."""
    folder, settings = prepared
    if request.param == "eagle3":
        return load_config(folder / "c.yaml", [*settings, f"output_dir={trained}"]), trained
    path = tmp_path_factory.mktemp("dflash")
    (path / "c.yaml").write_text(DFLASH)
    config = load_config(path / "c.yaml", [*settings, f"output_dir={path / 'run'}", "train.steps=30"])
    build_controller(config, World()).fit()
    return config, path / "run"


def counts(numbers: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in numbers.items() if name.startswith("eval/")}


@pytest.mark.parametrize("to", ["hf", "sglang", "vllm", "speculators"])
def test_there_and_back_is_the_same_acceptance(to: str, run: tuple[Any, Path], prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    """Every number of the evaluation; the mutation is one that a wrong name for a norm would be."""
    config, folder = run
    target = str(prepared[0] / "target")
    assert main(["export", "--checkpoint", str(folder / "latest"), "--to", to, "--out", str(tmp_path / "out")]) == 0
    assert main(["import", str(tmp_path / "out"), "--target", target, "--out", str(tmp_path / "run")]) == 0
    expected = counts(evaluate_checkpoint(config, folder / "latest", World()))
    assert expected["eval/acc_len"] > 1
    assert counts(evaluate_checkpoint(config, tmp_path / "run" / "latest", World())) == expected

    weights = load_file(tmp_path / "out" / "model.safetensors")
    weights["layers.0.input_layernorm.weight"].mul_(torch.linspace(-1, 2, 32))
    save_file(weights, tmp_path / "out" / "model.safetensors")
    assert main(["import", str(tmp_path / "out"), "--target", target, "--out", str(tmp_path / "other")]) == 0
    assert counts(evaluate_checkpoint(config, tmp_path / "other" / "latest", World())) != expected


def test_an_imported_draft_is_trained_on_and_decoded_with(trained: Path, prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    """A folder as EAGLE publishes them: `midlayer`, bfloat16, flat RoPE alone, no flags, no t2d; nothing says how many drafts."""
    folder, settings = prepared
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", str(trained / "latest"), "--to", "sglang", "--out", str(out)]) == 0
    weights = load_file(out / "model.safetensors")
    weights.pop("t2d")
    weights = {name: tensor.bfloat16() if tensor.is_floating_point() else tensor for name, tensor in weights.items()}
    save_file({name.replace("layers.0.", "midlayer."): tensor for name, tensor in weights.items()}, out / "model.safetensors")
    config = json.loads((out / "config.json").read_text())
    for key in ("rope_parameters", "fc_norm", "norm_output", "norm_before_fc", "norm_before_residual", "eagle_aux_hidden_state_layer_ids"):
        config.pop(key)
    (out / "config.json").write_text(json.dumps(config))
    (out / "specforge.json").unlink()
    words = ["import", str(out), "--target", str(folder / "target"), "--out", str(tmp_path / "run")]
    assert main(words) == 2
    assert main([*words, "--draft-tokens", "3"]) == 0
    assert main(["generate", "--target", str(folder / "target"), "--draft", str(tmp_path / "run" / "latest"), "--prompt", "the cat"]) == 0
    more = load_config(
        folder / "c.yaml",
        [*settings, f"output_dir={tmp_path / 'more'}", "train.steps=1", f"model.draft_path={tmp_path / 'run' / 'latest'}"],
    )
    build_controller(more, World()).fit()
    assert main([*words, "--draft-tokens", "3"]) == 6, "the run folder holds one already"


def test_what_is_refused(trained: Path, prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    assert main(["export", "--checkpoint", str(trained / "latest"), "--to", "hf", "--out", str(out)]) == 0

    def refused(name: str, **values: Any) -> str:
        copy = tmp_path / name
        shutil.copytree(out, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, **values}))
        if name == "pickle":
            (copy / "model.safetensors").rename(copy / "pytorch_model.bin")
        if name == "tables":
            weights = load_file(copy / "model.safetensors")
            weights["embed_tokens.weight"][5] += 1
            save_file(weights, copy / "model.safetensors")
        capsys.readouterr()
        assert main(["import", str(copy), "--target", str(prepared[0] / "target"), "--out", str(tmp_path / "run")]) == 6
        assert not (tmp_path / "run").exists()
        return capsys.readouterr().err

    error = refused("pickle")
    assert "pytorch_model.bin, a pickle" in error and "safetensors.torch.save_file" in error
    assert "embed_tokens.weight is not its target's" in refused("tables")
    assert "rotate as their target does" in refused("rope", rope_parameters={"rope_type": "default", "rope_theta": 5.0})
    assert "norm_before_residual" in refused("residual", norm_before_residual=True)
    assert "(1, 2, 3) and (2, 3, 4)" in refused("layers", eagle_aux_hidden_state_layer_ids=[2, 3, 4])
    assert "only EAGLE-3 and DFlash" in refused("kind", architectures=["Qwen3DSparkModel"])
    assert "num_attention_heads is 2" in refused("shape", num_attention_heads=2)
    assert "layers.1" in refused("more", num_hidden_layers=2)
