"""A second opinion: transformers' own assisted generation verifies the same drafts, and takes the very same rounds.

Theirs are verification, roll-back of keys, end tokens and length limit; of ours only the drafter takes part. The features it asks
for come from plain forwards of the target over the whole text.
"""

from collections.abc import Collection
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers.generation import CandidateGenerator

from specforge.decode.drafter import Drafter, NgramDrafter
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.engine import Decoder
from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from tests.tiny import make_method, train

NEW_TOKENS = 40


class Candidates(CandidateGenerator):
    """Our drafter as theirs. The first call asks for nothing, so that the first token is the target's alone, as in our decoder."""

    def __init__(self, target: Target, drafter: Drafter, prompt: np.ndarray, end_ids: Collection[int]) -> None:
        self.target, self.drafter, self.end_ids = target, drafter, end_ids
        self.prompt_tokens = self.length = len(prompt)
        self.last = len(prompt) + NEW_TOKENS
        self.rows = 0
        self.accepted, self.committed = list[int](), list[int]()
        drafter.begin([prompt], self.last + drafter.draft_nodes)

    def get_candidates(self, input_ids: torch.Tensor, **kwargs: object) -> tuple[torch.Tensor, None]:
        if input_ids.shape[1] == self.prompt_tokens:
            return input_ids, None
        hidden = self.target.model(input_ids, use_cache=False, output_hidden_states=True).hidden_states
        aux = [hidden[layer][:, self.rows : -1] for layer in self.drafter.layer_ids]
        new_ids = input_ids[:, self.rows + 1 :]
        self.drafter.extend(new_ids, torch.cat(aux, -1) if aux else torch.empty(*new_ids.shape, 0), [new_ids.shape[1]])
        self.rows += new_ids.shape[1]
        drafts, room = list[int](), self.last - input_ids.shape[1] - 1
        for draft in self.drafter.propose().ids_BK[0, :room].tolist():
            if draft < 0 or (drafts and drafts[-1] in self.end_ids):
                break
            drafts.append(draft)
        return torch.cat([input_ids, torch.tensor([drafts], dtype=torch.long)], 1), None

    def update_candidate_strategy(self, input_ids: torch.Tensor, scores: torch.Tensor, num_matches: int) -> None:
        if self.rows:
            self.accepted.append(int(num_matches))
            self.committed.append(input_ids.shape[1] - self.length)
        self.length = input_ids.shape[1]


def generated(target: Target, prompt: np.ndarray, end_ids: Collection[int], **options: object) -> list[int]:
    ids = target.model.generate(
        torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=NEW_TOKENS,
        do_sample=False, eos_token_id=sorted(end_ids) or None, **options,
    )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


@pytest.fixture(scope="module")
def prompts(answered: LocalFeatureStore) -> list[np.ndarray]:
    """What came before two answers of 30 and 37 tokens, and text that no draft has seen."""
    known = [answered.read(number) for number in (4, 5)]
    before = [sample.input_ids[: int(sample.loss_mask.int().argmax())].numpy().astype(np.int64) for sample in known]
    return [*before, np.random.default_rng(5).integers(3, 64, 11)]


@pytest.fixture(scope="module")
def alone(answered_target: Target, prompts: list[np.ndarray]) -> list[list[int]]:
    return [generated(answered_target, prompt, ()) for prompt in prompts]


@pytest.mark.parametrize("draft_tokens", [1, 3, 6])
@pytest.mark.parametrize("kind", ["trained", "random", "ngram"])
def test_transformers_take_the_same_rounds(
    kind: str, draft_tokens: int, answered_target: Target, answered_path: Path, answered: LocalFeatureStore, prompts: list[np.ndarray],
    alone: list[list[int]], monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Without end tokens, and with those at places 21 and 30 of the first two texts."""
    drafter: Drafter = NgramDrafter(draft_tokens)
    if kind != "ngram":
        options = {"draft_vocab_size": 50, "norm_output": draft_tokens == 3, "layers": 1 + draft_tokens // 6, "loss_chunk_rows": 512}
        method = make_method(answered_path, answered, draft_tokens=draft_tokens, **options)
        drafter = Eagle3Drafter(train(method, answered) if kind == "trained" else method, draft_tokens)
    for end_ids in (set(), {alone[0][21], alone[1][30]}):
        ours = Decoder(answered_target, drafter, end_ids=end_ids).decode(prompts, NEW_TOKENS)
        assert any(text.finished for text in ours) == bool(end_ids)
        for prompt, text, whole in zip(prompts, ours, alone, strict=True):
            ends = [place for place, token in enumerate(whole) if token in end_ids]
            assert text.ids == whole[: ends[0] + 1 if ends else None]
            with monkeypatch.context() as patch:
                candidates = Candidates(answered_target, drafter, prompt, end_ids)
                patch.setattr(answered_target.model, "_get_candidate_generator", lambda *_, theirs=candidates, **__: theirs)
                assert generated(answered_target, prompt, end_ids, prompt_lookup_num_tokens=draft_tokens) == text.ids
            assert candidates.committed == text.committed
            assert candidates.accepted[:-1] == text.accepted[:-1]  # a draft that ends the text they count as the target's own
        if kind == "trained" and not end_ids:
            tokens, rounds = (sum(len(x) if count else sum(x) for x in [text.committed for text in ours]) for count in (False, True))
            assert tokens > 1.2 * rounds
