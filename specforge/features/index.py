"""The index of a feature store, checked: whatever it says is of the right kind and fits the rest of it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from specforge import files
from specforge.errors import FeatureError

INDEX = "index.json"
STORE_FORMAT = 2
DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
"""Of features, by the name that safetensors gives them."""
_LARGEST_INDEX_MIB = 1024
_PER_SAMPLE = {"ids": str, "domains": str, "lengths": int, "supervised": int, "shard": int, "offset": int}
_META = {
    "target_path": str, "target_fingerprint": str, "target_revision": str, "tokenizer_path": str, "template_digest": str,
    "aux_layer_ids": list, "dtype": str, "hidden_size": int, "vocab_size": int, "max_length": int, "mask_options": list,
    "teacher_top_k": int,
}  # fmt: skip


def read_index(folder: Path) -> dict[str, Any]:
    """What `index.json` holds, and `shard_rows`, the tokens of each shard.

    Raises:
        FeatureError: naming the field of `index.json` that is of another format or kind, or contradicts another.
    """
    path = folder / INDEX
    index = files.read_object(path, FeatureError, _LARGEST_INDEX_MIB, format=int)
    if index["format"] != STORE_FORMAT:
        raise FeatureError(f"{folder}: store format {index['format']} is not {STORE_FORMAT}; capture the features again.")
    lists: dict[str, type] = dict.fromkeys(_PER_SAMPLE, list)
    files.check_fields(index, str(path), FeatureError, meta=dict, shards=int, truncated=int, unsupervised=int, **lists)
    files.check_fields(index["meta"], f"{path}: meta", FeatureError, **_META)
    for name, kind in _PER_SAMPLE.items():
        _require(len(index[name]) == len(index["ids"]), path, name, "must have one entry a sample")
        _require(all(files.is_a(value, kind) for value in index[name]), path, name, f"must hold {kind.__name__} only")
    index["shard_rows"] = _rows_of_shards(index, path)
    meta = index["meta"]
    _require(meta.keys() == _META.keys(), path, "meta", f"must have the fields {', '.join(_META)} and no others")
    _require(meta["dtype"] in DTYPES, path, "meta.dtype", f"must be one of {', '.join(DTYPES)}")
    _require(all(files.is_a(layer, int) for layer in meta["aux_layer_ids"]), path, "meta.aux_layer_ids", "must hold int only")
    _require(all(_is_pair(option) for option in meta["mask_options"]), path, "meta.mask_options", "must hold pairs of texts")
    return index


def check_shard(path: Path, shard: safe_open, expected: Mapping[str, tuple[str, Sequence[int]]]) -> None:
    """Raise FeatureError unless the tensors of an open shard have the `expected` data types and shapes."""
    names = shard.keys()
    for name, (dtype, shape) in expected.items():
        if name not in names:
            raise FeatureError(f"{path}: holds no {name}; capture the features again.")
        found = shard.get_slice(name)
        if (found.get_dtype(), list(found.get_shape())) != (dtype, list(shape)):
            raise FeatureError(
                f"{path}: {name} is {found.get_dtype()} {found.get_shape()}, the index wants {dtype} {list(shape)}; capture them again."
            )


def _rows_of_shards(index: dict[str, Any], path: Path) -> list[int]:
    """The samples of a shard lie end to end, so each begins where the tokens before it end."""
    _require(index["shards"] <= len(index["ids"]), path, "shards", "must not be more than the samples")
    rows = [0] * index["shards"]
    for shard, offset, length in zip(index["shard"], index["offset"], index["lengths"]):
        _require(shard < len(rows), path, "shard", f"must be below shards={len(rows)}")
        _require(offset == rows[shard], path, "offset", "must be the end of the sample before it")
        rows[shard] += length
    return rows


def _require(condition: bool, path: Path, name: str, rule: str) -> None:
    if not condition:
        raise FeatureError(f"{path}: {name} {rule}; the file was damaged, so capture the features again.")


def _is_pair(option: object) -> bool:
    return isinstance(option, list) and len(option) == 2 and all(isinstance(text, str) for text in option)
