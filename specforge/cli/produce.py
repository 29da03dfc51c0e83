"""`specforge produce CONFIG.yaml`: make the features that a training with `features.source=shared` is about to read."""

import argparse
import os
from collections.abc import Sequence

from specforge.config import KEYS_HELP, load_config
from specforge.errors import ConfigError


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge produce",
        description="Serve a training that runs elsewhere, with the same configuration. Several producers may serve one training: "
        "start them one by one or by torchrun. Any of them, and the training too, may be killed and started again.",
    )
    parser.add_argument("config", help="the configuration of the training, with features.source=shared")
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help=KEYS_HELP)
    given = parser.parse_intermixed_args(words)
    config = load_config(given.config, given.overrides)
    if config.features.source != "shared":
        raise ConfigError(
            f"features.source={config.features.source!r}: only features of source 'shared' are produced by a process of their own; "
            "set it for the producers and for the training."
        )

    import torch

    from specforge.cli import inputs
    from specforge.cli.compose import set_threads
    from specforge.distributed import World

    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    alone = World(local_rank=local_rank, local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")), device=device)
    set_threads(alone)
    made = inputs.producer(config, alone).run()
    print(f"the training has read its last step; {made} of its steps were made here")
    return 0
