"""`specforge doctor` tells what is there and what is wrong, on machines and configurations that really are so."""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from specforge.cli import doctor
from specforge.cli.__main__ import main
from specforge.distributed import World
from tests.distributed.test_world import free_port
from tests.ranks import run_ranks
from tests.texts import make_text_target, write_rows


@pytest.fixture(scope="module")
def settings(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A configuration file, and words that make it whole."""
    folder = tmp_path_factory.mktemp("doctor")
    target = make_text_target(folder / "target")
    rows = write_rows(folder / "rows.jsonl", 12)
    (folder / "c.yaml").write_text("data: {max_length: 64}\n")
    return [str(folder / "c.yaml"), f"model.target_path={target}", f"data.train_path={rows}", f"output_dir={folder / 'run'}"]


def examine(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, dict[str, dict[str, Any]]]:
    capsys.readouterr()
    code = main(["doctor", "--json", *words])
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] == (code == 0)
    return code, {finding["name"]: finding for finding in told["findings"]}


def test_a_machine_that_can_train(capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(capsys)
    assert code == 0
    assert found["torch"]["text"] == torch.__version__
    assert {"python", "world", "processors", "memory", "disk"} <= found.keys()
    assert found["locks"]["state"] == found["links"]["state"] == "ok"


@pytest.mark.parametrize(("free_gib", "state"), [(20.0, "note"), (20.1, "ok")])
def test_little_disk_is_a_note(free_gib: float, state: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free_gib * 2**30)))
    code, found = examine(capsys)
    assert (code, found["disk"]["state"]) == (0, state), "a note stops nobody"
    assert f"{free_gib:.1f}" in found["disk"]["text"]


def test_torch_is_named_with_its_build(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Which is not part of every wheel's own version."""
    written = tmp_path / "torch-99.0.dist-info" / "METADATA"
    written.parent.mkdir()
    written.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 99.0\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    assert examine(capsys)[1]["torch"]["text"] == torch.__version__


def test_the_table_is_for_people(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["doctor"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[-1] == "training can run"
    assert any(line.startswith("torch ") and line.endswith(torch.__version__) for line in lines)


def test_a_configuration_that_can_train(settings: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """The rows of `write_rows` hold 12 conversations with one answer each."""
    code, found = examine(capsys, *settings)
    assert code == 0
    assert found["target"]["text"].startswith("llama, 4 layers of 32, captured 1, 2, 3")
    assert found["data.train_path"]["text"].startswith("12 rows; of the first 12: longest ")
    assert not Path(settings[-1].removeprefix("output_dir=")).exists(), "looking changes nothing"


def test_what_a_configuration_lacks(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, found = examine(capsys, *settings, f"model.target_path={tmp_path}/nowhere")
    assert (code, found["target"]["state"], found["data"]["state"]) == (1, "bad", "bad")
    assert "nowhere" in found["target"]["text"]
    bare = make_text_target(tmp_path / "bare", template="")
    assert "data.chat_template" in examine(capsys, *settings, f"model.target_path={bare}")[1]["data"]["text"]
    (tmp_path / "broken.jsonl").write_text('{"conversations": [')
    assert "broken.jsonl:1" in examine(capsys, *settings, f"data.train_path={tmp_path}/broken.jsonl")[1]["data"]["text"]
    code, found = examine(capsys, *settings, "train.stepps=3")
    assert code == 1 and {"processors", "memory", "disk"} <= found.keys(), "the machine is examined all the same"
    assert "train.stepps" in found["configuration"]["text"]


def test_weight_bytes(settings: list[str]) -> None:
    """Llama of 4 layers, hidden 32, feed-forward 48, 4 query and 2 key heads of 8, tied: q, o 32*32, k, v 16*32, three of 32*48, norms."""
    folder = Path(settings[1].removeprefix("model.target_path="))
    vocabulary = json.loads((folder / "config.json").read_text())["vocab_size"]
    elements = vocabulary * 32 + 4 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 32 * 48 + 2 * 32) + 32
    assert doctor.weight_bytes(folder, "float32") == 4 * elements
    assert doctor.weight_bytes(folder, "bfloat16") == 2 * elements


@pytest.mark.skipif(torch.cuda.is_available(), reason="there the device's memory is the limit")
def test_a_target_larger_than_memory(settings: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A sparse file that declares one bfloat16 number for every two bytes of memory: twice the memory in float32."""
    folder = make_text_target(tmp_path / "large")
    size = psutil.virtual_memory().total // 2 * 2
    header = json.dumps({"more": {"dtype": "BF16", "shape": [size // 2], "data_offsets": [0, size]}}).encode()
    with (folder / "more.safetensors").open("wb") as shard:
        shard.write(len(header).to_bytes(8, "little") + header)
        shard.truncate(8 + len(header) + size)
    code, found = examine(capsys, *settings, f"model.target_path={folder}")
    assert code == 1
    assert "does not fit into memory" in found["target"]["text"]
    assert examine(capsys, *settings, f"model.target_path={folder}", "model.device_map=auto")[0] == 0


@pytest.mark.parametrize("cause", ["ImportError('libcudart.so.12: cannot open shared object file')", "OSError('libtorch.so: bad ELF')"])
def test_a_broken_torch_is_told(cause: str, tmp_path: Path) -> None:
    (tmp_path / "torch.py").write_text(f"raise {cause}")
    command = [sys.executable, "-m", "specforge", "doctor"]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert f"WRONG: {cause.split('(')[0]}: lib" in done.stdout
    assert "install torch again" in done.stdout
    assert "Traceback" not in done.stderr


def test_packages_that_are_missing_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    described = tmp_path / "specforge-9.dist-info"
    described.mkdir()
    needs = "Requires-Dist: torch>=2.11\nRequires-Dist: numpy>=99.1\nRequires-Dist: not-to-be-found>=1.0\n"
    (described / "METADATA").write_text(f"Metadata-Version: 2.1\nName: specforge\nVersion: 9\n{needs}")
    monkeypatch.syspath_prepend(tmp_path)
    found = {finding.name: finding for finding in doctor.packages()}
    assert found["torch"].state == "ok"
    assert (found["numpy"].state, found["numpy"].way_out) == ("bad", "pip install 'numpy>=99.1'")
    assert (found["not-to-be-found"].state, found["not-to-be-found"].text) == ("bad", "is not installed")


def test_a_folder_that_refuses_to_be_written() -> None:
    """Nobody, not even root, may make a folder in /proc."""
    assert [finding.state for finding in doctor.disk(Path("/proc")) if finding.name == "writing"] == ["bad"]


def test_threads_that_hurt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "4096")
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    told = [finding.way_out for finding in doctor.threads(World()) if finding.state == "note"]
    assert told[0] == "export OMP_WAIT_POLICY=PASSIVE"
    assert told[1].startswith("export OMP_NUM_THREADS=")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    assert [finding.state for finding in doctor.threads(World())] == ["ok"]


def told_by_rank(ranks: World, environment: dict[str, str]) -> tuple[int, str]:
    ranks.barrier()
    ranks.leave()
    os.environ.update({**environment, "RANK": str(ranks.rank), "LOCAL_RANK": str(ranks.rank)})
    with contextlib.redirect_stdout(io.StringIO()) as out:
        code = main(["doctor"])
    return code, out.getvalue()


def test_ranks_meet_and_one_of_them_tells() -> None:
    environment = {"WORLD_SIZE": "2", "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
    (main_code, told), (other_code, nothing) = run_ranks(told_by_rank, environment)
    assert (main_code, other_code, nothing) == (0, 0, "")
    assert "2 processes by torchrun, 2 on this node; the sum of 2 ones is 2" in told
    assert [line.split()[1] for line in told.splitlines() if line.startswith("rank ")] == ["0", "1"]


def test_a_launcher_that_says_too_little(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    code, found = examine(capsys)
    assert code == 1
    assert "MASTER_ADDR" in found["world"]["text"]
