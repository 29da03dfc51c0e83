"""The model card: what the draft is, what it was measured to do, and how to serve it."""

from pathlib import Path
from typing import Any

from specforge.export.engines import ENGINES, why_not
from specforge.export.trained import TrainedDraft

_NAMES = {"eagle3": "An EAGLE-3", "peagle": "A P-EAGLE", "dflash": "A DFlash", "domino": "A Domino", "dspark": "A DSpark"}


def card(trained: TrainedDraft, format_name: str, record: dict[str, Any], name: str) -> str:
    target, template = trained.target_path.name, trained.template
    lines = [
        "---", "library_name: specforge", "tags: [speculative-decoding, draft-model]", f"base_model: {target}", "---", "",
        f"# {name}", "",
        f"{_NAMES[trained.name]} draft for `{target}`, from step {trained.step} of run `{trained.run_id}`, layout `{format_name}`.",
        f"It reads the target's hidden states {record['hidden_state_ids']} (Hugging Face counting, 0 are the embeddings) and was "
        f"trained for {trained.method.draft_tokens} draft tokens.", "",
        "## Acceptance", "", *_acceptance(trained), "",
        "## Serving", "", *_serving(trained, format_name, name), "",
        "## Training text", "",
    ]  # fmt: skip
    if template is None:
        lines.append("Rows of token ids; no chat template is known.")
    else:
        thinking = {True: "thinking on", False: "thinking off", None: "which knows no thinking switch"}[template.enable_thinking]
        lines.append(f"Chat template of SHA-256 `{template.sha256}`, {thinking}. Serve with the same: another costs acceptance.")
    difference = record["verification"]["largest_difference"]
    lines += ["", f"A second reader's logits of this folder differ from the checkpoint's by {difference:.1e} of the largest.", ""]
    return "\n".join(lines)


def _acceptance(trained: TrainedDraft) -> list[str]:
    metrics = trained.metrics
    if "eval/walk_acc_len" not in metrics:
        return ["This checkpoint was not measured. `specforge eval` does it."]
    low, high = metrics.get("eval/walk_acc_len_low"), metrics.get("eval/walk_acc_len_high")
    interval = f" (95 % interval {low:.2f} to {high:.2f})" if low is not None and high is not None else ""
    lines = [
        f"{metrics['eval/walk_acc_len']:.3f} tokens a round{interval}, greedy chain of {metrics['eval/draft_tokens']} drafts, bonus token "
        f"counted, on {metrics['eval/samples']} held-out samples of the target's own answers.",
    ]
    if "eval/ngram_walk_acc_len" in metrics:
        lines.append(f"A prompt-lookup n-gram drafter has {metrics['eval/ngram_walk_acc_len']:.3f} on the same samples.")
    if trained.name == "domino":
        lines.append(f"SGLang drafts {trained.served_tokens} tokens of a block of {trained.config.block_size} rows.")
    return lines


def _serving(trained: TrainedDraft, format_name: str, name: str) -> list[str]:
    lines = []
    for engine, title in ENGINES.items():
        reason = why_not(trained.name, trained.config, trained.target, engine)
        if not reason and format_name == "speculators" and engine == "sglang":
            reason = "SGLang does not read this layout; export with `--to sglang`"
        if not reason and format_name in ENGINES and format_name != engine:
            continue
        lines += [f"{title}: {reason}." if reason else f"{title}:", ""]
        if not reason:
            lines += ["```bash", command(trained, format_name, engine, name), "```", ""]
    return lines[:-1]


def command(trained: TrainedDraft, format_name: str, engine: str, name: str) -> str:
    """What starts the engine with this folder, called `name`."""
    target, tokens = trained.target_path, trained.served_tokens
    if engine == "vllm":
        if format_name == "speculators":
            return f"vllm serve {name}"
        method = {"peagle": "eagle3"}.get(trained.name, trained.name)
        parallel = ', "parallel_drafting": true' if trained.name == "peagle" else ""
        asked = f'{{"method": "{method}", "model": "{name}", "num_speculative_tokens": {tokens}{parallel}}}'
        return f"vllm serve {target} --speculative-config '{asked}'"
    return " ".join(["python -m sglang.launch_server", f"--model-path {target}", *_sglang(trained, name)])


def _sglang(trained: TrainedDraft, name: str | Path) -> list[str]:
    tokens = trained.served_tokens
    if trained.name == "eagle3":
        own = [f"--speculative-num-steps {tokens}", "--speculative-eagle-topk 1", f"--speculative-num-draft-tokens {tokens + 1}"]
        return ["--speculative-algorithm EAGLE3", f"--speculative-draft-model-path {name}", *own]
    algorithm = "DSPARK" if trained.name == "dspark" else "DFLASH"
    own = [f"--speculative-draft-model-path {name}", f"--speculative-num-draft-tokens {tokens + 1}"]
    # SGLang's Domino computes in bfloat16 alone.
    return [f"--speculative-algorithm {algorithm}", *own, *(["--dtype bfloat16"] if trained.name == "domino" else [])]
