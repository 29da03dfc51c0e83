from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from specforge.cli.__main__ import main
from specforge.distributed import World
from specforge.features.store import LocalFeatureStore
from tests.export.checkpoints import ROPES, save
from tests.tiny import make_samples, make_store, make_target

Saved = Callable[..., Path]


@pytest.fixture(scope="session")
def stores(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, LocalFeatureStore]]:
    """By the type of RoPE: a target of 4 layers and features of random text."""
    known: dict[str, tuple[Path, LocalFeatureStore]] = {}

    def of(rope: str) -> tuple[Path, LocalFeatureStore]:
        if rope not in known:
            folder = tmp_path_factory.mktemp(rope)
            target = make_target(folder / "target", rope_parameters=ROPES[rope])
            known[rope] = target, make_store(folder / "store", target, make_samples([9, 21, 12]))
        return known[rope]

    return of


@pytest.fixture(scope="session")
def saved(stores: Any, tmp_path_factory: pytest.TempPathFactory) -> Saved:
    """The step folder of a checkpoint of that method, options and RoPE."""
    known: dict[str, Path] = {}

    def of(name: str, rope: str = "llama3", **options: Any) -> Path:
        key = f"{name} {rope} {sorted(options.items())}"
        if key not in known:
            target, store = stores(rope)
            run = tmp_path_factory.mktemp(name)
            save(World(), name, target, store.folder, run, options)
            known[key] = run / "r-step0"
        return known[key]

    return of


@pytest.fixture
def exported(saved: Saved, tmp_path: Path) -> Saved:
    """The folder that the command line makes of such a checkpoint."""

    def of(name: str, to: str, **options: Any) -> Path:
        out = tmp_path / f"{name}-{to}"
        assert main(["export", "--checkpoint", str(saved(name, **options)), "--to", to, "--out", str(out)]) == 0
        return out

    return of
