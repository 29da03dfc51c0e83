"""Feature stores: safetensors shards, one index, one manifest of checksums.

Shapes: S tokens of one sample, N tokens of a shard, A captured layers, H hidden size, V vocabulary of the target. The
samples of a shard lie end to end, so reading one of them is reading a range of rows.
"""

import contextlib
import dataclasses
import hashlib
import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, Self

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save

from specforge import files
from specforge.errors import FeatureError
from specforge.features.index import DTYPES, INDEX, STORE_FORMAT, check_shard, read_index
from specforge.features.span import Span, Spans


class Sample(Protocol):
    """Tokens to capture features for: input_ids [S] int32 and loss_mask [S] bool."""

    @property
    def id(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def input_ids(self) -> np.ndarray: ...
    @property
    def loss_mask(self) -> np.ndarray: ...
    @property
    def truncated(self) -> bool: ...


def bytes_per_token(num_aux_layers: int, hidden_size: int, dtype: str, teacher_top_k: int = 0) -> int:
    """Captured layers, last hidden state or likeliest ids, and beside them id, mask, arg-max and logsumexp."""
    hidden_bytes = hidden_size * getattr(torch, dtype).itemsize
    teacher_bytes = teacher_top_k * (4 + 2) if teacher_top_k else hidden_bytes
    return num_aux_layers * hidden_bytes + teacher_bytes + 4 + 1 + 4 + 4


@dataclass(frozen=True, kw_only=True)
class FeatureMeta:
    """What features are: two stores with equal meta and equal samples hold equal tensors."""

    target_path: str
    target_fingerprint: str
    """Hash of the target folder's content (`files.Fingerprints`); decides, where the path may change."""
    target_revision: str = ""
    tokenizer_path: str = ""
    template_digest: str = ""
    aux_layer_ids: tuple[int, ...]
    """Indices into `hidden_states` (0 = embeddings), low to high."""
    dtype: str
    hidden_size: int
    vocab_size: int
    max_length: int = 0
    mask_options: tuple[tuple[str, str], ...] = ()
    teacher_top_k: int = 0
    """The target's k likeliest ids are kept in place of its last hidden state; 0: the hidden state."""

    @property
    def bytes_per_token(self) -> int:
        """What a token takes on the disk."""
        return bytes_per_token(len(self.aux_layer_ids), self.hidden_size, self.dtype, self.teacher_top_k)

    @property
    def tensors(self) -> tuple[str, ...]:
        """The fields of SampleFeatures that are stored."""
        return tuple(name for name in TENSORS if name not in (_TEACHER[:1] if self.teacher_top_k else _TEACHER[1:]))

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        mask_options = tuple((name, value) for name, value in values["mask_options"])
        return cls(**{**values, "aux_layer_ids": tuple(values["aux_layer_ids"]), "mask_options": mask_options})


@dataclass(frozen=True)
class SampleFeatures:
    """One sample: input_ids [S] int32, loss_mask [S] bool, aux [S, A*H] (low to high, un-normed) and last [S, H] (after
    the final norm) in the store's dtype, argmax [S] int32 and logsumexp [S] float32 of the target's logits.

    A compressed teacher has, in place of `last`, top_ids [S, k] int32 and top_log_probs [S, k] float16 (`features.teacher`).
    What a sample lacks is an empty tensor."""

    input_ids: torch.Tensor
    loss_mask: torch.Tensor
    aux: torch.Tensor
    last: torch.Tensor
    argmax: torch.Tensor
    logsumexp: torch.Tensor
    top_ids: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int32))
    top_log_probs: torch.Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.float16))

    @classmethod
    def of(cls, stored: Mapping[str, torch.Tensor]) -> Self:
        """From the tensors of a store, which lacks some."""
        return cls(**{"last": torch.empty(0), **stored})

    def is_finite(self) -> bool:
        """Whether no feature is NaN or infinite. A sum passes either on, and costs one read; only then every number is asked."""
        features = (self.aux, self.last, self.logsumexp, self.top_log_probs)
        return all(bool(x.sum(dtype=torch.float32).isfinite()) or bool(x.isfinite().all()) for x in features)


TENSORS = tuple(one.name for one in dataclasses.fields(SampleFeatures))
_TEACHER = ("last", "top_ids", "top_log_probs")
"""A store holds the first of these or the other two."""


