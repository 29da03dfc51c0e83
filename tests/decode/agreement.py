"""What every drafter is held to: its distributions are those of the training forward, and its rounds those that the evaluator predicts."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import nn

from specforge.decode.drafter import Drafter, Proposal
from specforge.decode.engine import Decoder
from specforge.distributed import World
from specforge.eval.evaluator import Evaluator
from specforge.eval.live import decode_answers
from specforge.eval.simulate import simulate
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.target import Target
from specforge.methods.eagle3 import Eagle3
from tests.tiny import AUX


def sharpen(layers: nn.Module) -> None:
    """Attention decides what is said, and every norm has a weight of its own."""
    torch.manual_seed(0)
    for parameter in layers.parameters():
        parameter.data.mul_(1.5) if parameter.dim() == 2 else parameter.data.mul_(1 + torch.rand(len(parameter)))


def extend(drafter: Drafter, target: Target, texts: Sequence[np.ndarray], begin: Sequence[int], end: Sequence[int]) -> None:
    """Rows `begin` to `end` of each text were committed; what pads them must not matter."""
    counts = [e - b for b, e in zip(begin, end, strict=True)]
    ids_BM, aux_BMF = torch.zeros(len(texts), max(counts), dtype=torch.long), torch.full((len(texts), max(counts), 3 * 32), 7.0)
    for row, (text, b, e) in enumerate(zip(texts, begin, end, strict=True)):
        ids_BM[row, : e - b] = torch.from_numpy(text[b + 1 : e + 1])
        aux_BMF[row, : e - b] = target.capture([text], AUX)[0]["aux"][b:e]
    drafter.extend(ids_BM, aux_BMF, counts)


def supervised(target: Target, text: np.ndarray, first: int) -> DraftBatch:
    """One document, supervised from token `first` on."""
    whole = text.astype(np.int32)
    sample = SampleFeatures(torch.from_numpy(whole), torch.arange(len(whole)) >= first, **target.capture([whole], AUX)[0])
    return DraftBatch.pack([0], [sample])


def assert_drafts_are_training_steps(proposal: Proposal, method: Eagle3, target: Target, texts: Sequence[np.ndarray]) -> None:
    """The sampled drafts are appended; each was drawn from what a step of training says of that text."""
    assert proposal.probabilities_BKV is not None
    head_DH = method.teacher_head_DH if method.draft.lm_head is None else method.draft.lm_head.weight
    kept = torch.arange(len(method.draft.d2t)) + method.draft.d2t
    for row, text in enumerate(texts):
        batch = supervised(target, np.concatenate([text, proposal.ids_BK[row].numpy(), [5]]), len(text))
        plan = method.plan(batch)
        with torch.no_grad():
            outputs = method._hidden_states(batch, plan)
        assert len(outputs) == method.draft_tokens
        for draft, (output, step) in enumerate(zip(outputs, plan.steps, strict=True)):
            place = step.rows_R.tolist().index(len(text) - 2)
            expected = (output[place] * method.draft.norm.weight @ head_DH.T).softmax(-1)
            got = proposal.probabilities_BKV[row, draft]
            torch.testing.assert_close(got[kept], expected, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(got.sum(), torch.tensor(1.0))


def walked_as_decoded(
    method: nn.Module, drafter_of: Callable[[int], Drafter], draft_tokens: int, target: Target, answered: LocalFeatureStore
) -> float:
    """Tokens a round: decoded for real, then by the same drafter along the stored answers, and predicted by the evaluator."""
    drafter = drafter_of(draft_tokens)
    live = decode_answers(Decoder(target, drafter), answered, range(len(answered)), batch_rows=15)
    assert all(answer.same for answer in live)
    simulated = simulate(drafter, answered, range(len(answered)), torch.device("cpu"), batch_rows=4)
    assert simulated == [answer.decoded for answer in live]
    committed = [tokens for answer in live for tokens in answer.decoded.committed]
    evaluator = Evaluator(answered, World(), draft_tokens=draft_tokens, micro_batch_tokens=100, bootstrap=0)
    assert evaluator.evaluate(method)["eval/walk_acc_len"] == sum(committed) / len(committed)
    return sum(committed) / len(committed)
