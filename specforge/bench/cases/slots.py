"""Slots of bags of signs, laid out as a collate does it, forward only."""

import numpy as np
import torch

from specforge.bench.case import Case, Configuration, Lever, Outputs, Work
from specforge.layers.slots import SlotBags, SlotConfig, SlotEmbedding

SIGNS_PER_BAG = 1.6


class SlotsCase(Case):
    def __init__(self) -> None:
        levers = {"fuse_embedding": Lever(("false", "true"), "false", "true")}
        super().__init__("slots", levers, {"tokens": 256, "slots": 28, "width": 32, "rows": 50_000})

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        tokens, slots, width, rows = map(int, configuration.problem.values())
        torch.manual_seed(0)
        fused = configuration.levers["fuse_embedding"] == "true"
        layer = SlotEmbedding(SlotConfig(slots, rows, width, "modulo"), "fused" if fused else "per_slot").to(device)
        draw = np.random.default_rng(0)
        count_NS = draw.poisson(SIGNS_PER_BAG, (tokens, slots))
        bags = SlotBags.of(draw.integers(0, 2**31, count_NS.sum()), count_NS).to(device)

        @torch.no_grad()
        def run() -> Outputs:
            return {"bags_NX": layer(bags)}

        return Work(run)
