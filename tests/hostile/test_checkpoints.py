"""Checkpoints that somebody damaged or forged: refused by name, or loaded as what was saved."""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge.config.schema import TrainConfig
from specforge.distributed import World, randomness
from specforge.features.store import LocalFeatureStore
from specforge.models.draft_folder import read_draft_config, read_draft_tensors
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.run_folder import find_checkpoints, resolve
from specforge.training.state import TrainState
from tests.hostile.harness import outcomes, reseal, wrong
from tests.hostile.variants import (
    Harm,
    Variant,
    content,
    damaged,
    json_fields,
    json_texts,
    names_in,
    other_tensors,
    replaced,
    safetensors_headers,
    strangers,
)  # fmt: skip
from tests.tiny import make_method, make_samples, make_store

STEP = "r-step3"
Case = tuple[str, Variant, bool]


@pytest.fixture(scope="module")
def backend(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> FSDPTrainingBackend:
    store: LocalFeatureStore = make_store(tmp_path_factory.mktemp("store") / "s", target_path, make_samples([9, 12]))
    return FSDPTrainingBackend(make_method(target_path, store), TrainConfig(), World())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, backend: FSDPTrainingBackend) -> Path:
    folder = tmp_path_factory.mktemp("run") / "run"
    manager = CheckpointManager(folder, World(), keep=0)
    state = TrainState("r", 3, 12)
    manager.claim()
    manager.begin(state)
    manager.mark_best(state, {"eval/acc_len": 2.0})
    manager.save(state, backend, backend.method.config_dict(), {"batch": 4})
    manager.wait()
    manager.release()
    return folder


def read_with(backend: FSDPTrainingBackend, where: str) -> Any:
    def read(folder: Path) -> object:
        tensors = {**backend.draft_state(), **backend.optimizer_state()}
        with torch.no_grad():
            for tensor in tensors.values():
                tensor.zero_()
        manager = CheckpointManager(folder, World(), keep=0)
        randomness.seed_all(7, 0)
        state, size = manager.load(resolve(folder / where), backend)
        best = None if manager.best is None else vars(manager.best)
        return [dataclasses.asdict(state), size, best, tensors, randomness.capture()["torch"], randomness.capture()["numpy"]]

    return read


def reseal_step(run: Path) -> None:
    reseal(run / STEP)


def files_of(run: Path) -> dict[str, bytes]:
    return {path.relative_to(run).as_posix(): path.read_bytes() for path in sorted((run / STEP).rglob("*")) if path.is_file()}


def test_damage_under_the_checksums_is_refused(run: Path, backend: FSDPTrainingBackend, tmp_path: Path) -> None:
    cases: list[Case] = []
    for name, original in files_of(run).items():
        if not name.endswith("manifest.json"):
            cases += [(name, variant, False) for variant in (*damaged(original), *replaced(tmp_path / "canary", tmp_path / "marker"))]
        if name.endswith(".safetensors"):
            cases += [(name, variant, False) for variant in strangers(tmp_path / "marker")]
    found = outcomes(run, cases, read_with(backend, STEP), tmp_path)
    assert len(found) == len(cases) > 150
    assert wrong(found, ("refused",)) == {}


def test_forged_checksums_do_not_help(run: Path, backend: FSDPTrainingBackend, tmp_path: Path) -> None:
    cases: list[Case] = []
    for name, original in files_of(run).items():
        if name.endswith("manifest.json"):
            continue
        variants = [*replaced(tmp_path / "canary", tmp_path / "marker")]
        if name.endswith(".json") and "draft" not in name:
            variants += [*json_texts(original), *json_fields(original, free=("settings", "metrics", "python"), optional=("best", "cuda"))]
        if name.endswith(".safetensors"):
            tensor = "norm.weight" if "draft" in name else "norm.weight.exp_avg"
            variants += [*safetensors_headers(original), *other_tensors(tensor), *lost_pieces(tensor)]
        cases += [(name, variant, True) for variant in variants]
    found = outcomes(run, cases, read_with(backend, STEP), tmp_path, lambda folder: reseal(folder / STEP))
    assert len(found) == len(cases) > 300
    assert wrong(found, ("refused", "equal")) == {}


