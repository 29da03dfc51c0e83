"""What is captured is what the target computes, whatever shares its batch."""

from pathlib import Path

import accelerate
import numpy as np
import pytest
import torch
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import enable_progress_bar

from specforge.errors import ConfigError, FeatureError
from specforge.features import target as target_module
from specforge.features.target import Target, aux_layer_ids
from tests.tiny import make_target

SEQUENCES = [np.random.default_rng(length).integers(0, 64, length).astype(np.int32) for length in (5, 17, 1, 9)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("target"))


def sharp(model: torch.nn.Module) -> Target:
    """Weights large enough that a wrong layer, row or norm shows."""
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.3)
        elif "norm" in name or "ln_" in name:
            torch.nn.init.uniform_(parameter, 0.5, 1.5)
    return Target(model)


def test_a_target_is_loaded_without_a_word(folder: Path, capfd: pytest.CaptureFixture[str]) -> None:
    enable_progress_bar()
    Target.load(folder, "float32")
    assert capfd.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("num_layers", "ids"),
    [
        (36, (2, 18, 33)),
        (8, (2, 4, 5)),
        (7, (2, 3, 4)),
        (6, (1, 3, 5)),
        (5, (1, 3, 4)),
        (4, (1, 2, 3)),
        (3, (1, 2, 3)),
        (2, (1, 2)),
        (1, (1,)),
    ],
)
def test_default_layers(num_layers: int, ids: tuple[int, ...]) -> None:
    assert aux_layer_ids(num_layers) == ids


def test_requested_layers_are_checked_and_sorted() -> None:
    assert aux_layer_ids(4, (3, 0, 2)) == (0, 2, 3)
    for wrong in [(1, 5), (1, 4), (-1, 2), (2, 2, 3)]:
        with pytest.raises(ConfigError, match=r"model.aux_layer_ids=.*from 0 \(embeddings\) to 3, below the target's last layer"):
            aux_layer_ids(4, wrong)


def test_features_are_the_models_own(folder: Path) -> None:
    target = Target.load(folder, "float64")
    for sequence, captured in zip(SEQUENCES, target.capture(SEQUENCES, (0, 1, 3)), strict=True):
        with torch.no_grad():
            output = target.model(torch.from_numpy(sequence).long()[None], output_hidden_states=True)
        states, logits = output.hidden_states, output.logits[0]
        torch.testing.assert_close(captured["aux"], torch.cat([states[0], states[1], states[3]], -1)[0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(captured["last"], states[-1][0], atol=1e-12, rtol=1e-12)
        torch.testing.assert_close(captured["logsumexp"], logits.logsumexp(-1).float(), atol=1e-5, rtol=1e-6)
        assert captured["argmax"].tolist() == logits.argmax(-1).tolist()
        assert (captured["argmax"].dtype, captured["logsumexp"].dtype) == (torch.int32, torch.float32)


def test_last_layer_is_captured_before_the_final_norm(folder: Path) -> None:
    target = Target.load(folder, "float32")
    captured = target.capture(SEQUENCES, (4,))[1]
    torch.testing.assert_close(target.decoder.norm(captured["aux"]), captured["last"])
    assert not torch.allclose(captured["aux"], captured["last"], atol=1e-2)


def test_padding_disturbs_nothing(folder: Path) -> None:
    target = Target.load(folder, "float64")
    together = target.capture(SEQUENCES, (0, 2, 4))
    for sequence, captured in zip(SEQUENCES, together, strict=True):
        alone = target.capture([sequence], (0, 2, 4))[0]
        for name in ("aux", "last", "logsumexp"):
            exact = 1e-6 if captured[name].dtype == torch.float32 else 1e-12
            torch.testing.assert_close(captured[name], alone[name], atol=exact, rtol=exact)
        assert torch.equal(captured["argmax"], alone["argmax"])


def test_tiles_of_rows_and_ids_change_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = Target.load(folder, "float32")
    last = torch.randn(23, 32, generator=torch.Generator().manual_seed(0))
    last[3] = 0  # all logits equal: the first id wins in every tile
    whole = target.choices(last)
    monkeypatch.setattr(target_module, "_LOGIT_ROWS", 5)
    monkeypatch.setattr(target_module, "_LOGIT_COLUMNS", 7)
    tiled = target.choices(last)
    assert torch.equal(whole[0], tiled[0])
    assert whole[0][3] == 0
    torch.testing.assert_close(whole[1], tiled[1])


def test_other_families_are_captured() -> None:
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_size": 16}
    qwen = Qwen3ForCausalLM(Qwen3Config(**shape, intermediate_size=24, num_key_value_heads=1, head_dim=8, tie_word_embeddings=True))
    for model in (qwen, GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=3, n_head=2, n_embd=16))):
        target = sharp(model)
        captured = target.capture(SEQUENCES, (0, 1, 2))[1]
        states = model(torch.from_numpy(SEQUENCES[1]).long()[None], output_hidden_states=True).hidden_states
        torch.testing.assert_close(captured["aux"], torch.cat(states[:3], -1)[0], atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(captured["last"], states[-1][0], atol=1e-5, rtol=1e-5)


def test_capped_logits_are_refused() -> None:
    torch.manual_seed(0)
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        final_logit_softcapping=30.0,
    )  # fmt: skip
    with pytest.raises(FeatureError, match="cap or scale their logits"):
        sharp(Gemma2ForCausalLM(config)).capture(SEQUENCES, (1,))
    config.final_logit_softcapping = None
    sharp(Gemma2ForCausalLM(config)).capture(SEQUENCES, (1,))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_passes_the_check_of_the_head(folder: Path, dtype: str) -> None:
    captured = Target.load(folder, dtype).capture(SEQUENCES, (1,))[0]
    assert captured["aux"].dtype == captured["last"].dtype == getattr(torch, dtype)


