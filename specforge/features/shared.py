"""Features that other processes make while they are read: a folder that holds the next few spans and nothing else.

The trainer's rank 0 writes `request.json`: which features it wants, in which order, how far it is and how many spans ahead
it allows. Producers (`features.producer`) keep exactly these spans there, one file each. Both sides derive everything else
from that file and the encoded rows, so either may be killed at any moment and come back: a trainer that starts at an earlier
position says so, and what is missing is made again.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open

from specforge import files
from specforge.distributed.world import World
from specforge.errors import FeatureError
from specforge.features.capture import samples_sha256
from specforge.features.source import EncodedStore
from specforge.features.span import Span, Spans
from specforge.features.store import TENSORS, FeatureMeta, Sample, SampleFeatures, write_shard

_REQUEST = "request.json"
_FORMAT = 1
_POLL_S = 0.02
_TELL_S = 30.0
_KIND = ("target_fingerprint", "aux_layer_ids", "dtype", "template_digest", "max_length", "mask_options")
"""The fields of FeatureMeta that decide; paths may differ between machines."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """What a trainer wants made."""

    meta: FeatureMeta
    samples_sha256: str
    spans: Spans
    capture_tokens: int
    """Tokens of one forward of the target: with it, every producer makes the same bits."""
    ahead: int
    """Spans that may be on the disk at a time."""
    retain: bool
    position: int

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """None where no trainer has asked yet."""
        path = folder / _REQUEST
        if not path.exists():
            return None
        values = files.read_json(path, FeatureError)
        if not isinstance(values, dict) or values.pop("format", None) != _FORMAT:
            raise FeatureError(f"{path}: format must be {_FORMAT}; another version wrote it, remove {folder} and start again.")
        try:
            spans = Spans(**{**values["spans"], "excluded": tuple(values["spans"]["excluded"])})
            return cls(**{**values, "meta": FeatureMeta.from_dict(values["meta"]), "spans": spans})
        except (KeyError, TypeError, ValueError) as cause:
            raise FeatureError(f"{path}: is no request of a trainer ({cause!r}); remove {folder} and start again.") from cause

    def write(self, folder: Path) -> None:
        files.write_json(folder / _REQUEST, {"format": _FORMAT, **dataclasses.asdict(self)})

    def expect(self, folder: Path, meta: FeatureMeta, samples_digest: str) -> None:
        """
        Raises:
            FeatureError: these are not the features that this process would make or read, with the difference.
        """
        wanted = {name: getattr(self.meta, name) for name in _KIND} | {"rows": self.samples_sha256[:12]}
        own = {name: getattr(meta, name) for name in _KIND} | {"rows": samples_digest[:12]}
        differing = [f"{name}: the folder has {wanted[name]!r}, this run {own[name]!r}" for name in wanted if wanted[name] != own[name]]
        if differing:
            raise FeatureError(
                f"features shared in {folder} are of another kind ({'; '.join(differing)}); "
                f"use the same configuration for trainer and producers, or another features.path."
            )

    @property
    def identity(self) -> str:
        """What the spans of this request hold, whatever the position."""
        same = dataclasses.asdict(dataclasses.replace(self, position=0, ahead=0, retain=False))
        return hashlib.sha256(json.dumps(same).encode()).hexdigest()

    def wanted(self) -> list[Span]:
        return list(self.spans.following(self.position, self.ahead))


def span_path(folder: Path, position: int) -> Path:
    return folder / f"span-{position:012d}.safetensors"


def spans_present(folder: Path) -> list[int]:
    """Positions of the spans in `folder`, ascending."""
    return sorted(int(path.stem.removeprefix("span-")) for path in folder.glob(f"span-{'[0-9]' * 12}.safetensors"))


def write_span(folder: Path, span: Span, identity: str, features: dict[int, SampleFeatures]) -> None:
    """All samples of `span`, each with a checksum of its own, since each rank reads only a few of them."""
    numbers = list(dict.fromkeys(span.samples))
    held = {"identity": identity, "sha256": {str(number): _sha256(features[number]) for number in numbers}}
    write_shard(span_path(folder, span.position), [features[number] for number in numbers], {"span": json.dumps(held)})


def _sha256(features: SampleFeatures) -> str:
    digest = hashlib.sha256()
    for name in TENSORS:
        digest.update(getattr(features, name).contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


class Patience:
    """Polls for what another process does; tells now and then what is missing, and gives up after `wait_s`."""

    def __init__(self, wait_s: float, tell: bool = True) -> None:
        self._wait_s = wait_s
        self._tell = tell
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        self.renew()

    def renew(self) -> None:
        """Something happened."""
        self._began_s = self._told_s = time.monotonic()

    def pause(self, missing: str) -> None:
        """
        Raises:
            FeatureError: nothing happened for `wait_s`, or the launcher of this process is gone.
        """
        now_s = time.monotonic()
        if self._launcher is not None and os.getppid() != self._launcher:
            raise FeatureError(f"the launcher of this process is gone, so it no longer waits: {missing}.")
        if now_s - self._began_s > self._wait_s:
            raise FeatureError(f"features.wait_s={self._wait_s:g}: waited so long in vain: {missing}.")
        if self._tell and now_s - self._told_s > _TELL_S:
            self._told_s = now_s
            print(f"waiting since {now_s - self._began_s:.0f} s: {missing}", file=sys.stderr, flush=True)
        time.sleep(_POLL_S)


class SharedDirFeatureStore(EncodedStore):
    """The trainer's side. At most `ahead` spans are on the disk; those behind the position are removed when released.

    With `retain_on_release` nothing is removed, so the spans can be read again, by this run or by another of the same order.

    Raises:
        FeatureError: `folder` serves features of another kind.
    """

    def __init__(
        self,
        folder: Path,
        samples: Sequence[Sample],
        meta: FeatureMeta,
        world: World,
        *,
        capture_tokens: int,
        ahead: int,
        wait_s: float,
        retain_on_release: bool = False,
    ) -> None:
        super().__init__(samples, meta)
        self.folder = folder
        self._world = world
        self._capture_tokens = capture_tokens
        self._ahead = ahead
        self._retain = retain_on_release
        self._wait_s = wait_s
        self._samples_sha256 = samples_sha256(samples)
        self._request: Request | None = None
        world.on_main(self._refuse_another_kind)

    def _refuse_another_kind(self) -> None:
        earlier = Request.read(self.folder)
        if earlier is not None:
            earlier.expect(self.folder, self.meta, self._samples_sha256)

    @contextlib.contextmanager
    def reading(self, spans: Spans, position: int) -> Iterator[None]:
        request = Request(
            meta=self.meta, samples_sha256=self._samples_sha256, spans=spans, capture_tokens=self._capture_tokens,
            ahead=self._ahead, retain=self._retain, position=position,
        )  # fmt: skip
        lock = files.Lock(self.folder / "trainer.lock")
        self._world.on_main(lambda: self._begin(request, lock))
        self._request = request
        try:
            yield
        finally:
            self._request = None  # a reader that still waits gives up
            lock.release()

    def _begin(self, request: Request, lock: files.Lock) -> None:
        if not lock.try_acquire():
            raise FeatureError(f"{self.folder}: another run reads from it now; give this run a features.path of its own.")
        earlier = Request.read(self.folder)
        request.write(self.folder)
        wanted = {span.position for span in request.wanted()}
        same = earlier is not None and earlier.identity == request.identity
        self._remove([at for at in spans_present(self.folder) if not same or (at not in wanted and not request.retain)])

    def take(self, span: Span, numbers: Sequence[int]) -> list[SampleFeatures]:
        """
        Raises:
            FeatureError: no producer makes the span within `wait_s`, or it is damaged again after it was made anew.
        """
        if not numbers:
            return []
        path, damaged, patience = span_path(self.folder, span.position), False, Patience(self._wait_s, self._world.is_main)
        while request := self._request:
            try:
                return self._read(path, span, numbers, request.identity)
            except FileNotFoundError:
                if self._world.is_main and not request.retain:
                    self._remove([at for at in spans_present(self.folder) if at < request.position])
                patience.pause(f"{path} is not there; run `specforge produce` with this run's configuration")
            except FeatureError as cause:
                if damaged:
                    raise
                print(f"{cause} It is made again.", file=sys.stderr, flush=True)
                damaged = True
                path.unlink(missing_ok=True)
        raise FeatureError(f"{path}: is no longer wanted, the reading has ended.")

    def _read(self, path: Path, span: Span, numbers: Sequence[int], identity: str) -> list[SampleFeatures]:
        stored = list(dict.fromkeys(span.samples))
        offsets, row = {}, 0
        for number in stored:
            offsets[number] = row
            row += int(self.lengths[number])
        try:
            with safe_open(path, framework="pt") as file:
                held: Any = json.loads((file.metadata() or {}).get("span", "{}"))
                slices = {name: file.get_slice(name) for name in TENSORS}
                rows = [slice(offsets[number], offsets[number] + int(self.lengths[number])) for number in numbers]
                found = [SampleFeatures(**{name: slices[name][at] for name in TENSORS}) for at in rows]
        except (SafetensorError, json.JSONDecodeError) as cause:
            raise FeatureError(f"{path}: is not a readable span ({cause}).") from cause
        if not isinstance(held, dict) or held.get("identity") != identity:
            raise FeatureError(f"{path}: was made for another request.")
        for number, features in zip(numbers, found, strict=True):
            if held["sha256"].get(str(number)) != _sha256(features):
                raise FeatureError(f"{path}: the checksum of sample {self.ids[number]!r} differs, so it was damaged after writing.")
        return found

    def release(self, span: Span) -> None:
        """Tell the producers the new position, then make room for them."""
        if not self._world.is_main or self._request is None:
            return
        self._request = dataclasses.replace(self._request, position=span.end)
        self._request.write(self.folder)
        if not self._request.retain:
            self._remove([at for at in spans_present(self.folder) if at < span.end])

    def _remove(self, positions: Sequence[int]) -> None:
        for position in positions:
            span_path(self.folder, position).unlink(missing_ok=True)
