"""Sampled texts of the whole decoder against the probability of every text, by chi-square; decoders that are wrong on purpose fail.

A real target of eight tokens and two prompts of different lengths, whose texts of four tokens are decoded in one batch: the first
token is the target's alone, rounds of three or more nodes bring the others.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from specforge.decode.drafter import Drafter, NgramDrafter, Proposal
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.eagle3_tree import Eagle3TreeDrafter, TreeShape
from specforge.decode.engine import Decoder
from specforge.decode.sampling import Sampling
from specforge.decode.verify import Verdict, accept_or_resample, follow
from specforge.features.target import Target
from specforge.methods.eagle3 import Eagle3
from tests.decode.test_verify import accept_always, chi_square, off_by_one, wrong_residual
from tests.tiny import make_answered, make_method, make_store, make_target, train

VOCAB, TEXT = 8, 4
PROMPTS = [np.array([5, 4, 3, 5, 4]), np.array([6, 3, 6])]
WHOLE, CUT = Sampling(0.7), Sampling(0.8, top_k=5, top_p=0.9)
SAMPLINGS = pytest.mark.parametrize("sampling", [WHOLE, CUT], ids=["whole", "cut"])


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("distribution") / "target", vocab_size=VOCAB, num_hidden_layers=2)


@pytest.fixture(scope="module")
def target(path: Path) -> Target:
    return Target.load(path, "float32")


@pytest.fixture(scope="module")
def method(path: Path) -> Eagle3:
    """A draft that knows six of the eight tokens."""
    store = make_store(path.parent / "store", path, make_answered(path))
    return train(make_method(path, store, draft_vocab_size=6, loss_chunk_rows=512), store, steps=20)


DRAFTERS: dict[str, Callable[[Eagle3, Sampling], Drafter]] = {
    "chain": lambda method, sampling: Eagle3Drafter(method, 2),
    "tree": lambda method, sampling: Eagle3TreeDrafter(method, TreeShape(3, 2, 6)),
    "sampled": lambda method, sampling: Eagle3Drafter(method, 2, sampling, torch.Generator().manual_seed(1)),
    "ngram": lambda method, sampling: NgramDrafter(2),
}


def text_probabilities(target: Target, prompt: np.ndarray, sampling: Sampling) -> torch.Tensor:
    """Of every text [V^4], from plain forwards over the prompt and every beginning of a text."""
    texts = torch.tensor(list(itertools.product(range(VOCAB), repeat=TEXT)))
    rows = torch.cat([torch.from_numpy(prompt).expand(len(texts), -1), texts], 1)
    with torch.no_grad():
        logits = target.model(rows, use_cache=False).logits[:, len(prompt) - 1 : -1]
    return sampling.probabilities(logits.double()).gather(2, texts[..., None])[..., 0].prod(1)


def p_values(decoder: Decoder, target: Target, sampling: Sampling, texts: int) -> tuple[list[float], float]:
    """Chi-square of each prompt's texts, and tokens a round; the prompts take turns in the batch."""
    decoded = decoder.decode(PROMPTS * texts, TEXT)
    values = []
    for number, prompt in enumerate(PROMPTS):
        ids = torch.tensor([text.ids for text in decoded[number :: len(PROMPTS)]])
        place = (ids * VOCAB ** torch.arange(TEXT - 1, -1, -1)).sum(1)
        values.append(chi_square(place.bincount(minlength=VOCAB**TEXT), texts * text_probabilities(target, prompt, sampling)))
    committed = [tokens for text in decoded for tokens in text.committed]
    return values, sum(committed) / len(committed)


@SAMPLINGS
@pytest.mark.parametrize("kind", DRAFTERS)
def test_texts_have_the_targets_distribution(kind: str, sampling: Sampling, target: Target, method: Eagle3) -> None:
    decoder = Decoder(target, DRAFTERS[kind](method, sampling), sampling=sampling, generator=torch.Generator().manual_seed(2))
    values, tokens_a_round = p_values(decoder, target, sampling, texts=2000)
    assert min(values) > 1e-3
    assert tokens_a_round > 1.05  # drafts were accepted


class WrongDecoder(Decoder):
    """Verifies with another rule for chains that were sampled, another for all other drafts, or judges a row by the logits of the next."""

    sampled_rule, rule, rows_on = staticmethod(accept_or_resample), staticmethod(follow), 0

    def _verdict(self, logits_BNV: torch.Tensor, proposal: Proposal, ids_BN: torch.Tensor) -> Verdict:
        logits_BNV = logits_BNV.roll(self.rows_on, 0)
        if proposal.probabilities_BKV is None:
            return self.rule(logits_BNV, ids_BN, proposal.tree, self._sampling, self._generator)
        return self.sampled_rule(logits_BNV, ids_BN, proposal.probabilities_BKV, self._sampling, self._generator)


WRONGS: dict[str, tuple[str, dict[str, Any]]] = {
    "chain, feature off by one": ("chain", {"rule": off_by_one(follow)}),
    "tree, feature off by one": ("tree", {"rule": off_by_one(follow)}),
    "ngram, feature off by one": ("ngram", {"rule": off_by_one(follow)}),
    "chain, feature of another row": ("chain", {"rows_on": 1}),
    "sampled, feature off by one": ("sampled", {"sampled_rule": off_by_one(accept_or_resample)}),
    "sampled, accept always": ("sampled", {"sampled_rule": accept_always}),
    "sampled, wrong residual": ("sampled", {"sampled_rule": wrong_residual}),
}


@SAMPLINGS
@pytest.mark.parametrize("wrong", WRONGS)
def test_wrong_decoders_fail_the_same_test(wrong: str, sampling: Sampling, target: Target, method: Eagle3) -> None:
    kind, rules = WRONGS[wrong]
    decoder = WrongDecoder(target, DRAFTERS[kind](method, sampling), sampling=sampling, generator=torch.Generator().manual_seed(2))
    for name, value in rules.items():
        setattr(decoder, name, value)
    values, _ = p_values(decoder, target, sampling, texts=2000)
    assert min(values) < 1e-6
