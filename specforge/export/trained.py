"""A trained draft, and what is known of its training: what every layout is written from."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specforge.features.tables import TargetConfig


@dataclass(frozen=True)
class Template:
    """The chat template of the training rows."""

    sha256: str
    enable_thinking: bool | None
    """What the template did without being told; None: it knows no such switch."""


@dataclass(frozen=True)
class TrainedDraft:
    method: Any
    """The loaded method, whole, on the CPU, with its target's tables."""
    name: str
    """Of the method."""
    target: TargetConfig
    target_path: Path
    target_fingerprint: str
    checkpoint: str
    run_id: str
    step: int
    template: Template | None
    """None: the rows were tokens."""
    metrics: Mapping[str, Any]
    """The `eval/*` numbers of this very checkpoint; empty where it was never measured."""
    calibration: Path | None
    """The file of its confidence's scalings."""

    @property
    def config(self) -> Any:
        return self.method.draft.config

    @property
    def is_chain(self) -> bool:
        """EAGLE-3 and P-EAGLE, which have a vocabulary of their own."""
        return self.name in ("eagle3", "peagle")

    @property
    def served_tokens(self) -> int:
        """K that engines draft: SGLang's Domino drafts one token less than its block has rows."""
        tokens: int = self.method.draft_tokens
        return tokens - 1 if self.name == "domino" else tokens

    @property
    def embedding_VH(self) -> torch.Tensor:
        table: torch.Tensor = self.method.embedding_VH
        return table[: self.target.vocab_size]

    @property
    def head_XH(self) -> torch.Tensor:
        """What its logits come from: its own rows, the target's rows of its vocabulary, or all of the target's."""
        if not self.is_chain:
            head: torch.Tensor = self.method.head_VH
        elif self.method.draft.lm_head is not None:
            head = self.method.draft.lm_head.weight.detach()
        else:
            head = self.method.teacher_head_DH
        return head
