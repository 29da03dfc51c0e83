"""`specforge suite --model FOLDER --bundle FOLDER`: score a language model on an in-context-learning suite."""

import argparse
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

from specforge import files
from specforge.errors import ConfigError

if TYPE_CHECKING:
    from specforge.distributed import World


def run(words: Sequence[str]) -> int:
    given = _parsed(words)

    from specforge.cli.compose import set_threads
    from specforge.distributed import World

    began_s = time.perf_counter()
    world = World.join()
    set_threads(world)
    try:
        numbers = _score(given, world)
    finally:
        world.leave()
    if world.is_main:
        core, core_v2 = (fmean(task[name] for task in numbers) for name in ("centred", "centred_v2"))
        seconds = time.perf_counter() - began_s
        print(f"CORE {core:.4f} (with DCLM's corrected baselines {core_v2:.4f}), mean of {len(numbers)} tasks, in {seconds:.1f} s")
        print(files.json_line({"core": core, "core_v2": core_v2, "seconds": seconds, "tasks": numbers}))
    return 0


def _score(given: argparse.Namespace, world: "World") -> list[dict[str, Any]]:
    """The numbers of each task, which rank 0 prints when they are known."""
    from transformers import AutoTokenizer

    from specforge.cli.draft import read_draft
    from specforge.errors import DataError
    from specforge.features.target import Target
    from specforge.log.progress import progress
    from specforge.suite.bundle import read_tasks
    from specforge.suite.evaluate import Evaluation, Manner
    from specforge.suite.prompts import Draw
    from specforge.suite.record import Record
    from specforge.suite.scoring import Model
    from specforge.suite.token_cache import TokenCache

    def load_tokenizer() -> Any:
        with files.foreign(tokenizer_path, DataError, "--tokenizer must name a tokenizer that transformers loads without code of its own"):
            return AutoTokenizer.from_pretrained(tokenizer_path, local_files_only=True, trust_remote_code=False)

    folder, tokenizer_path = Path(given.model), Path(given.tokenizer or given.model)
    tasks = read_tasks(Path(given.bundle), given.tasks, given.num_shots)
    draw = Draw(given.max_per_task, given.fewshot_seed, given.shared_shots)
    manner = Manner(given.mode, given.rule, given.batch, given.piece_tokens, given.audit)
    cache = TokenCache(Path(given.cache), tokenizer_path, load_tokenizer, given.bos)
    draft = read_draft(given.draft, folder, None) if given.draft else None
    if draft is not None and draft.method is None:
        raise ConfigError(f"--draft {given.draft}: learned nothing that could be compared; give a checkpoint.")

    prints = files.Fingerprints(Path(given.cache) / ".fingerprints.json")
    prints_of = {"model": folder, **({"draft": Path(draft.name) / "draft"} if draft else {})}
    what = world.on_main(lambda: {name: prints.fingerprint(path) for name, path in prints_of.items()})
    what |= {"dtype": given.dtype, "attention": given.attention, "max_length": given.max_length, **asdict(manner)}
    identities = {task.label: {"tokens": cache.key(task, draw), **what} for task in tasks}
    record = Record(Path(given.out)) if given.out else None
    done = world.on_main(lambda: {label: record.known(label, identity) for label, identity in identities.items()} if record else {})
    numbers = {label: known for label, known in done.items() if known}
    width = max(map(len, identities))
    if world.is_main:
        for label, known in numbers.items():
            print(f"{_line(label, width, known)}  (kept)")
    waiting = [task for task in tasks if task.label not in numbers]
    if not waiting:
        return [numbers[task.label] for task in tasks]

    model = Model(Target.load(folder, given.dtype, world.device, attention=given.attention), given.max_length)
    if model.why_no_tree and given.mode in ("auto", "tree") and world.is_main:
        print(f"no prefix tree with this model, batches instead: {model.why_no_tree}", file=sys.stderr)
    evaluation = Evaluation(cache, draw, world, draft.method.to(world.device) if draft else None)
    with progress(None, description="suite", world=world) as bar:
        for result in evaluation.results(model, waiting, manner, bar):
            label = result.task.label
            numbers[label] = result.numbers()
            if world.is_main:
                before = record.last_centred(label) if record else None
                print(_line(label, width, numbers[label], result.task.shots, before), flush=True)
                if record:
                    record.write(result, identities[label])
    return [numbers[task.label] for task in tasks]


