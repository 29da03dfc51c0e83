"""What a compressed teacher costs and saves, measured on the embedded target.

    python -m specforge.demo.teacher_report [--target DIR] [--prompts N]

The target answers held-out prompts greedily; at every token of the answers its exact distribution on the draft vocabulary is
compared with the one rebuilt from its k likeliest ids. The draft behind the loss is the target's own highest captured layer, read
by the target's final norm and head: an imperfect model of the same text.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from specforge.data.vocabulary import DraftVocabulary
from specforge.demo.conversations import conversations
from specforge.demo.target_report import TARGET, greedy_answers, load
from specforge.features.capture import capture_samples
from specforge.features.store import FeatureMeta, SampleFeatures, bytes_per_token
from specforge.features.target import Target, aux_layer_ids
from specforge.features.teacher import likeliest
from specforge.methods.teacher import CompressedTeacher, ExactTeacher

DRAFT_VOCABULARY = 2048
TOP_K = (4, 8, 16, 32, 64, 128, 256)


def answered(folder: Path, prompts: int) -> list[SimpleNamespace]:
    """Samples of a question and the target's own answer, which is supervised."""
    model, tokenizer = load(folder)
    rows = sorted(conversations("heldout"), key=lambda row: row["id"].rpartition("-")[2])[:prompts]
    samples = []
    for row, answer in zip(rows, greedy_answers(model, tokenizer, rows), strict=True):
        asked = tokenizer.apply_chat_template(row["conversations"][:1], add_generation_prompt=True, return_dict=False)
        ids = np.array([*asked, *answer], dtype=np.int32)
        samples.append(
            SimpleNamespace(id=row["id"], domain="", input_ids=ids, loss_mask=np.arange(len(ids)) >= len(asked), truncated=False)
        )
    return samples


@torch.no_grad()
def measure(folder: Path, prompts: int) -> list[dict[str, Any]]:
    """One row a k: `covered` mass of the k ids, `tv` total variation and `kl` (nats) from the exact teacher, `loss` with the
    compressed teacher less `exact_loss` with the exact one, bytes a token of the teacher in bfloat16."""
    samples, target = answered(folder, prompts), Target.load(folder, "float32")
    layers = aux_layer_ids(target.num_layers)
    meta = FeatureMeta(
        target_path=str(folder), target_fingerprint="", aux_layer_ids=layers, dtype="float32", hidden_size=target.hidden_size,
        vocab_size=target.vocab_size,
    )  # fmt: skip
    features = capture_samples(target, samples, range(len(samples)), 4096, meta)
    counts = sum(np.bincount(sample.input_ids[sample.loss_mask], minlength=target.vocab_size) for sample in samples)
    vocabulary = DraftVocabulary.from_counts(np.asarray(counts), DRAFT_VOCABULARY)
    last, logsumexp, highest = (
        torch.cat([taught(one, name, vocabulary) for one in features.values()]) for name in ("last", "logsumexp", "aux")
    )
    head_DH = target.head.weight[torch.from_numpy(vocabulary.kept)]
    exact = ExactTeacher(last, head_DH, logsumexp).distribution(0, len(last), torch.float64)
    draft = (target.decoder.norm(highest[:, -target.hidden_size :]) @ head_DH.T).double().log_softmax(-1)  # type: ignore[operator]
    exact_loss = -(exact * draft).sum(-1).mean()
    rows = []
    for k in TOP_K:
        ids, log_probs = likeliest(target, last, logsumexp, k)
        teacher = CompressedTeacher(ids, log_probs, torch.from_numpy(vocabulary.to_draft), len(vocabulary.kept))
        compressed = teacher.distribution(0, len(last), torch.float64)
        rows.append({
            "k": k,
            "covered": float(log_probs.double().exp().sum(-1).mean()),
            "tv": float((compressed - exact).abs().sum(-1).mean() / 2),
            "kl": float((exact * (exact / compressed.clamp_min(1e-12)).log()).sum(-1).mean()),
            "loss_more": float(-(compressed * draft).sum(-1).mean() - exact_loss),
            "exact_loss": float(exact_loss),
            "bytes": bytes_per_token(0, 0, "bfloat16", k) - bytes_per_token(0, 0, "bfloat16"),
            "positions": len(last),
        })  # fmt: skip
    return rows


def taught(features: SampleFeatures, name: str, vocabulary: DraftVocabulary) -> torch.Tensor:
    """The rows of a feature that teach: the next token is supervised, and the draft can say what the target would."""
    rows = features.loss_mask[1:] & torch.from_numpy(vocabulary.t2d)[features.argmax[:-1].long()]
    tensor: torch.Tensor = getattr(features, name)
    return tensor[:-1][rows]


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure compressed teachers on the embedded target.")
    parser.add_argument("--target", type=Path, default=TARGET)
    parser.add_argument("--prompts", type=int, default=120)
    given = parser.parse_args(argv)
    rows = measure(given.target, given.prompts)
    print(f"{rows[0]['positions']} positions; loss of the draft with the exact teacher {rows[0]['exact_loss']:.3f} nats")
    print(f"{'k':>4}{'covered':>10}{'TV':>9}{'KL':>9}{'loss':>9}{'bytes':>8}")
    for row in rows:
        print(f"{row['k']:>4}{row['covered']:>10.4f}{row['tv']:>9.4f}{row['kl']:>9.4f}{row['loss_more']:>+9.4f}{row['bytes']:>8}")
    print(json.dumps(rows))


if __name__ == "__main__":
    main()
