"""A tiny random target on disk, features of random text, and a draft: everything built in milliseconds."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from specforge.config.methods import Eagle3Options
from specforge.decode.drafter import NoDrafter
from specforge.decode.engine import Decoder
from specforge.features.batch import DraftBatch
from specforge.features.store import FeatureMeta, FeatureWriter, LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.features.target import Target, aux_layer_ids
from specforge.methods.eagle3 import Eagle3

VOCAB = 64
AUX = (1, 2, 3)


def make_target(folder: Path, seed: int = 0, **sizes: object) -> Path:
    """A random Llama of 4 layers, hidden 32, grouped heads, as a Hugging Face folder."""
    torch.manual_seed(seed)
    given = {
        "vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False, "initializer_range": 0.2,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
    }  # fmt: skip
    LlamaForCausalLM(LlamaConfig(**given | sizes)).save_pretrained(folder)
    return folder


def make_samples(lengths: list[int], seed: int = 0, first_supervised: int = 3) -> list[SimpleNamespace]:
    """Random text; the mask has a prompt of `first_supervised` tokens and one gap, so that a sample has two answers."""
    rng = np.random.default_rng(seed)
    samples = []
    for number, length in enumerate(lengths):
        mask = np.arange(length) >= min(first_supervised + number % 2, length - 2)
        if length > 12:
            mask[length // 2 : length // 2 + 2] = False
        ids = rng.integers(3, VOCAB, length).astype(np.int32)
        samples.append(SimpleNamespace(id=f"s{number}", domain="ab"[number % 2], input_ids=ids, loss_mask=mask, truncated=False))
    return samples


def make_answered(target_path: Path) -> list[SimpleNamespace]:
    """Conversations of one or two turns; every answer is the target's own, of 2 to 40 tokens."""
    target = Target.load(target_path, "float32")
    rng, decoder, samples = np.random.default_rng(0), Decoder(target, NoDrafter()), []
    for number in range(10):
        ids, mask = rng.integers(3, target.vocab_size, 3 + number % 5), np.zeros(3 + number % 5, dtype=bool)
        for turn in range(1 + number % 2):
            answer = decoder.decode([ids], 2 + (7 * number + 3 * turn) % 39)[0].ids
            ids, mask = np.append(ids, answer), np.append(mask, np.ones(len(answer), dtype=bool))
            if number % 2 and not turn:
                ids, mask = np.append(ids, rng.integers(3, target.vocab_size, 4)), np.append(mask, np.zeros(4, dtype=bool))
        samples.append(SimpleNamespace(id=f"s{number}", domain="", input_ids=ids.astype(np.int32), loss_mask=mask, truncated=False))
    return samples


def make_store(folder: Path, target_path: Path, samples: list[SimpleNamespace]) -> LocalFeatureStore:
    target = Target.load(target_path, "float32")
    aux = aux_layer_ids(target.num_layers)
    meta = FeatureMeta(
        target_path=str(target_path), target_fingerprint="", aux_layer_ids=aux, dtype="float32",
        hidden_size=target.hidden_size, vocab_size=target.vocab_size,
    )  # fmt: skip
    with FeatureWriter(folder, meta, 2**20) as writer:
        for sample in samples:
            captured = target.capture([sample.input_ids], aux)[0]
            labels = torch.from_numpy(sample.input_ids), torch.from_numpy(sample.loss_mask)
            writer.add(sample, SampleFeatures(*labels, **captured))
    return LocalFeatureStore(folder)


def make_method(target_path: Path, store: LocalFeatureStore, seed: int = 0, **options: object) -> Eagle3:
    chosen = Eagle3Options(**{"draft_tokens": 3, "draft_vocab_size": 40, "loss_chunk_rows": 7, **options})
    return Eagle3.build(chosen, TargetTables.read(target_path), store, seed)


def train(method: Eagle3, store: LocalFeatureStore, steps: int = 40) -> Eagle3:
    """The method, after `steps` on all samples at once."""
    batch = DraftBatch.read(store, range(len(store)))
    plan, optimiser = method.plan(batch), torch.optim.AdamW(method.parameters(), lr=1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        (method(batch, plan).loss_sum / plan.weight).backward()
        optimiser.step()
    return method
