"""Hostile variants of a file: each is a name and a function that does something to the path of the file.

Everything is drawn from one seed, so that a variant that was refused wrongly can be tried again.
"""

import json
import os
import pickle
import random
import shutil
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

Harm = Callable[[Path], object]
Variant = tuple[str, Harm]
SEED = 20
DEEP = 200_000


class Marker:
    """Unpickled, it makes a file: proof that something was executed."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mknod, (str(self.path),)


def content(data: bytes | str) -> Harm:
    return lambda path: path.write_bytes(data if isinstance(data, bytes) else data.encode())


def damaged(original: bytes, flips: int = 12) -> Iterator[Variant]:
    """What a bad disk or a torn copy does. Every variant differs from the original in content."""
    draw = random.Random(SEED)
    for at in sorted({0, 1, 7, 8, 9, len(original) - 1, *(draw.randrange(len(original)) for _ in range(6))}):
        if at < len(original):
            yield f"truncated at {at}", content(original[:at])
    for number in range(flips):
        at, bit = draw.randrange(min(len(original), 400) if number % 2 else len(original)), draw.randrange(8)
        yield f"bit {bit} of byte {at}", content(original[:at] + bytes([original[at] ^ 1 << bit]) + original[at + 1 :])
    for _ in range(4):
        at = draw.randrange(len(original))
        yield f"byte {at} is 255", content(original[:at] + bytes([255 if original[at] != 255 else 254]) + original[at + 1 :])
    yield "not UTF-8", content(original[:9] + b"\xc3\x28" + original[9:])


def replaced(canary: Path, marker: Path) -> Iterator[Variant]:
    """Something else lies where the file was. `canary` is a folder outside with a file `copy` of equal content for each."""

    def instead(put: Callable[[Path], object]) -> Harm:
        def harm(path: Path) -> None:
            path.unlink()
            put(path)

        return harm

    def link(target: Callable[[Path], Path]) -> Harm:
        return instead(lambda path: path.symlink_to(target(path)))

    def leave(path: Path) -> None:
        copy = canary / path.name
        if not copy.exists():
            shutil.copy(path, copy)
        path.unlink()
        path.symlink_to(copy)

    def zip_of_torch(path: Path) -> None:
        torch.save({"weight": Marker(marker)}, path)

    yield "absent", lambda path: path.unlink()
    yield "empty", content(b"")
    yield "a folder", instead(Path.mkdir)
    yield "a pipe", instead(os.mkfifo)
    yield "a link to nothing", link(lambda path: path.with_name("nothing"))
    yield "a link to itself", link(lambda path: path)
    yield "a link to a device", link(lambda path: Path("/dev/zero"))
    yield "a link that leaves", leave
    yield "a pickle", lambda path: path.write_bytes(pickle.dumps(Marker(marker)))
    yield "a zip of torch.save", zip_of_torch
    yield "70 MiB of nothing", lambda path: os.truncate(path, 70 * 2**20)


def json_texts(original: bytes) -> Iterator[Variant]:
    """Other JSON, or nearly. `original` is an object."""
    text = original.decode()
    yield "deep lists", content("[" * DEEP)
    yield "deep closed lists", content("[" * 70 + "]" * 70)
    yield "deep objects", content('{"a":' * DEEP)
    yield "deep field", content('{"deep": ' + "[" * DEEP + "]" * DEEP + "," + text.strip()[1:])
    yield "a number of 5,000 digits", content('{"huge": ' + "9" * 5000 + "," + text.strip()[1:])
    first = json.dumps(next(iter(json.loads(text))))
    yield "a repeated key", content(f"{{{first}: null, {text.strip()[1:]}")
    yield "two values", content(text + text)
    for value in ("null", "true", "3", '"text"', "[]", "{}", "NaN", "[{}]"):
        yield f"only {value}", content(value)


WRONG: dict[type, list[Any]] = {
    str: [None, 3, [], {}, True],
    int: [None, "x", [], {}, True, -1, 2**80, float("nan"), 1.5, 10**4000],
    float: [None, "x", [], {}, True, float("nan"), float("inf")],
    list: [None, "x", 3, {}, [[]], [None]],
    dict: [None, "x", 3, []],
    bool: [None, "x", [], {}],
}


def json_fields(original: bytes, free: tuple[str, ...] = (), optional: tuple[str, ...] = ()) -> Iterator[Variant]:
    """Each field of the object missing and of each wrong type. What lies below a field of `free` may be anything; fields
    of `optional` may be missing or null."""
    for place, value in _fields(json.loads(original), free):
        where = ".".join(map(str, place))
        if place[-1] not in optional and not isinstance(place[-1], int):
            yield f"{where} is missing", content(_edited(original, place, None, remove=True))
        for wrong in WRONG.get(type(value), []):
            if not (wrong is None and place[-1] in optional):
                shown = "a huge number" if isinstance(wrong, int) and wrong > 2**90 else wrong
                yield f"{where} is {shown!r}", content(_edited(original, place, wrong))


def _fields(value: Any, free: tuple[str, ...], place: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every field of an object, and the first element of every list."""
    items = value.items() if isinstance(value, dict) else list(enumerate(value))[:1]
    for name, inner in items:
        yield (*place, name), inner
        if isinstance(inner, dict | list) and name not in free:
            yield from _fields(inner, free, (*place, name))


