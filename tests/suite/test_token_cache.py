"""Tokens are made once for what they depend on, whoever asks, dies or damages them."""

import dataclasses
import itertools
import json
import logging
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from safetensors.torch import save_file as save_torch
from transformers import AutoTokenizer

from specforge import files
from specforge.errors import DataError
from specforge.suite import token_cache
from specforge.suite.bundle import Task, read_examples, read_tasks
from specforge.suite.prompts import Draw, chosen, write_prompts
from specforge.suite.token_cache import First, TokenCache
from specforge.suite.tokens import TaskTokens, tokenise
from tests.processes import fork
from tests.suite.bundles import multiple_choice, write_bundle
from tests.texts import make_text_target


class Letters:
    """A tokenizer of one token a letter."""

    bos_token_id, eos_token_id = 1, 2

    def __call__(self, texts: list[str], add_special_tokens: bool) -> dict[str, Any]:
        assert not add_special_tokens
        return {"input_ids": [list(map(ord, text)) for text in texts]}


def never() -> Any:
    raise AssertionError("the tokenizer was loaded")


@pytest.fixture
def task(tmp_path: Path) -> Task:
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in multiple_choice(9, 0)))
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer.json").write_text("{}")
    return Task("a", "multiple_choice", tmp_path / "rows.jsonl", 2, " ", 25.0)


def cache_of(task: Task, load: Callable[[], Any] = Letters, first: First = "bos") -> TokenCache:
    folder = task.path.parent
    return TokenCache(folder / "cache", folder / "tokenizer", load, first)


def assert_same(one: TaskTokens, other: TaskTokens) -> None:
    for name, array in one.tensors().items():
        np.testing.assert_array_equal(array, other.tensors()[name], err_msg=name, strict=True)


def visible(task: Task) -> list[Path]:
    return [path for path in (task.path.parent / "cache").iterdir() if not path.name.startswith(".")]


# -- once --------------------------------------------------------------------------------------------------------------


def test_found_again_without_a_tokenizer(task: Task) -> None:
    """By the same instance, another one and another process."""
    cache = cache_of(task)
    made = cache.get(task, Draw())
    assert cache.get(task, Draw()) is made
    assert_same(cache_of(task, never).get(task, Draw()), made)
    other = fork(lambda: assert_same(cache_of(task, never).get(task, Draw()), made))
    other.join()
    assert other.exitcode == 0
    with pytest.raises(AssertionError, match="the tokenizer was loaded"):
        cache_of(task, never).get(task, Draw(3))


def test_a_reader_waits_for_no_lock(task: Task) -> None:
    """As it could not take one where it may not write."""
    made = cache_of(task).get(task, Draw())
    [entry] = visible(task)
    with files.Lock(entry.parent / f".{entry.name}.lock"):
        reader = fork(lambda: assert_same(cache_of(task, never).get(task, Draw()), made))
        reader.join(30)
        reader.kill()
        reader.join()
    assert reader.exitcode == 0


def test_made_and_found_are_the_direct_tokens(tmp_path: Path) -> None:
    folder, bundle = make_text_target(tmp_path / "target"), write_bundle(tmp_path / "bundle")
    tokenizer, draw = AutoTokenizer.from_pretrained(folder), Draw(max_examples=7, shared_shots=True)
    for task in read_tasks(bundle):
        prompts = write_prompts(task, chosen(read_examples(task), draw), draw)
        expected = tokenise(prompts, task.kind, lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"], 3)
        for load in (lambda: tokenizer, never):
            assert_same(TokenCache(tmp_path / "cache", folder, load, "eos").get(task, draw), expected)


def test_eight_processes_make_one(task: Task) -> None:
    calls = task.path.parent / "calls"

    def load_slowly() -> Letters:
        with calls.open("a") as file:
            file.write("x")
        time.sleep(0.2)
        return Letters()

    def ask() -> None:
        assert_same(cache_of(task, load_slowly).get(task, Draw()), expected)

    expected = TokenCache(task.path.parent / "own", task.path.parent / "tokenizer", Letters).get(task, Draw())
    processes = [fork(ask) for _ in range(8)]
    for process in processes:
        process.join()
    assert [process.exitcode for process in processes] == [0] * 8
    assert calls.read_text() == "x"
    assert len(visible(task)) == 1 and not list((task.path.parent / "cache").glob(".*staging*"))


# -- the key -----------------------------------------------------------------------------------------------------------

DRAWS = {"max_examples": 5, "fewshot_seed": 1, "shared_shots": True}
TASKS: dict[str, Any] = {"kind": "schema", "shots": 3, "delimiter": "\n"}


def test_every_choice_flips_the_key(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    assert DRAWS.keys() == {field.name for field in dataclasses.fields(Draw)}
    cache = cache_of(task)
    keys = [cache.key(task, Draw())]
    keys += [cache.key(task, Draw(**{name: value})) for name, value in DRAWS.items()]
    keys += [cache.key(dataclasses.replace(task, **{name: value}), Draw()) for name, value in TASKS.items()]
    keys += [cache_of(task, first=first).key(task, Draw()) for first in ("eos", "none")]
    for name in ("FORMAT", "ORDER_SEED"):
        with monkeypatch.context() as changed:
            changed.setattr(token_cache, name, 99)
            keys.append(cache.key(task, Draw()))
    assert len(set(keys)) == len(keys)
    assert cache_of(task, never).key(task, Draw()) == keys[0]


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt", "vocab.txt", "spiece.model", "sentencepiece.bpe.model",
     "special_tokens_map.json", "added_tokens.json", "tokenizer.model", "source.spm", "cl100k.tiktoken"],
)  # fmt: skip
def test_every_file_of_a_tokenizer_flips_the_key(task: Task, name: str) -> None:
    """That it is there, and each of its bytes."""
    path, keys = task.path.parent / "tokenizer" / name, [cache_of(task).key(task, Draw())]
    for text in ("ab", "ac"):
        path.write_text(text)
        keys.append(cache_of(task).key(task, Draw()))
    assert len(set(keys)) == 3


