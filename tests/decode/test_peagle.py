"""Drafting all depths at once on cached keys against the training forward on the same text, and the walk against real decoding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge.config.methods import PEagleOptions
from specforge.decode.adaptive import AdaptiveLength
from specforge.decode.costs import CostCurve
from specforge.decode.engine import Decoder
from specforge.decode.peagle import PEagleDrafter
from specforge.decode.sampling import Sampling
from specforge.distributed import World
from specforge.errors import ConfigError
from specforge.eval.evaluator import Evaluator
from specforge.eval.live import decode_answers
from specforge.eval.simulate import simulate
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.features.target import Target
from specforge.methods.peagle import PEagle
from specforge.models.calibration import Calibration
from tests.tiny import AUX, make_samples, make_store, train

OPTIONS: list[dict[str, Any]] = [{}, {"layers": 1, "fc_norm": True, "draft_vocab_size": 0}, {"norm_before_fc": True, "head": "frozen"}]


def make_peagle(target_path: Path, store: LocalFeatureStore, **options: Any) -> PEagle:
    chosen: dict[str, Any] = {"draft_tokens": 4, "layers": 2, "draft_vocab_size": 40, "loss_chunk_rows": 7, **options}
    method = PEagle.build(PEagleOptions(**chosen), TargetTables.read(target_path), store, 0)
    torch.manual_seed(0)
    for parameter in method.draft.layers.parameters():  # attention decides what is said, and every norm has a weight of its own
        parameter.data.mul_(1.5) if parameter.dim() == 2 else parameter.data.mul_(1 + torch.rand(len(parameter)))
    return method


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drafts_come_from_the_logits_of_training(options: dict[str, Any], target_path: Path, tmp_path: Path) -> None:
    """Three sequences of different lengths, extended in three calls, in the second of which one of them has ended its turn."""
    store = make_store(tmp_path / "store", target_path, make_samples([20, 9, 14]))
    method, target = make_peagle(target_path, store, **options), Target.load(target_path, "float32")
    texts = [store.read(number).input_ids.numpy() for number in range(3)]
    aux = [target.capture([text], AUX)[0]["aux"] for text in texts]

    drafter = PEagleDrafter(method, method.draft_tokens, Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    drafter.begin(texts, 32)
    rows = [len(text) - 1 for text in texts]
    for begin, end in (([0, 0, 0], [9, 4, 7]), ([9, 4, 7], [13, 4, 8]), ([13, 4, 8], rows)):
        counts = [e - b for b, e in zip(begin, end, strict=True)]
        ids_BM, aux_BMF = torch.zeros(3, max(counts), dtype=torch.long), torch.full((3, max(counts), aux[0].shape[1]), 7.0)
        for row, (b, e) in enumerate(zip(begin, end, strict=True)):
            ids_BM[row, : e - b] = torch.from_numpy(texts[row][b + 1 : e + 1])
            aux_BMF[row, : e - b] = aux[row][b:e]
        drafter.extend(ids_BM, aux_BMF, counts)
        if begin[0] == 0:  # rows that wait are not lost where nobody asks, and the mask rows leave nothing behind
            drafter.propose()
    proposal, again = drafter.propose(), drafter.propose()
    assert proposal.probabilities_BKV is not None and again.probabilities_BKV is not None
    assert torch.equal(proposal.probabilities_BKV, again.probabilities_BKV)

    head_DH = method.teacher_head_DH if method.draft.lm_head is None else method.draft.lm_head.weight
    kept = torch.arange(len(method.draft.d2t)) + method.draft.d2t
    for row, text in enumerate(texts):
        whole = np.concatenate([text, proposal.ids_BK[row].numpy(), [5]]).astype(np.int32)
        sample = SampleFeatures(torch.from_numpy(whole), torch.arange(len(whole)) >= len(text), **target.capture([whole], AUX)[0])
        batch = DraftBatch.pack([0], [sample])
        plan = method.plan(batch)
        outputs = method._hidden_states(batch, plan)
        assert len(outputs) == method.draft_tokens
        for depth, (output, step) in enumerate(zip(outputs, plan.steps, strict=True)):
            place = step.rows_R.tolist().index(len(text) - 2)
            expected = (output[place] * method.draft.norm.weight @ head_DH.T).softmax(-1)
            got = proposal.probabilities_BKV[row, depth]
            torch.testing.assert_close(got[kept], expected.detach(), rtol=1e-5, atol=1e-6)
            assert got.sum() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["trained", "random"])
def test_walk_is_live_at_every_length(kind: str, answered_path: Path, answered_target: Target, answered: LocalFeatureStore) -> None:
    method = make_peagle(answered_path, answered)
    if kind == "trained":
        train(method, answered, steps=60)
    for draft_tokens in (1, 2, 4):
        evaluator = Evaluator(answered, World(), draft_tokens=draft_tokens, micro_batch_tokens=100, bootstrap=0)
        numbers = evaluator.evaluate(method)
        live = decode_answers(Decoder(answered_target, PEagleDrafter(method, draft_tokens)), answered, range(len(answered)), batch_rows=5)
        assert all(answer.same for answer in live)
        tokens, rounds = (sum(len(x) if f else sum(x) for x in [a.decoded.committed for a in live]) for f in (False, True))
        assert numbers["eval/walk_acc_len"] == tokens / rounds
        if kind == "trained":
            assert tokens / rounds > 1.3 + 0.3 * (draft_tokens > 1)
        simulated = simulate(PEagleDrafter(method, draft_tokens), answered, range(len(answered)), torch.device("cpu"), batch_rows=4)
        assert simulated == [answer.decoded for answer in live]


def test_adaptive_lengths_propose_the_first_of_the_same_drafts(
    answered_path: Path, answered_target: Target, answered: LocalFeatureStore
) -> None:
    """Where verifying costs little all are proposed, where it costs much fewer are; the text stays the target's own."""
    method = train(make_peagle(answered_path, answered), answered, steps=60)
    texts = []
    for a_draft_s in (1e-6, 0.3, 100.0):
        costs = CostCurve((0.0, 0.1, 0.1, 0.1, 0.1), tuple(1 + a_draft_s * drafts for drafts in range(5)))
        rule = AdaptiveLength(Calibration((1.0,) * 4, (0.0,) * 4), costs)
        answers = decode_answers(
            Decoder(answered_target, PEagleDrafter(method, 4, adaptive=rule)), answered, range(len(answered)), batch_rows=1
        )
        assert all(answer.same for answer in answers)
        assert rule.rounds[:4].sum() == 0, "all four are drafted"
        texts.append(rule.numbers()["mean_verified"])
    assert texts[0] > 3.9 > texts[1] > texts[2] == 0
    with pytest.raises(ConfigError, match="adaptive draft length: is calibrated for arg-max drafts"):
        PEagleDrafter(method, 4, Sampling(temperature=1.0), torch.Generator(), rule)
