"""The decoder's text is the target's alone; rounds are as long as the drafts are right."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from specforge.decode.drafter import Drafter, NgramDrafter, NoDrafter, Proposal
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.eagle3_tree import Eagle3TreeDrafter, TreeShape
from specforge.decode.engine import Decoder
from specforge.decode.tree import Tree
from specforge.features.target import Target
from tests.tiny import make_method, make_samples, make_store, make_target

LENGTHS = [20, 9, 14]


class ScriptedDrafter:
    """Drafts what follows in `texts`, plus `shift`: an oracle (0) or always wrong."""

    layer_ids: tuple[int, ...] = ()

    def __init__(self, texts: list[list[int]], draft_tokens: int, shift: int, vocab: int) -> None:
        self.texts, self.draft_nodes, self.shift, self.vocab = texts, draft_tokens, shift, vocab

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        self.known = [1 - len(prompt) for prompt in prompts]

    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        self.known = [known + count for known, count in zip(self.known, counts, strict=True)]

    def propose(self) -> Proposal:
        rows = [(text[known:] + [0] * self.draft_nodes)[: self.draft_nodes] for text, known in zip(self.texts, self.known, strict=True)]
        ids_BK = (torch.tensor(rows) + self.shift) % self.vocab
        return Proposal(ids_BK, Tree.chain(len(ids_BK), self.draft_nodes, ids_BK.device))


@pytest.fixture(scope="module", params=["float32", "float64"])
def target(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Target:
    return Target.load(make_target(tmp_path_factory.mktemp("target")), request.param)


@pytest.fixture(scope="module")
def prompts() -> list[np.ndarray]:
    return [sample.input_ids.astype(np.int64) for sample in make_samples(LENGTHS)]


@pytest.fixture(scope="module")
def alone(target: Target, prompts: list[np.ndarray]) -> list[list[int]]:
    """What transformers itself says, 60 tokens a prompt."""
    return [
        target.model.generate(torch.from_numpy(prompt)[None], max_new_tokens=60, do_sample=False, eos_token_id=None)[
            0, len(prompt) :
        ].tolist()
        for prompt in prompts
    ]


def test_the_target_alone(target: Target, prompts: list[np.ndarray], alone: list[list[int]]) -> None:
    texts = Decoder(target, NoDrafter()).decode(prompts, 60)
    assert [text.ids for text in texts] == alone
    assert [text.committed for text in texts] == [[1] * 59] * 3


@pytest.mark.parametrize("draft_tokens", [1, 2, 3, 5, 8])
def test_greedy_text_is_the_targets(
    draft_tokens: int, target: Target, prompts: list[np.ndarray], alone: list[list[int]], tmp_path: Path
) -> None:
    """Batched, with an n-gram, an untrained and an always-wrong draft; a batch row's rounds are those of the row alone."""
    path = make_target(tmp_path / "target")
    store = make_store(tmp_path / "store", path, make_samples(LENGTHS))
    drafters: list[Drafter] = [NgramDrafter(draft_tokens), ScriptedDrafter(alone, draft_tokens, 1, 64)]
    if target.dtype == torch.float32:
        method = make_method(path, store)
        shape = TreeShape(draft_tokens, 2, min(2 * draft_tokens, 2 + 4 * (draft_tokens - 1)))
        drafters += [Eagle3Drafter(method, draft_tokens), Eagle3TreeDrafter(method, shape)]
    for drafter in drafters:
        texts = Decoder(target, drafter).decode(prompts, 60)
        assert [text.ids for text in texts] == alone
        if isinstance(drafter, NgramDrafter):
            singles = [Decoder(target, drafter).decode([prompt], 60)[0] for prompt in prompts]
            assert singles == texts


@pytest.mark.parametrize("draft_tokens", [1, 4, 6])
def test_an_oracle_fills_every_round_and_a_wrong_draft_none(
    draft_tokens: int, target: Target, prompts: list[np.ndarray], alone: list[list[int]]
) -> None:
    """1 + 8 * (K + 1) tokens: the first is the prefill's, the others fill 8 rounds."""
    length = 1 + 8 * (draft_tokens + 1)
    for shift, each in ((0, draft_tokens + 1), (1, 1)):
        texts = Decoder(target, ScriptedDrafter(alone, draft_tokens, shift, 64)).decode(prompts, length)
        assert [text.ids for text in texts] == [text[:length] for text in alone]
        assert {tokens for text in texts for tokens in text.committed} == {each}
        assert {count for text in texts for count in text.accepted} == {each - 1}


def test_end_tokens_and_limits_cut_inside_an_accepted_block(target: Target, prompts: list[np.ndarray], alone: list[list[int]]) -> None:
    """Whatever token ends a text, at every place of a block of 5, the text ends there, as it would without drafts."""
    for place in range(2, 9):
        for end_ids, limit in ((set(), place), ({alone[0][place]}, 60)):
            texts = Decoder(target, ScriptedDrafter(alone, 4, 0, 64), end_ids=end_ids).decode(prompts, limit)
            for text, whole in zip(texts, alone, strict=True):
                ends = [at for at, token in enumerate(whole[:limit]) if token in end_ids]
                expected = whole[: ends[0] + 1] if ends else whole[:limit]
                assert text.ids == expected
                assert text.finished == bool(ends)
                assert sum(text.committed) == len(expected) - 1
                assert all(0 <= tokens - accepted <= 1 for tokens, accepted in zip(text.committed, text.accepted, strict=True))


def test_each_row_has_its_own_limit(target: Target, prompts: list[np.ndarray], alone: list[list[int]]) -> None:
    texts = Decoder(target, NgramDrafter(3)).decode(prompts, [1, 50, 7])
    assert [text.ids for text in texts] == [text[:limit] for text, limit in zip(alone, [1, 50, 7], strict=True)]
