"""Drafting all depths at once on cached keys against the training forward on the same text, and the walk against real decoding."""

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge.config.methods import PEagleOptions
from specforge.decode.adaptive import AdaptiveLength
from specforge.decode.costs import CostCurve
from specforge.decode.engine import Decoder
from specforge.decode.peagle import PEagleDrafter
from specforge.decode.sampling import Sampling
from specforge.errors import ConfigError
from specforge.eval.live import decode_answers
from specforge.features.store import LocalFeatureStore
from specforge.features.tables import TargetTables
from specforge.features.target import Target
from specforge.methods.peagle import PEagle
from specforge.models.calibration import Calibration
from tests.decode.agreement import assert_drafts_are_training_steps, extend, sharpen, walked_as_decoded
from tests.tiny import make_samples, make_store, train

OPTIONS: list[dict[str, Any]] = [{}, {"layers": 1, "fc_norm": True, "draft_vocab_size": 0}, {"norm_before_fc": True, "head": "frozen"}]


def make_peagle(target_path: Path, store: LocalFeatureStore, **options: Any) -> PEagle:
    chosen: dict[str, Any] = {"draft_tokens": 4, "layers": 2, "draft_vocab_size": 40, **options}
    method = PEagle.build(PEagleOptions(**chosen), TargetTables.read(target_path), store, 0)
    sharpen(method.draft.layers)
    return method


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drafts_come_from_the_logits_of_training(options: dict[str, Any], target_path: Path, tmp_path: Path) -> None:
    """Three sequences of different lengths, extended in three calls, in the second of which one of them has ended its turn."""
    store = make_store(tmp_path / "store", target_path, make_samples([20, 9, 14]))
    method, target = make_peagle(target_path, store, **options), Target.load(target_path, "float32")
    texts = [store.read(number).input_ids.numpy() for number in range(3)]

    drafter = PEagleDrafter(method, method.draft_tokens, Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    drafter.begin(texts, 32)
    for begin, end in pairwise(([0, 0, 0], [9, 4, 7], [13, 4, 8], [len(text) - 1 for text in texts])):
        extend(drafter, target, texts, begin, end)
        if begin[0] == 0:  # rows that wait are not lost where nobody asks, and the mask rows leave nothing behind
            drafter.propose()
    proposal, again = drafter.propose(), drafter.propose()
    assert proposal.probabilities_BKV is not None and again.probabilities_BKV is not None
    assert torch.equal(proposal.probabilities_BKV, again.probabilities_BKV)
    assert_drafts_are_training_steps(proposal, method, target, texts)


@pytest.fixture(scope="module")
def new(answered_path: Path, answered: LocalFeatureStore) -> PEagle:
    return make_peagle(answered_path, answered)


@pytest.fixture(scope="module")
def trained(answered_path: Path, answered: LocalFeatureStore) -> PEagle:
    method = make_peagle(answered_path, answered)
    train(method, answered, steps=30)
    return method


def test_walk_is_live_at_every_length(new: PEagle, trained: PEagle, answered_target: Target, answered: LocalFeatureStore) -> None:
    def walked(method: PEagle, draft_tokens: int) -> float:
        return walked_as_decoded(method, partial(PEagleDrafter, method), draft_tokens, answered_target, answered)

    assert walked(new, 4) < 1.1  # nearly all that it drafts is rejected
    assert 1.25 < walked(trained, 1) < walked(trained, 2) < walked(trained, 4)


def test_adaptive_lengths_propose_the_first_of_the_same_drafts(
    trained: PEagle, answered_target: Target, answered: LocalFeatureStore
) -> None:
    """Where verifying costs little all are proposed, where it costs much fewer are; the text stays the target's own."""
    verified = []
    for a_draft_s in (1e-6, 0.3, 100.0):
        costs = CostCurve((0.0, 0.1, 0.1, 0.1, 0.1), tuple(1 + a_draft_s * drafts for drafts in range(5)))
        rule = AdaptiveLength(Calibration((1.0,) * 4, (0.0,) * 4), costs)
        answers = decode_answers(Decoder(answered_target, PEagleDrafter(trained, 4, adaptive=rule)), answered, range(4), batch_rows=1)
        assert all(answer.same for answer in answers)
        assert rule.rounds[:4].sum() == 0, "all four are drafted"
        verified.append(rule.numbers()["mean_verified"])
    assert verified[0] > 3.9 > verified[1] > verified[2] == 0
    with pytest.raises(ConfigError, match="adaptive draft length: is calibrated for arg-max drafts"):
        PEagleDrafter(trained, 4, Sampling(temperature=1.0), torch.Generator(), rule)
    with pytest.raises(ConfigError, match="--draft-tokens 5: this draft was trained for 4 and cannot draft more"):
        PEagleDrafter(trained, 5)
