"""A stored ranking model, loaded under each lever."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from specforge import files
from specforge.config import Levers
from specforge.errors import CheckpointError, ConfigError
from specforge.layers.expert_keys import unstack_experts
from specforge.ranking.calibration import write_shift
from specforge.ranking.load import load_ranking_model
from specforge.ranking.model import CTRModel
from tests.ranking.small import make_batch, make_model

BATCH = make_batch((7, 0, 1, 40, 19))


def stored(folder: Path, model: CTRModel, rename: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]] = dict) -> Path:
    folder.mkdir(exist_ok=True)
    save_file(rename(model.state_dict()), folder / "model.safetensors")
    files.write_json(folder / "config.json", model.config.stored())
    return folder


def with_contest_gates(state: dict[str, torch.Tensor], transposed: bool) -> dict[str, torch.Tensor]:
    """Gates without a bias, and experts under a key each."""
    renamed = {name: tensor for name, tensor in unstack_experts(state).items() if not name.endswith("gate.bias")}
    for name in [name for name in renamed if name.endswith("gate.weight")]:
        weight_ED = renamed.pop(name)
        renamed[name.replace("gate.weight", "gate.w_g")] = weight_ED.T.contiguous() if transposed else weight_ED
    return renamed


def scores(model: CTRModel) -> torch.Tensor:
    with torch.no_grad():
        return model(BATCH).logit_P


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("form", ["stacked", "per expert", "contest"])
def test_every_form_of_a_checkpoint_gives_the_same_model(form: str, transposed: bool, tmp_path: Path) -> None:
    model = make_model()
    with torch.no_grad():
        for layer in model.layers:
            layer.feed_forward.moe.gate.bias.zero_()
    forms = {"stacked": dict, "per expert": unstack_experts, "contest": lambda state: with_contest_gates(state, transposed)}
    loaded = load_ranking_model(stored(tmp_path / "m", model, forms[form]), Levers())
    assert torch.equal(scores(loaded.model), scores(model))
    assert not loaded.model.training and loaded.shift == 0.0 and loaded.merged == {}


def test_another_sign_policy_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"signid_mode='clamp': the checkpoint was trained with 'modulo'.*set signid_mode='modulo'"):
        load_ranking_model(stored(tmp_path / "m", make_model()), Levers(signid_mode="clamp"))


@pytest.mark.parametrize("change", ["missing", "shape", "no config"])
def test_a_folder_that_is_not_whole_is_refused(change: str, tmp_path: Path) -> None:
    def spoilt(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        state = dict(state)
        weight = state.pop("head.weight")
        return state if change == "missing" else state | {"head.weight": weight[:, 1:].contiguous()}

    folder = stored(tmp_path / "m", make_model(), dict if change == "no config" else spoilt)
    if change == "no config":
        (folder / "config.json").write_text('{"width": 3}')
    with pytest.raises(CheckpointError, match="slots is missing" if change == "no config" else r"head\.weight is"):
        load_ranking_model(folder, Levers())


def test_calibration_is_folded_into_the_bias(tmp_path: Path) -> None:
    model = make_model()
    folder = stored(tmp_path / "m", model)
    write_shift(folder, -0.75)
    loaded = load_ranking_model(folder, Levers())
    assert loaded.shift == -0.75
    torch.testing.assert_close(scores(loaded.model), scores(model) - 0.75, rtol=0, atol=1e-6)
    (folder / "calibration.json").write_text('{"format_version": 1, "shift": "much"}')
    with pytest.raises(CheckpointError, match="shift='much'"):
        load_ranking_model(folder, Levers())


def test_merging_comes_before_rounding_and_is_reported(tmp_path: Path) -> None:
    """Experts 1 and 3 differ by a share of their weights far below bfloat16's eps of 2^-8 / 2, yet their mean is what is rounded."""
    model = make_model()
    with torch.no_grad():
        for layer in model.layers:
            for weight in layer.feed_forward.moe.experts:
                weight[3] = weight[1] * (1 + 2.0**-7)
    folder = stored(tmp_path / "m", model)
    loaded = load_ranking_model(folder, Levers(expert_merge=True, merge_threshold=0.999, dtype="bfloat16"))
    assert {name: report.members for name, report in loaded.merged.items()} == {
        f"layers.{number}.feed_forward.moe": ((0,), (1, 3), (2,)) for number in (0, 1)
    }
    for layer, original in zip(loaded.model.layers, model.layers):
        up_GID, whole_GID = layer.feed_forward.moe.up_GID, original.feed_forward.moe.up_GID
        assert len(up_GID) == 3
        assert torch.equal(up_GID[1], whole_GID[[1, 3]].mean(0).bfloat16())
    plain = load_ranking_model(folder, Levers(dtype="bfloat16"))
    torch.testing.assert_close(scores(loaded.model), scores(plain.model), rtol=0, atol=0.25)


