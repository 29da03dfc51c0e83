"""P-EAGLE: EAGLE-3 whose later steps know neither the token nor the output before, so that one forward drafts all depths.

Rows, their attention, targets and weights are those of training-time test (`specforge.methods.eagle3`), with a depth d for a step j.
At depths d >= 1 a row is fed the mask token's embedding and a learned feature. The embedding stays the target's.

In training a sample's n rows are thinned out by depth (conditional drop, arXiv 2602.01469): depth d keeps max(ratio^d, floor) n of
them, drawn from (seed, step, sample number) alone, each among those of the depth before. An evaluation keeps all.
"""

from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from torch.nn import functional as F

from specforge.config.methods import PEagleOptions
from specforge.errors import ConfigError
from specforge.features.batch import DraftBatch
from specforge.features.source import FeatureStore
from specforge.features.tables import TargetTables
from specforge.layers.norm import normalise
from specforge.methods.base import Moment
from specforge.methods.eagle3 import Eagle3, Feed, TTTPlan, derive_config, plan_ttt, supervised_targets
from specforge.methods.mask_token import require_known, unused_token
from specforge.models.eagle3 import LayerState, StepRows
from specforge.models.peagle import PEagleConfig, PEagleDraft


def thinned_out(batch: DraftBatch, supervised_JT: np.ndarray, share_J: np.ndarray, moment: Moment) -> np.ndarray:
    """The supervised rows that each depth keeps: bool [J, T]. A sample's n rows are those that are supervised at any depth."""
    place_T = np.ones(supervised_JT.shape[1])
    for sample, (begin, end) in zip(batch.samples, pairwise(batch.documents.starts), strict=False):
        row_N = begin + np.flatnonzero(supervised_JT[:, begin:end].any(0))
        place_T[row_N] = np.random.default_rng([moment.seed, moment.step, sample]).permutation(len(row_N)) / len(row_N)
    return supervised_JT & (place_T < share_J[:, None])


class PEagle(Eagle3):
    options: PEagleOptions
    draft: PEagleDraft
    drafts_longer = False
    draft_type = PEagleDraft

    @classmethod
    def build(cls, options: Any, tables: TargetTables, store: FeatureStore, seed: int) -> Self:
        """As EAGLE-3's.

        Raises:
            ConfigError: the depths do not fit the target's context, or the mask token is none of the target's or one of the training rows.
        """
        mask_token_id = unused_token(options.mask_token_id, store, tables.config.vocab_size)
        return super().build(replace(options, mask_token_id=mask_token_id), tables, store, seed)

    @classmethod
    def read(cls, options: Any, tables: TargetTables, folder: Path) -> Self:
        if options.mask_token_id < 0:
            options = replace(options, mask_token_id=PEagleConfig.read(folder).mask_token_id)
        return super().read(options, tables, folder)

    @classmethod
    def config_of(cls, options: Any, tables: TargetTables, aux_layer_ids: tuple[int, ...], draft_vocab_size: int) -> PEagleConfig:
        vocab_size, positions = tables.config.vocab_size, tables.config.max_position_embeddings
        if options.draft_tokens > positions:
            raise ConfigError(
                f"method.options.draft_tokens={options.draft_tokens}: the target has {positions} positions; choose fewer depths."
            )
        require_known(options.mask_token_id, vocab_size)
        shape = derive_config(options, tables, aux_layer_ids, draft_vocab_size)
        return PEagleConfig(**vars(shape), mask_token_id=options.mask_token_id)

    def plan(self, batch: DraftBatch, moment: Moment | None = None) -> TTTPlan:
        options, supervised_JT = self.options, supervised_targets(batch, self.draft_tokens)
        if moment is not None:
            share_J = np.maximum(options.depth_ratio ** np.arange(self.draft_tokens), options.depth_floor)
            supervised_JT = thinned_out(batch, supervised_JT, share_J, moment)
        return plan_ttt(batch, supervised_JT, self._in_vocabulary_V, options.step_decay, moment)

    def _first_step(self, batch: DraftBatch, everywhere: StepRows, rows: StepRows) -> tuple[torch.Tensor, list[LayerState], Feed]:
        fused_TH, mask_1H = self.draft.fuse_with_mask(batch.aux)
        hidden, states = self.draft.first_step(fused_TH, self._embed(batch.input_ids.long().roll(-1)), everywhere, rows)
        eps, mask, embedding_XH = self.draft.config.rms_norm_eps, self.draft.config.mask_token_id, states[0].weights.embedding_XH
        assert embedding_XH is not None
        states[0].embedded_TX = F.linear(normalise(self.embedding_VH[mask : mask + 1].to(mask_1H.dtype), eps), embedding_XH)
        fed = mask_1H, normalise(mask_1H, eps), torch.zeros(1, dtype=torch.long, device=mask_1H.device)
        return hidden, states, lambda *_: fed
