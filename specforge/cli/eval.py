"""`specforge eval CONFIG.yaml --checkpoint RUN/best`: acceptance of a draft on held-out answers, or how well clicks are predicted."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from specforge import files
from specforge.config import KEYS_HELP, RankingConfig, load_task
from specforge.errors import ConfigError


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge eval",
        description="Measure a checkpoint on held-out answers. The last line of the output is one JSON object.",
    )
    parser.add_argument("config", help="the configuration of the run, for example RUN/config.yaml")
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help=KEYS_HELP)
    parser.add_argument("--checkpoint", required=True, help="RUN/best, RUN/latest or a step folder")
    parser.add_argument(
        "--calibrate", action="store_true", help="store beside the weights what scales a draft's confidence or shifts clicks"
    )
    parser.add_argument("--live", type=int, default=0, metavar="N", help="decode the answers of N samples and compare with the walk")
    parser.add_argument(
        "--simulate", nargs="+", default=(), metavar="DEPTHxTOP_KxNODES", help="tokens per round of draft trees, without running the target"
    )
    given = parser.parse_intermixed_args(words)
    if given.live < 0:
        raise ConfigError(f"--live {given.live}: must not be negative; 0 decodes nothing.")
    config = load_task(given.config, given.overrides)
    if isinstance(config, RankingConfig):
        if given.live or given.simulate:
            raise ConfigError("--live and --simulate: decode with a draft, which a ranking run has not; leave them out.")
        return _run_ranking(config, Path(given.checkpoint), given.calibrate)

    from specforge.cli.compose import evaluate_checkpoint, set_threads
    from specforge.cli.table import acceptance_table, calibration_table, chain_table, live_table
    from specforge.config.methods import registered
    from specforge.decode.tree import TreeShape
    from specforge.distributed import World

    trees = [TreeShape.parse(tree) for tree in given.simulate]
    if trees:
        registered(config.method.name).load_tree_drafter()
    world = World.join()
    set_threads(world)
    try:
        numbers = evaluate_checkpoint(config, Path(given.checkpoint), world, calibrate=given.calibrate, live=given.live, trees=trees)
    finally:
        world.leave()
    if world.is_main:
        print(acceptance_table(numbers))
        print(chain_table(numbers))
        print(calibration_table(numbers))
        for tree, length in numbers.get("eval/trees", {}).items():
            print(f"tree of depth x top-k x nodes {tree:<12}{length:>8.3f} tokens per round")
        if given.live:
            print(live_table(numbers))
        print(files.json_line(numbers))
    return 0


def _run_ranking(config: RankingConfig, checkpoint: Path, calibrate: bool) -> int:
    from specforge.cli.compose import set_threads
    from specforge.cli.ranking import evaluate_ranking_checkpoint
    from specforge.distributed import World

    world = World.join()
    set_threads(world)
    try:
        numbers = evaluate_ranking_checkpoint(config, checkpoint, world, calibrate=calibrate)
    finally:
        world.leave()
    if world.is_main:
        print(files.json_line(numbers))
    return 0
