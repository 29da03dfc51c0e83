"""RoPE from a configuration, and its angles."""

import math
from typing import Any

import torch

from specforge.export.contract.keys import Keys
from specforge.export.contract.unknown import require_neutral

_NUMBERS: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    "yarn": ("factor",),
}
_PERHAPS = ("original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim")
TYPES = tuple(_NUMBERS)
"""What this reader can work out; others depend on the length of the text in ways that engines do not share."""


def both_forms(keys: Keys) -> dict[str, Any]:
    """`rope_parameters`, which must say the same as `rope_theta` and `rope_scaling` beside it."""
    why = "a reader that knows this form alone would take theta for 10000"
    nested = keys.inner("rope_parameters", why)
    theta = nested.number("rope_theta")
    if "rope_theta" not in keys.values or "rope_scaling" not in keys.values:
        raise keys.wrong("rope_theta" if "rope_theta" not in keys.values else "rope_scaling", f"RoPE must be flat too: {why}")
    if keys.number("rope_theta") != theta:
        raise keys.wrong("rope_theta", f"rope_parameters says {theta}; the two must agree")
    scaling = keys.values["rope_scaling"] or {"rope_type": "default"}
    rope = {"rope_type": "default", **nested.values}
    if not isinstance(scaling, dict) or {**scaling, "rope_theta": nested.values["rope_theta"]} != rope:
        raise keys.wrong("rope_scaling", f"rope_parameters says {nested.values}; the two must agree")
    _require_known(Keys(rope, nested.where))
    return rope


def _require_known(rope: Keys) -> None:
    kind = rope.values["rope_type"]
    if kind not in TYPES:
        raise rope.wrong("rope_type", f"must be one of {', '.join(TYPES)}")
    if rope.values.get("type", kind) != kind:
        raise rope.wrong("type", f"rope_type says {kind}, and engines differ in which they ask")
    for name in (*_NUMBERS[kind], *(name for name in _PERHAPS if kind == "yarn" and rope.values.get(name) is not None)):
        rope.number(name)
    if kind == "llama3" and not rope.number("low_freq_factor") < rope.number("high_freq_factor"):
        raise rope.wrong("low_freq_factor", "must be smaller than high_freq_factor")
    require_neutral(rope)


def frequencies(rope: dict[str, Any], head_dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    """Turns of each pair of dimensions a position, in radians, [D / 2] float64; and what the tables are multiplied with."""
    theta, pairs = float(rope["rope_theta"]), torch.arange(0, head_dim, 2, dtype=torch.float64)
    plain = theta ** (-pairs / head_dim)
    kind = rope["rope_type"]
    if kind == "linear":
        return plain / rope["factor"], 1.0
    if kind == "llama3":
        return _llama3(plain, rope), 1.0
    if kind == "yarn":
        return _yarn(plain, rope, theta, head_dim, max_positions)
    return plain, 1.0


def _llama3(plain: torch.Tensor, rope: dict[str, Any]) -> torch.Tensor:
    """Long waves are stretched by the factor, short ones are not, those between by a share of it."""
    length, low, high = rope["original_max_position_embeddings"], rope["low_freq_factor"], rope["high_freq_factor"]
    waves = length * plain / (2 * math.pi)
    share = ((waves - low) / (high - low)).clamp(0, 1)
    return plain * share + plain / rope["factor"] * (1 - share)


def _yarn(plain: torch.Tensor, rope: dict[str, Any], theta: float, head_dim: int, max_positions: int) -> tuple[torch.Tensor, float]:
    length = rope.get("original_max_position_embeddings") or max_positions
    factor = rope.get("factor") or max_positions / length

    def dimension(turns: float) -> float:
        return head_dim * math.log(length / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension(rope.get("beta_fast") or 32), dimension(rope.get("beta_slow") or 1)
    if rope.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    stretched = ((torch.arange(len(plain), dtype=torch.float64) - low) / max(high - low, 0.001)).clamp(0, 1)
    attention = rope.get("attention_factor")
    if attention is None:
        all_dims, plain_scale = rope.get("mscale_all_dim"), rope.get("mscale")

        def scale(of: float) -> float:
            return 0.1 * of * math.log(factor) + 1 if factor > 1 else 1.0

        attention = scale(plain_scale) / scale(all_dims) if plain_scale and all_dims else scale(1)
    return plain / factor * stretched + plain * (1 - stretched), float(attention)


def rotate(x_NhD: torch.Tensor, position_N: torch.Tensor, rope: dict[str, Any], max_positions: int) -> torch.Tensor:
    """Dimension i and i + D/2 of each head turned together, as Llama has them."""
    turn_C, scale = frequencies(rope, x_NhD.shape[-1], max_positions)
    angle_N1C = (position_N.double()[:, None] * turn_C)[:, None]
    cos, sin = (part.to(x_NhD.dtype) * scale for part in (angle_N1C.cos(), angle_N1C.sin()))
    low, high = x_NhD.chunk(2, -1)
    return torch.cat([low * cos - high * sin, high * cos + low * sin], -1)
