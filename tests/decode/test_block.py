"""Drafting a block on cached keys against the training forward on the same text, and the walk against real decoding."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge.config.methods import METHODS
from specforge.decode.block import BlockDrafter
from specforge.decode.sampling import Sampling
from specforge.errors import ConfigError
from specforge.features.store import LocalFeatureStore
from specforge.features.tables import TargetTables
from specforge.features.target import Target
from specforge.methods.dflash import DFlash
from tests.decode.agreement import extend, sharpen, supervised, walked_as_decoded
from tests.tiny import make_samples, make_store, train

SLIDING = {"layers": 3, "layer_types": ("full_attention", "sliding_attention", "full_attention"), "sliding_window": 6}
VARIANTS: list[dict[str, Any]] = [
    {"name": "dflash"},
    {"name": "dflash", **SLIDING},
    {"name": "domino", "gru_hidden_dim": 8, "emb_dim": 8},
    *({"name": "dspark", "markov_head": head, "markov_rank": 8} for head in ("vanilla", "gated", "rnn")),
]


def make_method(target_path: Path, store: LocalFeatureStore, name: str = "dflash", **options: Any) -> DFlash:
    chosen: dict[str, Any] = {"block_size": 5 if name == "dflash" else 4, "layers": 2, **options}
    tables = TargetTables.read(target_path)
    method: DFlash = METHODS[name].load().build(METHODS[name].options(**chosen), tables, store, 0)
    sharpen(method.draft.layers)
    for parameter in method.draft.parameters():
        if not parameter.any():  # a new head says nothing
            parameter.data.normal_(0, 0.3)
    return method


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_drafts_come_from_the_logits_of_training(options: dict[str, Any], target_path: Path, tmp_path: Path) -> None:
    """Three sequences of different lengths, extended in three calls, in the last of which one has ended."""
    store = make_store(tmp_path / "store", target_path, make_samples([20, 9, 14]))
    method, target = make_method(target_path, store, **options), Target.load(target_path, "float32")
    texts = [store.read(number).input_ids.numpy() for number in range(3)]

    drafter = BlockDrafter(method, method.draft_tokens, Sampling(temperature=1.0), generator := torch.Generator())
    drafter.begin(texts, 32)
    for begin, end in pairwise(([0, 0, 0], [9, 4, 7], [13, 8, 8], [len(text) - 1 for text in texts])):
        extend(drafter, target, texts, begin, end)
        generator.manual_seed(0)
        again = drafter.propose()  # a block leaves nothing behind
    generator.manual_seed(0)
    proposal = drafter.propose()
    before_BK = torch.cat([drafter._anchor_B[:, None], proposal.ids_BK], 1)
    with torch.no_grad():
        draft = method.drafting(drafter._block())
        confidences = [draft(place, before_BK[:, place]).confidence_B for place in range(method.draft_tokens)]
    assert proposal.probabilities_BKV is not None and again.probabilities_BKV is not None
    assert torch.equal(proposal.probabilities_BKV, again.probabilities_BKV)

    for row, text in enumerate(texts):
        batch = supervised(target, np.concatenate([text, proposal.ids_BK[row].numpy()]), len(text) - 1)
        plan = method.plan(batch)
        of_text = torch.from_numpy(np.flatnonzero(plan.start_N == len(text) - 1))
        assert len(of_text) == method.draft_tokens
        with torch.no_grad():
            parts, output = method.parts(batch, plan, method._hidden_states(batch, plan)), method(batch, plan)
        expected = torch.stack([hidden_NX[of_text] @ head_VX.T for hidden_NX, head_VX in parts]).sum(0).softmax(-1)
        torch.testing.assert_close(proposal.probabilities_BKV[row], expected, rtol=1e-5, atol=1e-6)
        for place, confidence_B in enumerate(confidences):
            if confidence_B is not None:
                told = output.confidences_TK[len(text) - 1, place]
                torch.testing.assert_close(confidence_B[row], told, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", VARIANTS, ids=lambda options: "-".join(map(str, options.values())))
def test_walk_is_live_at_every_length(
    options: dict[str, Any], answered_path: Path, answered_target: Target, answered: LocalFeatureStore
) -> None:
    method = make_method(answered_path, answered, **options)
    walked = partial(walked_as_decoded, method, partial(BlockDrafter, method), target=answered_target, answered=answered)
    assert walked(4) < 1.1  # nearly all that it drafts is rejected
    train(method, answered, steps=20)
    assert 1.25 < walked(1) < walked(2) < walked(4)


def test_a_block_holds_no_more_drafts(answered_path: Path, answered: LocalFeatureStore) -> None:
    method = make_method(answered_path, answered)
    assert method.draft_tokens == 4
    with pytest.raises(ConfigError, match="--draft-tokens 5: this draft was trained for 4 and cannot draft more"):
        BlockDrafter(method, 5)
