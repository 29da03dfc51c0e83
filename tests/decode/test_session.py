"""Whatever was proposed, rejected, rolled back or moved: what a session says of a token equals one plain forward over its text."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
import transformers as hf

from specforge.decode.session import Block, TargetSession
from specforge.decode.tree import Tree
from specforge.errors import ConfigError
from specforge.features.target import Target

VOCAB, WINDOW, AUX = 48, 3, (0, 1, 3)
SIZES = {
    "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "initializer_range": 0.3, "pad_token_id": 0,
}  # fmt: skip
MIXED = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"] * 2}
ALL_SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention"] * 4}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2, "experts_implementation": "eager"}
KINDS: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "llama": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES)),
    "llama-eager": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**SIZES, attn_implementation="eager")),
    "mistral": lambda: hf.MistralForCausalLM(hf.MistralConfig(**SIZES, sliding_window=WINDOW)),
    "qwen3": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, use_sliding_window=True, **MIXED)),
    "qwen3-sliding": lambda: hf.Qwen3ForCausalLM(hf.Qwen3Config(**SIZES, use_sliding_window=True, **ALL_SLIDING)),
    "gemma3": lambda: hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**SIZES, **MIXED)),
    "gpt-oss": lambda: hf.GptOssForCausalLM(hf.GptOssConfig(**SIZES, **EXPERTS, **MIXED)),
}
TOLERANCE = {"sdpa": 1e-10, "eager": 1e-5}
"""Of the largest value; Llama's eager attention takes its softmax in float32."""


def make_target(kind: str, dtype: torch.dtype = torch.float64) -> Target:
    torch.manual_seed(0)
    return Target(KINDS[kind]().to(dtype))


@pytest.fixture(params=KINDS)
def target(request: pytest.FixtureRequest) -> Target:
    return make_target(request.param)


