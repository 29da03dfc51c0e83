"""Drafting a block on cached keys against the training forward on the same text, and the walk against real decoding."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge.config.methods import METHODS
from specforge.decode.block import BlockDrafter
from specforge.decode.engine import Decoder
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
from specforge.methods.dflash import DFlash
from tests.tiny import AUX, make_samples, make_store, train

SLIDING = {"layers": 3, "layer_types": ("full_attention", "sliding_attention", "full_attention"), "sliding_window": 6}


VARIANTS: list[dict[str, Any]] = [
    {"name": "dflash"},
    {"name": "dflash", **SLIDING},
    {"name": "domino", "gru_hidden_dim": 8, "emb_dim": 8},
    *({"name": "dspark", "markov_head": head, "markov_rank": 8} for head in ("vanilla", "gated", "rnn")),
]


def make_method(target_path: Path, store: LocalFeatureStore, name: str = "dflash", **options: Any) -> DFlash:
    chosen: dict[str, Any] = {"block_size": 5 if name == "dflash" else 4, "layers": 2, "loss_chunk_rows": 7, **options}
    tables = TargetTables.read(target_path)
    method: DFlash = METHODS[name].load().build(METHODS[name].options(**chosen), tables, store, 0)
    torch.manual_seed(0)
    for parameter in method.draft.layers.parameters():  # attention decides what is said, and every norm has a weight of its own
        parameter.data.mul_(1.5) if parameter.dim() == 2 else parameter.data.mul_(1 + torch.rand(len(parameter)))
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
    aux = [target.capture([text], AUX)[0]["aux"] for text in texts]

    drafter = BlockDrafter(method, method.draft_tokens, Sampling(temperature=1.0), generator := torch.Generator())
    drafter.begin(texts, 32)
    rows = [len(text) - 1 for text in texts]
    for begin, end in (([0, 0, 0], [9, 4, 7]), ([9, 4, 7], [13, 8, 8]), ([13, 8, 8], rows)):
        counts = [e - b for b, e in zip(begin, end, strict=True)]
        ids_BM, aux_BMF = torch.zeros(3, max(counts), dtype=torch.long), torch.full((3, max(counts), aux[0].shape[1]), 7.0)
        for row, (b, e) in enumerate(zip(begin, end, strict=True)):
            ids_BM[row, : e - b] = torch.from_numpy(texts[row][b + 1 : e + 1])
            aux_BMF[row, : e - b] = aux[row][b:e]
        drafter.extend(ids_BM, aux_BMF, counts)
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
        whole = np.concatenate([text, proposal.ids_BK[row].numpy()]).astype(np.int32)
        sample = SampleFeatures(torch.from_numpy(whole), torch.arange(len(whole)) >= len(text) - 1, **target.capture([whole], AUX)[0])
        batch = DraftBatch.pack([0], [sample])
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
@pytest.mark.parametrize("kind", ["trained", "random"])
def test_walk_is_live_at_every_length(
    kind: str, options: dict[str, Any], answered_path: Path, answered_target: Target, answered: LocalFeatureStore
) -> None:
    method = make_method(answered_path, answered, **options)
    if kind == "trained":
        train(method, answered)
    for draft_tokens in (1, 2, 4):
        evaluator = Evaluator(answered, World(), draft_tokens=draft_tokens, micro_batch_tokens=100, bootstrap=0)
        numbers = evaluator.evaluate(method)
        live = decode_answers(Decoder(answered_target, BlockDrafter(method, draft_tokens)), answered, range(len(answered)), batch_rows=5)
        assert all(answer.same for answer in live)
        tokens, rounds = (sum(len(x) if f else sum(x) for x in [a.decoded.committed for a in live]) for f in (False, True))
        assert numbers["eval/walk_acc_len"] == tokens / rounds
        if kind == "trained":
            assert tokens / rounds > 1.3 + 0.3 * (draft_tokens > 1)
        simulated = simulate(BlockDrafter(method, draft_tokens), answered, range(len(answered)), torch.device("cpu"), batch_rows=4)
        assert simulated == [answer.decoded for answer in live]


def test_a_block_holds_no_more_drafts(target_path: Path, answered_path: Path, answered: LocalFeatureStore) -> None:
    method = make_method(answered_path, answered)
    assert method.draft_tokens == 4
    with pytest.raises(ConfigError, match="draft tokens 5: a block of this draft holds 4"):
        BlockDrafter(method, 5)
