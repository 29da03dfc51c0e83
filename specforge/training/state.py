"""Where a run stands: the few numbers that, with weights and moments, define its next step."""

import dataclasses
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class TrainState:
    run_id: str
    step: int = 0
    """Optimiser steps done."""
    samples_seen: int = 0
    """Position in the global sample order; means the same at any world size."""
    parent: str = ""
    """The checkpoint from which this run forked; empty: it began by itself."""

    def advanced(self, samples: int) -> "TrainState":
        return dataclasses.replace(self, step=self.step + 1, samples_seen=self.samples_seen + samples)

    def as_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)
