"""What every test shares: one thread, and which tests run when."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from specforge.features.store import LocalFeatureStore


@pytest.fixture(autouse=True, scope="session")
def _one_thread_at_first() -> None:
    torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """A command under test shares out the cores; the next test must not inherit that, or its sums round differently."""
    yield
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random target on disk."""
    from tests.tiny import make_target

    return make_target(tmp_path_factory.mktemp("target"))


@pytest.fixture(scope="session")
def answered_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny target of which `answered` holds features, of conversations that it answered itself."""
    from tests.tiny import make_target

    return make_target(tmp_path_factory.mktemp("answered") / "target")


@pytest.fixture(scope="session")
def answered(answered_path: Path) -> LocalFeatureStore:
    from tests.tiny import make_answered, make_store

    return make_store(answered_path.parent / "store", answered_path, make_answered(answered_path))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="run the second tier too, the tests marked `long`")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
    if not config.getoption("--long") and "long" not in config.getoption("-m"):
        second_tier = [item for item in items if item.get_closest_marker("long")]
        config.hook.pytest_deselected(items=second_tier)
        items[:] = [item for item in items if item not in second_tier]
