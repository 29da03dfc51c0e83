"""`specforge prepare CONFIG.yaml`: look at the data, let the target answer it, capture what the target says about it."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from specforge.config import KEYS_HELP, load_config


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge prepare",
        description="Without options: capture the features of the training and the held-out rows. Runs under torchrun too.",
    )
    parser.add_argument("config", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help=KEYS_HELP)
    parser.add_argument("--show", type=int, metavar="N", help="print N samples of data.train_path, the supervised tokens marked, and stop")
    parser.add_argument("--regenerate", metavar="OUT.jsonl", help="write the target's own answers to the rows of data.train_path, and stop")
    parser.add_argument("--max-new-tokens", type=int, default=1024, help="length limit of an answer (default 1024)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: greedy (default)")
    parser.add_argument("--batch", type=int, default=128, help="answers generated at a time (default 128)")
    given = parser.parse_intermixed_args(words)
    config = load_config(given.config, given.overrides)

    from specforge.cli import inputs
    from specforge.cli.compose import set_threads
    from specforge.data.template import show
    from specforge.distributed import World

    if given.show is not None:
        samples = inputs.encode(config, "all").samples
        print(show(samples, inputs.load_tokenizer(config), given.show, colour=sys.stdout.isatty()))
        return 0
    world = World.join()
    set_threads(world)
    try:
        if given.regenerate:
            done = inputs.regenerate_answers(
                config, Path(given.regenerate), world,
                max_new_tokens=given.max_new_tokens, temperature=given.temperature, batch_rows=given.batch,
            )  # fmt: skip
            ended = done.answered - done.unfinished
            line = f"{done.answered} answers in {given.regenerate}, {ended} ended by themselves; {done.too_long} prompts were too long"
        else:
            heldout, train = inputs.prepare_features(config, inputs.read_tables(config), world)
            line = f"features of {len(heldout)} held-out samples in {heldout.folder}"
            if config.features.source == "offline":
                line = f"features of {len(train)} training samples in {inputs.Paths.of(config).features}, {line.removeprefix('features ')}"
        if world.is_main:
            print(line)
    finally:
        world.leave()
    return 0
