"""The part of a checkpoint that is the draft: `config.json` and safetensors shards, readable without a process group."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from specforge.errors import CheckpointError


def read_draft_config(folder: Path) -> dict[str, Any]:
    """What `config.json` of a draft folder holds.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise CheckpointError(f"draft folder {folder}: {path.name} is missing; give a step folder, RUN/latest or RUN/best.") from error
    except json.JSONDecodeError as error:
        raise CheckpointError(f"{path}: is not JSON ({error}); take another checkpoint.") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path}: must hold a JSON object; take another checkpoint.")
    return config


def read_draft_tensors(folder: Path, names: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """Whole (unsharded) tensors of a draft folder by name.

    Raises:
        CheckpointError: a name is in none of the shards.
    """
    found = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as shard:
            found.update({name: shard.get_tensor(name) for name in names if name in shard.keys()})  # noqa: SIM118
    missing = sorted(set(names) - set(found))
    if missing:
        raise CheckpointError(f"draft folder {folder}: no shard holds {', '.join(missing)}; take another checkpoint.")
    return found
