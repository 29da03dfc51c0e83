"""`specforge train CONFIG.yaml [key=value ...]`: train what the file is about, a draft unless it says `task: ranking`."""

import argparse
from collections.abc import Sequence

from specforge.config import KEYS_HELP, RankingConfig, load_task
from specforge.errors import ConfigError


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge train",
        description="Train a draft, or what `task:` says; several processes: torchrun --nproc-per-node=N -m specforge train C.yaml ...",
    )
    parser.add_argument("config", help="YAML file with the settings that differ from the defaults")
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help=KEYS_HELP)
    parser.add_argument("--plan", action="store_true", help="print steps, tokens, memory and disk, and stop")
    given = parser.parse_intermixed_args(words)
    config = load_task(given.config, given.overrides)
    if given.plan:
        if isinstance(config, RankingConfig):
            raise ConfigError("--plan: is worked out from a target, which a ranking run has not; leave it out.")
        from specforge.cli.plan import describe

        print(describe(config))
        return 0

    from specforge.cli.compose import build_controller, report, set_threads
    from specforge.cli.ranking import build_ranking_controller
    from specforge.distributed import World

    world = World.join()
    set_threads(world)
    try:
        controller = build_ranking_controller(config, world) if isinstance(config, RankingConfig) else build_controller(config, world)
        state = controller.fit()
        report(controller, state)
    finally:
        world.leave()
    return 0
