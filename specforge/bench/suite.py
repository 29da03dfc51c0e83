"""How fast a suite is scored, beside one example at a time with all logits. Every way is verified against that one.

Times are CPU times of the process on a CPU and times with synchronisation on a GPU. The ways take turns task by task, so that a slow minute
of the machine meets all of them.
"""

import argparse
import math
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm import tqdm
from transformers import AutoTokenizer

from specforge import files
from specforge.bench import suite_peer
from specforge.distributed import World
from specforge.errors import SpecForgeError
from specforge.features.target import Target
from specforge.log.progress import LineProgress, Progress
from specforge.suite.batches import collate
from specforge.suite.bundle import Task, read_tasks
from specforge.suite.evaluate import BASE_EXAMPLES, Evaluation, Manner, TaskResult
from specforge.suite.prompts import Draw
from specforge.suite.rules import Answers, answer
from specforge.suite.scoring import Model, Predictions
from specforge.suite.token_cache import TokenCache
from specforge.suite.tokens import TaskTokens

TOLERANCE_NATS = {torch.float64: 1e-9, torch.float32: 1e-3}
"""Of a row's loss; in half precision differences are reported and only margins beyond them count."""


@dataclass
class Way:
    """One way to score the tasks, its seconds, and what it got wrong."""

    name: str
    manner: Manner
    seconds: float = 0.0
    slots: int = 0
    copies: int = 0
    """Batches or pieces that went to the device while the clock ran."""
    largest_difference: float = 0.0
    """Of a row's loss from the sequential one, in nats."""
    flips: list[str] = field(default_factory=list)
    """Examples answered otherwise."""

    def compare(self, result: TaskResult, expected: Answers) -> None:
        said = result.answers
        difference = float(np.nan_to_num(np.abs(said.loss_R - expected.loss_R)).max(initial=0.0))
        self.largest_difference = max(self.largest_difference, difference)
        self.flips += [f"{result.task.label}/{example}" for example in np.flatnonzero(said.right_E != expected.right_E)]

    def numbers(self, sequential_s: float) -> dict[str, Any]:
        return {
            "way": self.name, "seconds": self.seconds, "times_faster": sequential_s / self.seconds, "slots": self.slots,
            "copies": self.copies, "largest_difference": self.largest_difference, "flips": self.flips,
        }  # fmt: skip


@torch.no_grad()
def score_sequentially(model: Model, tokens: TaskTokens, progress: Progress) -> Answers:
    """One example at a time, logits of every token: what evaluations without a cache do."""
    found, target = Predictions(tokens, model.target), model.target
    for example in range(len(tokens)):
        batch = collate(tokens, [example]).to(target.device)
        logits_BSV = target.model(input_ids=batch.ids_BS, use_cache=False).logits
        found.note(logits_BSV[batch.row_Q, batch.column_Q], batch.token_Q, batch.place_Q)
        progress.update(1)
    return answer(tokens, *found.reduced(World()))


def ways(modes: Sequence[str], batch_sizes: Sequence[int], pieces: Sequence[int]) -> list[Way]:
    found = []
    for mode in modes:
        if mode == "exact":
            found.append(Way("exact", Manner(mode="exact")))
        elif mode == "batched":
            found += [Way(f"batched {size}", Manner(mode="batched", batch_examples=size)) for size in batch_sizes]
        else:
            found += [Way(f"{mode} {tokens}", replace(Manner(piece_tokens=tokens), mode=mode)) for tokens in pieces]  # type: ignore[arg-type]
    return found


@contextmanager
def _timed(device: torch.device) -> Iterator[Callable[[], float]]:
    """Seconds since the block began, whatever still ran on the device included."""
    clock = time.perf_counter if device.type == "cuda" else time.process_time

    def now() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return clock()

    began_s = now()
    yield lambda: now() - began_s


