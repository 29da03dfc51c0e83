"""The target of the answered conversations, at work."""

from pathlib import Path

import pytest

from specforge.features.target import Target


@pytest.fixture(scope="module")
def answered_target(answered_path: Path) -> Target:
    return Target.load(answered_path, "float32")
