"""Padded batches of any size and the prefix tree give the numbers of CORE's sequential evaluation."""

from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from specforge.decode.cache import PassingCache
from specforge.distributed import World
from specforge.features.target import Target
from specforge.suite.batches import base_batches, compose
from specforge.suite.bundle import Task, read_examples, read_tasks
from specforge.suite.forest import plant
from specforge.suite.prompts import Draw, Prompt, chosen, write_prompts
from specforge.suite.rules import answer
from specforge.suite.scoring import Model, Predictions
from specforge.suite.tokens import TaskTokens, tokenise
from tests.suite.bundles import TASKS, write_bundle
from tests.suite.sequential import evaluate
from tests.texts import make_text_target

LONGEST, BOS = 96, 3
MAKERS: dict[str, Callable[..., Any]] = {
    "llama": lambda attention: LlamaForCausalLM._from_config(
        LlamaConfig(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=LONGEST, initializer_range=0.3,
        ), attn_implementation=attention,
    ),
    "qwen3": lambda attention: Qwen3ForCausalLM._from_config(
        Qwen3Config(
            vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
            head_dim=8, max_position_embeddings=LONGEST, initializer_range=0.3,
        ), attn_implementation=attention,
    ),
    "gpt2": lambda attention: GPT2LMHeadModel._from_config(
        GPT2Config(vocab_size=300, n_embd=32, n_layer=2, n_head=4, n_positions=LONGEST, initializer_range=0.3),
        attn_implementation=attention,
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("bundle") / "words")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return AutoTokenizer.from_pretrained(make_text_target(tmp_path_factory.mktemp("tokenizer") / "target"))


def prepare(bundle: Path, tokenizer: Any, label: str) -> tuple[Task, list[Prompt], TaskTokens]:
    [task] = read_tasks(bundle, [label])
    prompts = write_prompts(task, chosen(read_examples(task), Draw()), Draw())
    tokens = tokenise(prompts, task.kind, lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"], BOS)
    return task, prompts, tokens.cropped(LONGEST, label)


def make_model(name: str, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Target:
    torch.manual_seed(0)
    return Target(MAKERS[name](attention).to(dtype).eval())


def run(target: Target, tokens: TaskTokens, mode: str | int) -> tuple[np.ndarray, np.ndarray]:
    """Scored in batches of so many examples, or as a tree in pieces of so many tokens."""
    model, found, every = Model(target), Predictions(tokens, target), range(len(tokens))
    assert not model.why_no_tree
    if isinstance(mode, int):
        deque(model.batch_forwards(compose(base_batches(tokens, every, 4), mode), found), maxlen=0)
    else:
        forest = plant(tokens, every, int(mode.removeprefix("tree")))
        deque(model.tree_forwards(forest, forest.pieces, found), maxlen=0)
    return found.reduced(World())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["fp32", "fp64"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MAKERS)
def test_every_mode_is_the_sequential_evaluation(name: str, attention: str, dtype: torch.dtype, bundle: Path, tokenizer: Any) -> None:
    target = make_model(name, attention, dtype)
    # transformers' eager attention of llama and qwen3 takes its softmax in float32 whatever the model's type
    tolerance = 1e-12 if dtype == torch.float64 and (attention, name) not in {("eager", "llama"), ("eager", "qwen3")} else 2e-5
    for label in [task[0] for task in TASKS]:
        task, prompts, tokens = prepare(bundle, tokenizer, label)
        expected = [evaluate(target.model, prompt, task.kind, tokenizer, BOS, LONGEST) for prompt in prompts]
        for mode in (1, 3, 4, 6, 12, "tree8", "tree64", "tree4096"):
            said = answer(tokens, *run(target, tokens, mode))
            losses = np.array([loss for losses, _, _ in expected for loss in losses])
            np.testing.assert_allclose(said.loss_R, losses, rtol=0, atol=tolerance, err_msg=f"{label} {mode}")
            assert said.right_E.tolist() == [right for _, right, _ in expected], (label, mode)
            assert said.predicted_E.tolist() == [predicted for _, _, predicted in expected], (label, mode)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", [*MAKERS, "sliding"])
def test_a_cache_that_keeps_nothing_changes_no_bit(name: str, attention: str) -> None:
    sliding = MistralConfig(
        vocab_size=300, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=5, initializer_range=0.3,
    )  # fmt: skip
    make = MAKERS.get(name, lambda attention: MistralForCausalLM._from_config(sliding, attn_implementation=attention))
    torch.manual_seed(0)
    target = Target(make(attention))
    ids_BS = torch.randint(0, 300, (3, 17))
    cache = PassingCache(target.num_layers)
    with torch.no_grad():
        plain, first, second = (
            target.decoder(input_ids=ids_BS, past_key_values=each, use_cache=False).last_hidden_state for each in (None, cache, cache)
        )
    assert torch.equal(first, plain) and torch.equal(second, plain)
