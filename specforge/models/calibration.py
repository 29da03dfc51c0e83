"""From how probable a draft calls its token to how often such a token is accepted; stored in the draft's folder.

Two scalings of one form, sigmoid(scale_k * logit(p) + bias_k) at position k with scale_k > 0, so that the order of the drafts
of a position stays: `platt` (Platt 1999) has both, `temperature` (sequential temperature scaling) has scale_k = 1/T_k, bias_k = 0.
`specforge.eval.calibration` fits them.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Self

import torch

from specforge import files
from specforge.errors import CheckpointError

FILE = "calibration.json"
SCALINGS = ("platt", "temperature")
FORMAT_VERSION = 1
EPSILON = 2.0**-24
"""A float32 says of a probability no more than that it is this far from 0 or 1."""


@dataclass(frozen=True)
class Calibration:
    """One scale and one bias a position of the chain."""

    scale: tuple[float, ...]
    bias: tuple[float, ...]

    def apply(self, probability_XK: torch.Tensor) -> torch.Tensor:
        """Probability that draft k is accepted once the drafts before it were: [..., K] in, [..., K] out.

        Its cumulative product is the survival of the chain. K may be smaller than the number of positions.
        """
        self._require(probability_XK.shape[-1])
        scale_K, bias_K = (probability_XK.new_tensor(values[: probability_XK.shape[-1]]) for values in (self.scale, self.bias))
        return torch.sigmoid(scale_K * torch.logit(probability_XK, EPSILON) + bias_K)

    @classmethod
    def read(cls, draft_folder: Path, draft_tokens: int, scaling: str = "platt") -> Self:
        """The calibration in a checkpoint's `draft` folder, for chains of `draft_tokens`.

        Raises:
            CheckpointError: there is none, it is damaged, or it knows fewer positions.
        """
        path = draft_folder / FILE
        if not path.exists():
            raise CheckpointError(f"{path}: is missing; make it with `specforge eval --calibrate`.")
        stored = files.read_object(path, CheckpointError, format_version=int, platt=dict, temperature=dict)
        if stored["format_version"] != FORMAT_VERSION:
            raise CheckpointError(f"{path}: format_version must be {FORMAT_VERSION}; make it again with `specforge eval --calibrate`.")
        fields = stored[scaling]
        files.check_fields(fields, f"{path}: {scaling}", CheckpointError, scale=list, bias=list)
        for name in ("scale", "bias"):
            if not all(files.is_a(value, float) for value in fields[name]):
                raise CheckpointError(f"{path}: {scaling}.{name}={files.shown(fields[name])} must be a list of finite numbers; {_AGAIN}.")
        if len(fields["scale"]) != len(fields["bias"]) or not all(scale > 0 for scale in fields["scale"]):
            raise CheckpointError(f"{path}: {scaling} must have as many biases as scales, and scales above 0; {_AGAIN}.")
        calibration = cls(tuple(map(float, fields["scale"])), tuple(map(float, fields["bias"])))
        calibration._require(draft_tokens, f"{path}: ")
        return calibration

    def _require(self, draft_tokens: int, where: str = "") -> None:
        if draft_tokens > len(self.scale):
            raise CheckpointError(
                f"{where}calibrated for {len(self.scale)} positions, asked for {draft_tokens}; "
                f"run `specforge eval --calibrate eval.draft_tokens={draft_tokens}`."
            )


_AGAIN = "make it again with `specforge eval --calibrate`"


def write_calibrations(draft_folder: Path, calibrations: Mapping[str, Calibration]) -> None:
    """Store one calibration of each of `SCALINGS` beside the draft's weights."""
    files.write_json(draft_folder / FILE, {"format_version": FORMAT_VERSION, **{name: asdict(calibrations[name]) for name in SCALINGS}})
