"""`specforge bench train-step|loss-memory|save|decode`: speed and memory of a training step, a save, and a round of decoding.

It runs in a process whose allocator and threads are set as those of the quickstart's training are.
"""

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from specforge import files
from specforge.cli.demo import CALM
from specforge.errors import ConfigError


def run(words: Sequence[str]) -> int:
    from specforge.bench.blocks import BLOCK_SHAPES, BlockShape
    from specforge.bench.synthetic import SHAPES, Shape

    parser = argparse.ArgumentParser(prog="specforge bench", description="The last line of the output is one JSON object.")
    benches = parser.add_subparsers(dest="bench", required=True)
    step = benches.add_parser("train-step", help="forward and backward against the matrix products in them; float32, one thread")
    step.add_argument("--method", choices=("eagle3", "dflash"), default="eagle3")
    step.add_argument("--shape", choices=SHAPES, default="small", help="named sizes; the flags below change single ones")
    sizes = list(dict.fromkeys(size.name for size in (*fields(Shape), *fields(BlockShape))))
    for size in sizes:
        step.add_argument(f"--{size.replace('_', '-')}", type=int, metavar="N")
    step.add_argument("--repeats", type=int, default=60, help="the best of so many counts")
    step.add_argument("--peer", type=Path, metavar="PYTHON", help="compare with `speculators` in the environment of scripts/peer.sh")
    benches.add_parser(
        "loss-memory", help="growth of the resident set in the loss, chunked and naive: 4,096 tokens, a vocabulary of 128,256"
    )
    save = benches.add_parser("save", help="how long a checkpoint keeps training waiting, against writing it at once")
    save.add_argument("--out", type=Path, default=Path(), help="folder to write into (default: the current one)")
    save.add_argument("--repeats", type=int, default=10, help="saves of each kind")
    decode = benches.add_parser("decode", help="draft lengths that adapt against every fixed one, and where a round's time goes")
    decode.add_argument("config", help="the configuration of the run, for example RUN/config.yaml")
    decode.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the file")
    decode.add_argument("--checkpoint", required=True, help="RUN/best, RUN/latest or a step folder, calibrated")
    decode.add_argument("--prompts", type=int, default=32, help="answers to decode, of those that no scaling was fitted on")
    decode.add_argument("--laps", type=int, default=6, help="how often; the fastest of each answer counts")
    given = parser.parse_args(words)
    if any(os.environ.get(name) != value for name, value in CALM.items()):
        return subprocess.run([sys.executable, "-m", "specforge", "bench", *words], env={**os.environ, **CALM}, check=False).returncode
    if given.bench == "decode":
        print(files.json_line(_decode(given)))
        return 0
    if given.bench == "save":
        from specforge.bench.save import measure as measure_saves

        print(files.json_line(measure_saves(given.out, given.repeats)))
        return 0
    if given.bench == "loss-memory":
        from specforge.bench.loss_memory import measure_both

        print(files.json_line(measure_both()))
        return 0

    changed = {size: getattr(given, size) for size in sizes if getattr(given, size) is not None}
    named: Any = BLOCK_SHAPES[given.shape] if given.method == "dflash" else SHAPES[given.shape]
    foreign = sorted(changed.keys() - {size.name for size in fields(named)})
    if foreign or (given.peer and given.method != "eagle3"):
        unknown = "peer" if not foreign else foreign[0].replace("_", "-")
        raise ConfigError(f"--{unknown}: means nothing to a step of {given.method}; leave it out.")
    shape = replace(named, **changed)
    if given.method == "dflash":
        from specforge.bench.blocks import measure as measure_blocks

        print(files.json_line(measure_blocks(shape, given.repeats)))
        return 0

    from specforge.bench.train_step import measure, state_mib

    numbers = measure(shape, given.repeats, given.peer)
    short, long = (state_mib(shape, tokens) for tokens in (1024, 2048))
    print(f"state kept for the backward: {short:.1f} MiB at 1,024 tokens a document, {long:.1f} MiB at 2,048: {long / short:.2f} times")
    print(files.json_line(numbers))
    return 0


def _decode(given: argparse.Namespace) -> dict[str, Any]:
    import numpy as np
    import torch

    from specforge.bench.decode import measure, table
    from specforge.cli.draft import read_draft
    from specforge.cli.inputs import encode
    from specforge.config import load_config
    from specforge.distributed import World
    from specforge.errors import DataError
    from specforge.eval.acceptance import answers
    from specforge.eval.calibration import is_for_fit
    from specforge.features.target import Target
    from specforge.models.calibration import Calibration

    config = load_config(given.config, given.overrides)
    draft = read_draft(given.checkpoint, Path(config.model.target_path), config.eval.draft_tokens or None)
    calibration = Calibration.read(Path(draft.name) / "draft", draft.draft_tokens)
    target = Target.load(config.model.target_path, config.model.dtype, World.join().device)
    prompts = [
        (sample.input_ids[:first].astype(np.int64), last - first + 1)
        for sample in encode(config, "eval").samples if not is_for_fit(sample.id)
        for first, last in answers(sample.loss_mask) if first > 0
    ]  # fmt: skip
    if not prompts:
        raise DataError(f"data.eval_path={config.data.eval_path!r}: no answer is left to measure on; give more rows.")
    numbers = measure(
        target, lambda length, rule: replace(draft, draft_tokens=length, adaptive=rule).drafter(target, None, torch.Generator()),
        draft.draft_tokens, calibration, prompts[: given.prompts], given.laps,
    )  # fmt: skip
    print(table(numbers))
    return numbers