def _edited(original: bytes, place: tuple[str | int, ...], wrong: Any, remove: bool = False) -> bytes:
    whole = json.loads(original)
    inner = whole
    for name in place[:-1]:
        inner = inner[name]
    if remove:
        del inner[place[-1]]
    elif isinstance(wrong, int) and wrong > 2**90:
        inner[place[-1]] = "HUGE"
        return json.dumps(whole).replace('"HUGE"', "1" + "0" * 4000).encode()
    else:
        inner[place[-1]] = wrong
    return json.dumps(whole).encode()


def safetensors_headers(original: bytes) -> Iterator[Variant]:
    """Headers that lie about the data, which is left as it is."""
    length = struct.unpack("<Q", original[:8])[0]
    header, data = json.loads(original[8 : 8 + length]), original[8 + length :]
    name = next(name for name in header if name != "__metadata__")

    def with_header(text: str, claimed: int | None = None) -> Harm:
        encoded = text.encode()
        return content(struct.pack("<Q", len(encoded) if claimed is None else claimed) + encoded + data)

    def with_tensor(**fields: Any) -> Harm:
        return with_header(json.dumps({**header, name: {**header[name], **fields}}))

    whole = json.dumps(header)
    for claimed in (0, 1, 2**62, 2**64 - 1, 100_000_000, 100_000_001, length + len(data) + 1, 2**31):
        yield f"header of {claimed} bytes", with_header(whole, claimed)
    end = len(data)
    for offsets in ([0, end + 8], [end, 0], [8, 4], [-8, end], [2**62, 2**63], [0, 0], ["0", "8"], [0], None, [1.5, 8]):
        yield f"offsets {offsets}", with_tensor(data_offsets=offsets)
    shapes: tuple[Any, ...] = ([-1], [2**62], [2**32, 2**32], [2**63, 2], [1, 0, 2**60], "4", None, [1.5], [[]], [1] * 300)
    for shape in shapes:
        yield f"shape {str(shape)[:40]}", with_tensor(shape=shape)
    for dtype in ("F16", "F64", "I8", "F128", "", None, 3):
        yield f"dtype {dtype!r}", with_tensor(dtype=dtype)
    yield (
        "all tensors at one place",
        with_header(json.dumps({key: value if key == "__metadata__" else header[name] for key, value in header.items()})),
    )
    yield "a tensor twice", with_header("{" + f"{json.dumps(name)}: {json.dumps(header[name])}, " + whole[1:])
    yield "a hole after the header", content(original[:8] + original[8 : 8 + length] + bytes(64) + data)
    yield "deep header", with_header('{"a":' * 100_000)
    yield "a list as header", with_header("[]")
    yield "no tensors", with_header("{}")
    yield "metadata of numbers", with_header(json.dumps({**header, "__metadata__": {"a": 3}}))
    if "__metadata__" in header:
        for key in header["__metadata__"]:
            for wrong in (
                "",
                "{",
                "[]",
                "null",
                "{}",
                "[" * DEEP,
                json.dumps({name: {"saved_offsets": [-4]}}),
                json.dumps({name: {"saved_offsets": "x"}}),
            ):
                yield (
                    f"metadata {key} = {wrong[:20]}",
                    with_header(json.dumps({**header, "__metadata__": {**header["__metadata__"], key: wrong}})),
                )


def other_tensors(name: str) -> Iterator[Variant]:
    """Well-formed files with the tensor `name` of another type, shape, or not at all."""

    def edit(change: Callable[[torch.Tensor], torch.Tensor | None]) -> Harm:
        def harm(path: Path) -> None:
            from safetensors import safe_open

            with safe_open(path, framework="pt") as opened:
                notes = opened.metadata()
            tensors = load_file(path)
            changed = change(tensors.pop(name))
            save_file(tensors | ({} if changed is None else {name: changed.clone().contiguous()}), path, notes)

        return harm

    yield f"{name} gone", edit(lambda tensor: None)
    yield f"{name} as float64", edit(lambda tensor: tensor.double())
    yield f"{name} as float16", edit(lambda tensor: tensor.half())
    yield f"{name} as int8", edit(lambda tensor: tensor.to(torch.int8))
    yield f"{name} one row shorter", edit(lambda tensor: tensor[:-1])
    yield f"{name} one row longer", edit(lambda tensor: torch.cat([tensor, tensor[:1]]))
    yield f"{name} with one more dimension", edit(lambda tensor: tensor[None])
    yield f"{name} as one number", edit(lambda tensor: tensor.flatten()[0])
    yield f"{name} without rows", edit(lambda tensor: tensor[:0])


def names_in(manifest: bytes, marker: Path) -> Iterator[Variant]:
    """Manifests that list a file outside the folder, or a name that no file can have."""
    for name in (
        "../secret",
        "/etc/passwd",
        "a/../../b",
        "..",
        "",
        ".",
        "a\0b",
        "a\\..\\b",
        "\ud800",
        "x" * 5000,
        "a/" * 3000,
        str(marker),
    ):
        whole = json.loads(manifest)
        whole["files"][name] = {"size_bytes": 0, "sha256": ""}
        yield f"name {name[:20]!r}", content(json.dumps(whole))


def strangers(marker: Path) -> Iterator[Variant]:
    """A file that no manifest lists, beside the file that is named; it would be read if a reader took all that is there."""
    yield "a copy beside it", lambda path: shutil.copy(path, path.with_name("zz.safetensors"))
    yield "a pickle beside it", lambda path: path.with_name("zz.safetensors").write_bytes(pickle.dumps(Marker(marker)))
    yield "a pipe beside it", lambda path: os.mkfifo(path.with_name("zz.safetensors"))
