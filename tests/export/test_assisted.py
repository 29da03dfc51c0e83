"""Transformers' own DFlash drives an exported draft: their network, drafting, verification and roll-back of keys, our folder.

The network's class is that of the one DFlash draft that transformers has, whose names for two tensors differ from those that SGLang and
vLLM read. It takes its numbers from the exported `config.json`; its captured layers are those of the top level, outputs counted from 0.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file
from transformers.generation import DFlashTokenCandidateGenerator

from specforge.cli.__main__ import main
from specforge.decode.block import BlockDrafter
from specforge.decode.engine import Decoder
from specforge.distributed import World
from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from tests.decode.agreement import sharpen
from tests.export.checkpoints import save_method
from tests.methods.test_contract import learn, make

NEW_TOKENS = 40
NAMES = {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}
KEYS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
    "rope_parameters", "max_position_embeddings", "layer_types", "hidden_act", "block_size", "mask_token_id", "target_layer_ids",
)  # fmt: skip


def theirs(folder: Path, **others: Any) -> Any:
    """Their network with the folder's configuration and weights, none missing and none left over."""
    stored = json.loads((folder / "config.json").read_text())
    config = transformers.MuseGlimmerAssistantConfig(**{key: stored[key] for key in KEYS} | others)
    model = transformers.MuseGlimmerAssistantModel(config).eval()
    model.load_state_dict({NAMES.get(name, name): tensor for name, tensor in load_file(folder / "model.safetensors").items()})
    return model


def generated(target: Target, prompt: np.ndarray, **options: Any) -> list[int]:
    ids = target.model.generate(
        torch.from_numpy(prompt)[None], attention_mask=torch.ones(1, len(prompt), dtype=torch.long), max_new_tokens=NEW_TOKENS,
        do_sample=False, eos_token_id=None, **options,
    )  # fmt: skip
    return ids[0, len(prompt) :].tolist()


def test_transformers_takes_the_same_rounds(
    answered_path: Path, answered: LocalFeatureStore, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The target's own tokens, and in each round the drafts that our decoder accepts; other captured layers change only the latter."""
    method = make("dflash", answered_path, answered, layers=2, block_size=5)
    sharpen(method.draft.layers)
    learn(method, answered, 60)
    save_method(World(), "dflash", method, answered_path, tmp_path / "run")
    assert main(["export", "--checkpoint", str(tmp_path / "run" / "latest"), "--to", "sglang", "--out", str(tmp_path / "out")]) == 0
    target = Target.load(answered_path, "float32")
    prompts = [answered.read(number).input_ids[:9].numpy().astype(np.int64) for number in (1, 2, 4)]
    ours = Decoder(target, BlockDrafter(method, method.draft_tokens)).decode(prompts, NEW_TOKENS)

    accepted: list[int] = []
    update = DFlashTokenCandidateGenerator.update_candidate_strategy

    def counting(self: Any, input_ids: Any, scores: Any, num_matches: Any) -> Any:
        accepted.append(int(num_matches))
        return update(self, input_ids, scores, num_matches)

    monkeypatch.setattr(DFlashTokenCandidateGenerator, "update_candidate_strategy", counting)
    drafted, misled = theirs(tmp_path / "out"), theirs(tmp_path / "out", target_layer_ids=[1, 2, 3])
    for prompt, text in zip(prompts, ours, strict=True):
        assert generated(target, prompt) == text.ids
        rounds = []
        for model in (drafted, misled):
            accepted.clear()
            assert generated(target, prompt, assistant_model=model, speculation_type="dflash") == text.ids
            rounds.append(list(accepted))
        # Their first round is the prompt's; in the last, the length limit counts a draft as the target's own token.
        assert rounds[0][0] == 0 and rounds[0][1:-1] == text.accepted[:-1] and len(rounds[0]) == len(text.accepted) + 1
        assert sum(rounds[1]) < sum(rounds[0])
    assert {max(text.accepted) for text in ours} == {4}
