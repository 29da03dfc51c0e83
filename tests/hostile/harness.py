"""Reads hostile variants in a child with bounded memory and time, and judges what the reader made of each."""

import hashlib
import json
import multiprocessing
import os
import resource
import shutil
import signal
import tempfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specforge import files
from specforge.errors import SpecForgeError
from tests.hostile.variants import Variant

PATIENCE_S = 20
GROWTH_MIB = 400
"""A library that refuses a file may have read it; the largest is 70 MiB."""


class HungError(Exception):
    """A reader waits for something that does not come."""


def outcomes(
    base: Path,
    cases: Iterable[tuple[str, Variant, bool]],
    read: Callable[[Path], object],
    tmp_path: Path,
    seal: Callable[[Path], None] = lambda folder: None,
    names: Callable[[str], bool] = lambda message: False,
) -> dict[str, str]:
    """What `read` makes of copies of `base`: name of the variant -> refused, equal, different, or what went wrong.

    A case is (name of the file below `base`, variant, whether to seal the folder again so that its checksums fit). A message must
    name a path of the copy, or satisfy `names`. Fails where
    the child dies, grows, executes a pickle, or something beside the copy changes.
    """
    canary = tmp_path / "canary"
    shutil.rmtree(canary, ignore_errors=True)
    canary.mkdir()
    (canary / "secret").write_text("untouched")
    report, before = tmp_path / "report", _tree(canary)
    report.unlink(missing_ok=True)

    def work() -> None:
        torch.set_num_threads(1)
        _limit_memory()
        signal.signal(signal.SIGALRM, _hang)
        with report.open("a", buffering=1) as file:
            expected = digest(read(_copy(base, tmp_path)))
            size_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for number, (name, (what, harm), sealed) in enumerate(cases):
                label = f"{number} {name}: {what}" + (", sealed" if sealed else "")
                file.write(json.dumps([label, "the reader died"]) + "\n")
                folder = _copy(base, tmp_path)
                harm(folder / name)
                if sealed:
                    seal(folder)
                file.write(json.dumps([label, _outcome(read, folder, expected, names)]) + "\n")
            growth_mib = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - size_kib) / 2**10
            file.write(json.dumps(["memory", "bounded" if growth_mib < GROWTH_MIB else f"grew by {growth_mib:.0f} MiB"]) + "\n")

    child = multiprocessing.get_context("fork").Process(target=work)
    child.start()
    child.join()
    found = dict(json.loads(line) for line in report.read_text().splitlines())
    assert child.exitcode == 0, f"the child ended with {child.exitcode} at {list(found.items())[-1]}"
    assert found.pop("memory") == "bounded"
    after = _tree(canary)
    copies = {path.name for path in base.rglob("*")}  # that links lead to
    assert {name: text for name, text in after.items() if name not in copies} == before, "something outside the folder was changed"
    assert not (tmp_path / "marker").exists(), "a pickle was executed"
    return found


def _outcome(read: Callable[[Path], object], folder: Path, expected: str, names: Callable[[str], bool]) -> str:
    signal.alarm(PATIENCE_S)
    try:
        value = read(folder)
    except SpecForgeError as error:
        message = str(error)
        sentence = (str(folder) in message or names(message)) and "\n" not in message and len(message) < 1500
        return "refused" if type(error) is not SpecForgeError and sentence else f"a bad message: {type(error).__name__} {message[:300]!r}"
    except BaseException as error:
        return f"{type(error).__name__}: {str(error)[:300]!r}"
    finally:
        signal.alarm(0)
    return "equal" if digest(value) == expected else "different"


def wrong(found: dict[str, str], allowed: tuple[str, ...]) -> dict[str, str]:
    return {name: outcome for name, outcome in found.items() if outcome not in allowed}


def digest(value: Any) -> str:
    """Equal for equal values, tensors and arrays bit by bit."""
    sums = hashlib.sha256()

    def add(inner: Any) -> None:
        if isinstance(inner, torch.Tensor):
            add([str(inner.dtype), list(inner.shape)])
            sums.update(inner.detach().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        elif isinstance(inner, np.ndarray):
            add(inner.tolist())
        elif isinstance(inner, dict):
            add([[key, value] for key, value in inner.items()])
        elif isinstance(inner, list | tuple):
            sums.update(b"[%d" % len(inner))
            for one in inner:
                add(one)
        else:
            sums.update(repr(inner).encode() + b";")

    add(value)
    return sums.hexdigest()


def reseal(folder: Path, manifest_name: str = files.MANIFEST) -> None:
    """Forge the manifest so that it fits what is there, as somebody would who wants to be believed."""
    path = folder / manifest_name
    manifest = json.loads(path.read_text())
    for name in manifest["files"]:
        file = folder / name
        if file.is_file() and not file.is_symlink():
            manifest["files"][name] = {"size_bytes": file.stat().st_size, "sha256": files.sha256_file(file)}
    path.write_text(json.dumps(manifest))


def _copy(base: Path, tmp_path: Path) -> Path:
    """Small files, always at the same place, so that messages and values are comparable."""
    folder = tmp_path / "copy" / "folder"
    if folder.parent.exists():
        shutil.rmtree(folder.parent)
    shutil.copytree(base, folder, symlinks=True)
    return folder


def _limit_memory() -> None:
    """The address space may grow by 1 GiB: what reserves as much as a header claims fails at once."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * os.sysconf("SC_PAGE_SIZE") + 2**30
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    tempfile.tempdir = None


def _hang(number: int, frame: object) -> None:
    raise HungError(f"not finished after {PATIENCE_S} s")


def _tree(folder: Path) -> dict[str, str]:
    return {path.relative_to(folder).as_posix(): files.sha256_file(path) for path in folder.rglob("*") if path.is_file()}
