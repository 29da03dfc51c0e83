"""Texts that end with the target's positions: drafts reach beyond them and change nothing. And positions that cannot be told."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers as hf

from specforge.decode.drafter import Drafter, NgramDrafter, NoDrafter, Proposal
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.eagle3_tree import Eagle3TreeDrafter
from specforge.decode.engine import Decoder
from specforge.decode.session import TargetSession
from specforge.decode.tree import Tree, TreeShape
from specforge.errors import ConfigError, FeatureError
from specforge.features.tables import TargetConfig
from specforge.features.target import Target
from tests import tiny

POSITIONS, VOCAB = 32, 48
SMALL = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4}
LLAMA = {**SMALL, "intermediate_size": 40, "max_position_embeddings": POSITIONS, "initializer_range": 0.3, "pad_token_id": 0}
OPT = {"ffn_dim": 40, "word_embed_proj_dim": 32, "max_position_embeddings": POSITIONS, "init_std": 0.3}
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
GPT2 = {"vocab_size": VOCAB, "n_embd": 32, "n_layer": 3, "n_head": 4, "n_positions": POSITIONS, "initializer_range": 0.3}
LIMITED: dict[str, Callable[[], hf.PreTrainedModel]] = {
    "learned": lambda: hf.GPT2LMHeadModel(hf.GPT2Config(**GPT2, bos_token_id=1, eos_token_id=2)),
    "learned-offset": lambda: hf.OPTForCausalLM(hf.OPTConfig(**SMALL, **OPT)),
    "rotary-table": lambda: hf.GPTJForCausalLM(hf.GPTJConfig(**GPT2, rotary_dim=4, bos_token_id=1, eos_token_id=2)),
    "rotary-dynamic": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA, rope_parameters=DYNAMIC)),
    "rotary": lambda: hf.LlamaForCausalLM(hf.LlamaConfig(**LLAMA)),
}


def make_target(build: Callable[[], hf.PreTrainedModel]) -> Target:
    torch.manual_seed(0)
    return Target(build().double())


def plain_text(target: Target, prompt: np.ndarray, new_tokens: int) -> list[int]:
    """One whole forward a token, without a cache."""
    ids = torch.from_numpy(prompt)[None]
    for _ in range(new_tokens):
        with torch.no_grad():
            ids = torch.cat([ids, target.model(ids, use_cache=False).logits[:, -1:].argmax(-1)], dim=1)
    return ids[0, len(prompt) :].tolist()


class TreeOfGuesses(NgramDrafter):
    """Three tokens below the root and three chains below the first; the target's next token is among them now and then."""

    def propose(self) -> Proposal:
        rows = len(self._contexts)
        tree = Tree.of(torch.tensor([[-1, 0, 0, 0, 1, 1, 4, 5]] * rows), max_depth=3)
        return Proposal(torch.randint(3, VOCAB, (rows, self.draft_nodes), generator=torch.Generator().manual_seed(0)), tree)


class Oracle(NoDrafter):
    """Chains of what the texts go on with, and of nothing behind their ends."""

    def __init__(self, texts: Sequence[Sequence[int]], draft_tokens: int) -> None:
        self.texts, self.draft_nodes = texts, draft_tokens

    def begin(self, prompts: Sequence[np.ndarray], capacity_tokens: int) -> None:
        self.said = [1 - len(prompt) for prompt in prompts]

    def extend(self, next_ids_BM: torch.Tensor, aux_BMF: torch.Tensor, counts: Sequence[int]) -> None:
        self.said = [said + count for said, count in zip(self.said, counts, strict=True)]

    def propose(self) -> Proposal:
        rows = [[*text[said:], *[7] * self.draft_nodes][: self.draft_nodes] for text, said in zip(self.texts, self.said, strict=True)]
        return Proposal(torch.tensor(rows), Tree.chain(len(rows), self.draft_nodes, torch.device("cpu")))


