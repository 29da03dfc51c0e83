"""The shape of a ranking model, as a checkpoint's `config.json` stores it."""

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from specforge import files
from specforge.config.ranking import RankingModelConfig
from specforge.errors import CheckpointError
from specforge.layers.slots import SlotConfig
from specforge.models.draft_folder import read_draft_config


@dataclass(frozen=True)
class CTRConfig:
    slots: SlotConfig
    width: int
    layers: int
    heads: int
    inner: int
    experts: int
    top_k: int

    @classmethod
    def of(cls, model: RankingModelConfig, signid_mode: str) -> Self:
        slots = SlotConfig(model.slots, model.rows, model.slot_width, signid_mode)
        return cls(slots, model.width, model.layers, model.heads, model.inner, model.experts, model.top_k)

    @classmethod
    def read(cls, folder: Path) -> Self:
        """
        Raises:
            CheckpointError: the folder has no `config.json`, or it is not that of a ranking model.
        """
        stored, where = read_draft_config(folder), str(folder / "config.json")
        of_model, of_slots = files.kinds_of(cls) | {"slots": dict}, files.kinds_of(SlotConfig)
        files.check_fields(stored, where, CheckpointError, **of_model)
        files.check_fields(stored["slots"], f"{where}: slots", CheckpointError, **of_slots)
        slots = SlotConfig(**{key: stored["slots"][key] for key in of_slots})
        return cls(**{key: stored[key] for key in of_model} | {"slots": slots})

    def stored(self) -> dict[str, Any]:
        """For JSON."""
        return dataclasses.asdict(self)

    def refuse_other(self, stored: Self, folder: Path) -> None:
        """
        Raises:
            CheckpointError: the model stored in `folder` has another shape.
            ConfigError: its signs mean other rows.
        """
        self.slots.refuse_other(stored.slots.stored())
        theirs = stored.stored()
        for key, value in self.stored().items():
            if theirs[key] != value:
                raise CheckpointError(
                    f"{folder}: its model has {key}={theirs[key]!r}, wanted is {value!r}; set model.{key}={theirs[key]!r}."
                )
