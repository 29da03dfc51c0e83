"""An imported draft as a step folder that is evaluated, decoded with and trained on like any other."""

from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import save_file

from specforge import files
from specforge.errors import ExportError
from specforge.export.reading import Imported
from specforge.training.run_folder import FORMAT_VERSION
from specforge.training.state import TrainState

RUN_ID = "imported"


def write_checkpoint(imported: Imported, target_path: Path, run: Path) -> Path:
    """`RUN/imported-step0`, complete or absent, and `RUN/latest`. It has no optimiser, so no run resumes from it; a new one starts.

    Raises:
        ExportError: it exists already, or cannot be written.
    """
    final = run / f"{RUN_ID}-step0"
    if final.exists():
        raise ExportError(f"--out {run}: holds an imported draft already; remove {final} or choose another folder.")
    state = TrainState(RUN_ID)
    settings = {
        "method": {"name": imported.name, "options": asdict(imported.options)},
        "model": {"target_path": str(target_path)},
        "target_fingerprint": files.Fingerprints(run / "features" / ".fingerprints.json").fingerprint(target_path),
    }
    with files.writable(run, ExportError), files.staging(final) as folder:
        (folder / "draft").mkdir()
        files.write_json(folder / "draft" / "config.json", asdict(imported.config))
        save_file({name: _as_trained(tensor) for name, tensor in imported.tensors.items()}, folder / "draft" / "model.safetensors")
        stored = {"format_version": FORMAT_VERSION, **state.as_dict(), "world_size": 1, "settings": settings, "best": None}
        files.write_json(folder / "state.json", stored)
    files.relative_link(run / "latest", final.name)
    return final


def _as_trained(tensor: torch.Tensor) -> torch.Tensor:
    """Weights as training keeps them, in float32, which holds bfloat16 and float16 exactly."""
    return (tensor.float() if tensor.is_floating_point() else tensor).contiguous()
