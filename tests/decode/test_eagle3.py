"""Drafting on cached keys against the training forward on the text that the drafts make."""

from pathlib import Path

import numpy as np
import pytest
import torch

from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.eagle3_tree import Eagle3TreeDrafter, TreeShape
from specforge.decode.sampling import Sampling
from specforge.features.batch import DraftBatch
from specforge.features.store import SampleFeatures
from specforge.features.target import Target
from specforge.methods.eagle3 import Eagle3
from tests.tiny import AUX, make_method, make_samples, make_store, make_target

OPTIONS = [
    {},
    {"layers": 2, "draft_tokens": 4},
    {"fc_norm": True, "norm_output": True, "draft_vocab_size": 0},
    {"norm_before_fc": True, "head": "frozen", "layers": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drafts_come_from_the_logits_of_training(options: dict[str, object], tmp_path: Path) -> None:
    """Three sequences of different lengths, extended in two calls; sampled drafts are appended, and training sees that text."""
    target_path = make_target(tmp_path / "target")
    store = make_store(tmp_path / "store", target_path, make_samples([20, 9, 14]))
    method, target = make_method(target_path, store, **options), Target.load(target_path, "float32")
    drafts, texts = method.draft_tokens, [store.read(number).input_ids.numpy() for number in range(3)]
    aux = [target.capture([text], AUX)[0]["aux"] for text in texts]

    drafter = Eagle3Drafter(method, drafts, Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    drafter.begin(texts, 32)
    rows = [len(text) - 1 for text in texts]
    for begin, end in (([0, 0, 0], [13, 4, 7]), ([13, 4, 7], rows)):
        counts = [e - b for b, e in zip(begin, end, strict=True)]
        ids_BM, aux_BMF = torch.zeros(3, max(counts), dtype=torch.long), torch.full((3, max(counts), aux[0].shape[1]), 7.0)
        for row, (b, e) in enumerate(zip(begin, end, strict=True)):
            ids_BM[row, : e - b] = torch.from_numpy(texts[row][b + 1 : e + 1])
            aux_BMF[row, : e - b] = aux[row][b:e]
        drafter.extend(ids_BM, aux_BMF, counts)
    proposal = drafter.propose()
    assert proposal.probabilities_BKV is not None

    for row, text in enumerate(texts):
        whole = np.concatenate([text, proposal.ids_BK[row].numpy(), [5]]).astype(np.int32)
        features = target.capture([whole], AUX)[0]
        sample = SampleFeatures(torch.from_numpy(whole), torch.arange(len(whole)) >= len(text), **features)
        batch = DraftBatch.pack([0], [sample])
        plan = method.plan(batch)
        for step, (output, rows_R) in enumerate(zip(method._hidden_states(batch, plan), [s.rows_R for s in plan.steps], strict=True)):
            place = rows_R.tolist().index(len(text) - 2)
            head = method.teacher_head_DH if method.draft.lm_head is None else method.draft.lm_head.weight
            expected = (output[place] * method.draft.norm.weight @ head.T).softmax(-1)
            kept = torch.arange(len(method.draft.d2t)) + method.draft.d2t
            got = proposal.probabilities_BKV[row, step]
            torch.testing.assert_close(got[kept], expected.detach(), rtol=1e-5, atol=1e-6)
            assert got.sum() == pytest.approx(1)


def slow_tree(method: Eagle3, target: Target, text: np.ndarray, shape: TreeShape) -> set[tuple[int, ...]]:
    """The paths of the tree, each node's distribution from a training forward over the text and its whole path."""
    kept = torch.arange(len(method.draft.d2t)) + method.draft.d2t

    def log_probabilities(path: tuple[int, ...]) -> torch.Tensor:
        whole = np.concatenate([text, path, [5, 5]]).astype(np.int32)
        sample = SampleFeatures(torch.from_numpy(whole), torch.arange(len(whole)) >= len(text), **target.capture([whole], AUX)[0])
        batch = DraftBatch.pack([0], [sample])
        plan = method.plan(batch)
        outputs = method._hidden_states(batch, plan)
        place = plan.steps[len(path)].rows_R.tolist().index(len(text) - 2)
        assert method.draft.lm_head is not None
        return (outputs[len(path)][place] * method.draft.norm.weight @ method.draft.lm_head.weight.T).log_softmax(-1).detach()

    candidates, beams = dict[tuple[int, ...], float](), {(): 0.0}
    for _ in range(shape.depth):
        grown = dict[tuple[int, ...], float]()
        for path, score in beams.items():
            log_D, best = log_probabilities(path).topk(shape.top_k)
            grown |= {(*path, int(kept[token])): score + float(log) for log, token in zip(log_D, best, strict=True)}
        candidates |= grown
        beams = dict(sorted(grown.items(), key=lambda pair: -pair[1])[: shape.top_k])
    return {path for path, _ in sorted(candidates.items(), key=lambda pair: -pair[1])[: shape.nodes]}


@pytest.mark.parametrize("shape", [TreeShape(1, 4, 3), TreeShape(4, 3, 14), TreeShape(4, 5, 80)], ids=str)
def test_a_tree_holds_the_likeliest_paths(shape: TreeShape, tmp_path: Path) -> None:
    target_path = make_target(tmp_path / "target")
    store = make_store(tmp_path / "store", target_path, make_samples([11, 7]))
    method, target = make_method(target_path, store, draft_tokens=4, layers=2), Target.load(target_path, "float32")
    for parameter in method.draft.layers.parameters():  # what a beam has seen decides what it says
        parameter.data.mul_(2)
    texts = [store.read(number).input_ids.numpy() for number in range(2)]
    drafter = Eagle3TreeDrafter(method, shape)
    drafter.begin(texts, 16)
    counts = [len(text) - 1 for text in texts]
    ids_BM, aux_BMF = torch.zeros(2, max(counts), dtype=torch.long), torch.zeros(2, max(counts), 3 * 32)
    for row, text in enumerate(texts):
        ids_BM[row, : counts[row]] = torch.from_numpy(text[1:])
        aux_BMF[row, : counts[row]] = target.capture([text], AUX)[0]["aux"][:-1]
    drafter.extend(ids_BM, aux_BMF, counts)
    proposal = drafter.propose()
    for row, text in enumerate(texts):
        parents, ids = proposal.tree.parent_BN[row].tolist(), [-1, *proposal.ids_BK[row].tolist()]
        paths = [()]
        for parent, token in zip(parents[1:], ids[1:], strict=True):
            paths.append((*paths[parent], token))
        assert len(paths) == shape.nodes + 1
        assert set(paths[1:]) == slow_tree(method, target, text, shape)
