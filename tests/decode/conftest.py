"""A tiny target, and features of conversations that it answered itself."""

from pathlib import Path

import pytest

from specforge.features.store import LocalFeatureStore
from specforge.features.target import Target
from tests.tiny import make_answered, make_store, make_target


@pytest.fixture(scope="module")
def answered_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_target(tmp_path_factory.mktemp("answered") / "target")


@pytest.fixture(scope="module")
def answered_target(answered_path: Path) -> Target:
    return Target.load(answered_path, "float32")


@pytest.fixture(scope="module")
def answered(answered_path: Path) -> LocalFeatureStore:
    return make_store(answered_path.parent / "store", answered_path, make_answered(answered_path))
