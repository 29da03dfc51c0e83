"""What an export says of itself: the measured acceptance, the template, commands; and what its words are checked for."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge import files
from specforge.cli.__main__ import main
from specforge.cli.export import read_trained
from specforge.config.methods import Eagle3Options
from specforge.data.template import Encoder
from specforge.export.engines import why_no_format
from specforge.export.layouts import config_of
from specforge.features.tables import TargetTables
from specforge.methods.eagle3 import derive_config
from specforge.training.run_folder import read_best
from tests.texts import TEMPLATE, make_text_target

THINKING = (
    TEMPLATE + "{%- if add_generation_prompt and enable_thinking is defined and not enable_thinking -%}{{- '<|end|>' -}}{%- endif -%}"
)


def test_the_card_has_the_measured_acceptance_and_the_commands(trained: Path, prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    best, target = read_best(trained), prepared[0] / "target"
    assert best is not None
    for to in ("sglang", "vllm", "speculators"):
        assert main(["export", "--checkpoint", str(trained / "best"), "--to", to, "--out", str(tmp_path / to)]) == 0
    card, record = (tmp_path / "sglang" / "README.md").read_text(), json.loads((tmp_path / "sglang" / "specforge.json").read_text())
    assert f"{best.metrics['eval/walk_acc_len']:.3f} tokens a round" in card
    assert record["metrics"]["eval/acc_len"] == best.metrics["eval/acc_len"] and record["checkpoint"]["step"] == best.step
    command = (
        f"python -m sglang.launch_server --model-path {target} --speculative-algorithm EAGLE3 --speculative-draft-model-path sglang "
        "--speculative-num-steps 3 --speculative-eagle-topk 1 --speculative-num-draft-tokens 4"
    )
    assert command in card and "vllm serve" not in card
    asked = '{"method": "eagle3", "model": "vllm", "num_speculative_tokens": 3}'
    assert f"vllm serve {target} --speculative-config '{asked}'" in (tmp_path / "vllm" / "README.md").read_text()
    assert "vllm serve speculators\n" in (tmp_path / "speculators" / "README.md").read_text()


def test_the_template_is_named(trained: Path, prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    draft = read_trained(trained / "latest", "")
    digest = Encoder(AutoTokenizer.from_pretrained(prepared[0] / "target"), 64).template_digest
    assert draft.template.sha256 == digest and draft.template.enable_thinking is None


@pytest.mark.parametrize(("default", "expected"), [("", True), ("{%- set enable_thinking = enable_thinking | default(false) -%}", False)])
def test_thinking_is_what_the_template_does_untold(default: str, expected: bool, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    from specforge.cli.export import _thinking

    target = make_text_target(tmp_path / "target", default + THINKING)
    assert _thinking(AutoTokenizer.from_pretrained(target), default + THINKING) is expected


def test_words_that_contradict_each_other(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = ["--checkpoint", str(trained / "latest"), "--to", "hf", "--out", str(tmp_path / "out")]
    assert main(["export", *whole[:4]]) == 2 and main(["export", *whole, "--check", "x"]) == 2
    assert main(["export", *whole[:2], "--to", "gguf", *whole[4:]]) == 2 and "hf fits both engines" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(["export", *whole]) == 6 and "not overwritten" in capsys.readouterr().err
    assert main(["export", "--check", str(tmp_path / "nothing")]) == 6


def test_the_data_type_is_that_of_the_target(trained: Path) -> None:
    """Whatever the file holds: SGLang computes in float16 where a configuration says float32."""
    draft = read_trained(trained / "latest", "")
    draft.method.embedding_VH = draft.method.embedding_VH.bfloat16()
    assert draft.method.draft.fc.weight.dtype == torch.float32
    for to in ("sglang", "speculators"):
        config = config_of(draft, to)
        assert config["torch_dtype"] == config.get("transformer_layer_config", config)["torch_dtype"] == "bfloat16"


def test_shapes_that_an_engine_takes_for_others(target_path: Path) -> None:
    """SGLang: one captured layer loses its fusion, embeddings have no number, DeepSeek counts otherwise. Both: a context of their own."""
    tables = TargetTables.read(target_path)

    def reason(layers: tuple[int, ...], to: str, model_type: str = "llama", positions: int = 256) -> str:
        config = derive_config(Eagle3Options(), tables, layers, 40)
        target = replace(tables.config, model_type=model_type)
        return why_no_format("eagle3", replace(config, max_position_embeddings=positions), target, to)

    assert not reason((1, 2, 3), "sglang") and not reason((1, 2, 3), "speculators")
    assert "leaves out the fusion" in reason((2,), "sglang") and not reason((2,), "speculators")
    assert "embeddings" in reason((0, 2), "sglang") and "embeddings" in reason((0, 2), "vllm")
    assert "deepseek_v3" in reason((1, 2, 3), "sglang", "deepseek_v3") and not reason((2, 3), "sglang", "deepseek_v3")
    assert all("last layer" in reason((1, 2, 4), to) for to in ("hf", "sglang", "vllm", "speculators"))
    assert "2048 positions" in reason((1, 2, 3), "vllm", positions=2048)


def test_a_calibration_goes_along(trained: Path, tmp_path: Path) -> None:
    draft = replace(read_trained(trained / "latest", ""), calibration=tmp_path / "calibration.json")
    files.write_json(tmp_path / "calibration.json", {"kept": 1})
    from specforge.export.folder import export

    export(draft, "vllm", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "calibration.json").read_text()) == {"kept": 1}
