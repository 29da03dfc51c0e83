"""Runs in the peer's environment, without specforge: reads weights and a batch, and answers each line with one measured step."""

import json
import sys
import time

import torch
from safetensors import safe_open
from speculators.models.eagle3 import Eagle3DraftModel, Eagle3SpeculatorConfig  # type: ignore[import-not-found]
from transformers import LlamaConfig

torch.set_num_threads(1)
with safe_open(sys.argv[1], framework="pt") as file:
    about = file.metadata()
    tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


def chosen(prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}


layer = LlamaConfig(**json.loads(about["sizes"]), attn_implementation="sdpa")
model = Eagle3DraftModel(Eagle3SpeculatorConfig(transformer_layer_config=layer, draft_vocab_size=int(about["draft_vocab_size"])))
model.load_vocab_mappings(tensors["t2d"], tensors["d2t"])
missing, unexpected = model.load_state_dict(chosen("weight."), strict=False)
assert set(missing) <= {"t2d", "d2t"} and not unexpected, (missing, unexpected)
settings, _ = Eagle3DraftModel.get_trainer_kwargs(
    ttt_steps=int(about["ttt_steps"]), ttt_step_loss_decay=1.0, loss_fn="kl_div", loss_implementation="eager"
)
batch = chosen("batch.")
for _ in sys.stdin:
    model.zero_grad()
    start = time.process_time()
    _, loss, _ = model(**batch, **settings)
    loss.backward()
    print(json.dumps({"seconds": time.process_time() - start, "loss": loss.item()}), flush=True)
