"""Answers are the target's own, token by token, and none is lost or asked for twice."""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

from specforge.distributed.world import World
from specforge.errors import FeatureError
from specforge.features import generation, regenerate
from specforge.features.generation import Sampling, generate
from specforge.features.target import Target
from tests.ranks import run_ranks
from tests.tiny import make_target

END = {2, 7, 11, 13}
"""Several ends, so that answers of a random target differ in length."""


@pytest.fixture(scope="module")
def target_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_target(tmp_path_factory.mktemp("target"))
    settings = folder / "generation_config.json"
    settings.write_text(json.dumps({**json.loads(settings.read_text()), "eos_token_id": sorted(END)}))
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    words = Tokenizer(models.WordLevel({f"w{number}": number for number in range(64)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w2")


def make_prompts(count: int = 14) -> list[SimpleNamespace]:
    rng = np.random.default_rng(1)
    return [
        SimpleNamespace(
            id=f"p{number}",
            domain="ab"[number % 2],
            messages=[{"role": "user", "content": f"question {number}"}],
            prompt_ids=rng.integers(3, 64, int(rng.integers(1, 30))).astype(np.int32),
        )
        for number in range(count)
    ]


def one_by_one(target: Target, prompt: np.ndarray, max_new_tokens: int) -> list[int]:
    """Greedy decoding without cache, padding or batch."""
    ids = prompt.tolist()
    new: list[int] = []
    while len(new) < max_new_tokens and not (new and new[-1] in END):
        with torch.no_grad():
            new.append(int(target.model(torch.tensor([ids + new])).logits[0, -1].argmax()))
    return new


def run(
    path: Path, target_path: Path, tokenizer: Any, world: World | None = None, prompts: Any = None, **options: Any
) -> list[dict[str, Any]]:
    regenerate.regenerate(
        prompts or make_prompts(), lambda: Target.load(target_path, "float32"), tokenizer, path, world or World(),
        **{"max_new_tokens": 12, "batch_rows": 5, **options},
    )  # fmt: skip
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_greedy_answers_are_those_of_one_by_one_decoding(tmp_path: Path, target_path: Path, tokenizer: Any) -> None:
    target = Target.load(target_path, "float32")
    rows = run(tmp_path / "out.jsonl", target_path, tokenizer)
    prompts = make_prompts()
    assert [row["id"] for row in rows] == [prompt.id for prompt in prompts]
    lengths = set()
    for row, prompt in zip(rows, prompts, strict=True):
        answer = one_by_one(target, prompt.prompt_ids, 12)
        lengths.add(len(answer))
        assert row["input_ids"] == prompt.prompt_ids.tolist() + answer
        assert row["loss_mask"] == [0] * len(prompt.prompt_ids) + [1] * len(answer)
        assert row["finished"] == (answer[-1] in END)
        assert row["domain"] == prompt.domain
        said = answer[:-1] if row["finished"] else answer
        assert row["conversations"] == [
            *prompt.messages,
            {"role": "assistant", "content": tokenizer.decode(said, skip_special_tokens=True)},
        ]
    assert len(lengths) > 4  # rows left the batch at different times
    assert [path.name for path in tmp_path.iterdir()] == ["out.jsonl"]


@pytest.mark.parametrize("shrink_below", [0.0, 1.0])
def test_dropping_finished_rows_changes_nothing(target_path: Path, monkeypatch: pytest.MonkeyPatch, shrink_below: float) -> None:
    target, prompts = Target.load(target_path, "float32"), make_prompts()
    target.require_plain_head(prompts[0].prompt_ids)  # its own forwards are not counted below
    widths: list[int] = []
    forward = target.decoder.forward

    def watched(**inputs: Any) -> Any:
        widths.append(len(inputs["input_ids"]))
        return forward(**inputs)

    monkeypatch.setattr(target.decoder, "forward", watched)
    monkeypatch.setattr(generation, "_SHRINK_BELOW", shrink_below)
    answers = generate(
        target, [p.prompt_ids for p in prompts], [p.id for p in prompts], max_new_tokens=12, end_ids=END, sampling=Sampling()
    )
    monkeypatch.undo()
    assert [answer.ids for answer in answers] == [one_by_one(target, prompt.prompt_ids, 12) for prompt in prompts]
    needed = sum(len(answer.ids) for answer in answers)
    assert (sum(widths) == needed) == (shrink_below == 1.0)


def test_learned_positions_begin_at_each_prompt() -> None:
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=64, n_layer=2, n_head=2, n_embd=16, n_positions=64, initializer_range=0.5))
    target, prompts = Target(model), make_prompts()
    answers = generate(target, [p.prompt_ids for p in prompts], [p.id for p in prompts], max_new_tokens=8, end_ids=END, sampling=Sampling())
    assert [answer.ids for answer in answers] == [one_by_one(target, prompt.prompt_ids, 8) for prompt in prompts]


def test_greedy_text_is_the_captured_arg_max_in_half_precision(target_path: Path) -> None:
    target, prompts = Target.load(target_path, "bfloat16"), make_prompts()
    answers = generate(
        target, [p.prompt_ids for p in prompts], [p.id for p in prompts], max_new_tokens=12, end_ids=END, sampling=Sampling()
    )
    texts = [np.concatenate([prompt.prompt_ids, answer.ids]) for prompt, answer in zip(prompts, answers, strict=True)]
    captured = target.capture(texts, (1,))
    said = np.concatenate([answer.ids for answer in answers])
    argmax = np.concatenate([one["argmax"][len(p.prompt_ids) - 1 : -1] for one, p in zip(captured, prompts, strict=True)])
    assert (said == argmax).mean() > 0.95


def test_samples_follow_the_targets_distribution(target_path: Path) -> None:
    target = Target.load(target_path, "float32")
    prompt = make_prompts(1)[0].prompt_ids
    drawn = generate(
        target, [prompt] * 4000, [str(number) for number in range(4000)], max_new_tokens=1, end_ids=END, sampling=Sampling(temperature=3.0)
    )
    counts = np.bincount([answer.ids[0] for answer in drawn], minlength=64)
    with torch.no_grad():
        probabilities = (target.model(torch.from_numpy(prompt).long()[None]).logits[0, -1] / 3.0).softmax(-1).double().numpy()
    expected = probabilities * 4000
    common = expected > 5
    chi_squared = float((((counts - expected) ** 2) / expected)[common].sum())
    assert common.sum() > 10
    assert chi_squared < common.sum() + 4 * (2 * common.sum()) ** 0.5


def test_samples_depend_on_seed_and_id_alone(tmp_path: Path, target_path: Path, tokenizer: Any) -> None:
    options = {"temperature": 2.0, "seed": 3}
    rows = run(tmp_path / "a.jsonl", target_path, tokenizer, **options)
    assert run(tmp_path / "b.jsonl", target_path, tokenizer, **options, batch_rows=1) == rows
    reordered = run(tmp_path / "c.jsonl", target_path, tokenizer, **options, prompts=make_prompts()[::-1])
    assert reordered == rows[::-1]
    assert run(tmp_path / "d.jsonl", target_path, tokenizer, temperature=2.0, seed=4) != rows


def test_ranks_share_the_work(tmp_path: Path, target_path: Path, tokenizer: Any) -> None:
    rows = run_ranks(lambda world: run(tmp_path / "two.jsonl", target_path, tokenizer, world))
    assert rows[0] == rows[1] == run(tmp_path / "one.jsonl", target_path, tokenizer)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.jsonl", "two.jsonl"]


@pytest.mark.parametrize("size", [1, 2])
def test_killed_run_goes_on_without_asking_twice(tmp_path: Path, target_path: Path, tokenizer: Any, size: int) -> None:
    parts = tmp_path / ".out.jsonl.parts"

    def work() -> None:
        torch.set_num_threads(1)
        original = regenerate.generate

        def slow(*args: Any, **options: Any) -> Any:
            time.sleep(0.1)
            return original(*args, **options)

        regenerate.generate = slow
        run(tmp_path / "out.jsonl", target_path, tokenizer, batch_rows=3)

    process = multiprocessing.get_context("fork").Process(target=work)
    process.start()
    deadline = time.monotonic() + 20
    part = parts / "rank-00000.jsonl"
    while not part.exists() or part.read_text().count("\n") < 6:
        assert time.monotonic() < deadline
        time.sleep(0.002)
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    whole = part.read_text().splitlines(keepends=True)
    marked = json.loads(whole[0])
    marked["conversations"][-1]["content"] = "given before the kill"
    part.write_text(json.dumps(marked) + "\n" + "".join(whole[1:-1]) + whole[-1][: len(whole[-1]) // 2])

    rows = run_ranks(lambda world: run(tmp_path / "out.jsonl", target_path, tokenizer, world), world=size)[0]
    expected = run(tmp_path / "other.jsonl", target_path, tokenizer)
    assert [row["input_ids"] for row in rows] == [row["input_ids"] for row in expected]
    kept = [row["id"] for row in rows if row["conversations"][-1]["content"] == "given before the kill"]
    assert kept == [marked["id"]]
    assert not parts.exists()


def test_answers_of_other_settings_are_not_mixed_in(tmp_path: Path, target_path: Path, tokenizer: Any) -> None:
    parts = tmp_path / ".out.jsonl.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"max_new_tokens": 12, "temperature": 1.0, "seed": 0, "prompts": ""}))
    with pytest.raises(FeatureError, match=r"other settings \(temperature, prompts\)"):
        run(tmp_path / "out.jsonl", target_path, tokenizer)


def test_repeated_ids_are_refused(tmp_path: Path, target_path: Path, tokenizer: Any) -> None:
    with pytest.raises(FeatureError, match=r"sample id 'p0': occurs more than once"):
        run(tmp_path / "out.jsonl", target_path, tokenizer, prompts=[*make_prompts(2), *make_prompts(1)])


def test_prompts_that_fill_the_target_are_left_out_and_counted(
    tmp_path: Path, target_path: Path, tokenizer: Any, caplog: pytest.LogCaptureFixture
) -> None:
    prompts = make_prompts(3)
    target = Target.load(target_path, "float32")
    prompts[0].prompt_ids = next(p.prompt_ids for p in make_prompts() if len(one_by_one(target, p.prompt_ids, 12)) > 2)
    expected = one_by_one(target, prompts[0].prompt_ids, 12)
    prompts[1].prompt_ids = np.full(256, 5, dtype=np.int32)
    prompts[2].prompt_ids = np.full(254, 5, dtype=np.int32)
    counts = regenerate.regenerate(
        prompts, lambda: Target.load(target_path, "float32"), tokenizer, tmp_path / "out.jsonl", World(), max_new_tokens=12
    )
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    assert [row["id"] for row in rows] == ["p0", "p2"]
    assert (counts.answered, counts.too_long) == (2, 1)
    assert "1 prompts leave no room" in caplog.text
    assert len(rows[1]["input_ids"]) <= 256
    assert rows[0]["input_ids"] == prompts[0].prompt_ids.tolist() + expected  # its long neighbour does not shorten it


def test_target_without_an_end_is_refused(tmp_path: Path, target_path: Path) -> None:
    target = Target.load(target_path, "float32")
    target.model.generation_config.eos_token_id = None
    with pytest.raises(FeatureError, match="eos_token_id"):
        regenerate.end_token_ids(target, SimpleNamespace(eos_token_id=None))
    target.model.generation_config.eos_token_id = 9
    assert regenerate.end_token_ids(target, SimpleNamespace(eos_token_id=2)) == {2, 9}
