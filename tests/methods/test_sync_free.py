"""No method reads a value back from its device, in training or in evaluation, by being registered.

The plan, which the host makes before, is all that a forward knows of the batch's values.
"""

from collections.abc import Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch

from specforge.config.methods import METHODS
from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.errors import ConfigError
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore
from specforge.methods.base import Plan
from specforge.training.backend import FSDPTrainingBackend
from tests.methods.test_contract import MOMENT, each_method, make
from tests.sync_free import value_read
from tests.tiny import make_samples, make_store

SEVERAL: tuple[dict[str, Any], ...] = (
    {"layers": 2},
    {"layers": 2, "layer_types": ("sliding_attention", "full_attention"), "sliding_window": 3},
)
"""Options that go together, where a method has them all."""
NOT_ON_A_CPU = {"attention": "flex"}
"""Its kernel has no gradient outside of CUDA; `tests/methods/test_gpu.py` and `tests/layers/test_flex.py` run it."""


def values(name: str) -> Iterator[dict[str, Any]]:
    """Every value but the default of each option that is a choice or a switch, unless another registered method passes it on."""
    options = METHODS[name].options
    kinds, defaults = get_type_hints(options), {field.name: field.default for field in fields(options)}
    yield from (several for several in SEVERAL if several.keys() <= defaults.keys())
    parents = {entry.options for entry in METHODS.values() if issubclass(options, entry.options)} - {options}
    inherited = {field.name for parent in parents for field in fields(parent)}
    for key, default in defaults.items():
        if key in inherited:
            continue
        choices = get_args(kinds[key]) if get_origin(kinds[key]) is Literal else (True, False) if kinds[key] is bool else ()
        yield from ({key: value} for value in choices if value not in (default, NOT_ON_A_CPU.get(key)))


def variants(name: str) -> list[dict[str, Any]]:
    """The defaults, and as few sets of options as hold each of the `values` once."""
    found: list[dict[str, Any]] = [{}]
    for value in values(name):
        fitting = (options for options in found[1:] if not options.keys() & value.keys() and allowed(name, options | value))
        if (home := next(fitting, None)) is not None:
            home.update(value)
        elif allowed(name, value):
            found.append(dict(value))
    return found


def allowed(name: str, options: dict[str, Any]) -> bool:
    try:
        METHODS[name].options(**options)
    except ConfigError:
        return False
    return True


VARIANTS = [(name, options) for name in METHODS for options in variants(name)]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> LocalFeatureStore:
    return make_store(tmp_path_factory.mktemp("features") / "small", target_path, make_samples([7, 6]))


def learnt(method: Any, batch: DraftBatch, plan: Plan) -> None:
    method(batch, plan).loss_sum.backward()


@torch.no_grad()
def measured(method: Any, batch: DraftBatch, plan: Plan) -> None:
    method(batch, plan)


@pytest.mark.parametrize(("name", "options"), VARIANTS, ids=[f"{name} {options or 'defaults'}" for name, options in VARIANTS])
def test_training_reads_nothing(name: str, options: dict[str, Any], target_path: Path, small: LocalFeatureStore) -> None:
    method, batch = make(name, target_path, small, **options), DraftBatch.read(small, range(len(small)))
    assert value_read(learnt, method, batch, method.plan(batch, MOMENT)) is None


@each_method
def test_evaluation_reads_nothing(name: str, target_path: Path, small: LocalFeatureStore) -> None:
    method, batch = make(name, target_path, small).eval(), DraftBatch.read(small, range(len(small)))
    assert value_read(measured, method, batch, method.plan(batch)) is None


@each_method
def test_a_compressed_teacher_reads_nothing(name: str, target_path: Path, small: LocalFeatureStore) -> None:
    """Only the four likeliest ids of every distribution are known."""
    method, batch = make(name, target_path, small), DraftBatch.read(small, range(len(small)))
    top_ids = torch.arange(4, dtype=torch.int32).expand(len(batch.input_ids), 4)
    compressed = replace(batch, last=batch.last[:, :0], top_ids=top_ids, top_log_probs=torch.full(top_ids.shape, -2.0).half())
    assert value_read(learnt, method, compressed, method.plan(compressed, MOMENT)) is None


@each_method
def test_a_step_in_bf16_reads_nothing_until_it_is_clipped(name: str, target_path: Path, small: LocalFeatureStore) -> None:
    """The norm before clipping is among the numbers that the host reads once a step."""
    backend = FSDPTrainingBackend(make(name, target_path, small), TrainConfig(precision="bfloat16"), World())
    batch = DraftBatch.read(small, range(len(small)))

    def stepped(backend: FSDPTrainingBackend, batch: DraftBatch, plan: Plan) -> None:
        backend.backward(backend(batch, plan).loss_sum, plan.weight, boundary=True)
        backend.clip()

    assert value_read(stepped, backend, batch, backend.method.plan(batch, MOMENT)) is None
