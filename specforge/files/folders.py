"""Folders that are complete or absent.

A folder is built under a hidden name beside its final one, sealed by a manifest of sizes and checksums, brought to the
disk, and renamed. A reader therefore sees all of it or nothing, and can tell later whether a file was damaged.
"""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from specforge.errors import SpecForgeError
from specforge.files.fingerprints import Fingerprints, sha256_file
from specforge.files.untrusted import check_fields, inside, read_object, shown
from specforge.files.writing import sync_folder, write_json

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

_UNFINISHED = re.compile(r"\..+\.(staging-)?\d+-[0-9a-f]{8}")


@contextlib.contextmanager
def staging(final: Path, **seal: Any) -> Iterator[Path]:
    """A hidden folder beside `final` to write into; it becomes `final` when the block ends well and vanishes otherwise.

    `seal` are options of `publish`.
    """
    folder = new_staging(final)
    try:
        yield folder
        publish(folder, final, **seal)
    finally:
        shutil.rmtree(folder, ignore_errors=True)  # another rank may still write; what stays is hidden, and swept later


def new_staging(final: Path) -> Path:
    """The hidden folder alone, for writers of several processes: one makes it and, at the end, calls `publish`."""
    if os.path.lexists(final):
        raise SpecForgeError(f"{final}: exists already and is not overwritten; remove it or choose another folder.")
    folder = _hidden_name(final)
    folder.mkdir(parents=True)
    return folder


def publish(
    folder: Path,
    final: Path,
    *,
    manifest_name: str = MANIFEST,
    notes: Mapping[str, Any] | None = None,
    known_sha256: Mapping[str, str] | None = None,
    leave_out: Collection[str] = (),
) -> None:
    """Seal `folder` by a manifest and rename it to `final`.

    `notes` are further keys of the manifest, `known_sha256` checksums (by relative name) that need not be computed
    again, `leave_out` names of files that are not part of the content.
    """
    known, left_out = known_sha256 or {}, {*leave_out, manifest_name}
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if name in left_out:
            continue
        with path.open("rb") as file:
            os.fsync(file.fileno())
        files[name] = {"size_bytes": path.stat().st_size, "sha256": known.get(name) or sha256_file(path)}
    for subfolder in sorted(path for path in folder.rglob("*") if path.is_dir()):
        sync_folder(subfolder)
    write_json(folder / manifest_name, {"format": MANIFEST_FORMAT, **(notes or {}), "files": files})
    rights = (folder / manifest_name).stat().st_mode
    for name in files:
        (folder / name).chmod(rights)  # safetensors writes for the owner alone, and readers may be somebody else
    folder.rename(final)
    sync_folder(final.parent)


def sweep(final: Path) -> list[str]:
    """Remove what killed writers of `final` left behind; returns the names. The caller holds the lock of `final`."""
    stale = [path for path in final.parent.glob(".*") if path.name.startswith(_staging_prefix(final))]
    for path in stale:
        _remove(path, _hidden_name(final))
    return [path.name for path in stale]


def sweep_all(parent: Path) -> None:
    """Remove whatever killed writers left in `parent`, files and folders. The caller is the only one who writes there."""
    for path in parent.glob(".*"):
        if not _UNFINISHED.fullmatch(path.name):
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def discard(folder: Path) -> None:
    """Remove a published folder, or whatever has its name, so that no reader sees half of it."""
    _remove(folder, _hidden_name(folder))


def _remove(path: Path, doomed: Path) -> None:
    """Renamed first: a rank that outlives its killed job cannot add to what is being removed."""
    path.rename(doomed)
    if doomed.is_dir() and not doomed.is_symlink():
        shutil.rmtree(doomed, ignore_errors=True)  # what a late writer still got in is swept next time
    else:
        doomed.unlink()


def _staging_prefix(final: Path) -> str:
    return f".{final.name}.staging-"


def _hidden_name(final: Path) -> Path:
    return final.with_name(f"{_staging_prefix(final)}{os.getpid()}-{secrets.token_hex(4)}")


def verify(
    folder: Path,
    error: type[SpecForgeError] = SpecForgeError,
    *,
    manifest_name: str = MANIFEST,
    fingerprints: Fingerprints | None = None,
    sizes_only: bool = False,
) -> dict[str, Any]:
    """Check every file against the manifest, which is returned; tensors that it does not list may not be there.

    With `fingerprints`, files unchanged since they were last read are not read again; with `sizes_only` only `.json` is.

    Raises:
        error: naming the file that is missing, truncated, altered, not listed, or a link that leaves the folder.
    """
    listing = folder / manifest_name
    manifest = read_object(listing, error, format=int, files=dict)
    if manifest["format"] != MANIFEST_FORMAT:
        raise error(f"{listing}: format must be {MANIFEST_FORMAT}; another version wrote the folder, make it again.")
    root = folder.resolve()
    for name, expected in manifest["files"].items():
        path = inside(folder, name, error)
        check_fields(expected, f"{listing}: {shown(name)}", error, size_bytes=int, sha256=str)
        if not path.is_file():
            raise error(f"{path}: listed in {manifest_name} but missing; make {folder} again or restore it from a copy.")
        if not path.resolve().is_relative_to(root):
            raise error(f"{path}: is a link that leaves {folder}; put the file itself there.")
        try:
            wrong = _damage(path, expected, fingerprints, by_size=sizes_only and path.suffix != ".json")
        except OSError as cause:  # such as a folder that another process removes just now
            wrong = f"cannot be read ({cause.strerror})"
        if wrong:
            raise error(f"{path}: {wrong}, so it was damaged after writing; make {folder} again or restore it from a copy.")
    for parent, _, names in os.walk(folder):
        for name in names:
            path = Path(parent, name)
            if path.suffix == ".safetensors" and path.relative_to(folder).as_posix() not in manifest["files"]:
                raise error(f"{path}: is not listed in {manifest_name}, so it came there later; remove it.")
    return manifest


def _damage(path: Path, expected: Mapping[str, Any], fingerprints: Fingerprints | None, by_size: bool) -> str:
    size_bytes = path.stat().st_size
    if size_bytes != expected["size_bytes"]:
        return f"has {size_bytes} bytes, the manifest says {expected['size_bytes']}"
    if not by_size and (fingerprints.sha256(path) if fingerprints else sha256_file(path)) != expected["sha256"]:
        return "its SHA-256 differs from the manifest"
    return ""
