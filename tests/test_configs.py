"""Every recipe loads, and a dumped configuration reads back as itself."""

from pathlib import Path

import pytest

from specforge.config import dump_config, load_config

CONFIGS = sorted((Path(__file__).parents[1] / "configs").rglob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_a_recipe_loads_and_survives_its_dump(path: Path, tmp_path: Path) -> None:
    config = load_config(path)
    again = tmp_path / "again.yaml"
    again.write_text(dump_config(config))
    assert load_config(again) == config


def test_words_win_over_the_file() -> None:
    config = load_config(CONFIGS[0], ["train.steps=7", "model.aux_layer_ids=[1,3]"])
    assert (config.train.steps, config.model.aux_layer_ids) == (7, (1, 3))
