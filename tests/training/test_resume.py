"""Resumed = uninterrupted, bit by bit, from `latest` and from `best`; what a run folder holds; what is refused."""

import json
import random
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.distributed.tensor import DTensor

from specforge.config.schema import TrainConfig
from specforge.distributed import World, randomness
from specforge.errors import CheckpointError, ConfigError, NonFiniteError
from specforge.features.loader import FeatureDataLoader
from specforge.features.store import LocalFeatureStore
from specforge.log.run_log import RunLog
from specforge.methods.base import Moment
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.controller import TrainerController
from specforge.training.run_folder import find_checkpoints, resolve
from specforge.training.state import TrainState
from tests.ranks import run_ranks
from tests.tiny import make_method

STEPS, BATCH = 6, 4
CONFIG = TrainConfig(batch_samples=BATCH, learning_rate=1e-2, micro_batch_tokens=48, log_every=1, eval_every=1, save_every=2)
SCORES = [0.0, 1.0, 3.0, 2.0, 2.5, 1.0, 0.5]
"""`eval/acc_len` after each step: step 2 is the best."""


def draws() -> torch.Tensor:
    """One number of each generator that a checkpoint restores."""
    return torch.cat([torch.rand(1), torch.tensor([random.random(), np.random.rand()])])


def drawing_scores(step: int) -> dict[str, float]:
    """Uses up random numbers as a method may, so that a resumed run without its generators would differ."""
    draws()
    return {"eval/acc_len": SCORES[step]}


def controller_for(
    world: World,
    run: Path,
    target_path: Path,
    folder: Path,
    resume: str = "",
    skip: int = 0,
    config: TrainConfig = CONFIG,
    metric: str = "",
    make: Callable[[Path, LocalFeatureStore], Any] = make_method,
) -> TrainerController:
    """`skip` is a mutation: it moves the data position of a resumed run."""
    randomness.seed_all(0, world.rank)
    store = LocalFeatureStore(folder)
    method = make(target_path, store)
    backend = FSDPTrainingBackend(method, config, world)
    checkpoints = CheckpointManager(run, world, keep=0, best_metric=metric)
    state = TrainState("r")
    if resume:
        state, _ = checkpoints.load(resolve(run / resume), backend)
        state = replace(state, samples_seen=state.samples_seen + skip, run_id="r" if resume == "latest" else "r.fork1")
    box: list[TrainerController] = []
    controller = TrainerController(
        config=config, total_steps=STEPS, method=method, backend=backend,
        data=FeatureDataLoader(
            store, 0, BATCH, config.micro_batch_tokens, STEPS * BATCH, world,
            plan=lambda batch, step: method.plan(batch, Moment(0, step, STEPS)),
        ),
        checkpoints=checkpoints, log=RunLog(run, world), world=world, state=state, settings={},
        evaluate=lambda: drawing_scores(box[0].state.step),
    )  # fmt: skip
    box.append(controller)
    return controller


def fingerprint(controller: TrainerController) -> dict[str, torch.Tensor]:
    """This rank's shard of every parameter and moment, and what its generators draw next."""
    state = {**controller.backend.draft_state(), **controller.backend.optimizer_state()}
    local = {name: (t.to_local() if isinstance(t, DTensor) else t).detach().clone() for name, t in state.items()}
    return {**local, "random": draws()}


def run(world: World, folder: Path, *args: Any) -> dict[str, torch.Tensor]:
    controller = controller_for(world, folder, *args)
    controller.fit()
    return fingerprint(controller)


def truncate_after(folder: Path, step: int) -> None:
    """As if the run had been killed after `step` was saved."""
    for checkpoint in find_checkpoints(folder):
        if checkpoint.step > step:
            shutil.rmtree(checkpoint.path)
    (folder / "latest").unlink()
    (folder / "latest").symlink_to(f"r-step{step}")


@pytest.fixture(scope="module", params=[1, 2])
def uninterrupted(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, target_path: Path, store: LocalFeatureStore
) -> Any:
    folder = tmp_path_factory.mktemp("run")
    return request.param, folder, run_ranks(run, folder, target_path, store.folder, world=request.param)


def same(left: list[dict[str, torch.Tensor]], right: list[dict[str, torch.Tensor]]) -> bool:
    return all(a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a) for a, b in zip(left, right, strict=True))


def test_best_and_latest_are_what_the_scores_say(uninterrupted: Any) -> None:
    _, folder, _ = uninterrupted
    assert resolve(folder / "best").step == 2
    assert resolve(folder / "latest").step == STEPS
    assert not Path((folder / "best").readlink()).is_absolute()
    meta = json.loads((folder / "best_meta.json").read_text())
    assert (meta["step"], meta["score"], meta["metric"]) == (2, 3.0, "eval/acc_len")
    saved = [checkpoint.step for checkpoint in find_checkpoints(folder)]
    assert saved == [0, 1, 2, 4, 6], "a new best is saved on demand, off the interval too"
    assert not list(folder.glob("**/*.pt")) + list(folder.glob("**/.metadata"))


