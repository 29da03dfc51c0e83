"""How much the loss of EAGLE-3 adds to the resident set, and how much it would if it kept whole logits.

Each form runs in a process of its own, since memory that one has used is not given back. What is measured is growth: from
the resident set before the loss, with weights, tables and hidden states in it, to the peak of forward and backward.
"""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace

import psutil
import torch

from specforge.bench.synthetic import SHAPES, make_batch, make_method
from specforge.features.batch import DraftBatch
from specforge.layers.norm import normalise
from specforge.methods.eagle3 import Eagle3, TTTPlan

LARGE = replace(SHAPES["wide"], vocab=128_256, draft_vocab=32_000, documents=8, tokens=512, draft_tokens=3)


def measure_both() -> dict[str, float]:
    """Growth in MB of both forms at `LARGE`, and by how much, relatively, their losses and gradients differ."""
    numbers: dict[str, dict[str, float]] = {}
    # An allocator that keeps what is freed would hide the growth in what building the batch has left behind.
    plain = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    for form in FORMS:
        command = [sys.executable, "-m", "specforge.bench.loss_memory", form]
        numbers[form] = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=plain).stdout)
        print(f"{form}: grows by {numbers[form]['growth_mb']:.0f} MB in {numbers[form]['seconds']:.1f} s")
    chunked, naive = numbers["chunked"], numbers["naive"]
    differing = {f"{name}_difference": abs(chunked[name] / naive[name] - 1) for name in ("loss", "gradient_norm")}
    return {"chunked_mb": chunked["growth_mb"], "naive_mb": naive["growth_mb"], **differing}


def chunked_loss(method: Eagle3, batch: DraftBatch, plan: TTTPlan, outputs: list[torch.Tensor]) -> torch.Tensor:
    return method.loss(batch, plan, [normalise(output_RH, method.draft.config.rms_norm_eps) for output_RH in outputs]).loss_sum


def naive_loss(method: Eagle3, batch: DraftBatch, plan: TTTPlan, outputs: list[torch.Tensor]) -> torch.Tensor:
    """Cross-entropy on whole logits, one step after the other, with autograd."""
    assert method.draft.lm_head is not None
    target_TD = (batch.last @ method.teacher_head_DH.T).softmax(-1)
    loss_sum = torch.zeros(())
    for index, (step, out_RH) in enumerate(zip(plan.steps, outputs, strict=True)):
        start_S = torch.from_numpy(step.rows_R[step.supervised_S])
        weight_S = method.options.step_decay**index * torch.from_numpy(plan.counted_JT[index])[start_S]
        log_draft_SD = method.draft.lm_head(method.draft.norm(out_RH[step.supervised_S])).log_softmax(-1)
        loss_sum = loss_sum - weight_S.float() @ torch.linalg.vecdot(target_TD[start_S + 1 + index], log_draft_SD)
    return loss_sum


FORMS: dict[str, Callable[[Eagle3, DraftBatch, TTTPlan, list[torch.Tensor]], torch.Tensor]] = {
    "chunked": chunked_loss,
    "naive": naive_loss,
}


def run_form(form: str) -> dict[str, float]:
    torch.set_num_threads(1)
    method = make_method(LARGE)
    batch = make_batch(LARGE, method)
    plan = method.plan(batch)
    outputs = [torch.randn(len(step.rows_R), LARGE.hidden, requires_grad=True) for step in plan.steps]
    mb, process = 2**20, psutil.Process()
    before_mb, started_s = process.memory_info().rss / mb, process.cpu_times().user
    loss_sum = FORMS[form](method, batch, plan, outputs)
    loss_sum.backward()
    peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    assert method.draft.lm_head is not None and method.draft.lm_head.weight.grad is not None
    gradients = [method.draft.lm_head.weight.grad, *(out.grad for out in outputs if out.grad is not None)]
    return {
        "growth_mb": peak_mb - before_mb,
        "seconds": process.cpu_times().user - started_s,
        "loss": loss_sum.item(),
        "gradient_norm": torch.nn.utils.get_total_norm(gradients).item(),
    }


if __name__ == "__main__":
    print(json.dumps(run_form(sys.argv[1])))
