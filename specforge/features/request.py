"""What a trainer asks of its producers: one small file in the folder that they share."""

import dataclasses
import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from specforge import files
from specforge.errors import FeatureError
from specforge.features.span import Span, Spans
from specforge.features.store import FeatureMeta

_NAME = "request.json"
_FORMAT = 1
_KIND = ("target_fingerprint", "aux_layer_ids", "dtype", "template_digest", "max_length", "mask_options", "teacher_top_k")
"""The fields of FeatureMeta that decide; paths may differ between machines."""


@dataclass(frozen=True, kw_only=True)
class Request:
    """Which features a trainer wants, in which order, how far it is, and how much may be there at a time."""

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
        """None where no trainer has asked yet.

        Raises:
            FeatureError: the file is damaged or of another version.
        """
        path = folder / _NAME
        if not path.exists():
            return None
        values: Any = files.read_object(
            path, FeatureError, format=int, meta=dict, samples_sha256=str, spans=dict, capture_tokens=int, ahead=int, retain=bool,
            position=int,
        )  # fmt: skip
        if values.pop("format") != _FORMAT:
            raise FeatureError(f"{path}: format must be {_FORMAT}; another version wrote it, remove {folder} and start again.")
        try:
            spans = Spans(**{**values["spans"], "excluded": tuple(values["spans"]["excluded"])})
            return cls(**{**values, "meta": FeatureMeta.from_dict(values["meta"]), "spans": spans})
        except (KeyError, TypeError, ValueError) as cause:
            raise FeatureError(f"{path}: is no request of a trainer ({cause!r}); remove {folder} and start again.") from cause

    def write(self, folder: Path) -> None:
        with files.writable(folder, FeatureError):
            files.write_json(folder / _NAME, {"format": _FORMAT, **dataclasses.asdict(self)})

    def expect(self, folder: Path, meta: FeatureMeta, samples_digest: str) -> None:
        """
        Raises:
            FeatureError: these are not the features that this process would make or read, with the difference.
        """
        asked = {name: getattr(self.meta, name) for name in _KIND} | {"rows": self.samples_sha256[:12]}
        own = {name: getattr(meta, name) for name in _KIND} | {"rows": samples_digest[:12]}
        differing = [f"{name}: asked for is {asked[name]!r}, this process has {own[name]!r}" for name in asked if asked[name] != own[name]]
        if differing:
            raise FeatureError(
                f"features shared in {folder} are of another kind ({'; '.join(differing)}); give the training and its producers "
                f"the same configuration, or choose another features.path, or remove that folder."
            )

    @property
    def identity(self) -> str:
        """What the spans of this request hold, whatever the position."""
        same = dataclasses.asdict(dataclasses.replace(self, position=0, ahead=0, retain=False))
        return hashlib.sha256(json.dumps(same).encode()).hexdigest()

    @property
    def is_done(self) -> bool:
        return self.position >= self.spans.total_samples

    def wanted(self) -> list[Span]:
        """The spans that may be there now."""
        return list(self.spans.following(self.position, self.ahead))