def test_precision_is_applied_and_kept_modules_stay(tmp_path: Path) -> None:
    model = make_model()
    folder = stored(tmp_path / "m", model)
    loaded = load_ranking_model(folder, Levers(dtype="bfloat16", keep_fp32_modules=("head", "*.gate"))).model
    kinds = {name: parameter.dtype for name, parameter in loaded.named_parameters()}
    kept = {name for name, dtype in kinds.items() if dtype == torch.float32}
    assert kept == {
        "head.weight",
        "head.bias",
        *(f"layers.{n}.feed_forward.moe.gate.{part}" for n in (0, 1) for part in ("weight", "bias")),
    }
    for dtype in ("bfloat16", "float16"):
        small = load_ranking_model(folder, Levers(dtype=dtype)).model
        found = scores(small)
        assert found.dtype == torch.float32
        assert not torch.equal(found, scores(model))
        torch.testing.assert_close(found, scores(model), rtol=0, atol=0.3 if dtype == "bfloat16" else 0.05)


@pytest.mark.parametrize(
    ("levers", "said"),
    [
        ({"attn": "varlen"}, "attn=loop stands in for varlen"),
        ({"attn": "flex"}, "attn=loop stands in for flex"),
        (
            {"compile": True},
            "levers.compile=False stands in for True: torch.compile needs a C++ compiler on a CPU, and there is no nowhere",
        ),
        ({"moe": "grouped", "dtype": "float16"}, ""),
    ],
)
def test_an_unavailable_lever_falls_back_and_says_so(
    levers: dict[str, str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CXX", "nowhere")
    model = make_model()
    folder, chosen = stored(tmp_path / "m", model), replace(Levers(), **levers)
    loaded = load_ranking_model(folder, chosen)
    printed = capsys.readouterr().err
    torch.testing.assert_close(scores(loaded.model), scores(model), rtol=0, atol=1e-5 if chosen.dtype == "float32" else 0.05)
    assert said in printed and capsys.readouterr().err == "", "once, and not at each forward"
    if said:
        with pytest.raises(ConfigError, match=f"{next(iter(levers))}=.*without strict, which forbids to fall back"):
            load_ranking_model(folder, chosen, strict=True)
    else:
        load_ranking_model(folder, chosen, strict=True)


def test_grouped_experts_of_an_odd_width_fall_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = make_model(inner=22)
    folder = stored(tmp_path / "m", model)
    loaded = load_ranking_model(folder, Levers(moe="grouped"))
    assert "levers.moe=auto stands in for grouped: grouped_mm wants rows of a multiple of 16 bytes" in capsys.readouterr().err
    assert torch.equal(scores(loaded.model), scores(load_ranking_model(folder, Levers()).model))
    with pytest.raises(ConfigError, match=r"levers\.moe=grouped: grouped_mm wants"):
        load_ranking_model(folder, Levers(moe="grouped"), strict=True)


def test_digests_tell_levers_apart() -> None:
    assert Levers().digest == Levers().digest and len(Levers().digest) == 16
    others = [Levers.reference(), Levers(attn="loop"), Levers(keep_fp32_modules=("head",)), Levers(sync_timing=False)]
    assert len({Levers().digest, *(levers.digest for levers in others)}) == 1 + len(others)
