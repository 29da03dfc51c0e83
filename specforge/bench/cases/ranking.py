"""Inference of a small ranking model over a made-up world, from rows on the disk to probabilities in a list.

What is timed: which users share a batch, reading and collating their rows, the copy to the device, the forward, and the copy back. What is
not: parsing the file of rows, which is cached, and loading the model.
"""

import dataclasses
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, get_args, get_type_hints

import numpy as np
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from specforge import files
from specforge.bench.case import Case, Configuration, Lever, Outputs, Quality, Work
from specforge.bench.cases.precision import DTYPES, tolerance_of
from specforge.config.levers import Levers
from specforge.distributed import World
from specforge.layers.attention_choice import lacking_on
from specforge.layers.moe import why_not_grouped
from specforge.layers.slots import SlotConfig
from specforge.ranking.batch import RankingBatch
from specforge.ranking.evaluate import RankingEvaluator
from specforge.ranking.load import load_ranking_model, why_not_compiled
from specforge.ranking.model import CTRModel
from specforge.ranking.shape import CTRConfig
from specforge.ranking.store import UserStore, write_store
from specforge.ranking.world import ClickWorld

SHAPE = CTRConfig(SlotConfig(28, 16_384, 16, "modulo"), width=64, layers=2, heads=4, inner=128, experts=8, top_k=2)
LEVERS = ("attn", "moe", "fuse_embedding", "filter_test_users", "dtype", "keep_fp32_modules", "expert_merge", "compile")
KEPT = ("none", "head", "*norm", "*moe")
"""What may stay float32 in a smaller dtype."""
SCORED_SHARE, SCORED_ROWS, WORLD_SEED = 0.13, 4, 53
"""Of 60 users of this seed 9 have scored rows, and 13 % of all rows."""
TRAIN_USERS, LEARNING_RATE, TABLE_RATE = 48, 4e-3, 2e-2


class RankingCase(Case):
    """`batch_rows`: rows in one forward, exceeded only by a user with more. `mean_rows`: about so many has a user. `train_steps`: so long
    was the model trained; 0 leaves random weights."""

    def __init__(self) -> None:
        reference, default = Levers.reference(), Levers()
        levers = {name: Lever(_choices(name), _word(getattr(reference, name)), _word(getattr(default, name))) for name in LEVERS}
        levers["batch_rows"] = Lever((), "16384", "16384")
        super().__init__("ranking", levers, {"users": 60, "mean_rows": 40, "train_steps": 0})

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        levers, problem = chosen_levers(configuration), configuration.problem
        folder = Path(_made(int(problem["users"]), int(problem["mean_rows"]), int(problem["train_steps"])).name)
        store = UserStore(folder / ("filtered" if levers.filter_test_users else "all"))
        model = load_ranking_model(folder / "model", levers, device, strict=True).model
        batch_rows, world = int(configuration.levers["batch_rows"]), World(device=device)

        def forward(batch: RankingBatch) -> torch.Tensor:
            return model(batch).logit_P

        @torch.no_grad()
        def run() -> Outputs:
            evaluator = RankingEvaluator(store, world, micro_batch_tokens=batch_rows)
            predictions = evaluator.predict(forward)
            probability_P = predictions.logit_P[torch.from_numpy(np.argsort(predictions.row_P))].sigmoid().tolist()
            return {"probability_P": torch.tensor(probability_P)}

        @torch.no_grad()
        def quality(outputs: Outputs) -> Quality:
            numbers = RankingEvaluator(store, world, micro_batch_tokens=batch_rows).evaluate(forward)
            return {"auc": numbers["eval/auc_exact"], "pcoc": numbers["eval/pcoc"], "rows": float(store.lengths.sum())}

        return Work(run, quality)

    def tolerance(self, configuration: Configuration) -> float:
        return tolerance_of(configuration.levers["dtype"])

    def digest(self, configuration: Configuration) -> str:
        return chosen_levers(configuration).digest

    def lacking(self, lever: str, choice: str, configuration: Configuration, device: torch.device) -> str | None:
        dtype = DTYPES[configuration.levers["dtype"]]
        if lever == "attn":
            return lacking_on(choice, device, dtype)
        if (lever, choice) == ("moe", "grouped"):
            return why_not_grouped(torch.empty(0, SHAPE.width, dtype=dtype, device=device), SHAPE.inner)
        return why_not_compiled(device) if (lever, choice) == ("compile", "true") else None


def chosen_levers(configuration: Configuration) -> Levers:
    texts = {name: configuration.levers[name] for name in LEVERS}
    flags = {name: text == "true" for name, text in texts.items() if get_type_hints(Levers)[name] is bool}
    kept = () if texts["keep_fp32_modules"] == "none" else (texts["keep_fp32_modules"],)
    return dataclasses.replace(Levers(), **{**texts, **flags, "keep_fp32_modules": kept})  # type: ignore[arg-type]


def _choices(name: str) -> tuple[str, ...]:
    if name == "keep_fp32_modules":
        return KEPT
    kind = get_type_hints(Levers)[name]
    return ("false", "true") if kind is bool else get_args(kind)


def _word(value: Any) -> str:
    if value == ():
        return "none"
    return str(value).lower() if isinstance(value, bool) else str(value)


@cache
def _made(users: int, mean_rows: int, train_steps: int) -> TemporaryDirectory[str]:
    """A folder of `model`, and of the stores `all` and `filtered`; removed with the process."""
    folder, world = TemporaryDirectory(), ClickWorld(mean_rows=mean_rows)
    root = Path(folder.name)
    world.draw(users, WORLD_SEED, scored_share=SCORED_SHARE, scored_rows=SCORED_ROWS).save(root / "rows.csv", "user")
    for name, filters in (("all", False), ("filtered", True)):
        with files.staging(root / name) as staged:
            write_store(root / "rows.csv", staged, slots=world.slots, filter_users=filters)
    torch.manual_seed(0)
    model = _trained(CTRModel(SHAPE), world, train_steps)
    (root / "model").mkdir()
    files.write_json(root / "model" / "config.json", SHAPE.stored())
    save_file(model.state_dict(), root / "model" / "model.safetensors")
    return folder


def _trained(model: CTRModel, world: ClickWorld, steps: int) -> CTRModel:
    table = model.encoder.slots.table
    others = [parameter for parameter in model.parameters() if parameter is not table]
    optimiser = torch.optim.Adam([{"params": [table], "lr": TABLE_RATE}, {"params": others, "lr": LEARNING_RATE}])
    decay = torch.optim.lr_scheduler.ExponentialLR(optimiser, 0.1 ** (1 / max(steps, 1)))
    for step in range(steps):
        batch = RankingBatch.pack(range(TRAIN_USERS), world.draw(TRAIN_USERS, WORLD_SEED + 1 + step).users)
        optimiser.zero_grad()
        F.binary_cross_entropy_with_logits(model(batch).logit_P, batch.label_N[batch.scored_rows]).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        decay.step()
    return model
