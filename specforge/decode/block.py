"""Drafting a block in one forward, with DFlash and what is built on it: the features of committed tokens are keys and values of every
layer, and the whole trained block runs each round, however few of its drafts are asked for.

The keys of a block's rows lie behind the committed tokens' and are overwritten by these, so nothing is rolled back.

Shapes: B sequences, M committed rows of a call, N rows of a block, S slots of the cache, H hidden, F features, K drafts.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional as F

from specforge.decode.adaptive import AdaptiveLength
from specforge.decode.drafter import Proposal, require_trained_for
from specforge.decode.sampling import Sampling
from specforge.decode.tree import Tree
from specforge.errors import ConfigError
from specforge.layers.rows import to_device
from specforge.methods.dflash import DFlash
from specforge.models.decoder import after_attention
from specforge.models.dflash import FULL, SLIDING


class BlockDrafter:
    """A trained (or new) draft at work.

    Args:
        draft_tokens: K, at most as many as the block holds.
        sampling: draw the drafts from the draft's own distributions; None: their arg-max.
        generator: for the draws.
        adaptive: propose as many of the K drafts as it says.

    Raises:
        ConfigError: the block holds fewer drafts; `sampling` and `adaptive`, whose confidence is that of arg-max drafts.
    """

    def __init__(
        self,
        method: DFlash,
        draft_tokens: int,
        sampling: Sampling | None = None,
        generator: torch.Generator | None = None,
        adaptive: AdaptiveLength | None = None,
    ) -> None:
        require_trained_for(method, draft_tokens)
        if sampling is not None and adaptive is not None:
            raise ConfigError(
                "adaptive draft length: is calibrated for arg-max drafts; draft greedily, or sample a fixed number of drafts."
            )
        self.draft_nodes = draft_tokens
        self.layer_ids = method.draft.config.aux_layer_ids
        self._method, self._draft = method, method.draft
        self._sampling, self._generator, self._adaptive = sampling, generator, adaptive
        with torch.no_grad():
            self._weights = [layer.weights(method.draft.hidden_norm.weight) for layer in method.draft.stack]

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        config, weight, rows = self._draft.config, self._draft.fc.weight, len(prompts)
        slots = capacity_tokens + config.block_size
        shape = (len(self._weights), 2, rows, slots, config.num_key_value_heads, config.head_dim)
        self._cache_L2BSgD = torch.zeros(shape, dtype=weight.dtype, device=weight.device)
        self._angles_S1C = self._draft.rotary(slots)
        self._slot_S = torch.arange(slots, device=weight.device)
        self._row_B1 = torch.arange(rows, device=weight.device)[:, None]
        self._anchor_B = torch.zeros(rows, dtype=torch.long, device=weight.device)
        self._lengths = [0] * rows
        if self._adaptive is not None:
            self._adaptive.begin(rows)

    @torch.no_grad()
    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        slot_BM = self._next_slots(next_ids_BM.shape[1])
        angle_R1C, context_RH = self._angles_S1C[slot_BM.flatten()], self._draft.fuse(aux_BMF).flatten(0, 1)
        for layer, weights, cache_2BSgD in zip(self._draft.stack, self._weights, self._cache_L2BSgD, strict=True):
            new_R2gD = layer.context_keys_values(context_RH, weights, angle_R1C)
            cache_2BSgD[:, self._row_B1, slot_BM] = new_R2gD.transpose(0, 1).unflatten(1, slot_BM.shape)
        self._lengths = [length + count for length, count in zip(self._lengths, counts, strict=True)]
        count_B1 = to_device(np.array(counts), slot_BM.device)[:, None]
        last_B = next_ids_BM[self._row_B1, (count_B1 - 1).clamp_min(0)][:, 0]
        self._anchor_B = torch.where(count_B1[:, 0] > 0, last_B, self._anchor_B)
        if self._adaptive is not None:
            self._adaptive.saw(counts)

    @torch.no_grad()
    def propose(self) -> Proposal:
        draft, ids, probabilities = self._method.drafting(self._block()), [self._anchor_B], list[torch.Tensor]()
        if self._adaptive is not None:
            self._adaptive.start()
        for place in range(self.draft_nodes):
            logits_BV, confidence_B = draft(place, ids[-1])
            if self._sampling is not None:
                probabilities.append(self._sampling.probabilities(logits_BV))
                ids.append(torch.multinomial(probabilities[-1], 1, generator=self._generator)[:, 0])
                continue
            ids.append(logits_BV.argmax(-1))
            if self._adaptive is not None:
                likeliest_B = logits_BV.softmax(-1, dtype=torch.float32).amax(-1) if confidence_B is None else confidence_B
                self._adaptive.drafted(likeliest_B.tolist())
        verified = self.draft_nodes if self._adaptive is None else self._adaptive.verified()
        tree = Tree.chain(len(self._lengths), verified, self._anchor_B.device)
        return Proposal(torch.stack(ids, 1)[:, 1 : verified + 1], tree, torch.stack(probabilities, 1) if probabilities else None)

    def _next_slots(self, count: int) -> torch.Tensor:
        """The slots behind what is committed, [B, count]."""
        begin_B1 = to_device(np.array(self._lengths), self._slot_S.device)[:, None]
        return (begin_B1 + self._slot_S[:count]).clamp_max(len(self._slot_S) - 1)

    def _block(self) -> torch.Tensor:
        """Outputs [B, N, H] of a block at the last committed tokens, after the final norm."""
        config, slot_BN = self._draft.config, self._next_slots(self._draft.config.block_size)
        slot_U, slot_BN1 = self._slot_S[: max(self._lengths) + config.block_size], slot_BN[..., None]
        visible = {
            FULL: (slot_U <= slot_BN1[:, -1:]).expand(-1, config.block_size, -1),
            SLIDING: (slot_U <= slot_BN1) & (slot_U > slot_BN1 - config.sliding_window),
        }
        hidden, angle_R1C = self._draft.spread(self._method.embed_blocks(self._anchor_B)), self._angles_S1C[slot_BN.flatten()]
        for kind, layer, weights, cache_2BSgD in zip(config.layer_types, self._draft.stack, self._weights, self._cache_L2BSgD, strict=True):
            q_RhD, own_2RgD = layer.queries_keys_values(layer.project(hidden, weights), weights, angle_R1C)
            cache_2BSgD[:, self._row_B1, slot_BN] = own_2RgD.unflatten(1, slot_BN.shape)
            k_BgUD, v_BgUD = cache_2BSgD[:, :, : len(slot_U)].transpose(2, 3)
            mixed_BhND = F.scaled_dot_product_attention(
                q_RhD.unflatten(0, slot_BN.shape).transpose(1, 2), k_BgUD, v_BgUD, visible[kind][:, None], scale=1.0, enable_gqa=True
            )
            hidden = after_attention(hidden, mixed_BhND.transpose(1, 2).flatten(0, 1), weights, layer.eps).hidden_RH
        return self._draft.final_norm(hidden).unflatten(0, slot_BN.shape)
