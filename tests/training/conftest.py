from pathlib import Path

import pytest

from specforge.features.store import LocalFeatureStore
from tests.tiny import make_samples, make_store


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> LocalFeatureStore:
    """Samples of 5 to 40 tokens with masks of very different weight, so that ranks and micro-batches weigh unequally."""
    return make_store(tmp_path_factory.mktemp("features") / "store", target_path, make_samples([40, 9, 21, 5, 17, 12, 30, 6, 25, 11]))
