"""A whole draft folder: configuration, tensors, and what the export recorded beside them."""

import hashlib
import json
from pathlib import Path
from typing import Any

from specforge.errors import ExportError
from specforge.export.contract.configs import read_config
from specforge.export.contract.keys import Keys
from specforge.export.contract.served import Network, Served
from specforge.export.contract.tensors import FILE, read_tensors

RECORD = "specforge.json"
MANIFEST = "manifest.json"
_LARGEST_BYTES = 2**24


def read_folder(folder: Path) -> Served:
    """
    Raises:
        ExportError: an engine would load the folder wrongly, ignore part of it, or it is not the one that was exported.
    """
    if not folder.is_dir():
        raise ExportError(f"{folder}: there is no such folder; give one that `specforge export` wrote.")
    config = _object(folder / "config.json")
    network = read_config(config, str(folder / "config.json"))
    served = Served(network, *read_tensors(folder, network))
    if "speculators_model_type" in config and network.kind in ("eagle3", "peagle") and "embed_tokens.weight" not in served.tables:
        raise ExportError(
            f"{folder / FILE}: embed_tokens.weight is missing; speculators would go on with whatever its memory holds. Export again."
        )
    if (folder / RECORD).exists():
        _compare(network, Keys(_object(folder / RECORD), str(folder / RECORD)))
    if (folder / MANIFEST).exists():
        _verify(folder, Keys(_object(folder / MANIFEST), str(folder / MANIFEST)))
    return served


def _compare(network: Network, record: Keys) -> None:
    """What the draft was trained on against what engines would run it on."""
    target = record.inner("target", "it says what the draft was trained on")
    trained = {
        "kind": record.values.get("method"),
        "hidden_state_ids": record.ids("hidden_state_ids", "it says what the draft was trained on"),
        "max_positions": target.count("max_position_embeddings"),
        "vocab": target.count("vocab_size"),
        "feature": target.count("hidden_size"),
        "rope": {"rope_type": "default", **target.inner("rope_parameters", "it says what the draft was trained on").values},
    }
    for name, then in trained.items():
        now = getattr(network, name)
        if now != then:
            raise ExportError(f"{record.where}: the draft was trained with {name} {then}, config.json makes it {now}. Export again.")


def _verify(folder: Path, manifest: Keys) -> None:
    for name, stored in manifest.inner("files", "it lists the folder's content").values.items():
        path = folder / name
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise ExportError(f"{manifest.where}: {name[:80]!r} leads out of the folder; do not trust it.")
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except (OSError, ValueError) as cause:
            raise ExportError(f"{str(path)[:200]!r}: is listed in {MANIFEST} and cannot be read ({cause}). Export again.") from cause
        if found != Keys(stored, manifest.where).values.get("sha256"):
            raise ExportError(f"{path}: its SHA-256 is not the one in {MANIFEST}, so it was changed since. Export again.")


def _object(path: Path) -> Any:
    try:
        if not path.is_file() or path.stat().st_size > _LARGEST_BYTES:
            raise ExportError(f"{path}: is no file, or larger than a configuration can be. Export again.")
        return json.loads(path.read_bytes().decode(), object_pairs_hook=_without_repetition)
    except OSError as cause:
        raise ExportError(f"{path}: cannot be read ({cause.strerror}). Export again.") from cause
    except (ValueError, RecursionError) as cause:
        raise ExportError(f"{path}: is not valid JSON ({cause}). Export again.") from cause


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise ValueError("a key occurs twice in one object")
    return dict(pairs)
