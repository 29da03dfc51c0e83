"""How the embedded target was trained; one command does it again.

    python -m specforge.demo.target_recipe --minutes 70 --out DIR [--suite BUNDLE] [--own-document]

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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
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
from specforge.demo.own_document import packed_logits, pieces
from specforge.distributed import World
from specforge.suite.bundle import read_tasks
from specforge.suite.evaluate import Evaluation, Manner
from specforge.suite.in_training import SuiteInTraining
from specforge.suite.prompts import Draw
from specforge.suite.token_cache import TokenCache

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
SECOND_STAGE = 0.55
"""From this share of the budget on, most rows are conversations and these are kept from repeating themselves."""
REPEAT_WINDOW = 32
REPEAT_WEIGHT = 0.3
STARTED = time.time()


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
    return 0.2 if share < SECOND_STAGE else 0.6


def losses(logits_BTV: torch.Tensor, ids_BT: torch.Tensor, next_BT: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Cross-entropy, and unlikelihood of what was just said: [B] each, means over the tokens.

    A small model's greedy answers go in circles; making tokens of the last REPEAT_WINDOW less likely, unless they come
    next, is the cure of Welleck et al. (arXiv 1908.04319, token-level unlikelihood).
    """
    normaliser_BT = logits_BTV.logsumexp(-1)
    likelihood_BT = logits_BTV.gather(-1, next_BT[:, :, None])[:, :, 0] - normaliser_BT
    length = ids_BT.shape[1]
    said_BTT = ids_BT[:, None, :].expand(-1, length, -1)
    age_TT = torch.arange(length)[:, None] - torch.arange(length)
    counts_BTT = (age_TT >= 0) & (age_TT < REPEAT_WINDOW) & (said_BTT != next_BT[:, :, None])
    repeated_BTT = (logits_BTV.gather(-1, said_BTT) - normaliser_BT[:, :, None]).exp().clamp(max=0.999)
    unlikelihood_BT = -(torch.log1p(-repeated_BTT) * counts_BTT).sum(-1)
    return -likelihood_BT.mean(1), unlikelihood_BT.mean(1)


@dataclass
class Progress:
    """How far a training is; kept beside the snapshot, from which a stopped training goes on."""

    steps: int = 0
    spent_s: float = 0.0
    loss_nats: float = math.nan

    @property
    def tokens(self) -> int:
        return self.steps * BATCH_ROWS * ROW_TOKENS


def suite_hook(bundle: Path, tokenizer: PreTrainedTokenizerFast, out: Path, every_steps: int) -> SuiteInTraining:
    """Scores the tasks of a bundle; what it makes of them lies in `out`."""
    tokenizer.save_pretrained(folder := out / "tokenizer")
    cache = TokenCache(out / "suite-tokens", folder, lambda: tokenizer)
    return SuiteInTraining(Evaluation(cache, Draw(), World()), read_tasks(bundle), Manner(), every_steps)


