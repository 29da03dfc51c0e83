"""Drafting on cached keys against the training forward on the text that the drafts make."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.eagle3_tree import Eagle3TreeDrafter, TreeShape
from specforge.decode.sampling import Sampling
from specforge.features.target import Target
from specforge.methods.eagle3 import Eagle3
from tests.decode.agreement import assert_drafts_are_training_steps, extend, supervised
from tests.tiny import make_method, make_samples, make_store

OPTIONS = [
    {},
    {"layers": 2, "draft_tokens": 4},
    {"fc_norm": True, "norm_output": True, "draft_vocab_size": 0},
    {"norm_before_fc": True, "head": "frozen", "layers": 2},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_drafts_come_from_the_logits_of_training(options: dict[str, object], target_path: Path, tmp_path: Path) -> None:
    """Three sequences of different lengths, extended in two calls."""
    store = make_store(tmp_path / "store", target_path, make_samples([20, 9, 14]))
    method, target = make_method(target_path, store, **options), Target.load(target_path, "float32")
    texts = [store.read(number).input_ids.numpy() for number in range(3)]

    drafter = Eagle3Drafter(method, method.draft_tokens, Sampling(temperature=1.0), torch.Generator().manual_seed(0))
    drafter.begin(texts, 32)
    for begin, end in pairwise(([0, 0, 0], [13, 4, 7], [len(text) - 1 for text in texts])):
        extend(drafter, target, texts, begin, end)
    assert_drafts_are_training_steps(drafter.propose(), method, target, texts)


def slow_tree(method: Eagle3, target: Target, text: np.ndarray, shape: TreeShape) -> set[tuple[int, ...]]:
    """The paths of the tree, each node's distribution from a training forward over the text and its whole path."""
    kept = torch.arange(len(method.draft.d2t)) + method.draft.d2t

    def log_probabilities(path: tuple[int, ...]) -> torch.Tensor:
        batch = supervised(target, np.concatenate([text, path, [5, 5]]), len(text))
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
def test_a_tree_holds_the_likeliest_paths(shape: TreeShape, target_path: Path, tmp_path: Path) -> None:
    store = make_store(tmp_path / "store", target_path, make_samples([11, 7]))
    method, target = make_method(target_path, store, draft_tokens=4, layers=2), Target.load(target_path, "float32")
    for parameter in method.draft.layers.parameters():  # what a beam has seen decides what it says
        parameter.data.mul_(2)
    texts = [store.read(number).input_ids.numpy() for number in range(2)]
    drafter = Eagle3TreeDrafter(method, shape)
    drafter.begin(texts, 16)
    extend(drafter, target, texts, [0, 0], [len(text) - 1 for text in texts])
    proposal = drafter.propose()
    for row, text in enumerate(texts):
        parents, ids = proposal.tree.parent_BN[row].tolist(), [-1, *proposal.ids_BK[row].tolist()]
        paths = [()]
        for parent, token in zip(parents[1:], ids[1:], strict=True):
            paths.append((*paths[parent], token))
        assert len(paths) == shape.nodes + 1
        assert set(paths[1:]) == slow_tree(method, target, text, shape)
