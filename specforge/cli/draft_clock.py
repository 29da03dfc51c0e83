"""How long drafts take to draft, all of them decoding the same answers by turns."""

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch

from specforge.cli.demo import ANSWER_TOKENS, TARGET
from specforge.cli.draft import read_draft
from specforge.data.conversations import read_rows
from specforge.decode.drafter import Drafter, Proposal
from specforge.decode.engine import Decoder
from specforge.features.target import Target

PROMPTS, LAPS = 4, 2


class DraftClock:
    """Another drafter, and the seconds that it spent in each round, what it reads of the last one included."""

    def __init__(self, drafter: Drafter) -> None:
        self._drafter = drafter
        self.layer_ids, self.draft_nodes = drafter.layer_ids, drafter.draft_nodes
        self.rounds_s: list[float] = []

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        self._drafter.begin(prompts, capacity_tokens)
        self._prefilled = False

    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        began_s = time.perf_counter()
        self._drafter.extend(next_ids_BM, aux_BMF, counts)
        self._extended_s = time.perf_counter() - began_s

    def propose(self) -> Proposal:
        began_s = time.perf_counter()
        proposal = self._drafter.propose()
        if self._prefilled:
            self.rounds_s.append(self._extended_s + time.perf_counter() - began_s)
        self._prefilled = True
        return proposal


def draft_seconds(checkpoints: Mapping[str, Path], rows: Path) -> dict[str, float]:
    """Median of a round, one sequence at a time, greedy, one thread, of drafts of the embedded target on held-out rows."""
    torch.set_num_threads(1)
    target, generator = Target.load(TARGET, "float32"), torch.Generator()
    drafts = {name: read_draft(str(checkpoint), TARGET, None) for name, checkpoint in checkpoints.items()}
    clocks = {name: DraftClock(draft.drafter(target, None, generator)) for name, draft in drafts.items()}
    for _ in range(LAPS):
        for row in read_rows(rows)[:PROMPTS]:
            prompt_S = np.array(row.input_ids)[: np.argmax(np.array(row.loss_mask))]
            for clock in clocks.values():
                Decoder(target, clock).decode([prompt_S], ANSWER_TOKENS)
    return {name: median(clock.rounds_s) for name, clock in clocks.items()}