def test_offloaded_weights_give_the_same_features(folder: Path) -> None:
    expected = Target.load(folder, "float32").capture(SEQUENCES, (1, 2))
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    offloaded = Target(accelerate.cpu_offload(model, execution_device=torch.device("cpu")))
    assert offloaded.head.weight.device.type == "meta"
    for one, other in zip(expected, offloaded.capture(SEQUENCES, (1, 2)), strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_device_map_is_passed_on(folder: Path) -> None:
    captured = Target.load(folder, "float32", device_map="auto").capture(SEQUENCES, (1,))
    assert torch.equal(captured[0]["last"], Target.load(folder, "float32").capture(SEQUENCES, (1,))[0]["last"])


def test_what_is_no_target_is_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"model.target_path=.*no config.json"):
        Target.load(tmp_path / "absent", "float32")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(FeatureError, match="convert the weights"):
        Target.load(tmp_path, "float32")


def test_missing_weights_are_refused_and_not_random(tmp_path: Path) -> None:
    config = LlamaConfig(
        vocab_size=64, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, tie_word_embeddings=False
    )
    model = LlamaForCausalLM(config)
    kept = {key: value for key, value in model.state_dict().items() if "layers.1.mlp" not in key}
    model.save_pretrained(tmp_path, state_dict=kept)
    with pytest.raises(FeatureError, match=r"layers.1.mlp.*would be random"):
        Target.load(tmp_path, "float32")


def test_loads_and_forwards_are_counted(folder: Path) -> None:
    loads, forwards = Target.loads, Target.forwards
    target = Target.load(folder, "float32")
    target.capture(SEQUENCES, (1,))
    target.capture(SEQUENCES, (1,))
    assert (Target.loads - loads, Target.forwards - forwards) == (1, 2)


def test_a_target_whose_logits_are_not_finite_is_refused(tmp_path: Path) -> None:
    """Another sentence than of a head that is not plain: nothing is wrong with that."""
    target = Target.load(make_target(tmp_path / "target"), "float32")
    target.head.weight[3] = torch.nan
    with pytest.raises(FeatureError, match=r"not finite on cpu in torch.float32 with attention 'sdpa'"):
        target.require_plain_head(np.arange(8))