def train(out: Path, minutes: float, suite: Path | None = None, suite_every: int = 500, own_document: bool = False) -> None:
    """Train for so many minutes in all, from the snapshot in `out` if there is one (moments start anew).

    Args:
        suite: a bundle that is scored every `suite_every` steps, in time that does not count.
        own_document: a token sees its own document or conversation alone, and not all of its row.
    """
    out.mkdir(parents=True, exist_ok=True)
    snapshot, progress = out / "snapshot", Progress()
    if (snapshot / "progress.json").is_file():
        progress = Progress(**json.loads((snapshot / "progress.json").read_text()))
        tokenizer = PreTrainedTokenizerFast.from_pretrained(snapshot)
        model = LlamaForCausalLM.from_pretrained(snapshot, dtype=torch.float32, local_files_only=True)
    else:
        tokenizer = train_tokenizer(document.text for document in documents("train")[::4])
        model = new_model(tokenizer)
    first_ids = tokenizer.convert_tokens_to_ids([DOC, USER]) if own_document else []
    batches = [Rows(stream, SEED + 2 * progress.steps + i) for i, stream in enumerate(stored_streams(out, tokenizer))]
    chosen, began_at = optimizers(model), progress.steps
    base = [group["lr"] for optimizer in chosen for group in optimizer.param_groups]
    score = suite_hook(suite, tokenizer, out, suite_every) if suite else None
    rng, saved_s, marked = random.Random(SEED + progress.steps), progress.spent_s, time.time()
    while progress.spent_s < minutes * 60:
        share = progress.spent_s / (minutes * 60)
        num_chats = sum(rng.random() < chat_share_at(share) for _ in range(BATCH_ROWS))
        loss = backward(model, batches, num_chats, REPEAT_WEIGHT if share >= SECOND_STAGE else 0.0, first_ids)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group, rate in zip([group for optimizer in chosen for group in optimizer.param_groups], base, strict=True):
            group["lr"] = rate * rate_at(share) * min(1.0, (progress.steps - began_at + 1) / 20)
        for optimizer in chosen:
            optimizer.step()
            optimizer.zero_grad()
        progress.steps += 1
        progress.spent_s, marked = progress.spent_s + time.time() - marked, time.time()
        progress.loss_nats = loss if math.isnan(progress.loss_nats) else 0.98 * progress.loss_nats + 0.02 * loss
        if progress.steps % 50 == 0:
            rate_per_s = (progress.steps - began_at) * BATCH_ROWS * ROW_TOKENS / max(time.time() - STARTED, 1.0)
            print(
                f"step {progress.steps} loss {progress.loss_nats:.4f} {rate_per_s:.0f} tokens/s {progress.spent_s / 60:.1f} min", flush=True
            )
        if score and (numbers := score(model, progress.steps)):
            print(f"step {progress.steps} " + "  ".join(f"{name} {value:+.4f}" for name, value in numbers.items()), flush=True)
            marked = time.time()
        if progress.spent_s - saved_s > 600:
            saved_s = progress.spent_s
            save(model, tokenizer, snapshot)
            (snapshot / "progress.json").write_text(json.dumps(asdict(progress)))
    save(model, tokenizer, out)
    facts = {
        "command": f"python -m specforge.demo.target_recipe --minutes {minutes:g}" + own_document * " --own-document",
        "corpus_sha256": digest(), "seed": SEED,
        "steps": progress.steps, "tokens": progress.tokens, "minutes": round(progress.spent_s / 60, 1),
        "threads": torch.get_num_threads(), "train_loss_nats": round(progress.loss_nats, 4), "torch": torch.__version__,
        "date": time.strftime("%Y-%m-%d"),
    }  # fmt: skip
    (out / "provenance.json").write_text(json.dumps(facts, indent=1) + "\n")


def stored_streams(out: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[np.ndarray, np.ndarray]:
    """The token streams, kept in `out`, since making them takes minutes."""
    path = out / "streams.npz"
    if not path.is_file():
        sources, chats = streams(tokenizer)
        np.savez(path, sources=sources, chats=chats)
    stored = np.load(path)
    print(f"{len(stored['sources'])} source tokens, {len(stored['chats'])} conversation tokens", flush=True)
    return stored["sources"], stored["chats"]


def backward(model: LlamaForCausalLM, batches: list[Rows], num_chats: int, repeat_weight: float, first_ids: Sequence[int] = ()) -> float:
    """Gradients of one batch, conversations last; returns its cross-entropy in nats a token.

    Args:
        first_ids: what a document or conversation begins with, of which no token sees another; empty: it sees all of its row.
    """
    kinds = [batch.take(count) for batch, count in zip(batches, (BATCH_ROWS - num_chats, num_chats), strict=True) if count]
    rows_BT = torch.from_numpy(np.concatenate(kinds))
    is_chat_B = torch.arange(BATCH_ROWS) >= BATCH_ROWS - num_chats
    total = 0.0
    for ids_BT, chat_B in zip(rows_BT.split(MICRO_ROWS), is_chat_B.split(MICRO_ROWS), strict=True):
        if first_ids:
            logits_BTV = packed_logits(model, ids_BT[:, :-1], pieces(ids_BT[:, :-1].numpy(), first_ids))
        else:
            logits_BTV = model(input_ids=ids_BT[:, :-1], use_cache=False).logits
        if repeat_weight and chat_B.any():
            entropy_B, unlikelihood_B = losses(logits_BTV, ids_BT[:, :-1], ids_BT[:, 1:])
            loss = (entropy_B.sum() + repeat_weight * (unlikelihood_B * chat_B).sum()) / BATCH_ROWS
            total += entropy_B.detach().sum().item() / BATCH_ROWS
        else:
            loss = F.cross_entropy(logits_BTV.flatten(0, 1), ids_BT[:, 1:].flatten()) * len(ids_BT) / BATCH_ROWS
            total += loss.item()
        loss.backward()
    return total


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
    parser.add_argument(
        "--suite", type=Path, metavar="BUNDLE", help="tasks to score on the way (`python -m specforge.demo.bundle` writes some)"
    )
    parser.add_argument("--suite-every", type=int, default=500, metavar="STEPS", help="how often (default 500)")
    parser.add_argument("--own-document", action="store_true", help="no token sees another document than its own")
    given = parser.parse_args()
    warnings.simplefilter("ignore", SyntaxWarning)
    torch.set_num_threads(os.cpu_count() or 1)
    train(given.out, given.minutes, given.suite, given.suite_every, given.own_document)


if __name__ == "__main__":
    main()
