"""`specforge generate`: the target's own text, honest numbers, streamed characters, and what is refused."""

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from specforge import files
from specforge.cli.__main__ import main
from specforge.cli.compose import build_controller
from specforge.cli.contest import Contest, Turn, numbers_of, read_prompts
from specforge.cli.draft import Draft
from specforge.cli.streaming import Detokeniser, Printer
from specforge.config import load_config
from specforge.data.conversations import read_rows
from specforge.decode.engine import Decoded
from specforge.decode.sampling import Sampling
from specforge.distributed import World
from specforge.features.target import Target
from tests.texts import make_text_target, write_rows

PROMPTS = ["the cat sat on a mat", "birds sang of spring"]
MULTI_BYTE = "naïve café, 日本語の鳥 sang 🙂🙃 the cat — и кот"


@pytest.fixture(scope="module")
def target(prepared: tuple[Path, list[str]]) -> Path:
    return prepared[0] / "target"


@pytest.fixture
def run(trained: Path) -> Path:
    return trained


def generate(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[str, dict[str, Any], str]:
    """(all but the last line of stdout, the object of the last line, stderr)."""
    assert main(["generate", *(str(word) for word in words)]) == 0
    out, err = capsys.readouterr()
    text, _, last = out.rstrip("\n").rpartition("\n")
    return text, json.loads(last, parse_constant=no_number), err


def no_number(word: str) -> float:
    raise AssertionError(f"{word} is not JSON")


def refused(capsys: pytest.CaptureFixture[str], code: int, *words: object) -> str:
    assert main(["generate", *(str(word) for word in words)]) == code
    out, err = capsys.readouterr()
    assert not out, "before the first token"
    return err


def expected_texts(target: Path, new_tokens: int) -> str:
    """What transformers itself says to the prompts, printed as the command does."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)
    said = ""
    for number, prompt in enumerate(PROMPTS, 1):
        messages = [{"role": "user", "content": prompt}]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)["input_ids"]
        answer = model.generate(ids, max_new_tokens=new_tokens, do_sample=False)[0, ids.shape[1] :]
        said += f"[prompt-{number}] {tokenizer.decode(answer, skip_special_tokens=True)}\n"
    return said


@pytest.mark.parametrize("batch", [1, 2])
def test_greedy_text_is_the_targets(batch: int, target: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    expected = expected_texts(target, 24)
    for draft in (run / "latest", "ngram", "none"):
        words = ("--target", target, "--draft", draft, "--max-new-tokens", 24, "--batch", batch, "--prompt", *PROMPTS)
        text, numbers, _ = generate(capsys, *words)
        assert text.startswith(expected), draft
        assert "\x1b" not in text, "no terminal, no colour"
        assert numbers["draft_tokens"] == {"ngram": 4, "none": 0}.get(str(draft), 3)
        assert sum(numbers["histogram"]) == numbers["rounds"]
        assert numbers["tokens"] == numbers["new_tokens"] - len(PROMPTS), "the first token of a text is the prefill's"
        if draft != "none":
            assert (numbers["same_texts"], numbers["first_divergence"]) == (2, None)
            assert numbers["speed_up"] == pytest.approx(numbers["tokens_per_s"] / numbers["target_tokens_per_s"])
        else:
            assert "speed_up" not in numbers and numbers["tokens_per_round"] == 1


@pytest.mark.parametrize("batch", [1, 2])
def test_trees(batch: int, target: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The text is the target's, one beam makes the rounds of the chain, and more beams make fewer."""
    words = ("--target", target, "--draft", run / "latest", "--max-new-tokens", 60, "--batch", batch, "--prompt", *PROMPTS)
    expected = expected_texts(target, 60)
    chain = generate(capsys, *words, "--draft-tokens", 2)[1]
    rounds = {}
    for shape in ("2x1x2", "2x4x12"):
        text, numbers, _ = generate(capsys, *words, "--tree", shape, "--no-baseline")
        assert text.startswith(expected)
        assert f"\ntree {shape} (depth x top-k x nodes), temperature 0, drafts greedy, bonus token counted; 2 prompts" in text
        assert (numbers["drafts"], numbers["tree"], numbers["draft_tokens"]) == ("tree", shape, 2)
        assert len(numbers["histogram"]) == 3 and len(numbers["survival"]) == len(numbers["alpha"]) == 2, "by depth"
        assert sum(numbers["histogram"]) == numbers["rounds"]
        assert numbers["survival"] == pytest.approx([sum(numbers["histogram"][k:]) / numbers["rounds"] for k in (1, 2)])
        rounds[shape] = numbers["rounds"]
        if shape == "2x1x2":
            assert [numbers[name] for name in ("histogram", "survival", "alpha")] == [chain[n] for n in ("histogram", "survival", "alpha")]
    assert (chain["drafts"], chain["draft_tokens"]) == ("chain", 2) and "tree" not in chain
    assert rounds["2x4x12"] < rounds["2x1x2"] == chain["rounds"] < chain["tokens"]


def test_trees_of_sampled_texts(target: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--target", target, "--draft", run / "latest", "--max-new-tokens", 12, "--prompt", PROMPTS[0], "--no-baseline")
    said = [generate(capsys, *words, "--tree", "3x2x6", "--temperature", 1, "--seed", seed)[0].split("\n\ntree")[0] for seed in (0, 0, 1)]
    assert said[0] == said[1] != said[2]


def test_rows_of_two_domains(target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", 5)
    words = ("--target", target, "--draft", "ngram", "--file", rows, "--max-new-tokens", 12, "--batch", 2, "--draft-tokens", 2)
    text, numbers, _ = generate(capsys, *words, "--no-baseline")
    assert numbers["prompts"] == 5 and "target_tokens_per_s" not in numbers and "same_texts" not in numbers
    assert numbers["domains"].keys() == {"a", "b"}
    for name in ("rounds", "tokens"):
        assert sum(domain[name] for domain in numbers["domains"].values()) == numbers[name]
    assert np.sum([domain["histogram"] for domain in numbers["domains"].values()], axis=0).tolist() == numbers["histogram"]
    assert "domain a: tokens per round" in text


def test_a_text_ends_with_the_targets_positions(target: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--target", target, "--draft", "ngram", "--prompt", PROMPTS[0], "--max-new-tokens", 1000, "--temperature", 1)
    lengths = [generate(capsys, *words, "--seed", seed)[1] for seed in range(3)]
    prompt = read_prompts(target, PROMPTS[:1], None, 1000)[0][0]
    assert prompt.max_new_tokens == 128 - len(prompt.prompt_ids)
    assert all(numbers["new_tokens"] == prompt.max_new_tokens or numbers["finished"] for numbers in lengths)


def test_sampled_drafts(target: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--target", target, "--draft", run / "latest", "--prompt", PROMPTS[0])
    words = (*asked, "--max-new-tokens", 16, "--temperature", 1, "--top-k", 20)
    texts = [generate(capsys, *words, "--draft-sampling", "sampled", "--draft-tokens", 2, "--seed", seed)[:2] for seed in (0, 0, 1)]
    assert texts[0][1]["draft_sampling"] == "sampled" and texts[0][1]["draft_tokens"] == 2
    assert "same_texts" not in texts[0][1], "samples are not compared"
    said = [text.split("\n\nchain of")[0] for text, _ in texts]
    assert said[0] == said[1] != said[2]


@pytest.mark.parametrize("dtype", ["bfloat16", "float64"])
def test_other_data_types(dtype: str, target: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ("--target", target, "--draft", run / "latest", "--max-new-tokens", 6, "--dtype", dtype, "--prompt", PROMPTS[0])
    numbers = generate(capsys, *words)[1]
    assert numbers["same_texts"] == 1 or numbers["first_divergence"]["margin"] < 0.1


def test_the_first_divergence_is_named(target: Path) -> None:
    model = Target.load(target, "float32")
    prompts, tokenizer = read_prompts(target, PROMPTS, None, 8)
    contest = Contest(model, tokenizer, Draft("ngram", 2), Sampling(), sampled_draft=False, seed=0, baseline=True, colour=False)
    alone = [[5, 6, 7, 8], [9, 10, 11, 12]]
    texts = [[5, 6, 7, 8], [9, 10, 44, 12]]
    turn = Turn(prompts, *([Decoded(ids) for ids in texts], 1.0), *([Decoded(ids) for ids in alone], 2.0))
    numbers = numbers_of(contest, [turn])
    with torch.no_grad():
        context = torch.tensor([[*prompts[1].prompt_ids.tolist(), 9, 10]])
        best, second = model.model(context).logits[0, -1].topk(2).values.tolist()
    margin = numbers["first_divergence"].pop("margin")
    assert numbers["first_divergence"] == {"id": "prompt-2", "place": 2, "draft_token": 44, "target_token": 11}
    assert margin == pytest.approx(best - second, rel=1e-4)
    assert (numbers["same_texts"], numbers["speed_up"]) == (1, 2.0)


def test_no_half_character_is_printed(target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids = tokenizer(MULTI_BYTE, add_special_tokens=False)["input_ids"]
    assert len(ids) > len(MULTI_BYTE.split()) and any("\ufffd" in tokenizer.decode([token]) for token in ids)
    detokeniser = Detokeniser(tokenizer)
    pieces = [detokeniser.add(token) for token in ids]
    assert not any("\ufffd" in piece for piece in pieces)
    assert "".join(pieces) == MULTI_BYTE and detokeniser.end() == ""

    half = Detokeniser(tokenizer)
    assert [half.add(token) for token in tokenizer("a🙂", add_special_tokens=False)["input_ids"][:-1]] == ["a", "", "", ""]
    assert half.end() == "\ufffd", "what is no character is shown as none, once it cannot become one"


def test_drafted_tokens_are_coloured(target: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(target)
    ids, out = tokenizer("xyz", add_special_tokens=False)["input_ids"], io.StringIO()
    printer = Printer(tokenizer, colour=True, out=out)
    printer.watch(0, ids, 2)
    printer.end()
    assert out.getvalue() == "\x1b[32mx\x1b[0m\x1b[32my\x1b[0mz\n"


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("hidden_size", 64, "hidden size is 32, the target's is 64"),
        ("vocab_size", 299, "the target's is 299"),
        ("num_hidden_layers", 1, "the target has 1"),
    ],
)
def test_a_target_that_does_not_fit(
    key: str, value: int, said: str, target: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "target"
    shutil.copytree(target, other)
    config = json.loads((other / "config.json").read_text())
    config.pop("layer_types", None)
    (other / "config.json").write_text(json.dumps({**config, key: value}))
    err = refused(capsys, 5, "--target", other, "--draft", run / "latest", "--prompt", "a", "--allow-other-target")
    assert said in err


@pytest.mark.parametrize(
    ("draft", "more", "said"),
    [
        ("latest", ["--draft-tokens", 0], "--draft-tokens 0: must be at least 1"),
        ("ngram", ["--draft-tokens", -1], "--draft-tokens -1: must be at least 1"),
        ("none", ["--draft-tokens", 3], "draft 'none' drafts nothing"),
        ("latest", ["--batch", 0], "--batch 0: must be at least 1"),
        ("latest", ["--max-new-tokens", 0], "--max-new-tokens 0: must be at least 1"),
        ("latest", ["--temperature", -1], "temperature=-1.0: must be 0"),
        ("latest", ["--temperature", 1, "--top-k", -1], "top_k=-1: must not be negative"),
        ("latest", ["--temperature", 1, "--top-p", 0], "top_p=0.0: must lie in (0, 1]"),
        ("latest", ["--draft-sampling", "sampled"], "needs --temperature above 0"),
        ("ngram", ["--draft-sampling", "sampled", "--temperature", 1], "chains of a draft that learned"),
        ("none", ["--draft-sampling", "sampled", "--temperature", 1], "chains of a draft that learned"),
        ("latest", ["--draft-sampling", "sampled", "--temperature", 1, "--tree", "3x2x6"], "chains of a draft that learned"),
        ("ngram", ["--tree", "3x2x6"], "--tree 3x2x6: draft 'ngram' drafts no trees; leave --tree out"),
        ("none", ["--tree", "3x2x6"], "--tree 3x2x6: draft 'none' drafts no trees"),
        ("latest", ["--tree", "3x2"], "tree '3x2': must be three numbers, DEPTHxTOP_KxNODES"),
        ("latest", ["--tree", "3x2x2"], "nodes between depth and the 10 candidates"),
        ("latest", ["--tree", "2x101x150"], "tree top_k=101: the draft knows 100 tokens"),
    ],
)
def test_settings_out_of_range(
    draft: str, more: list[object], said: str, target: Path, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = run / "latest" if draft == "latest" else draft
    assert said in refused(capsys, 2, "--target", target, "--draft", name, "--prompt", "the cat", *more)


def test_one_kind_of_drafts(target: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["generate", "--target", target, "--draft", run / "latest", "--prompt", "a", "--tree", "3x2x6", "--draft-tokens", 3]
    with pytest.raises(SystemExit):
        main([str(word) for word in words])
    assert "--draft-tokens: not allowed with argument --tree" in capsys.readouterr().err


def test_a_block_holds_no_more_drafts(
    prepared: tuple[Path, list[str]], target: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["method.name=dflash", "method.options.block_size=4", f"output_dir={tmp_path / 'run'}", "train.steps=1"]
    build_controller(load_config(None, [*prepared[1], *words]), World()).fit()
    capsys.readouterr()
    monkeypatch.setattr(Target, "loads", 0)
    draft = tmp_path / "run" / "latest"
    said = refused(capsys, 2, "--target", target, "--draft", draft, "--prompt", "the cat", "--draft-tokens", 4)
    assert "--draft-tokens 4: this draft was trained for 3 and cannot draft more; ask for fewer" in said and Target.loads == 0


def test_prompts_that_leave_no_room(target: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The longest prompt that leaves room for one token is decoded; one token more is refused, before any prompt is decoded."""
    [short] = read_prompts(target, ["mat"], None, 1)[0]
    room = 128 - len(short.prompt_ids)
    longest, longer = ("mat" + " the" * (room - 1), "mat" + " the" * room)
    assert len(read_prompts(target, [longest], None, 9)[0][0].prompt_ids) == 127
    words = ("--target", target, "--draft", run / "latest")
    assert generate(capsys, *words, "--prompt", longest, "--max-new-tokens", 9)[1]["new_tokens"] == 1
    said = "its 128 tokens and one new one exceed the target's max_position_embeddings=128; shorten it or leave it out."
    assert f"prompt 'prompt-2': {said}" in refused(capsys, 3, *words, "--prompt", "a", longer)
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"id": "row-7", "conversations": [{"role": "user", "content": longer}]}) + "\n")
    assert f"prompt 'row-7': {said}" in refused(capsys, 3, *words, "--file", rows)


def test_rows_that_were_answered_are_asked_again(
    prepared: tuple[Path, list[str]], target: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Rows that `prepare --regenerate` wrote hold tokens: the target says their answers again, with any draft."""
    answered = prepared[0] / "heldout.jsonl"
    stored = {row.id: row for row in read_rows(answered)}
    [*prompts], _ = read_prompts(target, None, str(answered), 12)
    for prompt in prompts:
        row = stored[prompt.id]
        assert row.input_ids is not None and row.loss_mask is not None
        assert prompt.prompt_ids.tolist() == row.input_ids[: row.loss_mask.index(1)]
    _, numbers, _ = generate(capsys, "--target", target, "--draft", run / "latest", "--file", answered, "--max-new-tokens", 12)
    assert numbers["tokens"] == sum(sum(row.loss_mask or []) - 1 for row in stored.values())
    assert numbers["same_texts"] == 6 and numbers["domains"].keys() == {"a", "b"}

    for mask, said in (([1, 1, 1], "'t' holds an answer only: nothing is asked"), ([0, 1], "loss_mask")):
        rows = tmp_path / "tokens.jsonl"
        rows.write_text(json.dumps({"id": "t", "input_ids": [5, 6, 7], "loss_mask": mask}) + "\n")
        assert said in refused(capsys, 3, "--target", target, "--draft", "ngram", "--file", rows)
    rows.write_text(json.dumps({"id": "t", "input_ids": [5, 6, 999], "loss_mask": [0, 0, 1]}) + "\n")
    assert "input_ids reach from 5 to 999" in refused(capsys, 3, "--target", target, "--draft", "ngram", "--file", rows)
    rows.write_text(json.dumps({"id": "t", "input_ids": [5, 6, 7, 8, 9], "loss_mask": [0, 1, 0, 0, 1]}) + "\n")
    assert read_prompts(target, None, str(rows), 3)[0][0].prompt_ids.tolist() == [5, 6, 7, 8], "the last answer is asked for"


def test_a_checkpoint_that_is_not_there(target: Path, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no complete checkpoint" in refused(capsys, 5, "--target", target, "--draft", run / "step9", "--prompt", "a")


def test_another_target_than_the_drafts(target: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = make_text_target(tmp_path / "target", seed=1)
    words = ("--target", other, "--draft", run / "latest", "--prompt", "the cat", "--max-new-tokens", 4)
    assert "fingerprint" in refused(capsys, 5, *words)
    _, numbers, err = generate(capsys, *words, "--allow-other-target")
    assert "Warning" in err and numbers["same_texts"] == 1
    assert "Warning" not in generate(capsys, "--target", target, *words[2:])[2]


def test_a_checkpoint_that_knows_no_target_is_not_checked(
    target: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    old = tmp_path / "run-step40"
    shutil.copytree(run / "run-step40", tmp_path / "staged", ignore=shutil.ignore_patterns(files.MANIFEST))
    state = json.loads((tmp_path / "staged" / "state.json").read_text())
    assert len(state["settings"].pop("target_fingerprint")) == 64
    (tmp_path / "staged" / "state.json").write_text(json.dumps(state))
    files.publish(tmp_path / "staged", old)
    err = generate(capsys, "--target", target, "--draft", old, "--prompt", "the cat", "--max-new-tokens", 4)[2]
    assert "does not say which target" in err
