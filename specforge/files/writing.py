"""Single files and links, replaced in one step: readers see the old content or the new one."""

import contextlib
import errno
import json
import math
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from specforge.errors import SpecForgeError
from specforge.files.untrusted import inside

_NO_LINKS = {errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}
_REFUSED = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


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
    sync_folder(path.parent)


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode())


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def json_line(value: Any) -> str:
    """Numbers for other programs, on one line; what is not finite is null, since JSON knows no NaN."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


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


def sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def writable(folder: Path, error: type[SpecForgeError] = SpecForgeError) -> Iterator[None]:
    """Raise `error` with the way out where the system refuses to write below `folder`: a full disk, a quota, missing rights."""
    try:
        yield
    except OSError as cause:
        if cause.errno not in _REFUSED:
            raise
        raise error(
            f"{cause.filename or folder}: could not be written ({cause.strerror}); make room, or choose another folder than {folder}."
        ) from cause
