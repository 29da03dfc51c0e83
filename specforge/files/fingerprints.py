"""Hashes of content, remembered."""

import contextlib
import hashlib
import json
import time
from pathlib import Path
from typing import Any

from specforge.errors import SpecForgeError
from specforge.files.untrusted import read_json
from specforge.files.writing import write_json

_CONTENT_SUFFIXES = {".json", ".jsonl", ".safetensors", ".model", ".txt", ".jinja", ".parquet", ".tiktoken", ".yaml"}
_SETTLED_S = 2.0
"""A file changed less than this ago may change again without a new time stamp, so nothing is remembered of it."""


def sha256_file(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


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
            with contextlib.suppress(OSError):  # where nothing can be written, nothing is remembered
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
            memo = read_json(self.memo_path)
        except SpecForgeError:  # none yet, or damaged: files are read again
            return {}
        return memo if isinstance(memo, dict) else {}


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    # A copy may bring the old mtime along; ctime is the system's own.
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