def test_bytes_of_the_data_flip_the_key(task: Task) -> None:
    keys, text = [cache_of(task).key(task, Draw())], task.path.read_text()
    for changed in (text[::-1], text + "\n"):
        task.path.write_text(changed)
        keys.append(cache_of(task).key(task, Draw()))
    assert len(set(keys)) == 3


def test_what_tokens_do_not_depend_on_keeps_the_key(task: Task) -> None:
    """Weights and configuration of a model beside the tokenizer; the names of task and file; the baseline."""
    made = cache_of(task).get(task, Draw())
    for name in ("model.safetensors", "config.json", "generation_config.json", "pytorch_model.bin"):
        (task.path.parent / "tokenizer" / name).write_text("weights")
    other = dataclasses.replace(task, label="b", baseline_pct=50.0, path=shutil.copy(task.path, task.path.parent / "copy.jsonl"))
    assert_same(cache_of(task, never).get(other, Draw()), made)


# -- death and damage --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("moment", ["tokenising", "writing"])
def test_killed_in_the_middle_leaves_nothing(task: Task, moment: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def die(*half: Any) -> Any:
        if half:
            half[1].write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGKILL)

    def ask() -> None:
        if moment == "writing":
            monkeypatch.setattr(token_cache, "save_file", die)
        cache_of(task, Letters if moment == "writing" else die).get(task, Draw())

    victim = fork(ask)
    victim.join()
    assert victim.exitcode == -signal.SIGKILL
    assert visible(task) == []
    assert len(list((task.path.parent / "cache").glob(".*staging*/tokens.safetensors"))) == (moment == "writing")
    made = cache_of(task).get(task, Draw())
    assert len(visible(task)) == 1 and not list((task.path.parent / "cache").glob(".*staging*"))
    assert_same(cache_of(task, never).get(task, Draw()), made)


def remade(task: Task, made: TaskTokens, caplog: pytest.LogCaptureFixture) -> str:
    """What is warned of when the tokens are asked for, which are then made again once and found."""
    loads = itertools.count()
    with caplog.at_level(logging.WARNING):
        assert_same(cache_of(task, lambda: next(loads) or Letters()).get(task, Draw()), made)
    assert next(loads) == 1
    assert_same(cache_of(task, never).get(task, Draw()), made)
    return caplog.text


@pytest.mark.parametrize("harm", ["flip", "cut", "remove", "manifest", "no folder"])
def test_a_damaged_entry_is_made_again(task: Task, harm: str, caplog: pytest.LogCaptureFixture) -> None:
    made = cache_of(task).get(task, Draw())
    [entry] = visible(task)
    path = entry / "tokens.safetensors"
    data = path.read_bytes()
    if harm == "flip":
        path.write_bytes(data[:-3] + bytes([data[-3] ^ 1]) + data[-2:])
    elif harm == "cut":
        path.write_bytes(data[:-3])
    elif harm == "remove":
        path.unlink()
    elif harm == "manifest":
        (entry / files.MANIFEST).write_text("{")
    else:
        shutil.rmtree(entry)
        entry.write_text("")
    said = remade(task, made, caplog)
    assert "tokens are damaged and will be made again" in said
    assert (files.MANIFEST if harm in ("manifest", "no folder") else "tokens.safetensors") in said


def forge(entry: Path, change: Callable[[dict[str, Any]], object], save: Callable[..., None] = save_file) -> None:
    """Other tensors under a manifest that agrees with them."""
    path = entry / "tokens.safetensors"
    arrays = load_file(path)
    change(arrays)
    save(arrays, path)
    (entry / files.MANIFEST).unlink()
    files.publish(entry, entry)