def _line(label: str, width: int, numbers: dict[str, Any], asked_shots: int = 0, before: float | None = None) -> str:
    line = f"{label:<{width}}  accuracy {numbers['accuracy']:.4f}  centred {numbers['centred']:+.4f}"
    if before is not None:
        change = numbers["centred"] - before
        line += f"  {'↑' if change > 0 else '↓' if change < 0 else '='} {change:+.4f}"
    line += f"  {numbers['mode']}, {numbers['slots']:,} of {numbers['row_tokens']:,} tokens, {numbers['seconds']:.1f} s"
    if numbers["shots"] < asked_shots:
        line += f"; {numbers['shots']} shots of {asked_shots}, as there are no more examples"
    if audit := numbers.get("audit"):
        difference, at_risk = audit["largest_difference"], len(audit["at_risk"])
        line += f"; {audit['examples']} again in exact: losses within {difference:.1e}, {at_risk} answers at risk"
    if (accepted := numbers.get("draft_accepted")) is not None:
        line += f"; draft accepted {accepted:.3f}"
    return line


def _parsed(words: Sequence[str]) -> argparse.Namespace:
    given = _parser().parse_args(words)
    for name, least in (("num_shots", 0), ("max_per_task", 0), ("batch", 1), ("piece_tokens", 1), ("max_length", 0), ("audit", 0)):
        if (getattr(given, name) or 0) < least:
            raise ConfigError(f"--{name.replace('_', '-')} {getattr(given, name)}: must be at least {least}; give a larger number.")
    return given


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="specforge suite",
        description="Score a causal language model on a CORE-style bundle. Runs under torchrun too. The last line is one JSON object.",
    )
    parser.add_argument("--model", required=True, help="folder of the model and its tokenizer")
    parser.add_argument("--bundle", required=True, help="folder with core.yaml, eval_meta_data.csv and eval_data/")
    parser.add_argument("--tokenizer", help="folder of the tokenizer (default: the model's)")
    parser.add_argument("--tasks", nargs="+", default=(), metavar="LABEL", help="these only (default: all)")
    parser.add_argument("--num-shots", type=int, metavar="N", help="for every task (default: as the bundle says)")
    parser.add_argument(
        "--fewshot-seed", type=int, default=1234, help="plus the example's number seeds the draw of its shots (default 1234)"
    )
    parser.add_argument("--shared-shots", action="store_true", help="one block of shots for a whole task, which is then read once")
    parser.add_argument(
        "--max-per-task", type=int, default=0, metavar="N", help="score N examples, and draw shots from them; 0: all (default)"
    )
    parser.add_argument(
        "--mode", choices=("auto", "exact", "batched", "tree"), default="auto", help="how forwards are made up (default auto)"
    )
    parser.add_argument(
        "--rule",
        choices=("mean_token", "sum", "per_char", "per_byte", "pmi"),
        default="mean_token",
        help="which loss decides (default mean_token)",
    )
    parser.add_argument("--batch", type=int, default=4, help="examples of a padded batch (default 4)")
    parser.add_argument("--piece-tokens", type=int, default=512, help="tokens of a piece of the tree (default 512)")
    parser.add_argument("--draft", help="RUN/best of a draft of this model: also how much of what is scored it would have foreseen")
    parser.add_argument("--audit", type=int, default=0, metavar="N", help="score N examples of each task in exact too, and compare")
    parser.add_argument("--max-length", type=int, default=0, help="tokens that the model reads; 0: as its config.json says (default)")
    parser.add_argument("--bos", choices=("bos", "eos", "none"), default="bos", help="token before each text (default bos)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--attention", choices=("sdpa", "eager", "flex_attention"), help="of the model (default: transformers' choice)")
    parser.add_argument("--cache", default="runs/suite-tokens", help="folder of the token cache (default runs/suite-tokens)")
    parser.add_argument("--out", help="folder for results; tasks that it holds already are not scored again")
    return parser