@dataclass(frozen=True)
class ShardRecord:
    """What the index needs to know of one finished shard."""

    name: str
    size_bytes: int
    sha256: str


def shard_name(number: int) -> str:
    return f"features-{number:05d}.safetensors"


def write_shard(path: Path, features: Sequence[SampleFeatures], notes: dict[str, str] | None = None) -> ShardRecord:
    """Write the samples end to end, `notes` into the header; the file is complete or absent."""
    whole = {name: torch.cat([getattr(sample, name) for sample in features]).cpu() for name in TENSORS}
    data = save({name: tensor for name, tensor in whole.items() if tensor.numel() or name not in _TEACHER}, notes)
    files.write_bytes(path, data)
    return ShardRecord(path.name, len(data), hashlib.sha256(data).hexdigest())


def write_index(folder: Path, meta: FeatureMeta, samples: Sequence[Sample], shard_samples: Sequence[int]) -> None:
    """Write `index.json` of a store whose shard k holds the next `shard_samples[k]` of `samples`."""
    shard, offset = [], []
    following = iter(samples)
    for number, count in enumerate(shard_samples):
        row = 0
        for sample in itertools.islice(following, count):
            shard.append(number)
            offset.append(row)
            row += len(sample.input_ids)
    supervised = [int(sample.loss_mask.sum()) for sample in samples]
    index = {
        "format": STORE_FORMAT,
        "meta": dataclasses.asdict(meta),
        "shards": len(shard_samples),
        "truncated": sum(bool(sample.truncated) for sample in samples),
        "unsupervised": supervised.count(0),
        "ids": [sample.id for sample in samples],
        "domains": [sample.domain for sample in samples],
        "lengths": [len(sample.input_ids) for sample in samples],
        "supervised": supervised,
        "shard": shard,
        "offset": offset,
    }
    files.write_json(folder / INDEX, index)


class FeatureWriter:
    """Writes a store sample by sample; `folder` appears when the `with` block ends well."""

    def __init__(self, folder: Path, meta: FeatureMeta, shard_bytes: int) -> None:
        self.folder = folder
        self.meta = meta
        self.shard_bytes = shard_bytes
        self._waiting: list[SampleFeatures] = []
        self._samples: list[Sample] = []
        self._shard_samples: list[int] = []

    def add(self, sample: Sample, features: SampleFeatures) -> None:
        """Raises FeatureError where a feature is not finite."""
        check_finite(sample.id, features)
        waiting_tokens = sum(len(one.input_ids) for one in self._waiting) + len(features.input_ids)
        if self._waiting and waiting_tokens * self.meta.bytes_per_token > self.shard_bytes:
            self._flush()
        self._waiting.append(features)
        self._samples.append(sample)

    def _flush(self) -> None:
        write_shard(self._staging / shard_name(len(self._shard_samples)), self._waiting)
        self._shard_samples.append(len(self._waiting))
        self._waiting = []

    def __enter__(self) -> Self:
        self._stack = contextlib.ExitStack()
        self._staging = self._stack.enter_context(files.staging(self.folder))
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        if kind is not None:
            self._stack.__exit__(kind, value, trace)
            return
        with self._stack:
            if self._waiting:
                self._flush()
            write_index(self._staging, self.meta, self._samples, self._shard_samples)


def require_unique(ids: Sequence[str]) -> None:
    twice = [name for name, count in Counter(ids).items() if count > 1]
    if twice:
        raise FeatureError(
            f"sample id {twice[0]!r}: occurs more than once, as {len(twice)} ids do; make ids unique, samples are known by them."
        )


def check_finite(sample_id: str, features: SampleFeatures) -> None:
    if not features.is_finite():
        raise FeatureError(
            f"sample {sample_id!r}: the target's features hold NaN or infinite numbers, so they teach nothing; "
            f"check model.dtype (float16 overflows in many targets) or leave the sample out by data.exclude_ids."
        )


