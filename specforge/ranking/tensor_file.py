"""A safetensors file written piece by piece, so that no tensor is ever whole in memory."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

_DTYPES = {"int64": "I64", "int16": "I16", "uint8": "U8", "bool": "BOOL"}


@dataclass(frozen=True)
class Pieces:
    """A tensor of known shape, whose values come in the order of memory."""

    dtype: str
    shape: tuple[int, ...]
    values: Iterable[np.ndarray]

    @classmethod
    def whole(cls, values: np.ndarray) -> "Pieces":
        return cls(str(values.dtype), values.shape, [values])

    @property
    def num_bytes(self) -> int:
        return int(np.prod(self.shape)) * np.dtype(self.dtype).itemsize


def write_tensors(path: Path, tensors: Mapping[str, Pieces]) -> None:
    """The wider data types must come first, which keeps each tensor aligned."""
    header, begin = dict[str, object](), 0
    for name, pieces in tensors.items():
        end = begin + pieces.num_bytes
        header[name] = {"dtype": _DTYPES[pieces.dtype], "shape": pieces.shape, "data_offsets": [begin, end]}
        begin = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for pieces in tensors.values():
            for values in pieces.values:
                file.write(np.ascontiguousarray(values, dtype=np.dtype(pieces.dtype).newbyteorder("<")).data)
