"""The bench of saves names its numbers and leaves nothing behind."""

from pathlib import Path

from specforge.bench.save import measure
from specforge.bench.synthetic import SHAPES, make_method


def test_numbers_have_their_names(tmp_path: Path) -> None:
    numbers = measure(tmp_path, 1, SHAPES["small"])
    assert list(numbers) == ["sync_ms", "stall_ms", "step_ms", "step_beside_ms", "stall_ratio", "checkpoint_mb", "threads"]
    parameters = sum(p.numel() for p in make_method(SHAPES["small"]).parameters())
    assert 12 * parameters / 1e6 <= numbers["checkpoint_mb"] < 12.2 * parameters / 1e6, "weights and two moments, four bytes each"
    assert not list(tmp_path.iterdir())
