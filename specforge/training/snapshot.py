"""Snapshot: a copy of everything that changes in a step, so that training goes on while it is written.

Tensors go through torch.distributed.checkpoint with its Hugging Face writer: safetensors, one shard a rank, no pickle.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint import HuggingFaceStorageReader, HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from specforge import files
from specforge.distributed import World, randomness
from specforge.errors import CheckpointError
from specforge.training.backend import FSDPTrainingBackend

# A world of one has no process group, which is no news to it.
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


def tensors_of(backend: FSDPTrainingBackend) -> dict[str, dict[str, torch.Tensor]]:
    """The live tensors by subfolder and name, sharded as they are."""
    return {"draft": backend.draft_state(), "optimizer": backend.optimizer_state()}


class Snapshot:
    """This rank's share of a checkpoint in main memory. Its buffers are made at the first `take` and used again."""

    def __init__(self) -> None:
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}
        self._random: dict[str, Any] = {}

    @torch.no_grad()
    def take(self, backend: FSDPTrainingBackend) -> None:
        """Copy the state as it is now. The only part of a save for which training waits."""
        for folder, tensors in tensors_of(backend).items():
            copies = self._tensors.setdefault(folder, {})
            for name, tensor in tensors.items():
                if name not in copies:
                    copies[name] = torch.empty_like(tensor, device="cpu", requires_grad=False)
                copies[name].copy_(tensor, non_blocking=True)
        self._random = randomness.capture()
        if backend.world.device.type == "cuda":
            torch.cuda.synchronize(backend.world.device)

    def write(self, folder: Path, world: World) -> str | None:
        """Write this rank's files below `folder`; the reason if that failed. `world` is the group of the writing threads."""
        try:
            for name, tensors in self._tensors.items():
                (folder / name).mkdir(exist_ok=True)
                writer = HuggingFaceStorageWriter(str(folder / name), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=world.group, no_dist=world.size == 1)
            files.write_json(folder / random_name(world), self._random)
        except OSError as error:
            return f"rank {world.rank}: {error}."
        except CheckpointException as error:
            rank, (cause, _) = next(iter(error.failures.items()))
            return f"rank {rank}: {cause}."
        return None


def read_tensors(folder: Path, tensors: dict[str, torch.Tensor], world: World) -> None:
    """Fill `tensors`, sharded in whatever way, from a folder that any number of ranks wrote.

    Raises:
        CheckpointError: a tensor is missing, not complete, or of another shape or data type.
    """
    world.on_main(lambda: _check(folder, tensors))
    try:
        dcp.load(tensors, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=world.size == 1)
    except CheckpointException as error:
        reason = next(iter(error.failures.values()))[0]
        raise CheckpointError(
            f"{folder}: cannot be loaded into this draft: {reason}. Take a checkpoint of the same method and model."
        ) from error


def read_whole(folder: Path) -> dict[str, torch.Tensor]:
    """All tensors of a folder by name, whole and on the CPU, however many ranks wrote them.

    Raises:
        CheckpointError: a file is damaged, or a tensor is not complete.
    """
    tensors = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in _stored(folder).items()
        if isinstance(entry, TensorStorageMetadata)
    }
    read_tensors(folder, tensors, World())
    return tensors


def _stored(folder: Path) -> dict[str, Any]:
    """What torch's reader says of each tensor."""
    for path in sorted(folder.glob("*.safetensors")):
        files.open_tensors(path, CheckpointError)
    with files.foreign(folder, CheckpointError, "take another checkpoint"):
        return HuggingFaceStorageReader(str(folder)).read_metadata().state_dict_metadata


def _check(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Torch's reader would convert another data type, and leave rows as they are that no shard holds."""
    stored = _stored(folder)
    for name, tensor in tensors.items():
        found = stored.get(name)
        if not isinstance(found, TensorStorageMetadata):
            wrong = "is missing"
        elif (found.size, found.properties.dtype) != (tensor.shape, tensor.dtype):
            wrong = f"is {found.properties.dtype} of shape {list(found.size)}, wanted is {tensor.dtype} of shape {list(tensor.shape)}"
        elif sum(chunk.sizes.numel() for chunk in found.chunks) != tensor.numel() or any(
            min(c.offsets, default=0) < 0 for c in found.chunks
        ):
            wrong = "is not complete"
        else:
            continue
        raise CheckpointError(
            f"{folder}: cannot be loaded into this draft: {name} {wrong}. Take a checkpoint of the same method and model."
        )


def random_name(world: World) -> str:
    """The file of this rank's random state in a step folder."""
    return f"rng-rank{world.rank}.json"