def cached_sweep(model: Model, tasks: Sequence[Task], evaluation: Evaluation, all_ways: Sequence[Way]) -> float:
    """Score every task in every way, in turns, from what lies on the device; returns the seconds of the sequential evaluation."""
    for way in all_ways:
        evaluation.preload(model, tasks, way.manner)
    sequential_s = 0.0
    with tqdm(total=len(tasks) * (len(all_ways) + 1), desc="ways") as outer, tqdm(desc="examples") as inner:
        for task in tasks:
            tokens = evaluation.cache.get(task, evaluation.draw).cropped(model.longest, task.label)
            inner.set_postfix({"task": task.label})
            with _timed(model.target.device) as elapsed_s:
                expected = score_sequentially(model, tokens, inner)
                sequential_s += elapsed_s()
            outer.update()
            for way in all_ways:
                before = evaluation.resident.moved
                with _timed(model.target.device) as elapsed_s:
                    [result] = evaluation.results(model, [task], way.manner, inner)
                    way.seconds += elapsed_s()
                way.slots, way.copies = way.slots + result.slots, way.copies + evaluation.resident.moved - before
                way.compare(result, expected)
                outer.update()
    return sequential_s


def first_runs(
    model: Model,
    tasks: Sequence[Task],
    make_cache: Callable[[Path], TokenCache],
    draw: Draw,
    all_ways: Sequence[Way],
    depths: Sequence[int],
) -> list[dict[str, Any]]:
    """Wall seconds from texts to results, with the tokens of so many tasks made ahead."""
    found = []
    with tqdm(total=len(all_ways) * len(depths), desc="first runs") as outer, tqdm(desc="token slots") as inner:
        for way in all_ways:
            for depth in depths:
                with tempfile.TemporaryDirectory() as folder:
                    evaluation = Evaluation(make_cache(Path(folder)), draw, World(device=model.target.device))
                    began_s = time.perf_counter()
                    for _ in evaluation.results(model, tasks, way.manner, inner, ahead_tasks=depth):
                        pass
                    found.append({"way": way.name, "ahead_tasks": depth, "wall_s": time.perf_counter() - began_s})
                outer.update()
    return found


class _Stopwatch(LineProgress):
    """Stops when the first forward is done, and says nothing."""

    def __init__(self) -> None:
        super().__init__(None, every_s=math.inf)
        self.first_s = math.nan

    def update(self, n: int = 1) -> None:
        if math.isnan(self.first_s):
            self.first_s = time.perf_counter()


def first_forward_s(model: Model, tasks: Sequence[Task], open_cache: Callable[[], TokenCache], draw: Draw, world: World) -> float:
    """Wall seconds from tasks whose tokens are on the disk to the end of its first forward, every tier above the disk empty."""
    began_s, watch = time.perf_counter(), _Stopwatch()
    next(Evaluation(open_cache(), draw, world).results(model, tasks, Manner(), watch))
    return watch.first_s - began_s


def verdict(all_ways: Sequence[Way], dtype: torch.dtype) -> list[str]:
    """What is wrong, a sentence each."""
    faults = [f"{way.name}: answers {', '.join(way.flips[:5])} otherwise ({len(way.flips)} in all)" for way in all_ways if way.flips]
    allowed = TOLERANCE_NATS.get(dtype, float("inf"))
    faults += [f"{way.name}: losses differ by {way.largest_difference:.1e}" for way in all_ways if way.largest_difference > allowed]
    return faults + [f"{way.name}: {way.copies} copies to the device while the clock ran" for way in all_ways if way.copies]


def main(argv: Sequence[str] | None = None) -> int:
    given = _parser().parse_args(argv)
    try:
        numbers = _against_peer(given) if given.peer else _sweep(given)
    except SpecForgeError as error:
        print(f"bench_suite.py: {error}", file=sys.stderr)
        return error.exit_code
    for fault in numbers["faults"]:
        print(f"FAULT {fault}", file=sys.stderr)
    print(files.json_line(numbers))
    return 1 if numbers["faults"] else 0


