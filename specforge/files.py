"""Folders that are complete or absent, and the few other ways in which files are written and trusted here.

A folder is built under a hidden name beside its final one, sealed by a manifest of sizes and checksums, brought to the
disk, and renamed. A reader therefore sees all of it or nothing, and can tell later whether a file was damaged.
"""

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path, PurePosixPath
from types import TracebackType
from typing import Any, Self

from specforge.errors import SpecForgeError

MANIFEST = "manifest.json"
MANIFEST_FORMAT = 1

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_CONTENT_SUFFIXES = {".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja", ".parquet", ".tiktoken", ".yaml"}
_UNFINISHED = re.compile(r"\..+\.(staging-)?\d+-[0-9a-f]{8}")
_SETTLED_S = 2.0
"""A file changed less than this ago may change again without a new time stamp, so nothing is remembered of it."""


# -- single files ------------------------------------------------------------------------------------------------------


def write_bytes(path: Path, data: bytes) -> None:
    """Replace `path` in one step: readers see the old content or the new one, also after a power cut."""
    beside = path.with_name(f".{path.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with beside.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)
    _sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def read_json(path: Path, error: type[SpecForgeError] = SpecForgeError) -> Any:
    try:
        return json.loads(path.read_text())
    except FileNotFoundError as cause:
        raise error(f"{path}: there is no such file; its folder is incomplete or not of this kind.") from cause
    except (UnicodeDecodeError, json.JSONDecodeError) as cause:
        raise error(f"{path}: is not valid JSON ({cause}); it was damaged, so make its folder again.") from cause


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def inside(root: Path, name: str, error: type[SpecForgeError] = SpecForgeError) -> Path:
    """`root/name`, where `name` was read from a file: relative, without `..`, and so never outside `root`."""
    parts = PurePosixPath(name).parts
    if not parts or name.startswith("/") or "\\" in name or "\0" in name or ".." in parts:
        raise error(f"file name {name!r} listed in {root}: must be relative and stay inside that folder; do not trust this folder.")
    return root / name


def relative_link(link: Path, target_name: str) -> bool:
    """Make `link` point to its sibling `target_name`, replacing an older link in one step.

    Returns False where the file system has no links.
    """
    inside(link.parent, target_name)
    beside = link.with_name(f".{link.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        beside.symlink_to(target_name)
    except OSError as cause:
        if cause.errno in _NO_LINKS:
            return False
        raise
    try:
        beside.replace(link)
    finally:
        beside.unlink(missing_ok=True)
    return True


def require_free(path: Path, needed_bytes: int, purpose: str, error: type[SpecForgeError] = SpecForgeError) -> None:
    """Raise `error` unless the disk that holds, or will hold, `path` has `needed_bytes` free."""
    existing = next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())
    free_bytes = shutil.disk_usage(existing).free
    if free_bytes < needed_bytes:
        raise error(
            f"{path}: {purpose} needs {_gib(needed_bytes)}, the disk has {_gib(free_bytes)} free; "
            f"make room or choose a folder on another disk."
        )


def _gib(count_bytes: int) -> str:
    return f"{count_bytes / 2**30:.2f} GiB" if count_bytes >= 2**24 else f"{count_bytes / 2**20:.2f} MiB"


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# -- folders -----------------------------------------------------------------------------------------------------------


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
        _sync_folder(subfolder)
    write_json(folder / manifest_name, {"format": MANIFEST_FORMAT, **(notes or {}), "files": files})
    folder.rename(final)
    _sync_folder(final.parent)


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
    fingerprints: "Fingerprints | None" = None,
    sizes_only: bool = False,
) -> dict[str, Any]:
    """Check every file against the manifest, which is returned.

    With `fingerprints`, files unchanged since they were last read are not read again; with `sizes_only` none is.

    Raises:
        error: naming the file that is missing, truncated or altered.
    """
    manifest = read_json(folder / manifest_name, error)
    if not isinstance(manifest, dict) or manifest.get("format") != MANIFEST_FORMAT:
        raise error(f"{folder / manifest_name}: format must be {MANIFEST_FORMAT}; another version wrote the folder, make it again.")
    for name, expected in manifest["files"].items():
        path = inside(folder, name, error)
        if not path.is_file():
            raise error(f"{path}: listed in {manifest_name} but missing; make {folder} again or restore it from a copy.")
        size_bytes = path.stat().st_size
        if size_bytes != expected["size_bytes"]:
            wrong = f"has {size_bytes} bytes, {manifest_name} says {expected['size_bytes']}"
        elif not sizes_only and (fingerprints.sha256(path) if fingerprints else sha256_file(path)) != expected["sha256"]:
            wrong = f"its SHA-256 differs from {manifest_name}"
        else:
            continue
        raise error(f"{path}: {wrong}, so it was damaged after writing; make {folder} again or restore it from a copy.")
    return manifest


