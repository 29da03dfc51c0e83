"""Drafting all depths at once with P-EAGLE: mask rows follow the committed ones into the same forward.

The keys of the mask rows lie behind the committed rows' and are overwritten by the next committed ones, so nothing is rolled back. A
row sees those before it alone, so fewer mask rows give the same drafts.

Shapes: B sequences, M committed rows of a call, N = M + K - 1 rows of a forward, K drafts, H hidden, F features.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from specforge.decode.adaptive import AdaptiveLength
from specforge.decode.drafter import Proposal, require_trained_for
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.sampling import Sampling
from specforge.decode.tree import Tree
from specforge.layers.rows import to_device
from specforge.methods.peagle import PEagle


class PEagleDrafter(Eagle3Drafter):
    """As `Eagle3Drafter`, except that all K tokens are drafted however few `adaptive` proposes, and that committed rows wait for
    `propose`, to share a forward with the mask rows.

    Raises:
        ConfigError: besides, the draft was trained for fewer depths.
    """

    def __init__(
        self,
        method: PEagle,
        draft_tokens: int,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        adaptive: AdaptiveLength | None = None,
    ) -> None:
        require_trained_for(method, draft_tokens)
        super().__init__(method, draft_tokens, sampling, generator, adaptive)
        self._spare_slots = 2 * draft_tokens  # mask rows, and those by which other sequences are longer
        self._mask_token_id = method.draft.config.mask_token_id
        with torch.no_grad():
            self._mask_H = method.draft.fuse(method.draft.mask_hidden)[0, 0]

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        super().begin(prompts, capacity_tokens)
        self._waiting: tuple[torch.Tensor, torch.Tensor, Sequence[int]] | None = None

    @torch.no_grad()
    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        self._catch_up()
        self._waiting = next_ids_BM, self._draft.fuse(aux_BMF), counts
        if self._adaptive is not None:
            self._adaptive.saw(counts)

    @torch.no_grad()
    def propose(self) -> Proposal:
        self._catch_up()
        logits_BKD, _ = self._read(self._drafts_BKH)
        rows, verified, probabilities_BKV = len(logits_BKD), self.draft_nodes, None
        if self._sampling is not None:
            drawn_R, probabilities_RV = self._drawn(logits_BKD.flatten(0, 1), self._sampling)
            drawn_BK, probabilities_BKV = drawn_R.unflatten(0, (rows, -1)), probabilities_RV.unflatten(0, (rows, -1))
        else:
            drawn_BK = logits_BKD.argmax(-1)
        if self._adaptive is not None:
            self._adaptive.start()
            for confidence_B in logits_BKD.softmax(-1, dtype=torch.float32).amax(-1).T.tolist():
                self._adaptive.drafted(confidence_B)
            verified = self._adaptive.verified()
        tree = Tree.chain(rows, verified, drawn_BK.device)
        return Proposal(self._target_id_D[drawn_BK[:, :verified]], tree, probabilities_BKV)

    def _catch_up(self) -> None:
        """One forward of the rows that wait and, behind the last one of each sequence, K - 1 mask rows."""
        if self._waiting is None:
            return
        (next_ids_BM, fused_BMH, counts), self._waiting = self._waiting, None
        more, count_B1 = max(self.draft_nodes - 1, 0), to_device(np.array(counts), self._slot_S.device)[:, None]
        place_N = self._slot_S[: next_ids_BM.shape[1] + more]
        slot_BN, masked_BN = self._length_B1 + place_N, place_N >= count_B1
        ids_BN = F.pad(next_ids_BM, (0, more)).masked_fill(masked_BN, self._mask_token_id)
        features_BNH = torch.where(masked_BN[..., None], self._mask_H, F.pad(fused_BMH, (0, 0, 0, more)))
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        visible_BNS = self._slot_S[: max(self._lengths) + more] <= slot_BN[..., None]
        hidden_BNH = self._rows(features_BNH, ids_BN, slot_BN, slot_BN, visible_BNS)
        self._length_B1 = self._length_B1 + count_B1
        self._drafts_BKH = hidden_BNH[self._row_B1, (count_B1 - 1).clamp_min(0) + self._slot_S[: self.draft_nodes]]
