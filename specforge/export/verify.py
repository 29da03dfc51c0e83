"""The exported folder against the draft that was trained: one on the contract's plain products, the other on the training's kernels,
both on the same random features.

Shapes: N tokens, S steps, B rows of a block, H hidden, F all captured layers, D draft vocabulary, V target vocabulary.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

from specforge.errors import ExportError
from specforge.export.contract.folder import read_folder
from specforge.export.contract.logits import block_logits, block_states, chain_logits, confidences
from specforge.export.contract.served import Served
from specforge.export.trained import TrainedDraft
from specforge.layers.block_attention import BlockMask
from specforge.layers.documents import Documents
from specforge.layers.norm import normalise
from specforge.models.dflash import FULL, SLIDING, Blocks
from specforge.models.eagle3 import StepRows

TOLERANCE = 1e-3
"""Of float32 logits, relative to the largest. A wrong norm, layer order or angle moves them by tenths."""
_TOKENS = 7


@torch.no_grad()
def verify(folder: Path, trained: TrainedDraft) -> float:
    """The largest difference of logits (and confidences), relative to the largest logit.

    Raises:
        ExportError: the folder breaks the contract, or its logits are not the draft's.
    """
    served = read_folder(folder)
    if served.network.kind != trained.name or served.network.hidden_state_ids != trained.config.aux_layer_ids:
        raise ExportError(f"{folder}: reads as {served.network.kind} of {served.network.hidden_state_ids}; this is a defect, report it.")
    generator = torch.Generator().manual_seed(0)
    difference = _chain(served, trained, generator) if trained.is_chain else _block(served, trained, generator)
    if not difference <= TOLERANCE:
        raise ExportError(
            f"{folder}: its logits differ from the draft's by {difference:.2g} of the largest, more than {TOLERANCE:g}; "
            "this is a defect, report it."
        )
    return difference


def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).abs().max() / wanted.abs().max())


def _ids(trained: TrainedDraft, count: int, generator: torch.Generator) -> torch.Tensor:
    return torch.randint(trained.target.vocab_size, (count,), generator=generator)


def _features(trained: TrainedDraft, generator: torch.Generator) -> torch.Tensor:
    return torch.randn(_TOKENS, len(trained.config.aux_layer_ids) * trained.config.target_hidden_size, generator=generator)


def _chain(served: Served, trained: TrainedDraft, generator: torch.Generator) -> float:
    aux_NF, ids_N = _features(trained, generator), _ids(trained, _TOKENS, generator)
    steps = min(trained.method.draft_tokens, 3)
    embedded_NH = F.embedding(ids_N, trained.embedding_VH).float()
    fed = [embedded_NH.roll(-step, 0) for step in range(steps)]
    if trained.name == "peagle":
        mask_H = trained.embedding_VH[trained.config.mask_token_id].float()
        fed = [embedded_NH, *[mask_H.expand_as(embedded_NH)] * (steps - 1)]
    found_SND = chain_logits(served, aux_NF, torch.stack(fed))
    return _difference(found_SND, _trained_chain(trained, aux_NF, embedded_NH, steps))


def _trained_chain(trained: TrainedDraft, aux_NF: torch.Tensor, embedded_NH: torch.Tensor, steps: int) -> torch.Tensor:
    draft, head_DH = trained.method.draft, trained.head_XH.float()
    angles_P1C, documents, all_N = draft.rotary(_TOKENS + steps), Documents((_TOKENS,)), np.arange(_TOKENS)

    def rows_at(step: int) -> StepRows:
        return StepRows.of(documents, all_N, angles_P1C[all_N + step], torch.float32, flex=False)

    hidden, states = draft.first_step(draft.fuse(aux_NF), embedded_NH, rows_at(0), rows_at(0))
    fed: Any = None
    if trained.name == "peagle":
        _, mask_1H = draft.fuse_with_mask(aux_NF)
        token_1H = trained.embedding_VH[trained.config.mask_token_id : trained.config.mask_token_id + 1].float()
        states[0].embedded_TX = F.linear(normalise(token_1H, trained.config.rms_norm_eps), states[0].weights.embedding_XH)
        fed = mask_1H, normalise(mask_1H, trained.config.rms_norm_eps), torch.zeros(1, dtype=torch.long)
    logits = [draft.final_norm(hidden) @ head_DH.T]
    for step in range(1, steps):
        own = (hidden, normalise(hidden, trained.config.rms_norm_eps), (torch.arange(_TOKENS) + step) % _TOKENS)
        hidden = draft.next_step(*(fed or own), rows_at(step), states)
        logits.append(draft.final_norm(hidden) @ head_DH.T)
    return torch.stack(logits)


def _block(served: Served, trained: TrainedDraft, generator: torch.Generator) -> float:
    """A block whose anchor is the last of N + 1 tokens, and drafts after given tokens."""
    config, method = trained.config, trained.method
    aux_NF, previous_K = _features(trained, generator), _ids(trained, method.draft_tokens, generator)
    embedded_2H = method.embed_blocks(previous_K[:1]).float()
    embedded_BH = embedded_2H[[0] + [1] * (config.block_size - 1)]
    states_BH = block_states(served, aux_NF, embedded_BH)
    found_KV = block_logits(served, states_BH, trained.head_XH.float(), previous_K, method.embed(previous_K).float())
    drafting = method.drafting(_trained_block(trained, aux_NF, embedded_2H)[None])
    drafted = [drafting(place, token[None]) for place, token in enumerate(previous_K)]
    difference = _difference(found_KV, torch.cat([each.logits_BV for each in drafted]))
    if trained.name == "dspark":
        wanted_K = torch.cat([each.confidence_B for each in drafted])
        difference = max(difference, _difference(confidences(served, states_BH, previous_K), wanted_K))
    return difference


def _trained_block(trained: TrainedDraft, aux_NF: torch.Tensor, embedded_2H: torch.Tensor) -> torch.Tensor:
    """Outputs [B, H] of the trained network."""
    config, draft = trained.config, trained.method.draft
    documents, anchor, rows = Documents((_TOKENS + 1,)), np.array([_TOKENS]), config.block_size
    angles_P1C = draft.rotary(_TOKENS + rows)
    windows = {FULL: 0, SLIDING: config.sliding_window}
    masks = {kind: BlockMask.of(documents, anchor, rows, windows[kind], aux_NF.device, aux_NF.dtype) for kind in set(config.layer_types)}
    blocks = Blocks(angles_P1C[: _TOKENS + 1], angles_P1C[_TOKENS:], masks, torch.arange(rows))
    states_BH: torch.Tensor = draft(F.pad(aux_NF, (0, 0, 0, 1)), embedded_2H, blocks).hidden_NH
    return states_BH
