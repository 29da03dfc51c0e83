"""How the embedded target was trained; one command does it again.

    python -m specforge.demo.target_recipe --minutes 70 --out DIR

A byte-level BPE tokenizer of 4096 entries and a Llama of 2.4 million parameters, trained on source documents and on
conversations about them. Hidden matrices are optimised by Muon, tables and norms by AdamW; the learning rate depends on
the share of the time budget that is spent, so the run ends annealed whatever the machine's speed.
"""

import argparse
import json
import math
import os
import random
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.nn import functional as F
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from specforge.demo.conversations import conversations
from specforge.demo.corpus import digest, documents
from specforge.demo.muon import Muon

PAD, DOC, SYSTEM, USER, ASSISTANT, END = SPECIAL = ("<|pad|>", "<|doc|>", "<|system|>", "<|user|>", "<|assistant|>", "<|end|>")
CHAT_TEMPLATE = """\
{%- for message in messages -%}
{{- '<|' + message['role'] + '|>' -}}
{%- if message['role'] == 'assistant' -%}
{%- generation -%}{{- message['content'] + '<|end|>' -}}{%- endgeneration -%}
{%- else -%}
{{- message['content'] + '<|end|>' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"""
ROW_TOKENS = 256
BATCH_ROWS = 16
MICRO_ROWS = 8  # more rows at once and the logits leave the processor's cache
SEED = 0


