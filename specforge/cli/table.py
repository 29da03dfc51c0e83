"""The numbers of an evaluation as a table for people."""

import math
from collections.abc import Mapping
from typing import Any

from specforge.eval.acceptance import domains_of


def acceptance_table(numbers: Mapping[str, Any]) -> str:
    """Overall and by domain, each acceptance length with what it means; the n-gram drafter beside the draft."""
    drafts = numbers["eval/draft_tokens"]
    lines = [f"chain of K={drafts} drafts, greedy, bonus token counted; {numbers['eval/samples']} samples"]
    positions = zip(numbers["eval/per_position_acc"], numbers["eval/survival"], strict=True)
    lines += [f"{'draft':<10}{'accuracy a_k':>14}{'survival s_k':>14}"]
    lines += [f"{k:<10}{accuracy:>14.3f}{survival:>14.3f}" for k, (accuracy, survival) in enumerate(positions, 1)]
    lines += ["", f"{'':<24}{'draft':>8}{'n-gram':>9}"]
    lines.append(_row("walk_acc_len", numbers, "eval/walk_acc_len", "eval/ngram_walk_acc_len"))
    if "eval/walk_acc_len_low" in numbers:
        lines.append(f"  95 % interval: {_intervals(numbers, 'eval/')}")
    lines.append(_row("acc_len", numbers, "eval/acc_len", "eval/ngram_acc_len"))
    lines.append(_row("simulated_acc_len", numbers, "eval/simulated_acc_len", ""))
    for domain in domains_of(numbers):
        prefix, samples = f"eval/{domain}/", numbers[f"eval/{domain}/samples"]
        lines.append(_row(f"walk, {domain}", numbers, f"{prefix}walk_acc_len", f"{prefix}ngram_walk_acc_len") + f"  {samples} samples")
        if f"{prefix}walk_acc_len_low" in numbers:
            lines[-1] += f", 95 %: {_intervals(numbers, prefix)}"
    lines.append(f"greedy match {numbers['eval/greedy_match']:.4f}, loss {numbers['eval/avg_loss']:.3f} nats a token")
    return "\n".join(lines)


def chain_table(numbers: Mapping[str, Any]) -> str:
    """Tokens per round of every chain length."""
    lengths = numbers.get("eval/walk_acc_len_by_draft_tokens", [])
    return "tokens per round by drafts of a chain: " + (", ".join(f"{k}: {length:.3f}" for k, length in enumerate(lengths, 1)) or "-")


def calibration_table(numbers: Mapping[str, Any]) -> str:
    """How far the draft's confidence can be trusted, as it is and scaled."""
    metrics = ("auc", "pcoc", "ece", "brier")
    lines = ["", "confidence: draft k given that 1..k-1 are right, and survival of the prefix; on samples that no scaling was fitted on"]
    lines.append(f"{'':<24}" + "".join(f"{metric.upper():>9}" for metric in metrics))
    for version in ("raw", "temperature", "platt"):
        columns = [
            [*numbers[f"eval/calibration/{version}/per_position_{metric}"], numbers[f"eval/calibration/{version}/{metric}"]]
            for metric in metrics
        ]
        for k, values in enumerate(zip(*columns, strict=True), 1):
            label = f"{version}, " + (f"draft {k}" if k < len(columns[0]) else "survival")
            lines.append(f"{label:<24}" + "".join(f"{_number(value):>9}" for value in values))
    return "\n".join(lines)


def live_table(numbers: Mapping[str, Any]) -> str:
    """The walk beside what decoding shows, on the same samples."""
    live = {name.removeprefix("eval/live/"): value for name, value in numbers.items() if name.startswith("eval/live/")}
    predicted = live["predicted_tokens_per_round"]
    walk = "-" if predicted is None else f"{predicted:.6f}"
    return (
        f"\ntokens per round over {live['answers']} answers of {live['samples']} samples (greedy chain of {numbers['eval/draft_tokens']}): "
        f"predicted {walk}, decoded {live['tokens_per_round']:.6f} ({live['tokens']} tokens in {live['rounds']} rounds); "
        f"{live['same_answers']} answers said again"
    )


def _number(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "-"


def _intervals(numbers: Mapping[str, Any], prefix: str) -> str:
    """Of both walks."""
    bounds = [(numbers[f"{prefix}{name}_low"], numbers[f"{prefix}{name}_high"]) for name in ("walk_acc_len", "ngram_walk_acc_len")]
    return ", ".join(f"{drafter} {low:.2f}..{high:.2f}" for drafter, (low, high) in zip(("draft", "n-gram"), bounds, strict=True))


def _row(label: str, numbers: Mapping[str, Any], draft: str, ngram: str) -> str:
    return f"{label:<24}" + "".join(
        f"{numbers[name]:>{width}.3f}" if name in numbers else f"{'-':>{width}}" for name, width in ((draft, 8), (ngram, 9))
    )