def plain(target: Target, text: list[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Logits [S, V] and features [S, A*H] of one forward that nothing of ours takes part in."""
    with torch.no_grad():
        output = target.model(torch.tensor(text)[None], use_cache=False, output_hidden_states=True)
    return output.logits[0], torch.cat([output.hidden_states[layer][0] for layer in AUX], dim=-1)


def assert_equal(session: TargetSession, block: Block, row: int, tokens: list[int], expected: tuple[torch.Tensor, torch.Tensor]) -> None:
    """The block's `tokens` of `row` equal the last ones of a plain forward's."""
    got = session.logits(block.last_BNH)[row, tokens], block.aux_BNF[row, tokens]
    tolerance = TOLERANCE[session.target.config._attn_implementation]
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs[-len(tokens) :], rtol=0, atol=tolerance * float(theirs.abs().max()))


def check_rounds(target: Target, prompt_lengths: list[int], accepted: list[list[int]], draft_tokens: int) -> None:
    """Chains of which the anchor and `accepted[round][row]` - 1 drafts (or, at 0, nothing) are the text's and the others are wrong."""
    rng = np.random.default_rng(0)
    total = [length + sum(counts) for length, counts in zip(prompt_lengths, zip(*accepted, strict=True), strict=True)]
    texts = [rng.integers(3, VOCAB, length).tolist() for length in total]
    session = TargetSession(target, len(texts), max(total) + draft_tokens, AUX[::-1])
    block = session.prefill([np.array(text[:length], dtype=np.int32) for text, length in zip(texts, prompt_lengths, strict=True)])
    for row, (text, length) in enumerate(zip(texts, prompt_lengths, strict=True)):
        assert_equal(session, block, row, list(range(length)), plain(target, text[:length]))

    tree = Tree.chain(len(texts), draft_tokens, target.device)
    at = list(prompt_lengths)
    for counts in accepted:
        ids_BN = torch.from_numpy(rng.integers(3, VOCAB, (len(texts), draft_tokens + 1)))
        for row, count in enumerate(counts):
            ids_BN[row, :count] = torch.tensor(texts[row][at[row] : at[row] + count])
        block = session.forward(ids_BN, tree)
        session.keep([range(count) for count in counts])
        for row, count in enumerate(counts):
            at[row] += count
            if count:
                assert_equal(session, block, row, list(range(count)), plain(target, texts[row][: at[row]]))
        assert session.lengths == at


def test_rejected_tails_leave_no_trace(target: Target) -> None:
    check_rounds(target, [9], [[1], [4], [2], [5], [1], [1], [3], [5]], draft_tokens=4)


def test_rows_go_on_at_their_own_pace(target: Target) -> None:
    accepted = [[1, 4, 2], [3, 0, 4], [4, 1, 1], [1, 4, 0], [2, 2, 4], [4, 3, 1]]
    check_rounds(target, [11, 3, 7], accepted, draft_tokens=3)


def test_rows_of_equal_length_are_written_at_once() -> None:
    check_rounds(make_target("qwen3"), [6, 6], [[2, 2], [4, 4], [1, 3], [3, 1]], draft_tokens=3)


PARENTS = [[-1, 0, 0, 1, 2, 2, 4, 4, 6, 8], [-1, 0, 1, 1, 0, 2, 5, 6, 4, 7]]
PATHS = [[0, 2, 4, 6, 8, 9], [0, 1, 3]]


def path_to(parents: list[int], node: int) -> list[int]:
    return [] if node < 0 else [*path_to(parents, parents[node]), node]


def test_every_node_of_a_tree_sees_its_own_path_alone(target: Target) -> None:
    rng = np.random.default_rng(1)
    texts = [rng.integers(3, VOCAB, length).tolist() for length in (4, 8)]
    session = TargetSession(target, 2, 40, AUX)
    session.prefill([np.array(text) for text in texts])
    for parents, paths in ((PARENTS, PATHS), (PARENTS[::-1], [PATHS[1], []]), (PARENTS, [[0], PATHS[1]])):
        ids_BN = torch.from_numpy(rng.integers(3, VOCAB, (2, 10)))
        block = session.forward(ids_BN, Tree.of(torch.tensor(parents), max_depth=9))
        for row in range(2):
            for leaf in set(range(10)) - set(parents[row]):
                path = path_to(parents[row], leaf)
                assert_equal(session, block, row, path, plain(target, texts[row] + ids_BN[row, path].tolist()))
        session.keep(paths)
        texts = [text + ids_BN[row, path].tolist() for row, (text, path) in enumerate(zip(texts, paths, strict=True))]
        assert session.lengths == [len(text) for text in texts]


def test_buffers_are_allocated_once_and_a_session_starts_anew() -> None:
    target = make_target("llama")
    session = TargetSession(target, 1, 24)
    prompt = np.arange(3, 13)
    first = session.prefill([prompt])
    buffers = [buffer for layer in session._cache.layers for buffer in (layer.keys, layer.values)]
    pointers = [buffer.data_ptr() for buffer in buffers]
    for paths in ([0, 2], [0, 1], []):
        session.forward(torch.tensor([[5, 6, 7]]), Tree.of(torch.tensor([[-1, 0, 0]]), max_depth=1))
        session.keep([paths])
    again = session.prefill([prompt])
    assert [buffer.data_ptr() for layer in session._cache.layers for buffer in (layer.keys, layer.values)] == pointers
    assert {tuple(buffer.shape) for buffer in buffers} == {(1, 2, 24, 8)}
    assert torch.equal(first.last_BNH, again.last_BNH)
    assert first.aux_BNF.shape == (1, 10, 0)


def test_a_row_that_outgrows_the_cache_is_named() -> None:
    session = TargetSession(make_target("llama"), 1, 12)
    with pytest.raises(ConfigError, match=r"0 tokens of a sequence and 13 new ones exceed .* 12 tokens"):
        session.prefill([np.arange(3, 16)])
    session.prefill([np.arange(3, 13)])
    tree = Tree.chain(1, 1, torch.device("cpu"))
    session.forward(torch.tensor([[5, 6]]), tree)
    session.keep([[0]])
    with pytest.raises(ConfigError, match="11 tokens of a sequence and 2 new ones"):
        session.forward(torch.tensor([[5, 6]]), tree)


def test_layers_that_cannot_take_tokens_back_are_refused_by_name() -> None:
    linear = hf.Qwen3NextConfig(**SIZES, layer_types=["linear_attention", "full_attention"] * 2, num_experts=2, num_experts_per_tok=1)
    chunked = hf.Qwen3Config(**SIZES, layer_types=["chunked_attention", "full_attention"] * 2)
    recurrent = hf.RwkvConfig(vocab_size=VOCAB, hidden_size=16, attention_hidden_size=16, num_hidden_layers=2)
    with torch.device("meta"):
        models = [hf.Qwen3NextForCausalLM(linear), hf.Qwen3ForCausalLM(chunked), hf.RwkvForCausalLM(recurrent)]
    named = ("Qwen3NextModel.*linear_attention", "Qwen3Model.*chunked_attention", "RwkvModel.*recurrent state")
    for model, words in zip(models, named, strict=True):
        with pytest.raises(ConfigError, match=f"{words}.*decode with a target of full_attention"):
            TargetSession(Target(model), 1, 16)

    flash = make_target("llama")
    flash.config._attn_implementation = "flash_attention_2"
    with pytest.raises(ConfigError, match=r"'flash_attention_2'.*'sdpa', 'eager' or 'flex_attention'"):
        TargetSession(flash, 1, 16)


def test_half_precision_gives_its_features_and_float32_logits() -> None:
    session = TargetSession(make_target("llama", torch.bfloat16), 2, 16, AUX)
    session.prefill([np.arange(3, 7), np.arange(3, 9)])
    block = session.forward(torch.tensor([[5, 6], [7, 8]]), Tree.chain(2, 1, torch.device("cpu")))
    assert (block.aux_BNF.dtype, block.aux_BNF.shape) == (torch.bfloat16, (2, 2, 96))
    logits_BNV = session.logits(block.last_BNH)
    assert (logits_BNV.dtype, logits_BNV.shape) == (torch.float32, (2, 2, VOCAB))
    assert bool(logits_BNV.isfinite().all())
