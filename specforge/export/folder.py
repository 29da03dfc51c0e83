"""Writing a draft folder: complete and verified, or absent."""

import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from specforge import __version__, files
from specforge.errors import ConfigError, ExportError
from specforge.export.card import card
from specforge.export.engines import FORMATS, loaded_by, require_loadable
from specforge.export.layouts import config_of, tensors_of
from specforge.export.trained import TrainedDraft
from specforge.export.verify import verify

RECORD = "specforge.json"
CARD = "README.md"


def export(trained: TrainedDraft, format_name: str, out: Path) -> dict[str, Any]:
    """Write `out` and return what `specforge.json` in it says.

    Raises:
        ExportError: an engine of this format would load the draft wrongly, `out` exists, or the check of what was written failed.
    """
    if format_name not in FORMATS:
        raise ConfigError(f"--to {format_name}: must be one of {', '.join(FORMATS)}; hf fits both engines.")
    require_loadable(trained.name, trained.config, trained.target, format_name)
    if out.exists():
        raise ExportError(f"--out {out}: exists already and is not overwritten; remove it or choose another folder.")
    tensors = tensors_of(trained, format_name)
    files.require_free(out, sum(tensor.nbytes for tensor in tensors.values()), "the export", ExportError)
    with files.writable(out.parent, ExportError), files.staging(out, leave_out=(CARD,)) as folder:
        files.write_json(folder / "config.json", config_of(trained, format_name))
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        if trained.calibration is not None:
            shutil.copyfile(trained.calibration, folder / trained.calibration.name)
        record = record_of(trained, format_name)
        files.write_json(folder / RECORD, record)
        record["verification"] = {"largest_difference": verify(folder, trained)}
        files.write_json(folder / RECORD, record)
        files.write_text(folder / CARD, card(trained, format_name, record, out.name))
    return record


def record_of(trained: TrainedDraft, format_name: str) -> dict[str, Any]:
    """What an engine has no key for: where the draft comes from, on what it was trained, and how it did."""
    config, target, template = trained.config, trained.target, trained.template
    return {
        "format_version": 1,
        "specforge": __version__,
        "format": format_name,
        "loaded_by": list(loaded_by(trained.name, config, target, format_name)),
        "method": trained.name,
        "draft_tokens": trained.method.draft_tokens,
        "served_tokens": trained.served_tokens,
        "hidden_state_ids": list(config.aux_layer_ids),
        "head": "trained" if trained.is_chain and config.head_trained else "target",
        "checkpoint": {"name": trained.checkpoint, "run_id": trained.run_id, "step": trained.step},
        "target": {
            "name_or_path": str(trained.target_path),
            "fingerprint": trained.target_fingerprint,
            "model_type": target.model_type,
            "hidden_size": target.hidden_size,
            "num_hidden_layers": target.num_hidden_layers,
            "vocab_size": target.vocab_size,
            "max_position_embeddings": target.max_position_embeddings,
            "rope_parameters": target.rope_parameters,
        },
        "template": None if template is None else {"sha256": template.sha256, "enable_thinking": template.enable_thinking},
        "metrics": {name: value for name, value in sorted(trained.metrics.items()) if name in _METRICS},
    }


_METRICS = (
    "eval/walk_acc_len", "eval/walk_acc_len_low", "eval/walk_acc_len_high", "eval/acc_len", "eval/ngram_walk_acc_len",
    "eval/draft_tokens", "eval/samples", "eval/survival", "eval/greedy_match", "eval/walk_acc_len_by_draft_tokens",
)  # fmt: skip
