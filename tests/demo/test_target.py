"""The committed target loads, is small, marks its answers, and keeps the figures that its provenance claims."""

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from specforge.demo.muon import Muon, orthogonal
from specforge.demo.target_report import LIMITS, TARGET, bits_per_byte, greedy_answers, repeated_share

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What does this function do?\ndef area(r):\n    return 3.14 * r * r"},
    {"role": "assistant", "content": "Return the area of a circle."},
    {"role": "user", "content": "Reverse this list.\n[1, 2, 3]"},
    {"role": "assistant", "content": "    [3, 2, 1]"},
]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(TARGET, local_files_only=True)


def test_text_survives_the_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    text = "def f(x):\n\tif x:\n            return {'ä': 1234}  # naïve 漢\n\n\n"
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
    assert len(tokenizer.encode("2026", add_special_tokens=False)) == 4


def test_the_template_marks_answers_and_their_end(tokenizer: PreTrainedTokenizerBase) -> None:
    rendered = tokenizer.apply_chat_template(TURNS, return_dict=True, return_assistant_tokens_mask=True)
    runs: list[list[int]] = []
    previous = 0
    for token, marked in zip(rendered["input_ids"], rendered["assistant_masks"]):
        if marked:
            runs = [*runs, [token]] if not previous else [*runs[:-1], [*runs[-1], token]]
        previous = marked
    answers = [tokenizer.decode(run, clean_up_tokenization_spaces=False) for run in runs]
    assert answers == ["Return the area of a circle.<|end|>", "    [3, 2, 1]<|end|>"]


def test_the_generation_prompt_is_a_prefix(tokenizer: PreTrainedTokenizerBase) -> None:
    asked = tokenizer.apply_chat_template(TURNS[:2], add_generation_prompt=True, return_dict=False)
    answered = tokenizer.apply_chat_template(TURNS[:3], return_dict=False)
    assert answered[: len(asked)] == asked
    assert answered[-1] == tokenizer.eos_token_id == tokenizer.convert_tokens_to_ids("<|end|>")


def test_the_target_is_small_and_speaks(tokenizer: PreTrainedTokenizerBase) -> None:
    assert sum(file.stat().st_size for file in TARGET.iterdir()) <= 12_000_000
    model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32, local_files_only=True).eval()
    assert model.config.eos_token_id == model.generation_config.eos_token_id == tokenizer.eos_token_id
    assert model.config.vocab_size == len(tokenizer)
    text = 'def add(a, b):\n    """Return the sum of a and b."""\n    return a + b\n'
    assert bits_per_byte(model, tokenizer, [text]) < 2.5
    row = {"conversations": [{"role": "user", "content": "How many items are in this list?\n['a', 'b', 'c']"}]}
    alone = greedy_answers(model, tokenizer, [row])
    beside = greedy_answers(model, tokenizer, [row, {"conversations": TURNS[1:2]}])
    assert alone[0][-1] == tokenizer.eos_token_id
    assert beside[0] == alone[0]


def test_the_provenance_keeps_the_limits() -> None:
    facts = json.loads((TARGET / "provenance.json").read_text())
    assert facts["heldout_bpb"] <= LIMITS["bpb_over_gzip"] * facts["gzip_bpb"]
    assert facts["repeated_4grams"] <= LIMITS["repeated_4grams"]
    assert facts["ended"] >= LIMITS["ended"]
    assert {"corpus_sha256", "seed", "steps", "tokens", "minutes", "train_loss_nats", "xz_bpb", "command", "date"} <= facts.keys()


def test_repeated_share_counts_what_was_already_said() -> None:
    assert repeated_share([[1, 2, 3, 4, 5, 6]]) == 0
    assert repeated_share([[1, 1, 1, 1, 1, 1]]) == pytest.approx(2 / 3)
    assert repeated_share([[1, 2]]) == 0


def test_muon_steps_are_orthogonal() -> None:
    torch.manual_seed(0)
    for shape in ((8, 16), (16, 8)):
        singular = torch.linalg.svdvals(orthogonal(torch.randn(3, *shape), steps=8))
        assert 0.6 < float(singular.min()) <= float(singular.max()) < 1.3
    weight = torch.nn.Parameter(torch.randn(16, 8))
    before = weight.detach().clone()
    weight.grad = torch.randn(16, 8)
    Muon([weight], lr=0.1).step()
    assert float((weight - before).detach().norm()) == pytest.approx(0.1 * math.sqrt(2) * math.sqrt(8), rel=0.3)
