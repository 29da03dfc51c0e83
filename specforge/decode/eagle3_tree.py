"""Drafting a tree with EAGLE-3: a beam at each depth, of all its candidates the likeliest (EAGLE-2, arXiv 2406.16858, section 4).

Shapes: B sequences, k beams, x = k * k children of a depth, C candidates, N nodes with the root, S slots of the cache, H hidden, J slots of
earlier depths.
"""

import torch

from specforge.decode.drafter import Proposal
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.tree import Tree, TreeShape
from specforge.errors import ConfigError
from specforge.methods.eagle3 import Eagle3


class Eagle3TreeDrafter(Eagle3Drafter):
    """A candidate's score is the log-probability of its path; no child has more than its parent, so the best ones are a tree."""

    def __init__(self, method: Eagle3, shape: TreeShape) -> None:
        super().__init__(method, shape.depth)
        if shape.top_k > method.draft.config.draft_vocab_size:
            raise ConfigError(f"tree top_k={shape.top_k}: the draft knows {method.draft.config.draft_vocab_size} tokens; choose fewer.")
        self.shape, self.draft_nodes = shape, shape.nodes
        self._spare_slots = max(shape.nodes, (shape.depth - 1) * shape.top_k)

    @torch.no_grad()
    def propose(self) -> Proposal:
        beams, rows, length_B1 = self.shape.top_k, len(self._lengths), self._length_B1
        score_BC, ids_BC, fed_B1H = self._children(self._last_BH[:, None], self._last_BH.new_zeros(rows, 1))
        parent_BC = torch.full_like(ids_BC, -1)
        place_Bk = self._slot_S[:beams].expand(rows, -1)  # of the beams among the candidates
        fed_BkH = fed_B1H.expand(-1, beams, -1)  # of the output that each beam's token came from
        above_BkJ = torch.zeros(rows, beams, 0, dtype=torch.bool, device=score_BC.device)
        for depth in range(1, self.shape.depth):
            own_kk = torch.eye(beams, dtype=torch.bool, device=score_BC.device)
            above_BkJ = torch.cat([above_BkJ, own_kk.expand(rows, -1, -1)], 2)
            first_slot = (depth - 1) * beams
            hidden_BkH = self._rows(
                fed_BkH,
                ids_BC.gather(1, place_Bk),
                (length_B1 + depth - 1).expand(-1, beams),
                length_B1 + self._slot_S[first_slot : first_slot + beams],
                self._visible(length_B1, above_BkJ),
            )
            score_Bx, ids_Bx, fed_BkH = self._children(hidden_BkH, score_BC.gather(1, place_Bk))
            known = score_BC.shape[1]
            score_BC, ids_BC = torch.cat([score_BC, score_Bx], 1), torch.cat([ids_BC, ids_Bx], 1)
            parent_BC = torch.cat([parent_BC, place_Bk.repeat_interleave(beams, 1)], 1)
            best_Bk = score_Bx.topk(beams).indices
            place_Bk, from_Bk1 = known + best_Bk, (best_Bk // beams)[..., None]
            fed_BkH = fed_BkH.gather(1, from_Bk1.expand(-1, -1, fed_BkH.shape[2]))
            above_BkJ = above_BkJ.gather(1, from_Bk1.expand(-1, -1, above_BkJ.shape[2]))
        return self._best(score_BC, ids_BC, parent_BC)

    def _children(self, hidden_BMH: torch.Tensor, score_BM: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Scores and target ids [B, M * k] of the likeliest tokens after each output, and what their rows are fed [B, M, H]."""
        logits_BMD, fed_BMH = self._read(hidden_BMH)
        log_BMk, drawn_BMk = logits_BMD.float().log_softmax(-1).topk(self.shape.top_k)
        return (score_BM[..., None] + log_BMk).flatten(1), self._target_id_D[drawn_BMk].flatten(1), fed_BMH

    def _visible(self, length_B1: torch.Tensor, above_BkJ: torch.Tensor) -> torch.Tensor:
        """The committed slots and, behind them, those of the beams above and of itself: [B, k, S]."""
        _, beams, behind = above_BkJ.shape
        slot_S = self._slot_S[: max(self._lengths) + behind]
        visible_BkS = (slot_S < length_B1)[:, None].repeat(1, beams, 1)
        slot_BJ = length_B1 + self._slot_S[:behind]
        return visible_BkS.scatter_(2, slot_BJ[:, None].expand(-1, beams, -1), above_BkJ)

    def _best(self, score_BC: torch.Tensor, ids_BC: torch.Tensor, parent_BC: torch.Tensor) -> Proposal:
        # Stable, so that of equal scores the parent, which comes first, is the one that stays.
        kept_BN = score_BC.sort(dim=1, descending=True, stable=True).indices[:, : self.shape.nodes].sort(dim=1).values
        node_BC = torch.full_like(ids_BC, -1).scatter_(1, kept_BN, self._slot_S[1 : self.shape.nodes + 1].expand_as(kept_BN))
        above_BN = parent_BC.gather(1, kept_BN)
        parent_BN = torch.where(above_BN < 0, 0, node_BC.gather(1, above_BN.clamp_min(0)))
        root_B1 = torch.full_like(parent_BN[:, :1], -1)
        return Proposal(ids_BC.gather(1, kept_BN), Tree.of(torch.cat([root_B1, parent_BN], 1), self.shape.depth))
