"""How good the embedded target is, in the figures that a demonstration depends on.

    python -m specforge.demo.target_report [--target DIR] [--record]

A target that models text worse than gzip, or whose greedy answers go in circles, makes every acceptance length meaningless: a drafter is
then praised for predicting loops. So three things are measured on held-out packages: bits per byte beside general compressors, how often
an answer repeats itself, and how often it ends by itself.
"""

from __future__ import annotations

import argparse
import gzip
import itertools
import json
import lzma
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from specforge.demo.conversations import DOMAINS, conversations
from specforge.demo.corpus import documents
from specforge.errors import DataError

TARGET = Path(__file__).parent / "target"
WINDOW_TOKENS = 256  # what the target was trained on
ANSWER_TOKENS = 64
BATCH_PROMPTS = 64
LIMITS = {"bpb_over_gzip": 0.92, "repeated_4grams": 0.35, "ended": 0.5}


def load(folder: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model in fp32 and tokenizer of a folder, nothing fetched."""
    if not (folder / "config.json").is_file():
        remedy = "`python -m specforge.demo.target_recipe --out DIR` makes one"
        raise DataError(f"--target={folder}: a folder with config.json is needed; {remedy}")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, local_files_only=True)
    return model.eval(), AutoTokenizer.from_pretrained(folder, local_files_only=True)


def heldout_texts(total_bytes: int) -> list[str]:
    """Held-out documents up to a size, packages in turn, so that no large one is all there is."""
    packages: dict[str, list[str]] = {}
    for document in documents("heldout"):
        packages.setdefault(document.package, []).append(document.text)
    chosen: list[str] = []
    for text in filter(None, itertools.chain.from_iterable(itertools.zip_longest(*packages.values()))):
        if sum(map(len, chosen)) + len(text) <= total_bytes:
            chosen.append(text)
    return chosen


def compressed_bits_per_byte(texts: Sequence[str]) -> dict[str, float]:
    """What `gzip -9` and `xz -9e` need for the texts, one after another in one file."""
    plain = "".join(texts).encode()
    packed = {"gzip_bpb": gzip.compress(plain, 9), "xz_bpb": lzma.compress(plain, preset=9 | lzma.PRESET_EXTREME)}
    return {name: 8 * len(data) / len(plain) for name, data in packed.items()}


@torch.inference_mode()
def bits_per_byte(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> float:
    """Each token is predicted once, from its document's beginning or at least half a window of context."""
    nats, num_bytes = 0.0, sum(len(text.encode()) for text in texts)
    half = WINDOW_TOKENS // 2
    for text in texts:
        ids_T = torch.tensor([tokenizer.bos_token_id, *tokenizer.encode(text, add_special_tokens=False, verbose=False)])
        for start in range(0, max(1, len(ids_T) - half), half):
            window_T = ids_T[start : start + WINDOW_TOKENS]
            loss_T = F.cross_entropy(model(window_T[None]).logits[0, :-1], window_T[1:], reduction="none")
            nats += float(loss_T[(half - 1) if start else 0 :].sum())
    return nats / math.log(2) / num_bytes


@torch.inference_mode()
def greedy_answers(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    """Answer ids of every row's first question, the end of turn included where it was reached."""
    prompts = [tokenizer.apply_chat_template(row["conversations"][:1], add_generation_prompt=True, return_dict=False) for row in rows]
    answers: dict[int, list[int]] = {}
    by_length = sorted(range(len(rows)), key=lambda index: len(prompts[index]))
    for start in range(0, len(rows), BATCH_PROMPTS):
        chosen = by_length[start : start + BATCH_PROMPTS]
        for index, answer_T in zip(chosen, _generate(model, tokenizer, [prompts[index] for index in chosen])):
            ids = answer_T.tolist()
            answers[index] = ids[: ids.index(tokenizer.eos_token_id) + 1] if tokenizer.eos_token_id in ids else ids
    return [answers[index] for index in range(len(rows))]


def _generate(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> Tensor:
    tokenizer.padding_side = "left"
    padded = tokenizer.pad({"input_ids": list(prompts)}, return_tensors="pt")
    return model.generate(**padded, max_new_tokens=ANSWER_TOKENS, do_sample=False)[:, padded["input_ids"].size(1) :]


def repeated_share(answers: Iterable[Sequence[int]], order: int = 4) -> float:
    """Share of the n-grams that the same answer has already shown."""
    total = repeated = 0
    for ids in answers:
        grams = [tuple(ids[start : start + order]) for start in range(len(ids) - order + 1)]
        total += len(grams)
        repeated += len(grams) - len(set(grams))
    return repeated / max(1, total)


def describe_answers(answers: Sequence[Sequence[int]], end_id: int) -> dict[str, float]:
    """Repetition, share that ended by itself, mean length."""
    ended = sum(ids[-1] == end_id for ids in answers)
    return {
        "repeated_4grams": repeated_share(answers),
        "ended": ended / len(answers),
        "mean_tokens": sum(map(len, answers)) / len(answers),
    }


def measure(folder: Path, prompts: int = 240, text_bytes: int = 300_000) -> dict[str, Any]:
    """All figures of one folder."""
    model, tokenizer = load(folder)
    texts = heldout_texts(text_bytes)
    rows = sorted(conversations("heldout"), key=lambda row: row["id"].rpartition("-")[2])[:prompts]
    answers = greedy_answers(model, tokenizer, rows)
    figures: dict[str, Any] = {"heldout_bytes": sum(map(len, texts)), "heldout_bpb": bits_per_byte(model, tokenizer, texts)}
    figures |= compressed_bits_per_byte(texts)
    figures["bpb_over_gzip"] = figures["heldout_bpb"] / figures["gzip_bpb"]
    figures |= {"prompts": len(rows), **describe_answers(answers, tokenizer.eos_token_id), "domains": {}}
    for domain in DOMAINS:
        chosen = [ids for row, ids in zip(rows, answers) if row["domain"] == domain]
        figures["domains"][domain] = describe_answers(chosen, tokenizer.eos_token_id)
    return figures


def table(figures: dict[str, Any]) -> str:
    """The figures as a person reads them."""
    lines = [
        f"held-out text          {figures['heldout_bytes']:>9,} bytes",
        f"target                 {figures['heldout_bpb']:>9.3f} bits/byte, {figures['bpb_over_gzip']:.3f} x gzip",
        f"gzip -9                {figures['gzip_bpb']:>9.3f}",
        f"xz -9e                 {figures['xz_bpb']:>9.3f}",
        f"{'greedy answers':<23}{'repeated':>9}{'ended':>8}{'tokens':>8}",
    ]
    for name, part in {f"all {figures['prompts']}": figures, **figures["domains"]}.items():
        lines.append(f"  {name:<21}{part['repeated_4grams']:>9.3f}{part['ended']:>8.2f}{part['mean_tokens']:>8.1f}")
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure the embedded target on held-out packages.")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--prompts", type=int, default=240)
    parser.add_argument("--text-bytes", type=int, default=300_000)
    parser.add_argument("--threads", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="write the figures into the folder's provenance.json")
    given = parser.parse_args(argv)
    if given.threads:
        torch.set_num_threads(given.threads)
    figures = measure(given.target, given.prompts, given.text_bytes)
    if given.record:
        provenance = given.target / "provenance.json"
        known = json.loads(provenance.read_text()) if provenance.is_file() else {}
        provenance.write_text(json.dumps(known | figures, indent=1) + "\n")
    print(table(figures))
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
