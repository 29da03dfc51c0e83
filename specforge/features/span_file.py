"""The features of one span in one file: the samples end to end, each with a checksum of its own."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError

from specforge import files
from specforge.errors import FeatureError
from specforge.features.span import Span
from specforge.features.store import TENSORS, SampleFeatures, write_shard

_DIGITS = 12


def span_path(folder: Path, position: int) -> Path:
    return folder / f"span-{position:0{_DIGITS}d}.safetensors"


def spans_present(folder: Path) -> list[int]:
    """Positions of the spans in `folder`, ascending."""
    return sorted(int(path.stem.removeprefix("span-")) for path in folder.glob(f"span-{'[0-9]' * _DIGITS}.safetensors"))


def sweep_partial(folder: Path, position: int) -> None:
    """Remove what killed producers left of a span. The caller holds its claim."""
    for partial in folder.glob(f".{span_path(folder, position).name}.*"):
        partial.unlink(missing_ok=True)


def write_span(folder: Path, span: Span, identity: str, features: Mapping[int, SampleFeatures]) -> None:
    """Write all samples of `span`; `identity` says of which request it is."""
    numbers = list(dict.fromkeys(span.samples))
    notes = {"identity": identity, "sha256": json.dumps({number: _sha256(features[number]) for number in numbers})}
    with files.writable(folder, FeatureError):
        write_shard(span_path(folder, span.position), [features[number] for number in numbers], notes)


def read_span(folder: Path, span: Span, identity: str, numbers: Sequence[int], lengths: np.ndarray) -> list[SampleFeatures]:
    """Some samples of `span`; only they are read and checked. `lengths` are those of all samples, by number.

    Raises:
        FeatureError: the file is damaged, or of another request.
    """
    path = span_path(folder, span.position)
    stored = list(dict.fromkeys(span.samples))
    ends = dict(zip(stored, np.cumsum(lengths[stored]).tolist(), strict=True))
    with files.open_tensors(path, FeatureError) as file:
        notes = file.metadata() or {}
        if notes.get("identity") != identity:
            raise FeatureError(f"{path}: was made for another request.")
        try:
            checksums = json.loads(notes["sha256"])
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            rows = [slice(ends[number] - int(lengths[number]), ends[number]) for number in numbers]
            found = [SampleFeatures.of({name: tensor[at] for name, tensor in slices.items()}) for at in rows]
            damaged = [number for number, features in zip(numbers, found, strict=True) if checksums[str(number)] != _sha256(features)]
        except (SafetensorError, KeyError, TypeError, ValueError) as cause:
            raise FeatureError(f"{path}: is not a readable span ({cause!r}).") from cause
    if damaged:
        raise FeatureError(f"{path}: the checksum of sample number {damaged[0]} differs, so it was damaged after writing.")
    return found


def _sha256(features: SampleFeatures) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        digest.update(getattr(features, name).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()
