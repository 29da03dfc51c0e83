"""What `specforge eval` keeps of an evaluation: its numbers, and a few answers with their rounds as text."""

import platform
import time
from collections.abc import Sequence
from typing import Any

import torch
import transformers
from transformers import PreTrainedTokenizerBase

from specforge import __version__
from specforge.cli.inputs import load_tokenizer
from specforge.cli.streaming import Detokeniser
from specforge.config import RunConfig
from specforge.distributed import World
from specforge.eval.evaluator import Calibrated
from specforge.eval.record import EvaluationRecord, rows_digest
from specforge.eval.walked import Walked
from specforge.features.store import LocalFeatureStore
from specforge.training.run_folder import Checkpoint

TEXTS_OF_DOMAIN = 3
_LONGEST_PROMPT_TOKENS, _MOST_ROUNDS = 400, 400


def record_of(
    config: RunConfig, checkpoint: Checkpoint, settings: dict[str, Any], store: LocalFeatureStore, calibrated: Calibrated,
    numbers: dict[str, Any], world: World,
) -> EvaluationRecord:  # fmt: skip
    """The record of an evaluation that gave `numbers`, of a checkpoint that remembers `settings`."""
    tokenizer, rows = load_tokenizer(config), rows_digest(store, config.eval.max_samples)
    return EvaluationRecord(
        checkpoint=checkpoint.path.name,
        run_id=checkpoint.run_id,
        step=checkpoint.step,
        time=round(time.time(), 3),
        made_with={
            "specforge": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
            "device": torch.cuda.get_device_name(world.device) if world.device.type == "cuda" else f"{platform.machine()} CPU",
            "ranks": world.size,
        },
        data=config.data.eval_path or config.data.train_path,
        rows=rows,
        held_out=settings.get("heldout_rows", rows) == rows,
        numbers=numbers,
        groups=calibrated.groups,
        texts=[_text(tokenizer, store, walked) for walked in calibrated.walked],
    )


def _text(tokenizer: PreTrainedTokenizerBase, store: LocalFeatureStore, walked: Walked) -> dict[str, Any]:
    """An answer with its rounds; a long prompt without its beginning, a long answer without its end."""
    ids = store.labels(walked.sample)[0].tolist()
    prompt, answer = ids[max(walked.first - _LONGEST_PROMPT_TOKENS, 0) : walked.first], ids[walked.first : walked.last + 1]
    pieces = iter(_pieces(tokenizer, answer))
    first, rounds = next(pieces), []
    for accepted, refused in zip(walked.accepted[:_MOST_ROUNDS], walked.refused, strict=False):
        rounds.append({
            "accepted": [next(pieces) for _ in range(accepted)],
            "own": next(pieces, ""),
            "refused": tokenizer.decode([refused]) if refused >= 0 else "",
        })  # fmt: skip
    return {
        "id": store.ids[walked.sample],
        "domain": store.domains[walked.sample],
        "prompt": tokenizer.decode(prompt),
        "first": first,
        "rounds": rounds,
    }


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token says; a character of several tokens belongs to the last of them."""
    detokeniser = Detokeniser(tokenizer)
    pieces = [detokeniser.add(token) for token in ids]
    pieces[-1] += detokeniser.end()
    return pieces
