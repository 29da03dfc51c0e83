"""Data types as a lever: what they are called, and how far rounding may carry a result."""

import torch

from specforge.bench.case import Lever

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_TOLERANCES = {"float32": 1e-5, "bfloat16": 5e-2, "float16": 5e-3}

DTYPE = Lever(tuple(DTYPES), "float32", "float32")


def tolerance_of(dtype: str) -> float:
    return _TOLERANCES[dtype]
