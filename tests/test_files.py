"""Folders are complete or absent, damage is found, and locks outlive no holder."""

import json
import multiprocessing
import os
import signal
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from specforge import files
from specforge.errors import FeatureError, SpecForgeError


def fork(fn: Callable[[], None]) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=fn)
    process.start()
    return process


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


def settle(folder: Path) -> None:
    """Make every file look written long ago, as files are that have not just been made."""
    for path in folder.rglob("*"):
        os.utime(path, (1_000_000_000, 1_000_000_000))


def make_folder(final: Path) -> Path:
    with files.staging(final) as folder:
        (folder / "sub").mkdir()
        (folder / "a.json").write_text("{}")
        (folder / "sub" / "b.bin").write_bytes(bytes(range(200)))
        (folder / "sub" / "b.bin").chmod(0o600)
    return final


def test_staged_folder_appears_sealed(tmp_path: Path) -> None:
    final = make_folder(tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    assert sorted(files.verify(final)["files"]) == ["a.json", "sub/b.bin"]
    assert (final / "sub" / "b.bin").stat().st_mode == (final / "manifest.json").stat().st_mode, "who may read one may read all"


def test_failed_staging_leaves_nothing(tmp_path: Path) -> None:
    def fail() -> None:
        with files.staging(tmp_path / "out") as folder:
            (folder / "half").write_text("x")
            raise KeyError("boom")

    with pytest.raises(KeyError):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_nothing_is_overwritten(tmp_path: Path) -> None:
    final = make_folder(tmp_path / "out")
    with pytest.raises(SpecForgeError, match="exists already"):
        files.new_staging(final)


def test_killed_writer_is_invisible_and_swept(tmp_path: Path) -> None:
    final, begun = tmp_path / "out", tmp_path / "begun"

    def write_forever() -> None:
        with files.staging(final) as folder:
            (folder / "half").write_text("x")
            begun.touch()
            time.sleep(60)

    writer = fork(write_forever)
    wait_until(begun.exists)
    os.kill(writer.pid, signal.SIGKILL)
    writer.join()
    other = files.new_staging(tmp_path / "out2")
    assert not final.exists()
    assert len(files.sweep(final)) == 1
    assert files.sweep(final) == []
    assert other.exists()  # another folder's staging is not ours to sweep


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda path: path.unlink(), "missing"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "has 199 bytes, the manifest says 200"),
        (lambda path: path.write_bytes(bytes([1]) + path.read_bytes()[1:]), "SHA-256"),
    ],
)
def test_damage_is_named(tmp_path: Path, harm: Callable[[Path], None], message: str) -> None:
    final = make_folder(tmp_path / "out")
    files.verify(final, FeatureError)
    harm(final / "sub" / "b.bin")
    with pytest.raises(FeatureError, match=rf"b\.bin.*{message}"):
        files.verify(final, FeatureError)


def test_sizes_alone_do_not_see_a_flipped_bit(tmp_path: Path) -> None:
    final = make_folder(tmp_path / "out")
    (final / "sub" / "b.bin").write_bytes(bytes(200))
    files.verify(final, sizes_only=True)
    with pytest.raises(SpecForgeError):
        files.verify(final)


def test_checksums_given_are_not_computed_again(tmp_path: Path) -> None:
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "a").write_text("a")
    (folder / "progress").write_text("not content")
    files.publish(folder, tmp_path / "out", known_sha256={"a": "given"}, leave_out=["progress"], notes={"key": "k"})
    manifest = json.loads((tmp_path / "out" / files.MANIFEST).read_text())
    assert manifest["files"] == {"a": {"size_bytes": 1, "sha256": "given"}}
    assert manifest["key"] == "k"