# -- locks and memory --------------------------------------------------------------------------------------------------


class Lock:
    """Mutual exclusion between processes by a file that is there while somebody holds it.

    The kernel releases the lock when its holder ends, in whatever way; a file left behind is then taken over.

    Raises:
        SpecForgeError: there can be no lock at `path`, because the file system has none or may not be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def try_acquire(self) -> bool:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644)
        except OSError as cause:
            raise _no_lock(self.path, cause) from cause
        try:
            # A file that its holder removed meanwhile locks nobody out.
            if _flock(descriptor, fcntl.LOCK_EX, self.path) and _is_at(descriptor, self.path):
                self._descriptor, descriptor = descriptor, -1
        finally:
            if descriptor != -1:
                os.close(descriptor)
        return self._descriptor is not None

    def acquire(self, poll_s: float = 0.1) -> None:
        while not self.try_acquire():
            time.sleep(poll_s)

    def release(self) -> None:
        if self._descriptor is not None:
            self.path.unlink(missing_ok=True)
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> Self:
        self.acquire()
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.release()


def is_held(path: Path) -> bool:
    """Whether some process holds the `Lock` of `path`."""
    try:
        descriptor = os.open(path, os.O_RDONLY)
    except FileNotFoundError:
        return False
    try:
        return not _flock(descriptor, fcntl.LOCK_SH, path)
    finally:
        os.close(descriptor)


def _flock(descriptor: int, kind: int, path: Path) -> bool:
    """Lock an open file unless another process has locked it."""
    try:
        fcntl.flock(descriptor, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as cause:
        raise _no_lock(path, cause) from cause
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    except OSError as cause:
        if cause.errno in (errno.ENOENT, errno.ESTALE):
            return False
        raise


def _no_lock(path: Path, cause: OSError) -> SpecForgeError:
    return SpecForgeError(
        f"{path}: cannot be locked ({cause.strerror}); choose a folder that can be written, on a file system with flock "
        "(a local disk, Lustre mounted with flock, NFS with its lock service)."
    )


class Fingerprints:
    """Content hashes, remembered in `memo_path` by path, size, times of change and inode, so that large files are read once."""

    def __init__(self, memo_path: Path) -> None:
        self.memo_path = memo_path

    def sha256(self, path: Path) -> str:
        stamp, key, memo = _stamp(path), str(path.absolute()), self._memo()
        known = memo.get(key)
        if isinstance(known, list) and known[:-1] == stamp and isinstance(known[-1], str):
            return known[-1]
        digest = sha256_file(path)
        if stamp == _stamp(path) and time.time() - stamp[1] / 1e9 > _SETTLED_S:
            self.memo_path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.memo_path, {**self._memo(), key: [*stamp, digest]})
        return digest

    def fingerprint(self, path: Path) -> str:
        """Hash of a file, or of the names and contents of a folder's files that carry content (configuration, tokenizer,
        template, weights, rows; hidden ones and documentation do not); "" where `path` does not exist."""
        if path.is_file():
            return self.sha256(path)
        if not path.is_dir():
            return ""
        contents = []
        for file in sorted(path.rglob("*")):
            name = file.relative_to(path)
            hidden = any(part.startswith(".") for part in name.parts)
            if not hidden and file.is_file() and file.suffix in _CONTENT_SUFFIXES:
                contents.append([name.as_posix(), self.sha256(file)])
        return hashlib.sha256(json.dumps(contents).encode()).hexdigest()

    def _memo(self) -> dict[str, Any]:
        try:
            memo = json.loads(self.memo_path.read_text())
        except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError):
            return {}
        return memo if isinstance(memo, dict) else {}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    # A copy may bring the old mtime along; ctime is the system's own.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