class LocalFeatureStore:
    """A store read by sample number; shards are memory-mapped and opened when first needed.

    ids, domains: per sample. lengths, supervised: int64 [samples], known without reading features.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        if not self.folder.is_dir():
            raise FeatureError(f"features.path={str(folder)!r}: there is no such folder; capture the features first (specforge prepare).")
        files.verify(self.folder, FeatureError, sizes_only=True)
        index = read_index(self.folder)
        self.meta = FeatureMeta.from_dict(index["meta"])
        self.ids: list[str] = index["ids"]
        self.domains: list[str] = index["domains"]
        self.lengths = np.array(index["lengths"], dtype=np.int64)
        self.supervised = np.array(index["supervised"], dtype=np.int64)
        self.truncated: int = index["truncated"]
        self.unsupervised: int = index["unsupervised"]
        self._shard: list[int] = index["shard"]
        self._offset: list[int] = index["offset"]
        self._shard_rows: list[int] = index["shard_rows"]
        self._open: dict[int, safe_open] = {}

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def aux_layer_ids(self) -> tuple[int, ...]:
        return self.meta.aux_layer_ids

    def read(self, number: int) -> SampleFeatures:
        """The features of a sample by its number, 0 to len - 1."""
        return SampleFeatures.of({name: self._rows(number, name) for name in self.meta.tensors})

    def reading(self, spans: Spans, position: int) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    def take(self, span: Span, numbers: Sequence[int]) -> list[SampleFeatures]:
        return [self.read(number) for number in numbers]

    def release(self, span: Span) -> None:
        """A store on disk stays as it is and can be read again."""

    def tokens(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """input_ids [S] int32 and loss_mask [S] bool, without touching the features."""
        return self._rows(number, "input_ids"), self._rows(number, "loss_mask")

    def labels(self, number: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """input_ids [S], loss_mask [S] and argmax [S]: what drafts are compared with."""
        return (*self.tokens(number), self._rows(number, "argmax"))

    def supervised_counts(self, vocab_size: int) -> np.ndarray:
        """How often each token id is supervised, int64 [vocab_size]."""
        counts = np.zeros(vocab_size, dtype=np.int64)
        for shard in sorted(set(self._shard)):
            handle = self._handle(shard)
            supervised = handle.get_tensor("input_ids")[handle.get_tensor("loss_mask")]
            counts += np.bincount(supervised.numpy(), minlength=vocab_size)
        return counts

    def verify(self, fingerprints: files.Fingerprints | None = None) -> None:
        """Compare every file with its checksum; with `fingerprints`, only those that changed since they were last read.

        Raises:
            FeatureError: naming the file that is missing, truncated or altered.
        """
        files.verify(self.folder, FeatureError, fingerprints=fingerprints)

    def expect(self, **wanted: Any) -> None:
        """Refuse features of another kind, with the difference: `expect(target_fingerprint=..., aux_layer_ids=...)`.

        The names are fields of `FeatureMeta`.
        """
        stored = {name: getattr(self.meta, name) for name in wanted}
        differing = [
            f"{name}: the store has {stored[name]!r}, wanted is {value!r}" for name, value in wanted.items() if stored[name] != value
        ]
        if differing:
            raise FeatureError(
                f"features in {self.folder} are not those asked for ({'; '.join(differing)}); capture them again or change the settings."
            )

    def _rows(self, number: int, name: str) -> torch.Tensor:
        offset = self._offset[number]
        return self._handle(self._shard[number]).get_slice(name)[offset : offset + int(self.lengths[number])]

    def _handle(self, shard: int) -> safe_open:
        if shard not in self._open:
            path = self.folder / shard_name(shard)
            opened = files.open_tensors(path, FeatureError)
            check_shard(path, opened, self._shapes(shard))
            self._open[shard] = opened
        return self._open[shard]

    def _shapes(self, shard: int) -> dict[str, tuple[str, list[int]]]:
        """Data type and shape of each tensor of a shard."""
        rows = self._shard_rows[shard]
        feature, hidden, top_k = DTYPES[self.meta.dtype], self.meta.hidden_size, self.meta.teacher_top_k
        shapes = {
            "input_ids": ("I32", [rows]), "loss_mask": ("BOOL", [rows]), "argmax": ("I32", [rows]), "logsumexp": ("F32", [rows]),
            "aux": (feature, [rows, hidden * len(self.aux_layer_ids)]), "last": (feature, [rows, hidden]),
            "top_ids": ("I32", [rows, top_k]), "top_log_probs": ("F16", [rows, top_k]),
        }  # fmt: skip
        return {name: shapes[name] for name in self.meta.tensors}
