"""The part of a checkpoint that is the draft: `config.json` and safetensors shards, readable without a process group."""

from pathlib import Path
from typing import Any

import torch

from specforge import files
from specforge.errors import CheckpointError


def read_draft_config(folder: Path) -> dict[str, Any]:
    """What `config.json` of a draft folder holds.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    if not (folder / "config.json").exists():
        raise CheckpointError(f"draft folder {folder}: config.json is missing; give a step folder, RUN/latest or RUN/best.")
    return files.read_object(folder / "config.json", CheckpointError)


def read_draft_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Whole (unsharded) tensors of a draft folder by name.

    Raises:
        CheckpointError: a name is in none of the shards.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with files.open_tensors(path, CheckpointError) as shard:
            found.update({name: shard.get_tensor(name) for name in names if name in shard.keys()})  # noqa: SIM118
    missing = sorted(set(names) - set(found))
    if missing:
        raise CheckpointError(f"draft folder {folder}: no shard holds {', '.join(missing)}; take another checkpoint.")
    return found
