"""Drafting a chain with EAGLE-3: its layers on cached keys, from the last committed row on.

The key of a draft lies behind the committed rows' and is overwritten by the next committed one, so nothing is rolled back.

Shapes: B sequences, M rows of a call, S slots of the cache, H hidden, F features, X = (h + 2g) * D, K drafts, D draft vocabulary.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from specforge.decode.adaptive import AdaptiveLength
from specforge.decode.drafter import Proposal
from specforge.decode.sampling import Sampling
from specforge.decode.tree import Tree
from specforge.errors import ConfigError
from specforge.layers.norm import normalise
from specforge.layers.rows import to_device
from specforge.methods.eagle3 import Eagle3
from specforge.models.decoder import after_attention


class Eagle3Drafter:
    """A trained (or new) draft at work.

    Args:
        draft_tokens: K, at most what it was trained for to be sensible.
        sampling: draw the drafts of a chain from the draft's own distribution; None: its arg-max.
        generator: for the draws.
        adaptive: draft as many of the K tokens as it says, and propose as many of those.

    Raises:
        ConfigError: `sampling` and `adaptive`, whose confidence is that of arg-max drafts.
    """

    def __init__(
        self,
        method: Eagle3,
        draft_tokens: int,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        adaptive: AdaptiveLength | None = None,
    ) -> None:
        if sampling is not None and adaptive is not None:
            raise ConfigError(
                "adaptive draft length: is calibrated for arg-max drafts; draft greedily, or sample a fixed number of drafts."
            )
        self.draft_nodes = self._spare_slots = draft_tokens
        self._sampling, self._generator, self._adaptive = sampling, generator, adaptive
        self._draft = method.draft
        self.layer_ids = method.draft.config.aux_layer_ids
        head_DH = method.teacher_head_DH if method.draft.lm_head is None else method.draft.lm_head.weight
        with torch.no_grad():
            self._head_DH = head_DH.to(method.draft.fc.weight.dtype)
            self._target_id_D = torch.arange(len(method.draft.d2t), device=head_DH.device) + method.draft.d2t
            self._embedding_VH = method.embedding_VH
            self._weights = [layer.weights() for layer in method.draft.stack]

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        config, weight, rows = self._draft.config, self._draft.fc.weight, len(prompts)
        slots = capacity_tokens + self._spare_slots
        shape = (len(self._weights), 2, rows, slots, config.num_key_value_heads, config.head_dim)
        self._cache_L2BSgD = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._angles_S1C = self._draft.rotary(slots)
        self._slot_S = torch.arange(slots, device=weight.device)
        self._row_B1 = torch.arange(rows, device=weight.device)[:, None]
        self._last_BH = torch.zeros(rows, config.hidden_size, dtype=weight.dtype, device=weight.device)
        self._lengths = [0] * rows
        self._length_B1 = torch.zeros_like(self._row_B1)
        if self._adaptive is not None:
            self._adaptive.begin(rows)

    @torch.no_grad()
    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        slot_BM = self._length_B1 + self._slot_S[: next_ids_BM.shape[1]]
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        visible_BMS = self._slot_S[: max(self._lengths)] <= slot_BM[..., None]
        hidden_BMH = self._rows(self._draft.fuse(aux_BMF), next_ids_BM, slot_BM, slot_BM, visible_BMS)
        count_B1 = to_device(np.array(counts), self._slot_S.device)[:, None]
        self._length_B1 = self._length_B1 + count_B1
        if min(counts) == next_ids_BM.shape[1]:
            self._last_BH = hidden_BMH[:, -1]
        else:
            last_BH = hidden_BMH[self._row_B1, (count_B1 - 1).clamp_min(0)][:, 0]
            self._last_BH = torch.where(count_B1 > 0, last_BH, self._last_BH)
        if self._adaptive is not None:
            self._adaptive.saw(counts)

    @torch.no_grad()
    def propose(self) -> Proposal:
        slot_BK = self._length_B1 + self._slot_S[: self.draft_nodes]
        visible_BKS = self._slot_S[: max(self._lengths) + self.draft_nodes - 1] <= slot_BK[..., None]
        hidden_BH = fed_BH = self._last_BH
        ids, probabilities = list[torch.Tensor](), list[torch.Tensor]()
        if self._adaptive is not None:
            self._adaptive.start()
        while len(ids) < self.draft_nodes and (self._adaptive is None or self._adaptive.goes_on()):
            if ids:
                row, slots = slice(len(ids) - 1, len(ids)), max(self._lengths) + len(ids)
                slot_B1, visible_B1S = slot_BK[:, row], visible_BKS[:, row, :slots]
                hidden_BH = self._rows(fed_BH[:, None], ids[-1][:, None], slot_B1, slot_B1, visible_B1S)[:, 0]
            logits_BD, fed_BH = self._read(hidden_BH)
            if self._adaptive is not None:
                confidence_B, drawn_B = logits_BD.softmax(-1, dtype=torch.float32).max(-1)
                self._adaptive.drafted(confidence_B.tolist())
            elif self._sampling is None:
                drawn_B = logits_BD.argmax(-1)
            else:
                drawn_B, probabilities_BV = self._drawn(logits_BD, self._sampling)
                probabilities.append(probabilities_BV)
            ids.append(self._target_id_D[drawn_B])
        verified = len(ids) if self._adaptive is None else self._adaptive.verified()
        ids_BK = torch.stack(ids[:verified], 1) if verified else slot_BK[:, :0]
        tree = Tree.chain(len(hidden_BH), verified, hidden_BH.device)
        return Proposal(ids_BK, tree, torch.stack(probabilities, 1) if probabilities else None)

    def _rows(
        self,
        hidden_BMH: torch.Tensor,
        ids_BM: torch.Tensor,
        position_BM: torch.Tensor,
        slot_BM: torch.Tensor,
        visible_BMS: torch.Tensor,
    ) -> torch.Tensor:
        """Outputs [B, M, H] before the final norm; the rows' keys and values go to their slots before any row looks."""
        rows, slots, shape = self._row_B1, visible_BMS.shape[2], hidden_BMH.shape
        hidden, angle_R1C = hidden_BMH.flatten(0, 1), self._angles_S1C[position_BM.flatten()]
        for layer, weights, cache_2BSgD in zip(self._draft.stack, self._weights, self._cache_L2BSgD, strict=True):
            embedded_RX = None
            if weights.embedding_XH is not None:
                embedded_RH = F.embedding(ids_BM.flatten(), self._embedding_VH).to(hidden.dtype)
                embedded_RX = F.linear(normalise(embedded_RH, layer.eps), weights.embedding_XH)
            q_RhD, *kv_RgD = layer.queries_keys_values(normalise(hidden, layer.eps), weights, embedded_RX, angle_R1C)
            for cache_BSgD, new_RgD in zip(cache_2BSgD, kv_RgD, strict=True):
                cache_BSgD[rows, slot_BM] = new_RgD.unflatten(0, shape[:2])
            k_BgSD, v_BgSD = cache_2BSgD[:, :, :slots].transpose(2, 3)
            mixed_BhMD = F.scaled_dot_product_attention(
                q_RhD.unflatten(0, shape[:2]).transpose(1, 2), k_BgSD, v_BgSD, visible_BMS[:, None], scale=1.0, enable_gqa=True
            )
            hidden = after_attention(hidden, mixed_BhMD.transpose(1, 2).flatten(0, 1), weights, layer.eps).hidden_RH
        return hidden.unflatten(0, shape[:2])

    def _read(self, hidden_XH: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Logits of the token that follows each output, and what the row of that token is fed of it."""
        normed_XH = self._draft.final_norm(hidden_XH)
        return F.linear(normed_XH, self._head_DH), normed_XH if self._draft.config.norm_output else hidden_XH

    def _drawn(self, logits_BD: torch.Tensor, sampling: Sampling) -> tuple[torch.Tensor, torch.Tensor]:
        """Draft ids [B] and the distribution they were drawn from, over the target's vocabulary [B, V]."""
        probabilities_BD = sampling.probabilities(logits_BD)
        drawn_B = torch.multinomial(probabilities_BD, 1, generator=self._generator)[:, 0]
        nowhere_BV = probabilities_BD.new_zeros(len(logits_BD), len(self._draft.t2d))
        return drawn_B, nowhere_BV.index_copy_(1, self._target_id_D, probabilities_BD)
