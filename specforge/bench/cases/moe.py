"""A sparse mixture of experts, forward only."""

import torch

from specforge.bench.case import Case, Configuration, Lever, Outputs, Work
from specforge.bench.cases.precision import DTYPE, DTYPES, tolerance_of
from specforge.layers.moe import IMPLEMENTATIONS, SparseMoE, why_not_grouped


class MixtureCase(Case):
    def __init__(self) -> None:
        levers = {"moe": Lever(IMPLEMENTATIONS, "loop", "auto"), "dtype": DTYPE}
        super().__init__("moe", levers, {"tokens": 16, "width": 64, "inner": 128, "experts": 8, "top_k": 2})

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        tokens, width, inner, experts, top_k = map(int, configuration.problem.values())
        torch.manual_seed(0)
        layer, dtype = SparseMoE(width, inner, experts, top_k, configuration.levers["moe"]), DTYPES[configuration.levers["dtype"]]
        layer = layer.eval().to(device, dtype)
        x_TD = torch.randn(tokens, width, generator=torch.Generator().manual_seed(0)).to(device, dtype)

        @torch.no_grad()
        def run() -> Outputs:
            mixture = layer(x_TD)
            return {"out_TD": mixture.out_TD, "overflow": mixture.overflow}

        return Work(run, lambda outputs: {"picks_without_place": float(outputs["overflow"])})

    def tolerance(self, configuration: Configuration) -> float:
        return tolerance_of(configuration.levers["dtype"])

    def lacking(self, lever: str, choice: str, configuration: Configuration, device: torch.device) -> str | None:
        if (lever, choice) != ("moe", "grouped"):
            return None
        x_TD = torch.empty(1, int(configuration.problem["width"]), dtype=DTYPES[configuration.levers["dtype"]], device=device)
        return why_not_grouped(x_TD, int(configuration.problem["inner"]))
