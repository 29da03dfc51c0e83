"""What is chosen on a device, what is said about it, and what is refused."""

import pytest
import torch

from specforge.errors import ConfigError
from specforge.layers.attention_choice import resolve

CPU, CUDA = torch.device("cpu"), torch.device("cuda", 0)


@pytest.mark.parametrize(("gradient", "name"), [(False, "loop"), (True, "bucket")])
def test_a_cpu_chooses_by_the_gradient(gradient: bool, name: str) -> None:
    choice = resolve("auto", CPU, torch.bfloat16, gradient)
    assert choice.name == name and choice.reason.startswith(f"attn={name}: ")


@pytest.mark.parametrize("asked", ["loop", "padded", "bucket", "sdpa"])
def test_what_a_cpu_has_is_given(asked: str) -> None:
    assert resolve(asked, CPU, torch.float32, gradient=True, strict=True).name == asked


@pytest.mark.parametrize("asked", ["flex", "varlen"])
def test_what_a_cpu_lacks_is_replaced_with_a_word_or_refused(asked: str, capsys: pytest.CaptureFixture[str]) -> None:
    choice = resolve(asked, CPU, torch.bfloat16, gradient=True)
    assert choice.name == "bucket"
    assert choice.reason == f"attn=bucket stands in for {asked}: its kernel needs a CUDA device, and this is cpu."
    assert capsys.readouterr().err == choice.reason + "\n"
    with pytest.raises(ConfigError, match=f"attn='{asked}': its kernel needs a CUDA device, and this is cpu; use attn=bucket or"):
        resolve(asked, CPU, torch.bfloat16, gradient=True, strict=True)


def test_a_gpu_in_float32_has_no_varlen() -> None:
    assert resolve("auto", CUDA, torch.float32, gradient=True).name == "bucket"
    with pytest.raises(ConfigError, match="attn='varlen': its kernel computes in float16 or bfloat16, not float32"):
        resolve("varlen", CUDA, torch.float32, gradient=True, strict=True)


def test_an_unknown_implementation_is_refused() -> None:
    with pytest.raises(ConfigError, match="attn='dense': must be one of auto, loop, padded, bucket, sdpa, flex, varlen"):
        resolve("dense", CPU, torch.float32, gradient=False)


@pytest.mark.gpu
def test_a_gpu_chooses_varlen_for_bf16() -> None:
    assert resolve("auto", CUDA, torch.bfloat16, gradient=True).name == "varlen"