def train_tokenizer(texts: Iterator[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE; digits stand alone, runs of spaces may become one token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\n+| ?[^\s\w]+| ?[A-Za-z_]+| ?\d| +(?= )|\s"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=4096, special_tokens=list(SPECIAL), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, bos_token=DOC, eos_token=END)
    fast.chat_template = CHAT_TEMPLATE
    return fast


def new_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=192, intermediate_size=512, num_hidden_layers=4, num_attention_heads=3,
        num_key_value_heads=1, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True, rms_norm_eps=1e-5,
        attn_implementation="sdpa",
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    torch.manual_seed(SEED)
    return LlamaForCausalLM(config)


def token_stream(tokenizer: PreTrainedTokenizerFast, texts: list[str], seed: int) -> np.ndarray:
    """The shuffled texts as one stream of ids, uint16."""
    random.Random(seed).shuffle(texts)
    pieces = []
    for start in range(0, len(texts), 512):
        encoded = tokenizer(texts[start : start + 512], add_special_tokens=False, verbose=False)["input_ids"]
        pieces += [np.array(ids, dtype=np.uint16) for ids in encoded]
    return np.concatenate(pieces)


def streams(tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """Source documents and conversations as token streams."""
    sources = [DOC + document.text + END for document in documents("train")]
    chats = [
        "".join(f"<|{turn['role']}|>{turn['content']}{END}" for turn in row["conversations"])
        for row in conversations("train")
        if row["conversations"][0]["content"].isascii() and row["conversations"][1]["content"].isascii()
    ]
    return token_stream(tokenizer, sources, SEED), token_stream(tokenizer, chats, SEED)


class Rows:
    """Rows of ROW_TOKENS + 1 ids from a stream, in a fixed random order, over and over."""

    def __init__(self, stream: np.ndarray, seed: int) -> None:
        self._stream = stream
        self._rng = np.random.default_rng(seed)
        self._left: list[int] = []
        self.epochs = 0

    def take(self, count: int) -> np.ndarray:
        rows: list[np.ndarray] = []
        while len(rows) < count:
            if not self._left:
                shift = int(self._rng.integers(0, ROW_TOKENS)) if self.epochs else 0
                starts = np.arange(shift, len(self._stream) - ROW_TOKENS - 1, ROW_TOKENS)
                self._left = self._rng.permutation(starts).tolist()
                self.epochs += 1
            start = self._left.pop()
            rows.append(self._stream[start : start + ROW_TOKENS + 1])
        return np.stack(rows).astype(np.int64)


def optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and "embed" not in name and "lm_head" not in name]
    hidden = {id(p) for p in matrices}
    rest = [p for p in model.parameters() if id(p) not in hidden]
    return [
        Muon(matrices, lr=0.02, momentum=0.95, weight_decay=0.02),
        torch.optim.AdamW(rest, lr=3e-3, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def rate_at(share: float) -> float:
    """Multiplier of the learning rates when `share` of the budget is spent: warm-up, plateau, linear decay to zero."""
    return min(1.0, share / 0.01 + 0.05, max(0.0, (1 - share) / 0.6))


def chat_share_at(share: float) -> float:
    """Share of a batch's rows that are conversations."""
    return 0.2 if share < 0.6 else 0.45


def train(out: Path, minutes: float) -> None:
    out.mkdir(parents=True, exist_ok=True)
    began = time.time()
    tokenizer = train_tokenizer(document.text for document in documents("train")[::4])
    tokenizer.save_pretrained(out)
    if (out / "streams.npz").is_file():
        stored = np.load(out / "streams.npz")
        sources, chats = stored["sources"], stored["chats"]
    else:
        sources, chats = streams(tokenizer)
        np.savez(out / "streams.npz", sources=sources, chats=chats)
    print(f"{time.time() - began:.0f} s: {len(sources)} source tokens, {len(chats)} conversation tokens", flush=True)
    model, batches = new_model(tokenizer), (Rows(sources, SEED), Rows(chats, SEED + 1))
    chosen = optimizers(model)
    base = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    rng, step, spent_s, loss_mean, saved_s, marked = random.Random(SEED), 0, 0.0, math.nan, 0.0, time.time()
    while spent_s < minutes * 60:
        share = spent_s / (minutes * 60)
        num_chats = sum(rng.random() < chat_share_at(share) for _ in range(BATCH_ROWS))
        rows = (
            np.concatenate([batches[0].take(BATCH_ROWS - num_chats), batches[1].take(num_chats)])
            if num_chats
            else batches[0].take(BATCH_ROWS)
        )
        loss = torch.zeros(())
        for ids_BT in torch.from_numpy(rows).split(MICRO_ROWS):
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
            part = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()) * len(ids_BT) / BATCH_ROWS
            part.backward()
            loss += part.detach()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        groups = [group for optimizer in chosen for group in optimizer.param_groups]
        for group, rate in zip(groups, base, strict=True):
            group["lr"] = rate * rate_at(share)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        step += 1
        spent_s, marked = spent_s + time.time() - marked, time.time()
        loss_mean = loss.item() if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * loss.item()
        if step % 50 == 0:
            tokens = step * BATCH_ROWS * ROW_TOKENS
            print(f"step {step} loss {loss_mean:.4f} {tokens / spent_s:.0f} tokens/s spent {spent_s / 60:.1f} min", flush=True)
        if spent_s - saved_s > 600:
            saved_s = spent_s
            save(model, tokenizer, out / "snapshot")
    save(model, tokenizer, out)
    facts = {
        "command": f"python -m specforge.demo.target_recipe --minutes {minutes:g}", "corpus_sha256": digest(), "seed": SEED, "steps": step,
        "tokens": step * BATCH_ROWS * ROW_TOKENS, "source_epochs": batches[0].epochs, "conversation_epochs": batches[1].epochs,
        "minutes": round(spent_s / 60, 1), "threads": torch.get_num_threads(), "train_loss_nats": round(loss_mean, 4),
        "torch": torch.__version__, "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    (out / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """The model as bfloat16 safetensors with tokenizer and generation settings."""
    state: dict[str, Any] = {name: value.to(torch.bfloat16) for name, value in model.state_dict().items()}
    del state["lm_head.weight"]
    model.generation_config = GenerationConfig(
        eos_token_id=tokenizer.eos_token_id, bos_token_id=tokenizer.bos_token_id, pad_token_id=tokenizer.pad_token_id, do_sample=False
    )
    model.save_pretrained(folder, state_dict=state)
    tokenizer.save_pretrained(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the embedded target again.")
    parser.add_argument("--minutes", type=float, default=70.0)
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)
    torch.set_num_threads(os.cpu_count() or 1)
    train(given.out, given.minutes)


if __name__ == "__main__":
    main()
