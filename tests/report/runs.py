"""Run folders written by hand, so that every number in a report is known."""

import json
from pathlib import Path
from typing import Any

from specforge.config import load_config
from specforge.config.load import dump_config
from specforge.eval.record import EvaluationRecord

HOSTILE = '"></script><img src=x onerror="document.title=1"><b>&amp;'
GROUPS = [[10.0, 1.0, 2.0], [10.0, 4.0, 5.0], [10.0, 8.0, 9.0], [0.0, 0.0, 0.0]]


def evaluation(walk: float, domain: str = "code", **more: Any) -> dict[str, Any]:
    """What an evaluation of 2 drafts says."""
    numbers = {
        "eval/avg_loss": 2.5, "eval/draft_tokens": 2, "eval/samples": 7, "eval/starts": 100, "eval/avg_acc": 0.6,
        "eval/per_position_acc": [0.6, 0.5], "eval/survival": [0.6, 0.3], "eval/acc_len": 1.9, "eval/greedy_match": 1.0,
        "eval/walk_acc_len": walk, "eval/walk_acc_len_low": walk - 0.125, "eval/walk_acc_len_high": walk + 0.125,
        "eval/walk_acc_len_by_draft_tokens": [1.5, walk], "eval/walk_histogram": [20, 12, 8],
        "eval/ngram_walk_acc_len": 1.375, "eval/ngram_walk_acc_len_low": 1.25, "eval/ngram_walk_acc_len_high": 1.5,
        "eval/ngram_walk_histogram": [30, 6, 4],
        f"eval/{domain}/acc_len": 1.8, f"eval/{domain}/walk_acc_len": 1.625, f"eval/{domain}/ngram_walk_acc_len": 1.3125,
        f"eval/{domain}/ngram_walk_acc_len_low": 1.0, f"eval/{domain}/ngram_walk_acc_len_high": 1.5,
        f"eval/{domain}/samples": 12, f"eval/{domain}/walk_acc_len_low": 1.5, f"eval/{domain}/walk_acc_len_high": 1.75,
    }  # fmt: skip
    return numbers | more


def calibration() -> dict[str, Any]:
    """The table of a reliability diagram; what cannot be known is null."""
    values = {
        "auc": (0.875, [0.75, None]),
        "pcoc": (1.25, [1.125, 1.5]),
        "ece": (0.0625, [0.03125, 0.25]),
        "brier": (0.1875, [0.125, 0.375]),
    }
    return {
        f"eval/calibration/{version}/{prefix}{metric}": value
        for version in ("raw", "platt", "temperature")
        for metric, (survival, positions) in values.items()
        for prefix, value in (("", survival), ("per_position_", positions))
    }


LIVE = {
    "eval/live/samples": 3, "eval/live/answers": 3, "eval/live/same_answers": 3, "eval/live/predicted_tokens_per_round": 1.71875,
    "eval/live/tokens_per_round": 1.71875, "eval/live/survival": [0.5, 0.25], "eval/live/histogram": [16, 8, 8],
    "eval/live/predicted_histogram": [16, 8, 8], "eval/live/rounds": 32, "eval/live/tokens": 55, "eval/trees": {"2x2x4": 2.125},
}  # fmt: skip


def write_run(
    folder: Path, run_id: str, walks: list[float], *, method: str = "eagle3", domain: str = "code", recorded: bool = True
) -> Path:
    """A run that was logged at every step of `walks` and evaluated after the last one."""
    folder.mkdir(parents=True)
    settings = [
        f"output_dir={folder}",
        "run_id=r",
        f"method.name={method}",
        "model.target_path=/models/target",
        "data.train_path=train.jsonl",
    ]
    config = load_config(None, settings)
    (folder / "config.yaml").write_text(dump_config(config))
    (folder / "branch.json").write_text(json.dumps({"run_id": run_id, "parent": "", "resume_from": "", "job": ""}))
    lines: list[dict[str, Any]] = []
    for step, walk in enumerate(walks):
        if step:
            lines.append({
                "step": 10 * step, "train/loss": 4.0 / step, "train/accuracy": [0.25 * step / len(walks), 0.125],
                "perf/tokens_per_s": 1000.0 + step, "perf/peak_memory_mib": 2048.0 + step, "perf/step_time_s": 0.5,
                "perf/data_wait_s": 0.125,
            })  # fmt: skip
        lines.append({"step": 10 * step, **evaluation(walk, domain)})
    lines.append({"event": "resume", "checkpoint": f"{run_id}-step10", "step": 10 * (len(walks) - 1)})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line | {"time": 1.0e9}) + "\n" for line in lines))
    if recorded:
        second = {"accepted": [], "own": f" {HOSTILE}", "refused": HOSTILE}
        text = {
            "id": f"row of {run_id}", "domain": domain, "prompt": f"Ask {HOSTILE}", "first": "One",
            "rounds": [{"accepted": [" two", " three"], "own": " four", "refused": ""}, second],
        }  # fmt: skip
        EvaluationRecord(
            checkpoint=f"step{10 * (len(walks) - 1)}", run_id=run_id, step=10 * (len(walks) - 1), time=1.0e9, made_with={"torch": "2.x"},
            data="heldout.jsonl", rows="0" * 64, held_out=True, numbers={**evaluation(walks[-1], domain), **calibration(), **LIVE},
            groups={version: [GROUPS] * 3 for version in ("raw", "platt", "temperature")}, texts=[text],
        ).write(folder)  # fmt: skip
    return folder
