"""`specforge doctor [CONFIG.yaml]`: can this machine, and this configuration, train? One line a fact; what is wrong has a way out."""

import argparse
import dataclasses
import fcntl
import importlib
import importlib.metadata
import json
import math
import os
import platform
import re
import shutil
import socket
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from specforge.errors import FeatureError, SpecForgeError

if TYPE_CHECKING:
    from specforge.config import RunConfig
    from specforge.distributed import World

_JOIN_TIMEOUT_S = 120.0
_ROWS_ENCODED = 64
_LITTLE_DISK_GIB = 20.0
_FLOATS = ("F64", "F32", "F16", "BF16")


@dataclass(frozen=True)
class Finding:
    """`note`: training works, but slower or with less comfort; `bad`: it does not."""

    name: str
    state: Literal["ok", "note", "bad"]
    text: str
    way_out: str = ""


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="specforge doctor",
        description="Look at packages, devices, launcher and disk; with a CONFIG, at its target, tokenizer and rows too. "
        "Exit code 0: training can run. Under torchrun, srun or mpirun all processes join and add a number up.",
    )
    parser.add_argument("config", nargs="?", help="YAML file of the run")
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help="settings that win over the file")
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of a table")
    given = parser.parse_intermixed_args(words)

    needed = ("torch", *(["omegaconf", "transformers"] if given.config else []))
    findings = [*packages(), *(found for module in needed if (found := importable(module)))]
    if any(finding.state == "bad" for finding in findings):
        return report([*findings, *disk(Path())], given.json)
    import torch

    findings = [dataclasses.replace(finding, text=torch.__version__) if finding.name == "torch" else finding for finding in findings]
    config = None
    if given.config:
        config, found = configuration(given.config, given.overrides)
        findings.append(found)
    folder = _existing(Path(config.output_dir if config else "."))
    world, found = join()
    if world is None:
        return report([*findings, found], given.json)
    try:
        findings += [found, *ranks(world, folder)]
        healthy = True
        if world.is_main:
            findings += [*host(), *threads(world), *disk(folder)]
            if config:
                findings += [*target(config), *texts(config)]
            healthy = report(findings, given.json) == 0
        return 0 if world.from_main(healthy) else 1
    finally:
        world.leave()


def report(findings: Sequence[Finding], as_json: bool) -> int:
    """Print the findings; 0 if training can run, else 1."""
    bad = sum(finding.state == "bad" for finding in findings)
    if as_json:
        print(json.dumps({"ok": not bad, "findings": [dataclasses.asdict(finding) for finding in findings]}))
        return int(bad > 0)
    width = max(len(finding.name) for finding in findings) + 2
    for finding in findings:
        mark = {"ok": "", "note": "note: ", "bad": "WRONG: "}[finding.state]
        print(f"{finding.name:<{width}}{mark}{finding.text}" + (f"\n{'':<{width}}-> {finding.way_out}" if finding.way_out else ""))
    print(f"\n{'training can run' if not bad else f'training cannot run: {bad} of these are wrong'}")
    return int(bad > 0)


def packages() -> Iterator[Finding]:
    """Python and what the installed specforge requires, by the versions that are written down beside the packages."""
    yield Finding("python", "ok", f"{platform.python_version()}, {sys.executable}")
    try:
        required = importlib.metadata.requires("specforge") or []
    except importlib.metadata.PackageNotFoundError:
        yield Finding("specforge", "note", "is not installed, so the versions it needs are not known", "install it: pip install -e .")
        return
    for name, least in re.findall(r"^([\w-]+)>=([\d.]+)$", "\n".join(required), re.MULTILINE):
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            yield Finding(name, "bad", "is not installed", f"pip install '{name}>={least}'")
            continue
        if _numbers(version) < _numbers(least):
            yield Finding(name, "bad", f"{version} is too old", f"pip install '{name}>={least}'")
        else:
            yield Finding(name, "ok", version)


def importable(module: str) -> Finding | None:
    """What is wrong with an installed package: its import fails, by a missing module or a library that cannot be loaded."""
    try:
        importlib.import_module(module)
    except (ImportError, OSError) as cause:
        return Finding(
            f"import {module}", "bad", f"{type(cause).__name__}: {cause}", f"install {module} again, in the build for this machine"
        )
    return None


def configuration(path: str, overrides: Sequence[str]) -> tuple["RunConfig | None", Finding]:
    from specforge.config import load_config

    try:
        return load_config(path, overrides), Finding("configuration", "ok", path)
    except SpecForgeError as error:
        return None, Finding("configuration", "bad", str(error))