def lost_pieces(tensor: str) -> Iterator[Variant]:
    """Shards whose notes place a tensor elsewhere: torch's reader would leave the rows before it as they were."""

    def place_at(offset: int) -> Harm:
        def harm(path: Path) -> None:
            tensors = load_file(path)
            notes = {"DCP_SHARDING_INFO": json.dumps({name: {"saved_offsets": [0] * value.dim()} for name, value in tensors.items()})}
            whole = json.loads(notes["DCP_SHARDING_INFO"])
            whole[tensor]["saved_offsets"] = [offset]
            if offset > 0:
                tensors[tensor] = tensors[tensor][offset:].clone()
            save_file(tensors, path, {**notes, "DCP_SHARDING_INFO": json.dumps(whole)})

        return harm

    for offset in (8, -8, 10**9):
        yield f"{tensor} begins at {offset}", place_at(offset)


def test_manifest(run: Path, backend: FSDPTrainingBackend, tmp_path: Path) -> None:
    name = f"{STEP}/manifest.json"
    original = (run / name).read_bytes()
    cases = [
        (name, variant, False)
        for variant in (
            *damaged(original, flips=40),
            *replaced(tmp_path / "canary", tmp_path / "marker"),
            *json_texts(original),
            *json_fields(original),
            *names_in(original, tmp_path / "marker"),
        )
    ]
    found = outcomes(run, cases, read_with(backend, STEP), tmp_path)
    assert len(found) == len(cases) > 100
    assert wrong(found, ("refused", "equal")) == {}


@pytest.mark.parametrize(("name", "where"), [("best_meta.json", "best"), ("branch.json", "latest")])
def test_files_of_the_run(run: Path, backend: FSDPTrainingBackend, tmp_path: Path, name: str, where: str) -> None:
    """No checksum covers them: another text may be found there, or no checkpoint at all; it is never anything else than this run's."""
    original = (run / name).read_bytes()
    cases = [
        (name, variant, False)
        for variant in (
            *damaged(original),
            *replaced(tmp_path / "canary", tmp_path / "marker"),
            *json_texts(original),
            *json_fields(original, free=("metrics",)),
            *(
                ("checkpoint " + text, field(original, "checkpoint", text))
                for text in ("../../canary", "/etc", "x/../..", "\ud800", "y" * 999)
            ),
        )
    ]
    found = outcomes(run, cases, lambda folder: resolve(folder / where).path.name, tmp_path)
    assert len(found) == len(cases) > 50
    assert wrong(found, ("refused", "equal")) == {}
    found = outcomes(run, cases, lambda folder: (find_checkpoints(folder), CheckpointManager(folder, World(), keep=0).best), tmp_path)
    assert wrong(found, ("refused", "equal", "different")) == {}


def field(original: bytes, name: str, value: str) -> Harm:
    return content(json.dumps({**json.loads(original), name: value}))


@pytest.mark.parametrize("link", ["latest", "best", "r-step9", "r-step3"])
def test_links_that_lead_elsewhere(run: Path, backend: FSDPTrainingBackend, tmp_path: Path, link: str) -> None:
    """`latest` and `best` are for people: whatever they say, the run's own files decide. A step that is a link is none."""

    def to(target: str) -> Variant:
        def harm(path: Path) -> None:
            if path.is_dir() and not path.is_symlink():
                path.rename(path.with_name("away"))
            path.unlink(missing_ok=True)
            path.symlink_to(target)

        return f"to {target}", harm

    cases = [(link, to(target), False) for target in ("/", "/etc", "..", "../../canary", link, "nothing", "/dev/zero")]
    found = outcomes(run, cases, read_with(backend, link if link != "r-step9" else "latest"), tmp_path)
    assert wrong(found, ("refused",) if link == "r-step3" else ("equal",)) == {}


def test_draft_folder_by_itself(run: Path, tmp_path: Path) -> None:
    """Read without a manifest, so that a flipped bit of a tensor may pass."""
    draft = run / STEP / "draft"
    cases: list[Case] = []
    for path in sorted(draft.iterdir()):
        original, variants = path.read_bytes(), [*replaced(tmp_path / "canary", tmp_path / "marker")]
        variants += [*damaged(original), *(json_texts(original) if path.suffix == ".json" else safetensors_headers(original))]
        cases += [(path.name, variant, False) for variant in variants]
    found = outcomes(draft, cases, lambda folder: [read_draft_config(folder), read_draft_tensors(folder, ("d2t", "t2d"))], tmp_path)
    assert len(found) == len(cases) > 80
    assert wrong(found, ("refused", "equal", "different")) == {}