@pytest.mark.parametrize("where", ["latest", "best"])
def test_resumed_equals_uninterrupted(where: str, uninterrupted: Any, tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    world, folder, expected = uninterrupted
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    if where == "latest":
        truncate_after(moved, 4)
    assert same(run_ranks(run, moved, target_path, store.folder, where, world=world), expected)


def test_another_data_position_is_noticed(uninterrupted: Any, tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    """Negative control: one sample off and the bits differ."""
    world, folder, expected = uninterrupted
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    truncate_after(moved, 4)
    assert not same(run_ranks(run, moved, target_path, store.folder, "latest", 1, world=world), expected)


def test_resuming_the_best_leaves_everything_in_place(
    uninterrupted: Any, tmp_path: Path, target_path: Path, store: LocalFeatureStore
) -> None:
    world, folder, _ = uninterrupted
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    before = {checkpoint.path.name for checkpoint in find_checkpoints(moved)}
    run_ranks(run, moved, target_path, store.folder, "best", world=world)
    after = {checkpoint.path.name for checkpoint in find_checkpoints(moved)}
    assert before < after
    assert after - before == {"r.fork1-step4", "r.fork1-step6"}
    assert resolve(moved / "latest").run_id == "r.fork1"


def test_without_links_best_and_latest_still_resolve(uninterrupted: Any, tmp_path: Path) -> None:
    _, folder, _ = uninterrupted
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    (moved / "best").unlink()
    (moved / "latest").unlink()
    assert resolve(moved / "best").step == 2
    assert resolve(moved / "latest").step == STEPS


def test_a_restart_remembers_the_best(uninterrupted: Any) -> None:
    _, folder, _ = uninterrupted
    again = CheckpointManager(folder, World(), keep=1)
    assert again.best is not None
    assert not again.is_best({"eval/acc_len": 2.9})
    assert not again.is_best({"eval/acc_len": 3.0}), "strictly better only"
    assert not again.is_best({"eval/acc_len": float("nan")})
    assert again.is_best({"eval/acc_len": 3.1})


class WithoutSeek:
    """Windows from the beginning only."""

    def __init__(self, data: Any) -> None:
        self._data = data

    def __iter__(self) -> Any:
        return iter(self._data)


def test_data_without_seek_is_advanced(uninterrupted: Any, tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    world, folder, expected = uninterrupted
    if world == 2:
        pytest.skip("one world size tells it")
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    truncate_after(moved, 4)

    def advance(world: World) -> dict[str, torch.Tensor]:
        controller = controller_for(world, moved, target_path, store.folder, "latest")
        controller.data = WithoutSeek(controller.data)
        controller.fit()
        return fingerprint(controller)

    assert same(run_ranks(advance, world=1), expected)


def test_only_one_run_writes_into_a_folder(tmp_path: Path) -> None:
    first, second = (CheckpointManager(tmp_path, World(), keep=1) for _ in range(2))
    first.claim()
    with pytest.raises(CheckpointError, match="another run writes here"):
        second.claim(patience_s=0.2)
    first.release()
    second.claim(patience_s=0.2)
    second.release()


def test_rotation_keeps_the_newest_and_the_best(tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    controller = controller_for(World(), tmp_path, target_path, store.folder)
    controller.checkpoints.keep = 1
    controller.fit()
    assert [checkpoint.step for checkpoint in find_checkpoints(tmp_path)] == [2, 6]


def test_an_unusable_metric_stops_before_the_first_step(tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    controller = controller_for(World(), tmp_path, target_path, store.folder, metric="eval/nothing")
    with pytest.raises(ConfigError, match=r"eval/nothing.*choose one of eval/acc_len"):
        controller.fit()
    assert controller.state.step == 0
    assert not find_checkpoints(tmp_path)


@pytest.mark.parametrize("damage", ["flip", "truncate", "missing"])
def test_a_damaged_checkpoint_is_refused(
    damage: str, uninterrupted: Any, tmp_path: Path, target_path: Path, store: LocalFeatureStore
) -> None:
    _, folder, _ = uninterrupted
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    shard = next((moved / "r-step6" / "draft").glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    if damage == "missing":
        shard.unlink()
    else:
        shard.write_bytes(content if damage == "flip" else content[:-5])
    with pytest.raises(CheckpointError, match=rf"{shard.name}: .*Or take another one there: r-step0, r-step1, r-step2, r-step4\.$"):
        controller_for(World(), moved, target_path, store.folder, "latest")


def test_an_incomplete_checkpoint_is_not_one(uninterrupted: Any, tmp_path: Path) -> None:
    _, folder, _ = uninterrupted
    moved = tmp_path / "moved"
    shutil.copytree(folder, moved, symlinks=True)
    (moved / "r-step6" / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match=r"no complete checkpoint.*r-step6/manifest.json is missing.*beside it: .*r-step4"):
        resolve(moved / "r-step6")
    (moved / "r-step4").rename(moved / "copy")
    with pytest.raises(CheckpointError, match=r"copy'.*is called RUN_ID-stepN; complete ones beside it: r-step0, r-step1, r-step2\.$"):
        resolve(moved / "copy")
    (moved / "copy").rename(moved / "r-step4")
    assert resolve(moved / "latest").step == 4, "what a kill left unfinished does not hide what is complete"


def poison(world: World, folder: Path, target_path: Path, features: Path) -> str:
    """Rank 1's share of the third window turns into NaN."""
    controller = controller_for(world, folder, target_path, features)
    plan, calls = controller.method.plan, []

    def poisoned(batch: Any, moment: Any = None) -> Any:
        calls.append(batch.samples)
        if len(calls) == 3 and world.rank == 1:
            batch.aux.fill_(float("nan"))
        return plan(batch, moment)

    controller.method.plan = poisoned  # type: ignore[method-assign]
    before = None
    try:
        controller.fit()
    except NonFiniteError as error:
        before = str(error)
    assert before is not None
    assert controller.state.step == 2
    assert all(bool(t.isfinite().all()) for name, t in fingerprint(controller).items())
    return before


def test_a_non_finite_value_on_one_rank_stops_all(tmp_path: Path, target_path: Path, store: LocalFeatureStore) -> None:
    first, second = run_ranks(poison, tmp_path, target_path, store.folder, world=2)
    assert first == second
    assert "step 3" in first
    named = json.loads((tmp_path / "non_finite.json").read_text())["sample_ids"]
    assert named
    assert set(named) <= set(store.ids)
