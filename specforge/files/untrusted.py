"""Readers of files that others may have written, damaged or forged. They bound what they read, execute nothing, wait for
nobody, and name the file when they refuse it."""

import contextlib
import json
import os
import stat
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import UnionType
from typing import Any, get_origin, get_type_hints

from safetensors import SafetensorError, safe_open

from specforge.errors import SpecForgeError

_LARGEST_MIB = 64
_DEEPEST = 64
_LONGEST_NAME_BYTES, _LONGEST_PATH = 255, 1024
_LARGEST_COUNT = 2**63


def read_bytes(path: Path, error: type[SpecForgeError] = SpecForgeError, largest_mib: int = _LARGEST_MIB) -> bytes:
    """The content of a regular file that is not larger than `largest_mib`."""
    with os.fdopen(_open_regular(path, error), "rb") as file:
        size_bytes = os.fstat(file.fileno()).st_size
        if size_bytes > largest_mib * 2**20:
            raise error(
                f"{path}: has {size_bytes} bytes, more than the {largest_mib} MiB that such a file may have; make its folder again."
            )
        return file.read(size_bytes)


def read_json(path: Path, error: type[SpecForgeError] = SpecForgeError, largest_mib: int = _LARGEST_MIB) -> Any:
    """The value in a JSON file without repeated keys, lists and objects at most 64 deep."""
    try:
        return parse_json(read_bytes(path, error, largest_mib))
    except ValueError as cause:
        raise error(f"{path}: is not valid JSON ({cause}); it was damaged, so make its folder again.") from cause


def parse_json(data: bytes) -> Any:
    """Raises ValueError, also where a key is repeated in an object or lists and objects are more than 64 deep."""
    try:
        value = json.loads(data.decode(), object_pairs_hook=_without_repetition)
    except RecursionError as cause:
        raise ValueError("lists and objects are nested without end") from cause
    if _is_deep(value):
        raise ValueError(f"lists and objects are nested more than {_DEEPEST} deep")
    return value


def read_object(path: Path, error: type[SpecForgeError], largest_mib: int = _LARGEST_MIB, **kinds: type | UnionType) -> dict[str, Any]:
    """The object in a JSON file; it has the fields `kinds`, and perhaps others.

    `int` means a number from 0 that fits in 64 bits, `float` any finite number.
    """
    value = read_json(path, error, largest_mib)
    check_fields(value, str(path), error, **kinds)
    return value


def check_fields(value: Any, where: str, error: type[SpecForgeError], **kinds: type | UnionType) -> None:
    """Raise unless `value` is an object with the fields `kinds`; `where` names it in the message."""
    if not isinstance(value, dict):
        raise error(f"{where}: must be a JSON object, not {shown(value)}; it was damaged, so make its folder again.")
    for name, kind in kinds.items():
        if name not in value:
            raise error(f"{where}: {name} is missing; the file was damaged or is of another version, so make its folder again.")
        if not is_a(value[name], kind):
            wanted = getattr(kind, "__name__", str(kind))
            raise error(f"{where}: {name}={shown(value[name])} must be of type {wanted}; it was damaged, so make its folder again.")


def kinds_of(record: type) -> dict[str, Any]:
    """The fields of a dataclass and their kinds, for `check_fields`."""
    hints = get_type_hints(record).items()
    return {name: hint if isinstance(hint, UnionType) else get_origin(hint) or hint for name, hint in hints}


def is_a(value: object, kind: type | UnionType) -> bool:
    """Whether a JSON value is of a kind; see `read_object`."""
    if isinstance(value, bool) or kind not in (int, float):
        return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))
    if kind is int:
        return isinstance(value, int) and 0 <= value < _LARGEST_COUNT
    return isinstance(value, int | float) and -float("inf") < value < float("inf")


def shown(value: object) -> str:
    """A value for a message: not longer than a line, whatever it is."""
    if isinstance(value, int) and abs(value) >= 10**40:
        return "a number of more than 40 digits"
    text = " ".join(repr(value).split())
    return text if len(text) <= 120 else f"{text[:120]}..."


def open_tensors(path: Path, error: type[SpecForgeError]) -> safe_open:
    """A safetensors file, its header checked, its tensors mapped into memory and not yet read."""
    os.close(_open_regular(path, error))
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as cause:
        raise error(f"{path}: is not readable as safetensors ({cause}); make its folder again or take another copy.") from cause


@contextlib.contextmanager
def foreign(path: Path, error: type[SpecForgeError], way_out: str) -> Iterator[None]:
    """Around a library's reader of `path`, which may raise anything over content that it did not expect."""
    try:
        yield
    except Exception as cause:
        raise error(f"{path}: cannot be read ({shown(cause)}); {way_out}.") from cause


def inside(root: Path, name: str, error: type[SpecForgeError] = SpecForgeError) -> Path:
    """`root/name`, where `name` was read from a file: relative, without `..`, and so never outside `root`."""
    parts = PurePosixPath(name).parts if isinstance(name, str) else ()
    if not parts or len(name) > _LONGEST_PATH or name.startswith("/") or ".." in parts or not all(_is_plain(part) for part in parts):
        raise error(f"file name {shown(name)} listed in {root}: must be relative and stay inside that folder; do not trust this folder.")
    return root / name


def _is_plain(part: str) -> bool:
    encoded = part.encode(errors="replace")
    return encoded.decode() == part and len(encoded) <= _LONGEST_NAME_BYTES and "\\" not in part and "\0" not in part


def _open_regular(path: Path, error: type[SpecForgeError]) -> int:
    """A descriptor of a file that is no pipe, device or folder."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # opening a pipe would wait for its writer
    except FileNotFoundError as cause:
        raise error(f"{path}: there is no such file; its folder is incomplete or not of this kind.") from cause
    except OSError as cause:
        raise error(f"{path}: cannot be read ({cause.strerror}); its folder is damaged or not of this kind.") from cause
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise error(f"{path}: must be a file and is something else; its folder is damaged or not of this kind.")
    return descriptor


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a key occurs twice in one object")
    return value


def _is_deep(value: object) -> bool:
    level: list[Any] = [value]
    for _ in range(_DEEPEST + 1):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
