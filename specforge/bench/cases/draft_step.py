"""One training step of a draft on random features: plan, forward, backward."""

from dataclasses import replace
from typing import Any

import torch

from specforge.bench.blocks import BLOCK_SHAPES, make_dflash
from specforge.bench.case import Case, Configuration, Lever, Outputs, Quality, Work
from specforge.bench.synthetic import SHAPES, make_batch, make_method
from specforge.methods.base import Moment

WHOLE_LOSS_ROWS = "1000000"
"""More rows than there are: all logits at one time."""
MOMENT = Moment(seed=0, step=0, total_steps=1)


class DraftStepCase(Case):
    """`loss_chunk_rows=0` is the method's own choice."""

    def __init__(self) -> None:
        levers = {
            "attention": Lever(("blocks", "flex"), "blocks", "blocks"),
            "loss_chunk_rows": Lever((), WHOLE_LOSS_ROWS, "0"),
            "activation_checkpointing": Lever(("false", "true"), "false", "false"),
        }
        super().__init__("draft-step", levers, {"method": "eagle3", "shape": "small", "documents": 4, "tokens": 256})

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        method, batch = _made(configuration)
        method, batch = method.to(device), batch.to(device)
        weights = [weight for weight in method.parameters() if weight.requires_grad]
        supervised_tokens = float(batch.loss_mask.sum())

        def run() -> Outputs:
            output = method(batch, method.plan(batch, MOMENT))
            gradients = torch.autograd.grad(output.loss_sum, weights)
            tally = {"correct": output.tally["correct"], "count": output.tally["count"], "confidence": output.confidences_TK.sum().detach()}
            named = {f"gradient {number}": gradient for number, gradient in enumerate(gradients)}
            return {"loss": output.loss_sum.detach(), **tally, **named}

        def quality(outputs: Outputs) -> Quality:
            return {
                "loss": float(outputs["loss"]) / supervised_tokens,
                "acc_len": _accepted(outputs),
                "draft_tokens": float(len(outputs["count"])),
                "pcoc": float(outputs["confidence"]) / max(float(outputs["correct"].sum()), 1.0),
            }

        return Work(run, quality)

    def tolerance(self, configuration: Configuration) -> float:
        """Gradients of the loss are sums over chunks, in another order."""
        return 1e-4

    def lacking(self, lever: str, choice: str, configuration: Configuration, device: torch.device) -> str | None:
        dflash = configuration.problem["method"] == "dflash"
        if lever == "attention" and choice == "flex":
            return "DFlash has one form of attention" if dflash else None if device.type == "cuda" else "it trains on a CUDA device only"
        if lever == "activation_checkpointing" and choice == "true" and dflash:
            return "DFlash keeps all it computed"
        return None


def _made(configuration: Configuration) -> tuple[Any, Any]:
    levers, problem = configuration.levers, configuration.problem
    sizes: dict[str, Any] = {"documents": problem["documents"], "tokens": problem["tokens"]}
    rows = int(levers["loss_chunk_rows"])
    if problem["method"] == "dflash":
        return make_dflash(replace(BLOCK_SHAPES[str(problem["shape"])], **sizes), loss_chunk_rows=rows)
    shape = replace(SHAPES[str(problem["shape"])], **sizes)
    method = make_method(
        shape, attention=levers["attention"], loss_chunk_rows=rows, activation_checkpointing=levers["activation_checkpointing"] == "true",
    )  # fmt: skip
    return method, make_batch(shape, method)


def _accepted(outputs: Outputs) -> float:
    """Committed tokens of a round, were each draft as likely right as all of its position, whatever came before."""
    share_K = outputs["correct"].double() / outputs["count"].double().clamp_min(1)
    return 1 + float(share_K.cumprod(0).sum())