def join() -> tuple["World | None", Finding]:
    """Meet the other processes, if a launcher started any, and add up one number over all."""
    import torch
    import torch.distributed as dist

    from specforge.distributed import World
    from specforge.distributed.launcher import read_place

    try:
        place = read_place(os.environ)
        world = World.join(_JOIN_TIMEOUT_S)
        total = int(world.sum_(torch.ones(1)))
    except (SpecForgeError, dist.DistError) as error:
        way_out = "" if isinstance(error, SpecForgeError) else "start all processes, and let them reach MASTER_ADDR:MASTER_PORT"
        return None, Finding("world", "bad", str(error), way_out)
    if world.size == 1:
        return world, Finding("world", "ok", "one process, no launcher")
    text = f"{world.size} processes by {place.launcher}, {world.local_size} on this node; the sum of {world.size} ones is {total}"
    return world, Finding("world", "ok" if total == world.size else "bad", text)


def ranks(world: "World", folder: Path) -> list[Finding]:
    """The device of each rank, and whether it sees what rank 0 writes. All ranks call it together."""
    import torch

    probe = world.on_main(lambda: _probe(folder)) or folder
    facts = world.gather_objects((socket.gethostname(), _device(world.device), probe.is_dir()))
    if world.is_main and probe != folder:
        probe.rmdir()
    if not world.is_main:
        return []
    findings = [Finding(f"rank {rank}", "ok", f"{host}, {device}") for rank, (host, device, _) in enumerate(facts)]
    blind = [rank for rank, (_, _, sees) in enumerate(facts) if not sees]
    if blind:
        findings.append(
            Finding("shared disk", "bad", f"ranks {blind} do not see {folder}", "put output_dir on a disk that all nodes share")
        )
    if not torch.cuda.is_available():
        findings.append(
            Finding("CUDA", "note", "no device; training runs on the CPU", "a CUDA build of torch and its driver, for large targets")
        )
    else:
        findings.append(Finding("CUDA", "ok", f"{torch.version.cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}"))
    return findings


def _device(device: Any) -> str:
    import torch

    if device.type != "cuda":
        return "cpu"
    about = torch.cuda.get_device_properties(device)
    free, total = torch.cuda.mem_get_info(device)
    return f"{device} {about.name}, capability {about.major}.{about.minor}, {_gib(free)} of {_gib(total)} free"


def host() -> Iterator[Finding]:
    import psutil

    memory = psutil.virtual_memory()
    yield Finding("processors", "ok", f"{_cores()} cores for this process, of {os.cpu_count()}")
    yield Finding("memory", "ok", f"{_gib(memory.available)} of {_gib(memory.total)} free")


def threads(world: "World") -> Iterator[Finding]:
    """OpenMP settings with which processors wait instead of working; they matter where the CPU does the work."""
    given = {name: os.environ[name] for name in ("OMP_NUM_THREADS", "OMP_WAIT_POLICY") if name in os.environ}
    yield Finding("OpenMP", "ok", ", ".join(f"{name}={value}" for name, value in given.items()) or "nothing set")
    if world.device.type == "cpu" and given.get("OMP_NUM_THREADS") != "1" and given.get("OMP_WAIT_POLICY", "").upper() != "PASSIVE":
        yield Finding("OpenMP", "note", "waiting threads spin, which starves others on shared cores", "export OMP_WAIT_POLICY=PASSIVE")
    wanted = int(given.get("OMP_NUM_THREADS", "1").split(",")[0]) * world.local_size
    if wanted > _cores():
        text = f"{world.local_size} processes of {given['OMP_NUM_THREADS']} threads want more than {_cores()} cores"
        yield Finding("OpenMP", "note", text, f"export OMP_NUM_THREADS={max(1, _cores() // world.local_size)}")


def disk(folder: Path) -> Iterator[Finding]:
    """Room, and what the file system can do: folders are renamed into place, locked while in use, and linked to by name."""
    free = shutil.disk_usage(folder).free
    state: Literal["ok", "note"] = "ok" if free > _LITTLE_DISK_GIB * 2**30 else "note"
    yield Finding("disk", state, f"{_gib(free)} free for {folder.resolve()}")
    probe = _probe(folder)
    if probe is None:
        yield Finding(
            "writing", "bad", f"{folder}: refuses a new folder", "choose another output_dir, or give this user the right to write"
        )
        return
    try:
        yield _locks(probe / "lock")
        yield _links(probe / "latest")
    finally:
        shutil.rmtree(probe)


