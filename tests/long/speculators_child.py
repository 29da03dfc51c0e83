"""Runs in the environment of scripts/peer.sh, without specforge: converts and loads draft folders, and writes what each computes.

A line of its input is a job in JSON: `folder`, `batch` (safetensors: keywords of the model's forward), `asked` (keywords of its
`get_trainer_kwargs`), `watched` (modules whose outputs are wanted), `out`, and `convert` where the folder is to be made by the converter.
A job that is done is answered by a line.
"""

import json
import sys
from functools import partial
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from speculators import SpeculatorModel, SpeculatorModelConfig  # type: ignore[import-not-found]
from speculators.convert import convert_model  # type: ignore[import-not-found]


def answer(job: dict[str, Any]) -> dict[str, torch.Tensor]:
    if job["convert"]:
        convert_model(output_path=job["folder"], **job["convert"])
    config = SpeculatorModelConfig.from_pretrained(job["folder"])
    config.transformer_layer_config._attn_implementation = "sdpa"
    model = SpeculatorModel.from_pretrained(job["folder"], config=config)
    model.lm_head.requires_grad_(True)
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, module: torch.nn.Module, inputs: Any, output: torch.Tensor) -> None:
        call = sum(key.rpartition(".")[0] == name for key in found)
        found[f"{name}.{call}"] = output.detach().clone()

    for name in job["watched"]:
        model.get_submodule(name).register_forward_hook(partial(keep, name))
    settings, _ = type(model).get_trainer_kwargs(loss_implementation="eager", **job["asked"])
    _, loss, _ = model(**load_file(job["batch"]), **settings)
    loss.backward()
    found |= {f"grad.{name}": parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    return {"loss": loss.detach(), **{name: tensor.contiguous() for name, tensor in found.items()}}


torch.set_num_threads(1)
for line in sys.stdin:
    job = json.loads(line)
    save_file(answer(job), job["out"])
    print("done", flush=True)
