"""Random state of one rank as JSON: torch (CPU and CUDA), Python and NumPy, saved and restored exactly."""

import random
from typing import Any

import numpy as np
import torch


def seed_all(seed: int, rank: int, salt: int = 0) -> None:
    """Give every generator of this process its own stream, derived from (seed, rank, salt)."""
    streams = np.random.SeedSequence([seed, rank, salt]).generate_state(3)
    torch.manual_seed(int(streams[0]))
    random.seed(int(streams[1]))
    np.random.seed(int(streams[2]))


def capture() -> dict[str, Any]:
    """The state of all generators, JSON-serialisable."""
    name, keys, position, has_gauss, gauss = np.random.get_state()
    version, internal, gauss_next = random.getstate()
    return {
        "torch": _hex(torch.get_rng_state()),
        "cuda": _hex(torch.cuda.get_rng_state()) if torch.cuda.is_available() else None,
        "python": [version, list(internal), gauss_next],
        "numpy": [str(name), np.asarray(keys).tolist(), int(position), int(has_gauss), float(gauss)],
    }


def restore(state: dict[str, Any]) -> None:
    """Continue every generator exactly where `capture` found it."""
    torch.set_rng_state(_bytes(state["torch"]))
    if state["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(_bytes(state["cuda"]))
    version, internal, gauss_next = state["python"]
    random.setstate((version, tuple(internal), gauss_next))
    name, keys, position, has_gauss, gauss = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), position, has_gauss, gauss))


def _hex(state: torch.Tensor) -> str:
    return state.numpy().tobytes().hex()


def _bytes(text: str) -> torch.Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
