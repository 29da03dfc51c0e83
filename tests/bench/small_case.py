"""A case as small as one can be: a sum of squares by two ways, of which one can be broken."""

import torch

from specforge.bench.case import Case, Configuration, Lever, Outputs, Work


class SumCase(Case):
    def __init__(self, error: float = 0.0) -> None:
        levers = {"way": Lever(("loop", "product", "kernel"), "loop", "product"), "chunk": Lever((), "1", "8")}
        super().__init__("sum", levers, {"tokens": 16, "scale": 1.0})
        self.error, self.prepared = error, list[str]()
        self.runs = list[str]()

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        x_T = torch.arange(int(configuration.problem["tokens"])) * float(configuration.problem["scale"])
        way = configuration.levers["way"]
        self.prepared.append(str(configuration))

        def run() -> Outputs:
            self.runs.append(str(configuration))
            if way == "loop":
                return {"sum": sum((x * x for x in x_T), torch.zeros(()))}
            return {"sum": (x_T @ x_T) * (1 + self.error)}

        return Work(run, lambda outputs: {"auc": 0.75, "pcoc": 1.0, "sum": float(outputs["sum"])})

    def lacking(self, lever: str, choice: str, configuration: Configuration, device: torch.device) -> str | None:
        return "there is no such kernel" if choice == "kernel" else None
