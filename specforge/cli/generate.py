"""`specforge generate --target FOLDER --draft RUN/best --prompt TEXT`: decode with a draft, and say what it brought."""

import argparse
import os
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from specforge import files
from specforge.errors import ConfigError

AUTO = "auto"


def run(words: Sequence[str]) -> int:
    given = _parser().parse_args(words)
    for name in ("max_new_tokens", "batch"):
        if getattr(given, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(given, name)}: must be at least 1; give a larger number.")

    from specforge.cli.compose import set_threads
    from specforge.cli.contest import Contest, numbers_of, read_prompts
    from specforge.cli.draft import read_draft
    from specforge.decode.sampling import Sampling
    from specforge.decode.tree import TreeShape
    from specforge.distributed import World
    from specforge.features.target import Target

    sampling = Sampling(given.temperature, given.top_k, given.top_p)
    tree = TreeShape.parse(given.tree) if given.tree else None
    sampled_draft = given.draft_sampling == "sampled"
    if sampled_draft and (given.temperature == 0 or given.draft in ("ngram", "none") or tree):
        raise ConfigError(
            "--draft-sampling sampled: needs --temperature above 0, and chains of a draft that learned, whose distribution it draws from; "
            "use --draft-sampling greedy."
        )
    adaptive = given.draft_tokens == AUTO
    if adaptive and (sampled_draft or given.draft in ("ngram", "none")):
        raise ConfigError(
            "--draft-tokens auto: needs arg-max drafts of a calibrated checkpoint; give a number of tokens, or --draft-sampling greedy."
        )
    world, folder = World.join(), Path(given.target)
    set_threads(world)
    prompts, tokenizer = read_prompts(folder, given.prompt, given.file, given.max_new_tokens)
    draft = read_draft(given.draft, folder, None if adaptive else given.draft_tokens, tree, allow_other_target=given.allow_other_target)
    target = Target.load(folder, given.dtype, world.device)
    if adaptive:
        draft = draft.adapted(target, [each.prompt_ids for each in prompts[: given.batch]])
    contest = Contest(
        target, tokenizer, draft, sampling, sampled_draft=sampled_draft, seed=given.seed, baseline=not given.no_baseline,
        colour=sys.stdout.isatty() and not os.environ.get("NO_COLOR"),
    )  # fmt: skip
    turns = [contest.turn(prompts[begin : begin + given.batch]) for begin in range(0, len(prompts), given.batch)]
    numbers = {
        "target": given.target, "draft": draft.name, "dtype": given.dtype, "device": world.device.type, "batch": given.batch,
        "seed": given.seed, "drafts": "tree" if tree else "chain", **({"tree": str(tree)} if tree else {}),
        "draft_tokens": draft.draft_tokens, "temperature": given.temperature, "top_k": given.top_k, "top_p": given.top_p,
        "draft_sampling": given.draft_sampling, "bonus_token_counted": True, **numbers_of(contest, turns),
        **(draft.adaptive.numbers() if draft.adaptive else {}),
    }  # fmt: skip
    print(_table(numbers))
    print(files.json_line(numbers))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specforge generate",
        description="Decode prompts with a draft and with the target alone. The last line of the output is one JSON object.",
    )
    parser.add_argument("--target", required=True, help="folder of the target and its tokenizer")
    parser.add_argument("--draft", required=True, help="RUN/best, RUN/latest, a step folder, ngram or none")
    asked = parser.add_mutually_exclusive_group(required=True)
    asked.add_argument("--prompt", nargs="+", metavar="TEXT", help="user messages, each a prompt of its own")
    asked.add_argument("--file", metavar="ROWS.jsonl", help="conversations; a closing assistant turn is what the target says anew")
    drafts = parser.add_mutually_exclusive_group()
    drafts.add_argument(
        "--draft-tokens", type=_draft_tokens, metavar="K",
        help="drafts of a round (default: as many as the draft was trained for); auto: as many of these as pay for their time",
    )  # fmt: skip
    drafts.add_argument("--tree", metavar="DEPTHxTOP_KxNODES", help="draft trees, such as 4x2x8, instead of chains")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--top-k", type=int, default=0, help="sample from so many tokens; 0: all (default)")
    parser.add_argument("--top-p", type=float, default=1.0, help="sample from the fewest tokens of this mass (default 1: all)")
    parser.add_argument("--draft-sampling", choices=("greedy", "sampled"), default="greedy", help="how a draft chooses (default greedy)")
    parser.add_argument("--max-new-tokens", type=int, default=256, help="length limit of a text (default 256)")
    parser.add_argument("--batch", type=int, default=1, help="prompts decoded together (default 1: text is streamed)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32", help="of target and draft")
    parser.add_argument("--seed", type=int, default=0, help="of sampled tokens (default 0)")
    parser.add_argument("--allow-other-target", action="store_true", help="go on where the draft was trained with another target")
    parser.add_argument("--no-baseline", action="store_true", help="do not decode with the target alone too")
    return parser


def _draft_tokens(word: str) -> int | str:
    return word if word == AUTO else int(word)


def _table(numbers: Mapping[str, Any]) -> str:
    """How a draft did on prompts that were decoded with it, and by the target alone."""
    drafted = numbers["draft_tokens"]
    kind = f"tree {numbers['tree']} (depth x top-k x nodes)" if "tree" in numbers else f"chain of K={drafted} drafts"
    lines = [
        "",
        f"{kind}, temperature {numbers['temperature']:g}, drafts {numbers['draft_sampling']}, "
        f"bonus token counted; {numbers['prompts']} prompts, {numbers['new_tokens']} new tokens",
        f"tokens per round {_rate(numbers)}",
    ]
    if drafted:
        lines.append(f"{'draft':<10}{'survival s_k':>14}{'alpha_k':>10}")
        positions = zip(numbers["survival"], numbers["alpha"], strict=True)
        for k, (survival, alpha) in enumerate(positions, 1):
            lines.append(f"{k:<10}{survival:>14.3f}{'-' if alpha is None else f'{alpha:.3f}':>10}")
        counts = ", ".join(f"{accepted}: {rounds}" for accepted, rounds in enumerate(numbers["histogram"]))
        lines.append(f"rounds by accepted drafts  {counts}")
    if "costs" in numbers:
        lines.append(f"drafted {numbers['mean_drafted']:.2f} and verified {numbers['mean_verified']:.2f} tokens a round, K at most")
    lines += [f"domain {domain}: tokens per round {_rate(of)}" for domain, of in numbers["domains"].items()]
    speed = f"{numbers['tokens_per_s']:.1f} tokens/s, prompts included"
    if "speed_up" in numbers:
        speed += f"; the target alone {numbers['target_tokens_per_s']:.1f}: {numbers['speed_up']:.2f} times as fast"
    lines.append(speed)
    if "same_texts" in numbers:
        lines.append(f"{numbers['same_texts']} of {numbers['prompts']} greedy texts are the target's own")
    if at := numbers.get("first_divergence"):
        lines.append(
            f"first divergence: {at['id']}, new token {at['place']}: {at['draft_token']} for {at['target_token']}; "
            f"the target's best two logits differ by {at['margin']:.3g} there"
        )
    return "\n".join(lines)


def _rate(rounds: Mapping[str, Any]) -> str:
    mean = rounds["mean_tokens_per_round"]
    return f"{rounds['tokens_per_round']:.3f}" + ("" if mean is None else f" pooled, {mean:.3f} mean over texts")
