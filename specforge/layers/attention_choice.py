"""Which implementation of packed attention a device, a data type and gradients call for, and why."""

import sys

import torch

from specforge.errors import ConfigError
from specforge.layers.choice import Choice
from specforge.layers.packed_attention import IMPLEMENTATIONS

HALF = (torch.float16, torch.bfloat16)
AMPERE = (8, 0)


def resolve(asked: str, device: torch.device, dtype: torch.dtype, gradient: bool, *, strict: bool = False) -> Choice:
    """What `prepare` can be given on this device.

    Args:
        asked: an implementation, or `auto`.
        gradient: whether a backward follows.
        strict: refuse an implementation that is not available; otherwise `auto` takes its place, which is printed.

    Raises:
        ConfigError: no such implementation, or not available under `strict`.
    """
    if asked == "auto":
        return _best(device, dtype, gradient)
    if asked not in IMPLEMENTATIONS:
        raise ConfigError(f"attn={asked!r}: must be one of auto, {', '.join(IMPLEMENTATIONS)}.")
    lacking = lacking_on(asked, device, dtype)
    if not lacking:
        return Choice(asked, f"attn={asked} was asked for and is available.")
    best = _best(device, dtype, gradient)
    if strict:
        raise ConfigError(
            f"attn={asked!r}: {lacking}; use attn={best.name} or attn=auto, or do without strict, which forbids to fall back."
        )
    choice = Choice(best.name, f"attn={best.name} stands in for {asked}: {lacking}.")
    print(choice.reason, file=sys.stderr, flush=True)
    return choice


def _best(device: torch.device, dtype: torch.dtype, gradient: bool) -> Choice:
    """On one CPU thread, documents of 10 to 160 tokens on average took buckets 0.6 to 1.7 times the loop's time without gradients and
    0.4 to 1.2 times with them, falling where documents are short.
    """
    if not lacking_on("varlen", device, dtype):
        return Choice("varlen", "attn=varlen: one kernel for all documents, without padding or mask.")
    if device.type == "cpu" and not gradient:
        return Choice("loop", "attn=loop: on a CPU without gradients a call for each document mostly costs less than padding.")
    return Choice("bucket", "attn=bucket: documents of similar length share a call, padded to at most twice the area.")


def lacking_on(name: str, device: torch.device, dtype: torch.dtype) -> str | None:
    """What keeps the implementation from running, if anything does."""
    if name in ("flex", "varlen") and device.type != "cuda":
        return f"its kernel needs a CUDA device, and this is {device.type}"
    if name == "varlen" and dtype not in HALF:
        return f"its kernel computes in float16 or bfloat16, not {str(dtype).removeprefix('torch.')}"
    if name == "varlen" and torch.cuda.get_device_capability(device) < AMPERE:
        return "its kernel needs a device of compute capability 8.0 or more"
    return None