def _probe(folder: Path) -> Path | None:
    """A new folder in `folder`; None where the system refuses one."""
    try:
        return Path(tempfile.mkdtemp(prefix=".doctor-", dir=folder))
    except OSError:
        return None


def _locks(path: Path) -> Finding:
    with path.open("w") as first, path.open("w") as second:
        try:
            fcntl.flock(first, fcntl.LOCK_EX | fcntl.LOCK_NB)
            fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return Finding("locks", "ok", "flock holds others off")
        except OSError as cause:
            return Finding("locks", "bad", f"flock fails: {cause.strerror}", "mount the disk with flock, or choose another output_dir")
    return Finding("locks", "bad", "flock lets two in at a time", "mount the disk with flock, or choose another output_dir")


def _links(path: Path) -> Finding:
    try:
        path.symlink_to("lock")
    except OSError as cause:
        return Finding("links", "note", f"cannot be made: {cause.strerror}", "resume from the folder of the step in place of RUN/latest")
    return Finding("links", "ok", "can be made")


def target(config: "RunConfig") -> Iterator[Finding]:
    """The model in `model.target_path`: readable, and small enough for where it is to run."""
    from specforge.cli.inputs import Paths, captured_layers
    from specforge.features.tables import TargetConfig

    folder = Path(config.model.target_path)
    try:
        shape = TargetConfig.read(folder)
        layers = captured_layers(config, shape.num_hidden_layers)
        needed = weight_bytes(folder, config.model.dtype)
    except SpecForgeError as error:
        yield Finding("target", "bad", str(error))
        return
    text = f"{shape.model_type}, {shape.num_hidden_layers} layers of {shape.hidden_size}, captured {', '.join(map(str, layers))}"
    yield Finding("target", "ok", f"{text}; {_gib(needed)} in {config.model.dtype}")
    room, where = _room()
    if needed > room and not config.model.device_map and not Paths.of(config).features.is_dir():
        yield Finding("target", "bad", f"does not fit into {where} of {_gib(room)}", "set model.device_map=auto, or capture on more memory")


def weight_bytes(folder: Path, dtype: str) -> int:
    """What the safetensors of a folder take in memory as `dtype`; numbers of another kind count as one byte each.

    Raises:
        FeatureError: there are none, or one cannot be read.
    """
    from safetensors import SafetensorError, safe_open

    paths, width, total = sorted(folder.glob("*.safetensors")), 4 if dtype == "float32" else 2, 0
    if not paths:
        raise FeatureError(f"model.target_path={str(folder)!r}: no *.safetensors there; give the folder of a causal language model.")
    for path in paths:
        try:
            with safe_open(path, framework="numpy") as tensors:
                for name in tensors.keys():  # noqa: SIM118
                    stored = tensors.get_slice(name)
                    total += (width if stored.get_dtype() in _FLOATS else 1) * math.prod(stored.get_shape())
        except SafetensorError as cause:
            raise FeatureError(f"{path}: is not readable as safetensors ({cause}); download the target again.") from cause
    return total


def texts(config: "RunConfig") -> Iterator[Finding]:
    """Tokenizer, chat template and rows, as training reads them; the first rows are tokenised."""
    from specforge.cli import inputs
    from specforge.data.conversations import read_rows
    from specforge.data.template import encode_all

    try:
        encoder = inputs.build_encoder(config)
        yield Finding("tokenizer", "ok", config.tokenizer_path)
        for key in ("train_path", "eval_path"):
            if not (path := getattr(config.data, key)):
                continue
            rows = read_rows(path)
            encoded = encode_all(list(islice(rows, _ROWS_ENCODED)), encoder)
            tokens = [len(sample.input_ids) for sample in encoded.samples]
            share = sum(int(sample.loss_mask.sum()) for sample in encoded.samples) / sum(tokens)
            counted = f"{len(rows)} row{'s' * (len(rows) > 1)}"
            text = f"{counted}; of the first {encoded.num_rows}: longest {max(tokens)} tokens, {share:.0%} supervised"
            yield Finding(f"data.{key}", "ok", f"{text}, {encoded.truncated} truncated")
    except SpecForgeError as error:
        yield Finding("data", "bad", str(error))


def _room() -> tuple[int, str]:
    import psutil
    import torch

    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[1], "a CUDA device"
    return psutil.virtual_memory().total, "memory"


def _existing(path: Path) -> Path:
    """The nearest folder that is there already."""
    return next(folder for folder in (path, *path.absolute().parents) if folder.is_dir())


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0])[:3])


def _gib(size_bytes: float) -> str:
    return f"{size_bytes / 2**30:.1f} GiB"
