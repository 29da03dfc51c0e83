"""How close a training step of EAGLE-3 comes to the matrix products in it.

One thread, float32, forward and backward of the method itself, its plan included. Step, step with half of the targets,
matrix product and peer take turns, and the best of each counts, so that a busy phase of the machine meets all of them.
Times are CPU times of the process: what a neighbour takes of the core does not count, and helper threads would. A neighbour still
empties the caches, and a product finds a quiet moment sooner than a step.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from specforge.bench.peer import Peer
from specforge.bench.synthetic import Shape, counted_flops, make_batch, make_method
from specforge.features.batch import DraftBatch
from specforge.methods.base import Moment
from specforge.methods.eagle3 import Eagle3

PRODUCT_SIZE = 1024


class Best:
    """The shortest of all calls, in seconds."""

    def __init__(self) -> None:
        self.seconds = float("inf")

    def time(self, call: Callable[[], object]) -> None:
        start = time.process_time()
        call()
        self.seconds = min(self.seconds, time.process_time() - start)


class Step:
    """Forward and backward on one batch, with fresh gradients."""

    def __init__(self, method: Any, batch: DraftBatch) -> None:
        self.method, self.batch = method, batch
        self.best, self.loss_sum = Best(), float("nan")

    def __call__(self) -> None:
        self.method.zero_grad()
        output = self.method(self.batch, self.plan())
        output.loss_sum.backward()
        self.loss_sum = output.loss_sum.item()

    def plan(self) -> Any:
        return self.method.plan(self.batch, Moment(seed=0, step=0, total_steps=1))


def measure(shape: Shape, repeats: int, peer_python: Path | None) -> dict[str, float | None]:
    """The numbers of the JSON line; `loss` is KL in nats per supervised token, summed over the steps."""
    torch.set_num_threads(1)
    half_shape = replace(shape, prompt=shape.tokens // 2)
    full, half = (Step(method := make_method(shape), make_batch(each, method)) for each in (shape, half_shape))
    method = full.method
    left, right = torch.randn(2, PRODUCT_SIZE, PRODUCT_SIZE).unbind()
    product, peer_best = Best(), Best()
    peer = None if peer_python is None else Peer(peer_python, shape, method, full.batch)
    full()
    half()
    try:
        for _ in range(repeats):
            product.time(lambda: left @ right)
            full.best.time(full)
            product.time(lambda: left @ right)
            half.best.time(half)
            if peer is not None:
                peer_best.seconds = min(peer_best.seconds, peer.step_s())
    finally:
        if peer is not None:
            peer.close()
    rate = 2 * PRODUCT_SIZE**3 / product.seconds
    plan = method.plan(full.batch)
    flops = counted_flops(shape, plan, full.batch.documents)
    floor_s = flops / rate
    print(f"matrix rate {rate / 1e9:.1f} GFLOP/s, best of {2 * repeats} products of {PRODUCT_SIZE} cubed; counted {flops / 1e9:.2f} GFLOP")
    loss = (full.loss_sum - teacher_entropy(method, full.batch)) / float(full.batch.loss_mask.sum())
    if peer is not None:
        print(f"peer {1e3 * peer_best.seconds:.1f} ms, its loss {peer.loss:.7f}, ours {loss:.7f}")
    return {
        "ms": 1e3 * full.best.seconds,
        "floor_ms": 1e3 * floor_s,
        "ratio_to_floor": full.best.seconds / floor_s,
        "half_supervised_ratio": half.best.seconds / full.best.seconds,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "peer_ratio": None if peer is None else peer_best.seconds / full.best.seconds,
        "loss": loss,
    }


def teacher_entropy(method: Eagle3, batch: DraftBatch) -> float:
    """What cross-entropy has over KL, in nats: the entropy of the target at each position, once a step that it teaches."""
    logits_TD = batch.last @ method.teacher_head_DH.T
    entropy_T = torch.distributions.Categorical(logits=logits_TD).entropy()
    counted_JT = torch.from_numpy(method.plan(batch).counted_JT)
    return sum(float(entropy_T.roll(-1 - step)[counted_T].sum()) for step, counted_T in enumerate(counted_JT))


def state_mib(shape: Shape, tokens: int) -> float:
    """What a forward over one document of `tokens` tokens keeps for its backward, in MiB; parameters and tables do not count."""
    shape = replace(shape, documents=1, tokens=tokens)
    method = make_method(shape)
    batch = make_batch(shape, method)
    own = {tensor.untyped_storage().data_ptr() for tensor in [*method.parameters(), *method.buffers()]}
    kept: dict[int, torch.UntypedStorage] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage  # held, so that no address is used twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss_sum = method(batch, method.plan(batch)).loss_sum
    del loss_sum
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own) / 2**20