def _against_peer(given: argparse.Namespace) -> dict[str, Any]:
    python, bundle, draw = suite_peer.interpreter(), Path(given.bundle), Draw(given.max_per_task, shared_shots=given.shared_shots)
    found = []
    for task in read_tasks(bundle, given.tasks, given.num_shots):
        found.append(numbers := suite_peer.compare(python, Path(given.model), bundle, task, draw, given.dtype))
        print(
            f"{task.label}, {task.shots} shots, {numbers['examples']} examples: {numbers['cpu_ms_per_example']:.1f} ms an example, "
            f"lm-evaluation-harness {numbers['peer_cpu_ms_per_example']:.1f} ms, {numbers['times_less']:.2f} times as much; "
            f"log-probabilities within {numbers['largest_difference']:.1e}, {len(numbers['answered_otherwise'])} answers differ",
            flush=True,
        )
    return {"peer": found, "faults": [fault for numbers in found for fault in suite_peer.verdict(numbers)]}


def _sweep(given: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(given.threads)
    world, folder = World.join(), Path(given.model)
    tasks = read_tasks(Path(given.bundle), given.tasks, given.num_shots)
    draw = Draw(given.max_per_task, shared_shots=given.shared_shots)
    model = Model(Target.load(folder, given.dtype, world.device))

    def make_cache(root: Path) -> TokenCache:
        return TokenCache(root, folder, lambda: AutoTokenizer.from_pretrained(folder, local_files_only=True), given.bos)

    all_ways, firsts = ways(given.modes, given.batch_sizes, given.pieces), list[dict[str, Any]]()
    if not given.skip_first:
        firsts = first_runs(model, tasks, make_cache, draw, all_ways, given.ahead)
    evaluation = Evaluation(make_cache(Path(given.cache)), draw, world, resident_bytes=given.resident_bytes)
    evaluation.preload(model, tasks, Manner(mode="batched", batch_examples=BASE_EXAMPLES))
    started_s = first_forward_s(model, tasks, lambda: make_cache(Path(given.cache)), draw, world)
    print(f"first forward done {started_s:.2f} s after a cached suite of {len(tasks)} tasks is opened")
    sequential_s = cached_sweep(model, tasks, evaluation, all_ways) if all_ways else math.nan
    print(f"\n{'way':<16}{'seconds':>10}{'times faster':>14}{'slots':>12}{'difference':>12}")
    print(f"{'sequential':<16}{sequential_s:>10.2f}{1:>14.2f}")
    for way in all_ways:
        print(f"{way.name:<16}{way.seconds:>10.2f}{sequential_s / way.seconds:>14.2f}{way.slots:>12,}{way.largest_difference:>12.1e}")
    for first in firsts:
        print(f"first run, {first['way']}, {first['ahead_tasks']} tasks ahead: {first['wall_s']:.2f} s")
    return {
        "sequential_s": sequential_s, "ways": [way.numbers(sequential_s) for way in all_ways], "first_runs": firsts,
        "cached_first_forward_s": started_s, "faults": verdict(all_ways, model.target.dtype),
    }  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="bench_suite.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--bundle", required=True)
    parser.add_argument("--tasks", nargs="+", default=())
    parser.add_argument("--num-shots", type=int)
    parser.add_argument("--shared-shots", action="store_true")
    parser.add_argument("--max-per-task", type=int, default=500)
    parser.add_argument(
        "--modes", nargs="*", choices=("exact", "batched", "tree", "auto"), default=["exact", "batched", "tree", "auto"],
        help="ways to compare (default all); none: only how soon a cached suite begins",
    )  # fmt: skip
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 2, 4, 8, 16, 32, 64])
    parser.add_argument("--pieces", type=int, nargs="+", default=[256, 512, 1024], help="tokens of a piece of the tree")
    parser.add_argument("--ahead", type=int, nargs="+", default=[1, 2, 4], help="tasks whose tokens are made ahead in a first run")
    parser.add_argument("--skip-first", action="store_true", help="no first runs; without a cache one pass makes it")
    parser.add_argument("--cache", default="runs/suite-tokens")
    parser.add_argument("--resident-bytes", type=int, default=2**32)
    parser.add_argument("--bos", choices=("bos", "eos", "none"), default="bos")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16", "float64"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--peer",
        choices=("lm-eval",),
        help="instead of a sweep, CPU time an example and results beside lm-evaluation-harness, in the environment of scripts/peer.sh",
    )
    return parser