def test_manifest_cannot_name_files_outside(tmp_path: Path) -> None:
    final = make_folder(tmp_path / "out")
    manifest = json.loads((final / files.MANIFEST).read_text())
    manifest["files"]["../secret"] = {"size_bytes": 0, "sha256": ""}
    (final / files.MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(SpecForgeError, match="must be relative"):
        files.verify(final)


@pytest.mark.parametrize("name", ["", "/etc/passwd", "../a", "a/../../b", "a\\..\\b", "a\0b"])
def test_escaping_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(SpecForgeError, match="must be relative"):
        files.inside(tmp_path, name)


def test_harmless_names_are_not_refused(tmp_path: Path) -> None:
    assert files.inside(tmp_path, "a/..b/c.json") == tmp_path / "a" / "..b" / "c.json"


def test_text_is_replaced_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    files.write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        files.write_text(path, "new\ud800")
    assert path.read_text() == "old"
    files.write_json(path, {"ä": [1, 2]})
    assert files.read_json(path) == {"ä": [1, 2]}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.txt"]


def test_unreadable_json_is_named(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"a\.json: there is no such file"):
        files.read_json(tmp_path / "a.json", FeatureError)
    (tmp_path / "a.json").write_text('{"torn')
    with pytest.raises(FeatureError, match="not valid JSON"):
        files.read_json(tmp_path / "a.json", FeatureError)


def test_links_are_relative_and_replaced(tmp_path: Path) -> None:
    root = tmp_path / "run"
    for name in ("one", "two"):
        (root / name).mkdir(parents=True)
        assert files.relative_link(root / "latest", name)
    moved = root.rename(tmp_path / "moved")
    assert (moved / "latest").resolve() == moved / "two"


def test_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: Path, target: str) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    assert files.relative_link(tmp_path / "latest", "one") is False


def test_free_space_is_asked_of_the_disk_that_will_hold_the_folder(tmp_path: Path) -> None:
    files.require_free(tmp_path / "not" / "yet" / "there", 1, "a test", FeatureError)
    with pytest.raises(FeatureError, match=r"a test needs .* GiB, the disk has .* GiB free"):
        files.require_free(tmp_path / "not" / "yet" / "there", 2**60, "a test", FeatureError)


def test_lock_excludes_and_is_taken_over_from_the_dead(tmp_path: Path) -> None:
    path, held = tmp_path / "lock", tmp_path / "held"

    def hold() -> None:
        with files.Lock(path):
            held.touch()
            time.sleep(60)

    holder = fork(hold)
    wait_until(held.exists)
    lock = files.Lock(path)
    assert not lock.try_acquire()
    os.kill(holder.pid, signal.SIGKILL)
    holder.join()
    lock.acquire(poll_s=0.01)
    assert not files.Lock(path).try_acquire()
    lock.release()
    assert not path.exists()


def test_locked_sections_never_overlap(tmp_path: Path) -> None:
    """Four processes add to a counter without any other protection; the lock file is removed and made again each time."""
    counter = tmp_path / "counter"
    counter.write_text("0")

    def add() -> None:
        for _ in range(200):
            lock = files.Lock(tmp_path / "lock")
            lock.acquire(poll_s=0)
            counter.write_text(str(int(counter.read_text()) + 1))
            lock.release()

    for process in [fork(add) for _ in range(4)]:
        process.join()
    assert counter.read_text() == "800"


def test_fingerprint_is_of_content_and_names(tmp_path: Path) -> None:
    model, memo = tmp_path / "model", files.Fingerprints(tmp_path / "memo.json")
    model.mkdir()
    (model / "config.json").write_text("{}")
    (model / "README.md").write_text("a")
    first = memo.fingerprint(model)
    assert memo.fingerprint(tmp_path / "absent") == ""
    (model / "README.md").write_text("b")
    assert memo.fingerprint(model) == first
    (model / "config.json").write_text("[]")
    edited = memo.fingerprint(model)
    assert edited != first
    (model / "config.json").rename(model / "other.json")
    assert memo.fingerprint(model) not in (first, edited)


def test_unchanged_files_are_hashed_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reads: list[str] = []
    sha256_file = files.sha256_file

    def counted(path: Path) -> str:
        reads.append(path.name)
        return sha256_file(path)

    monkeypatch.setattr(files.fingerprints, "sha256_file", counted)
    rows, memo = tmp_path / "rows.jsonl", tmp_path / "memo.json"
    rows.write_text("1")
    settle(tmp_path)
    digests = [files.Fingerprints(memo).fingerprint(rows) for _ in range(3)]
    assert reads == ["rows.jsonl"]
    rows.write_text("2")
    assert files.Fingerprints(memo).fingerprint(rows) != digests[0]
    assert len(reads) == 2
    files.Fingerprints(memo).fingerprint(rows)
    assert len(reads) == 3  # it changed just now and could change again within one tick of the clock
