"""FSDPTrainingBackend: the one place that knows how parameters are laid out over ranks.

`shard`, `hybrid` and `replicate` are meshes of the same `fully_shard`. The method is one FSDP unit: training-time
test runs the draft's layers several times within one forward, so units below the root would gather each layer anew
at every step. At world size 1 nothing is sharded.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.errors import SpecForgeError


class FSDPTrainingBackend:
    """Shards a method, runs backward with or without reduction, clips, steps, and hands out its state."""

    def __init__(self, method: nn.Module, config: TrainConfig, world: World) -> None:
        self.method = method.to(world.device)
        self.world = world
        self._compute_dtype = getattr(torch, config.precision)
        self._clip_norm = config.clip_norm
        self._unreduced = False
        if world.size > 1:
            policy = MixedPrecisionPolicy(param_dtype=self._compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
            fully_shard(self.method, mesh=world.mesh(config.sharding), mp_policy=policy)
        self.trainable = {name: p for name, p in self.method.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.trainable.values(), lr=config.learning_rate, betas=(config.beta1, config.beta2), weight_decay=config.weight_decay
        )
        for parameter in self.trainable.values():
            moments = {name: torch.zeros_like(parameter, requires_grad=False) for name in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[parameter] = {"step": torch.zeros(()), **moments}

    def __call__(self, *args: Any) -> Any:
        """The method's forward in the run's precision; at world size 1 on a cast of the parameters, as FSDP does it for more."""
        if self.world.size > 1 or self._compute_dtype == torch.float32:
            return self.method(*args)
        cast = {name: parameter.to(self._compute_dtype) for name, parameter in self.method.named_parameters()}
        return functional_call(self.method, cast, args)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """Backward passes in here add up locally; the next one outside reduces the sum. A null context at world size 1."""
        if not isinstance(self.method, FSDPModule):
            yield
            return
        self.method.set_requires_gradient_sync(False)
        self.method.set_is_last_backward(False)
        self.method.set_reshard_after_backward(False)
        try:
            yield
        finally:
            self._unreduced = True
            self.method.set_requires_gradient_sync(True)
            self.method.set_is_last_backward(True)
            self.method.set_reshard_after_backward(True)

    def backward(self, loss_sum: torch.Tensor, global_weight: torch.Tensor | float, *, boundary: bool) -> None:
        """Add the gradient of `loss_sum / global_weight` (a scalar, on the device); over all ranks it is reduced at the boundary only."""
        with nullcontext() if boundary else self.no_sync():
            # FSDP averages over ranks; the sum over ranks is wanted.
            (loss_sum * (self.world.size / global_weight)).backward()
        if boundary:
            self._unreduced = False

    def clip(self) -> torch.Tensor:
        """Scale the gradients to the bound; returns their global norm before that, a plain scalar.

        Raises:
            SpecForgeError: gradients are missing or were not reduced, so that a step would silently do nothing.
        """
        gradients = [p.grad for p in self.trainable.values() if p.grad is not None]
        if self._unreduced or len(gradients) < len(self.trainable):
            raise SpecForgeError("optimiser step on an unreduced accumulation window: end the window with backward(boundary=True).")
        norm = nn.utils.get_total_norm(gradients)
        whole = norm.full_tensor() if isinstance(norm, DTensor) else norm
        nn.utils.clip_grads_with_norm_(self.trainable.values(), self._clip_norm, whole)
        return whole

    def step(self, learning_rate: float) -> None:
        """Update the parameters with clipped gradients and forget these."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Evaluation: every parameter is gathered once, so ranks may run different numbers of batches without a collective."""
        training = self.method.training
        self.method.eval()
        if isinstance(self.method, FSDPModule):
            self.method.set_reshard_after_forward(False)
            self.method.unshard()
        try:
            with torch.no_grad():
                yield
        finally:
            if isinstance(self.method, FSDPModule):
                self.method.reshard()
            self.method.train(training)

    def draft_state(self) -> dict[str, torch.Tensor]:
        """Parameters and stored buffers by name, sharded as they are; loading writes into these very tensors."""
        prefix = "draft."
        return {name.removeprefix(prefix): value for name, value in self.method.state_dict().items() if name.startswith(prefix)}

    def optimizer_state(self) -> dict[str, torch.Tensor]:
        """AdamW's tensors as `name.exp_avg`, `name.exp_avg_sq`, `name.step`."""
        return {
            f"{name.removeprefix('draft.')}.{key}": value
            for name, parameter in self.trainable.items()
            for key, value in self.optimizer.state[parameter].items()
        }