def at(name: str, place: int, value: int) -> Callable[[dict[str, Any]], object]:
    return lambda arrays: arrays[name].__setitem__(place, value)


WRONG_KIND = "does not hold the integers"
MISFIT = "its offsets and spans do not fit together"
FORGED: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "floats": (lambda x: x.update(scored_R=x["scored_R"].astype(np.float32)), WRONG_KIND),
    "unsigned": (lambda x: x.update(token_N=x["token_N"].astype(np.uint8)), WRONG_KIND),
    "missing": (lambda x: x.pop("chars_R"), WRONG_KIND),
    "unknown": (lambda x: x.update(other=x["chars_R"]), WRONG_KIND),
    "matrix": (lambda x: x.update(token_N=x["token_N"][None]), WRONG_KIND),
    "rows out of order": (lambda x: x.update(row_start_R1=x["row_start_R1"][[0, 2, 1, *range(3, 37)]]), MISFIT),
    "an empty row": (lambda x: x["row_start_R1"].__setitem__(2, x["row_start_R1"][1]), MISFIT),
    "rows that wrap around": (
        lambda x: x.update(row_start_R1=np.array([0, 2**63 - 1, -2, *x["row_start_R1"][3:]], dtype=np.int64)),
        MISFIT,
    ),
    "rows that begin late": (at("row_start_R1", 0, 1), MISFIT),
    "rows that end early": (lambda x: x.update(token_N=np.append(x["token_N"], np.int32(5))), MISFIT),
    "an example without rows": (at("example_start_E1", 1, 0), MISFIT),
    "an example too few": (lambda x: x.update(gold_E=x["gold_E"][1:]), MISFIT),
    "a row too few": (lambda x: x.update(scored_R=x["scored_R"][1:]), MISFIT),
    "a span beyond its row": (at("scored_R", 0, 10_000), MISFIT),
    "a span before its row": (at("scored_R", 0, -1), MISFIT),
    "a continuation beyond its row": (at("continuation_R", 3, 10_000), MISFIT),
    "a negative length": (at("bytes_R", 3, -1), MISFIT),
    "a negative token": (at("token_N", 7, -1), MISFIT),
    "gold beyond its example": (at("gold_E", 2, 4), MISFIT),
    "negative gold": (at("gold_E", 2, -1), MISFIT),
    "two classes": (lambda x: x.update(classes=np.zeros(2, dtype=np.int32)), MISFIT),
    "nothing": (lambda x: x.update({name: array[:0] for name, array in x.items()}), MISFIT),
}


@pytest.mark.parametrize("case", FORGED)
def test_a_forged_entry_is_noticed(task: Task, case: str, caplog: pytest.LogCaptureFixture) -> None:
    made = cache_of(task).get(task, Draw())
    change, said = FORGED[case]
    forge(visible(task)[0], change)
    assert said in remade(task, made, caplog)


def test_numbers_that_numpy_does_not_have_are_noticed(task: Task, caplog: pytest.LogCaptureFixture) -> None:
    made = cache_of(task).get(task, Draw())
    forge(
        visible(task)[0],
        lambda x: x.update({name: torch.from_numpy(array).to(torch.bfloat16) for name, array in x.items()}),
        save_torch,
    )
    assert "numpy has no such numbers" in remade(task, made, caplog)


# -- refusals ----------------------------------------------------------------------------------------------------------


def test_what_cannot_be_tokenised_is_refused_and_not_kept(task: Task) -> None:
    class NoBos(Letters):
        bos_token_id = None  # type: ignore[assignment]

    with pytest.raises(DataError, match=r"--bos bos: the tokenizer has no BOS token; choose --bos eos"):
        cache_of(task, NoBos).get(task, Draw())
    assert cache_of(task, NoBos, "eos").get(task, Draw()).row(0)[0] == 2
    assert cache_of(task, NoBos, "none").get(task, Draw()).row(0)[0] > 2
    task.path.write_text(json.dumps({"query": "", "choices": ["a", "b"], "gold": 0}))
    unseparated = dataclasses.replace(task, delimiter="")
    with pytest.raises(DataError, match=r"task 'a': some texts are scored from their first token, which nothing predicts"):
        cache_of(task, NoBos, "none").get(unseparated, Draw())
    assert cache_of(task, NoBos, "eos").get(unseparated, Draw()).scored_R.tolist() == [1, 1]
    assert len(visible(task)) == 3


def test_what_is_not_there_is_said(task: Task) -> None:
    task.path.unlink()
    for ask in (cache_of(task).get, cache_of(task).key):
        with pytest.raises(DataError, match=r"rows\.jsonl: there is no such file; task 'a' needs it, or leave it out by --tasks"):
            ask(task, Draw())
    (task.path.parent / "tokenizer" / "tokenizer.json").unlink()
    with pytest.raises(DataError, match=r"tokenizer: holds no tokenizer; give --tokenizer the folder of one"):
        cache_of(task)
