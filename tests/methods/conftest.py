from pathlib import Path

import pytest

from specforge.features.store import LocalFeatureStore
from tests.tiny import make_samples, make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> LocalFeatureStore:
    return make_store(tmp_path_factory.mktemp("features") / "store", target_path, make_samples([9, 21, 5, 17, 12, 30]))
