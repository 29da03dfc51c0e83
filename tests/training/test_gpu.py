"""On a CUDA device: one bf16 step moves the draft, and the checkpoint restores the device's generator."""

from pathlib import Path

import pytest
import torch

from specforge.config.schema import TrainConfig
from specforge.distributed import World, randomness
from specforge.features.loader import FeatureDataLoader
from specforge.training.backend import FSDPTrainingBackend
from tests.tiny import make_method, make_samples, make_store, make_target
from tests.training.test_resume import controller_for, fingerprint, same

pytestmark = pytest.mark.gpu


def test_a_bf16_step_on_the_device(tmp_path: Path) -> None:
    target = make_target(tmp_path / "target")
    store = make_store(tmp_path / "store", target, make_samples([40, 9, 21, 17]))
    world = World(device=torch.device("cuda", 0))
    method = make_method(target, store)
    backend = FSDPTrainingBackend(method, TrainConfig(precision="bfloat16"), world)
    before = {name: p.detach().clone() for name, p in backend.trainable.items()}
    window = next(iter(FeatureDataLoader(store, 0, 4, 128, 4, world)))
    batch = window.batches[0]
    output = backend(batch.to(world.device), method.plan(batch))
    backend.backward(output.loss_sum, method.plan(batch).weight, boundary=True)
    assert backend.clip().isfinite()
    backend.step(1e-3)
    assert all(not torch.equal(p, before[name]) for name, p in backend.trainable.items())


def test_the_generator_of_the_device_is_restored() -> None:
    state = randomness.capture()
    drawn = torch.rand(3, device="cuda")
    randomness.restore(state)
    assert torch.equal(torch.rand(3, device="cuda"), drawn)


def test_a_checkpoint_of_the_device_comes_back(tmp_path: Path) -> None:
    """Weights, moments and the generators of host and device, copied while the device worked."""
    target = make_target(tmp_path / "target")
    store = make_store(tmp_path / "store", target, make_samples([40, 9, 21, 17]))
    world = World(device=torch.device("cuda", 0))
    controller = controller_for(world, tmp_path / "run", target, store.folder)
    controller.fit()
    drawn = torch.rand(3, device="cuda")
    ended = fingerprint(controller)
    again = controller_for(world, tmp_path / "run", target, store.folder, "latest")
    assert torch.equal(torch.rand(3, device="cuda"), drawn)
    assert same([fingerprint(again)], [ended])
    again.log.close()
    again.checkpoints.release()
