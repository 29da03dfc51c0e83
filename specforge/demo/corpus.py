"""The Python sources that every installation has, split by package into training and held-out documents.

The standard library and the packages that specforge depends on serve as a corpus that needs no download. Held-out figures mean
something only if nothing like the held-out text was trained on: so a package is held out as a whole, near copies are dropped, and a
file whose lines mostly stand in the training text is never held out. Tables, generated files and vendored packages are left out.
"""

import hashlib
import re
import sysconfig
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Literal, get_args

from specforge.errors import DataError

Split = Literal["train", "heldout"]

DEPENDENCIES = (
    "accelerate", "anyio", "certifi", "click", "filelock", "fsspec", "google", "h11", "hf_xet", "httpcore", "httpx", "huggingface_hub",
    "idna", "jinja2", "markdown_it", "mpmath", "networkx", "numpy", "omegaconf", "opentelemetry", "packaging", "platformdirs", "psutil",
    "pyarrow", "pydantic", "pygments", "regex", "requests", "rich", "safetensors", "sympy", "tokenizers", "torch", "torchgen", "tqdm",
    "transformers", "typer", "urllib3", "wandb", "yaml",
)  # fmt: skip
_DROPPED_FOLDERS = {
    "encodings", "pydoc_data", "distutils", "lib2to3", "idlelib", "turtledemo", "ensurepip", "site-packages", "__pycache__",
    "_vendor", "vendor", "vendored", "extern", "lexers", "styles", "unicode", "proto", "generated", "_generated", "bundled",
}  # fmt: skip
_CAP_BYTES = {"torch": 9_000_000, "transformers": 9_000_000, "sympy": 6_000_000, "test": 9_000_000}
_MAX_FILE_BYTES = 120_000
_DEFAULT_CAP_BYTES = 2_500_000
_HELD_OUT_SHARE = 0.10
_COPIED_SHARE = 0.5
_SALT = "specforge-demo"


@dataclass(frozen=True)
class Document:
    """One source file; `package` is its top-level module or package."""

    package: str
    name: str
    text: str


def split_of(package: str) -> Split:
    """Which side a package is on, by a hash of its name. What is not on a user's machine for certain is only trained on."""
    if package in ("test", "torch", "transformers", "sympy", "numpy"):
        return "train"
    number = int.from_bytes(hashlib.sha256(f"{_SALT}/{package}".encode()).digest()[:8])
    return "heldout" if number / 2**64 < _HELD_OUT_SHARE else "train"


def _sources() -> Iterator[tuple[str, Path, Path]]:
    """(package, root, file) of all candidate files."""
    library, packages = Path(sysconfig.get_path("stdlib")), Path(sysconfig.get_path("purelib"))
    for entry in sorted(library.iterdir()):
        if entry.suffix == ".py":
            yield entry.stem, library, entry
        elif entry.is_dir() and (entry / "__init__.py").is_file():
            yield from ((entry.name, library, path) for path in sorted(entry.rglob("*.py")))
    for name in DEPENDENCIES:
        yield from ((name, packages, path) for path in sorted((packages / name).rglob("*.py")))


def _usable(path: Path, root: Path) -> str | None:
    """The text of a file that people wrote for people, or None."""
    parts = path.relative_to(root).parts
    if _DROPPED_FOLDERS.intersection(parts) or path.name.endswith(("_pb2.py", "_pb2_grpc.py")):
        return None
    size = path.stat().st_size
    if not 300 <= size <= _MAX_FILE_BYTES:
        return None
    try:
        text = path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return None
    lines = text.splitlines()
    strange = sum(not character.isascii() for character in text) / len(text)
    generated = "generated" in text[:600].lower() and "edit" in text[:600].lower()
    return None if generated or strange > 0.02 or max(map(len, lines)) > 400 else text


def _line_hashes(text: str) -> set[int]:
    """Lines by their hashes, without those that any file may share."""
    return {hash(line) for line in map(str.strip, text.splitlines()) if len(line) > 12}


def documents(split: Split) -> tuple[Document, ...]:
    """All documents of a split, in an order that depends on their names only."""
    if split not in get_args(Split):
        raise DataError(f"split={split!r}: the corpus has two sides; ask for 'train' or 'heldout'")
    return _divided()[split]


def _tests_heldout(name: str) -> bool:
    """Whether a file of the standard library's own tests is about a module that is held out."""
    tested = re.match(r"test/test_([a-z0-9]+)", name)
    return tested is not None and split_of(tested[1]) == "heldout"


@cache
def _divided() -> dict[str, tuple[Document, ...]]:
    """Both sides: training documents first, each package up to its cap, then the held-out ones that do not repeat them."""
    chosen: dict[str, list[Document]] = defaultdict(list)
    for package, root, path in _sources():
        name = path.relative_to(root).as_posix()
        if not _tests_heldout(name) and (text := _usable(path, root)):
            chosen[split_of(package)].append(Document(package, name, text))
    seen: set[int] = set()
    used_bytes: dict[str, int] = defaultdict(int)
    kept: dict[str, list[Document]] = {"train": [], "heldout": []}
    for side in kept:
        for document in sorted(chosen[side], key=lambda d: hashlib.sha256(d.name.encode()).digest()):
            lines = _line_hashes(document.text)
            copied = len(lines & seen) / max(len(lines), 1)
            cap = _CAP_BYTES.get(document.package, _DEFAULT_CAP_BYTES)
            if copied > _COPIED_SHARE or used_bytes[document.package] + len(document.text) > cap:
                continue
            seen |= lines
            used_bytes[document.package] += len(document.text)
            kept[side].append(document)
    return {side: tuple(taken) for side, taken in kept.items()}


def digest() -> str:
    """SHA-256 over names and contents of both splits."""
    whole = hashlib.sha256()
    for side in ("train", "heldout"):
        for document in documents(side):
            whole.update(f"{side}/{document.name}\0".encode() + document.text.encode())
    return whole.hexdigest()