@pytest.mark.parametrize("kind", LIMITED)
def test_a_text_may_fill_all_positions(kind: str) -> None:
    """The last rounds draft up to 6 tokens beyond the last position; rows reach theirs in different rounds."""
    target = make_target(LIMITED[kind])
    prompts = [np.arange(3, 12), np.arange(5, 10), np.arange(7, 27)]
    limits = [POSITIONS - len(prompt) for prompt in prompts]
    expected = [plain_text(target, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    drafters: list[Drafter] = [NoDrafter(), NgramDrafter(6), TreeOfGuesses(7), Oracle(expected, 6)]
    for drafter in drafters:
        texts = Decoder(target, drafter).decode(prompts, limits)
        assert [text.ids for text in texts] == expected, type(drafter)


def test_a_learned_draft_beside_learned_positions(tmp_path: Path) -> None:
    """From features of such a target to chains and trees that reach beyond its positions."""
    torch.manual_seed(0)
    sizes = {**GPT2, "vocab_size": tiny.VOCAB, "n_layer": 4}
    hf.GPT2LMHeadModel(hf.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)).save_pretrained(tmp_path / "target")
    store = tiny.make_store(tmp_path / "store", tmp_path / "target", tiny.make_samples([30, 12, 32, 25]))
    method = tiny.train(tiny.make_method(tmp_path / "target", store, draft_tokens=4, loss_chunk_rows=512), store)
    target, prompts = Target.load(tmp_path / "target", "float32"), [np.arange(3, 12), np.arange(5, 10)]
    limits = [POSITIONS - len(prompt) for prompt in prompts]
    expected = [plain_text(target, prompt, limit) for prompt, limit in zip(prompts, limits, strict=True)]
    for drafter in (Eagle3Drafter(method, 4), Eagle3TreeDrafter(method, TreeShape(4, 2, 8))):
        assert [text.ids for text in Decoder(target, drafter).decode(prompts, limits)] == expected


ALIBI = {
    "BloomModel": lambda: hf.BloomForCausalLM(hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4)),
    "MptModel": lambda: hf.MptForCausalLM(hf.MptConfig(vocab_size=VOCAB, d_model=32, n_layers=3, n_heads=4)),
    "FalconModel": lambda: hf.FalconForCausalLM(hf.FalconConfig(**SMALL, alibi=True)),
}


@pytest.mark.parametrize("name", ALIBI)
def test_positions_that_cannot_be_told_are_refused_by_name(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"{name} works out positions by itself \(ALiBi\).*rotary or learned"):
        Decoder(make_target(ALIBI[name]), NgramDrafter(3)).decode([np.arange(3, 9)], 8)


def test_alibi_folders_are_refused_by_name(tmp_path: Path) -> None:
    """The command line does not come as far as the model: its configuration names no number of positions."""
    hf.BloomConfig(vocab_size=VOCAB, hidden_size=32, n_layer=3, n_head=4).save_pretrained(tmp_path)
    with pytest.raises(FeatureError, match=r"BloomConfig.*max_position_embeddings.*rotary or learned positions"):
        TargetConfig.read(tmp_path)


def test_windows_that_are_measured_between_slots_are_refused_by_name() -> None:
    local = hf.GPTNeoConfig(
        vocab_size=VOCAB, hidden_size=32, num_layers=2, num_heads=4, attention_types=[[["global", "local"], 1]], window_size=4,
    )  # fmt: skip
    with pytest.raises(ConfigError, match="GPTNeoModel has layers with global, local"):
        TargetSession(make_target(lambda: hf.GPTNeoForCausalLM(local)), 1, 16)


def test_angles_that_change_within_a_text_are_refused_by_name() -> None:
    """Before and behind the border the angles are the same all through; the text is then the plain one."""
    rope = {"rope_type": "longrope", "rope_theta": 10_000.0, "short_factor": [1.0] * 4, "long_factor": [4.0] * 4}
    config = hf.Phi3Config(**{**LLAMA, "max_position_embeddings": 60}, rope_parameters=rope, original_max_position_embeddings=20)
    target = make_target(lambda: hf.Phi3ForCausalLM(config))
    for length, new_tokens in ((8, 12), (21, 15)):
        prompt = np.arange(3, 3 + length)
        assert Decoder(target, NgramDrafter(5)).decode([prompt], new_tokens)[0].ids == plain_text(target, prompt, new_tokens)
    for length, new_tokens in ((8, 13), (20, 1)):
        with pytest.raises(
            ConfigError, match=rf"original_max_position_embeddings=20, between a prompt of {length} tokens and a text of 21"
        ):
            Decoder(target, NgramDrafter(5)).decode([np.arange(3, 3 + length)], new_tokens)
