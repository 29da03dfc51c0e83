"""A whole run through `build_controller` and the command line: regenerate, train, resume, fork, evaluate."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge import __version__, files
from specforge.cli.__main__ import COMMANDS, main
from specforge.cli.compose import build_controller, evaluate_checkpoint, set_threads
from specforge.config import KEYS_HELP, RunConfig, load_config
from specforge.distributed import World
from specforge.features.target import Target
from specforge.log.run_log import read_metrics
from specforge.models.calibration import Calibration
from specforge.training.run_folder import find_checkpoints, resolve
from tests.ranks import run_ranks
from tests.texts import make_text_target, write_rows


def config_of(prepared: tuple[Path, list[str]], run: Path, *more: str) -> RunConfig:
    folder, settings = prepared
    return load_config(folder / "c.yaml", [*settings, f"output_dir={run}", *more])


def train(world: World, config: RunConfig) -> int:
    return build_controller(config, world).fit().step


def evals(run: Path) -> list[dict[str, Any]]:
    return [line for line in read_metrics(run / "metrics.jsonl") if "eval/acc_len" in line]


@pytest.mark.parametrize("world", [1, 2])
def test_train_resume_and_evaluate(world: int, prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    config = config_of(prepared, run, "train.steps=6", "train.eval_every=2", "train.save_every=2")
    assert run_ranks(train, config, world=world) == [6] * world
    assert (run / "config.yaml").is_file()
    assert [line["step"] for line in evals(run)] == [0, 2, 4, 6]
    last = evals(run)[-1]
    assert last["eval/greedy_match"] == 1.0, "the answers are the target's own, token by token"
    assert last["eval/walk_acc_len"] >= 1.0
    assert {"eval/a/acc_len", "eval/b/acc_len", "eval/ngram_walk_acc_len", "eval/walk_acc_len_low"} <= last.keys()

    loads, forwards = Target.loads, Target.forwards
    numbers = evaluate_checkpoint(config, run / "latest", World())
    assert (Target.loads, Target.forwards) == (loads, forwards), "the features are in the cache"
    for name in ("eval/walk_acc_len", "eval/acc_len", "eval/per_position_acc"):
        assert numbers[name] == last[name]

    longer = config_of(prepared, run, "train.steps=8", f"train.resume_from={run / 'latest'}", "train.allow_config_change=true")
    assert run_ranks(train, longer, world=world) == [8] * world
    assert resolve(run / "latest").run_id == "run"


def test_resuming_an_old_checkpoint_forks(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    settings = ("train.steps=4", "train.save_every=2", "checkpoint.keep=0")
    train(World(), config_of(prepared, run, *settings))
    before = {checkpoint.path.name: checkpoint.path.stat().st_mtime_ns for checkpoint in find_checkpoints(run)}
    train(World(), config_of(prepared, run, *settings, f"train.resume_from={run / 'run-step2'}"))
    after = {checkpoint.path.name: checkpoint.path.stat().st_mtime_ns for checkpoint in find_checkpoints(run)}
    assert before.items() <= after.items()
    assert resolve(run / "latest").path.name == "run.fork1-step4"
    fork = next(line for line in read_metrics(run / "metrics.jsonl") if line.get("event") == "fork")
    assert (fork["parent"], fork["run_id"]) == ("run-step2", "run.fork1")


def test_a_new_run_starts_from_an_earlier_draft(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    train(World(), config_of(prepared, tmp_path / "first", "train.steps=3"))
    again = config_of(prepared, tmp_path / "second", "train.steps=1", f"model.draft_path={tmp_path / 'first' / 'latest'}")
    train(World(), again)
    assert evals(tmp_path / "second")[0]["eval/avg_loss"] == pytest.approx(evals(tmp_path / "first")[-1]["eval/avg_loss"], rel=1e-6)


def fails(words: Sequence[object], code: int, capsys: pytest.CaptureFixture[str]) -> str:
    assert main([str(word) for word in words]) == code
    return capsys.readouterr().err


def test_bad_input(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """One sentence that names key, value and way out; the exit code of its kind; no checkpoint, nothing lost."""
    folder, settings = prepared
    run = tmp_path / "run"
    base = ["train", folder / "c.yaml", *settings, f"output_dir={run}", "train.steps=1"]
    assert "train.stepps" in fails([*base, "train.stepps=3"], 2, capsys)
    assert "data.max_length" in fails([*base, "data.max_length=many"], 2, capsys)
    assert "did you mean 'eagle3'" in fails([*base, "method.name=eagle"], 2, capsys)
    assert "no such file" in fails(["train", folder / "none.yaml"], 2, capsys)
    assert "train.resume_from" in fails([*base, f"train.resume_from={run}/latest"], 5, capsys)
    assert "nowhere" in fails([*base, f"model.target_path={folder}/nowhere"], 4, capsys)
    assert not run.exists(), "refused before anything was written"

    broken = folder / "broken.jsonl"
    broken.write_text((folder / "train.jsonl").read_text() + '{"id": "x", "conversations": [\n')
    assert "broken.jsonl:25" in fails([*base, f"data.train_path={broken}"], 3, capsys)
    empty = folder / "empty.jsonl"
    empty.write_text("")
    assert "empty.jsonl" in fails([*base, f"data.train_path={empty}"], 3, capsys)
    assert not find_checkpoints(run)

    assert "checkpoint.best_metric='eval/f1'" in fails([*base, "checkpoint.best_metric=eval/f1"], 2, capsys)
    assert not find_checkpoints(run)


def test_a_run_is_not_mixed_with_another(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = prepared
    run = tmp_path / "run"
    base = ["train", folder / "c.yaml", *settings, f"output_dir={run}", "train.steps=2"]
    assert main([str(word) for word in base]) == 0
    assert f"train.resume_from={run}/latest" in fails(base, 5, capsys)
    resume = [*base, f"train.resume_from={run}/latest"]
    message = fails([*resume, "train.learning_rate=0.5", "method.options.step_decay=0.5"], 5, capsys)
    assert "train.learning_rate: checkpoint 0.01, now 0.5" in message
    assert "method.options.step_decay: checkpoint 0.8, now 0.5" in message
    assert "train.allow_config_change=true" in message
    other = make_text_target(tmp_path / "other-target", seed=1)
    message = fails(
        [*base[:-2], f"output_dir={tmp_path / 'new'}", f"features.path={run / 'features' / 'train'}", f"model.target_path={other}"],
        4,
        capsys,
    )
    assert "target_fingerprint" in message


def test_a_checkpoint_of_another_method(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = prepared
    run = tmp_path / "run"
    base = ["train", folder / "c.yaml", *settings, f"output_dir={run}", "train.steps=1"]
    assert main([str(word) for word in base]) == 0
    step = run / "run-step1"
    state = json.loads((step / "state.json").read_text())
    state["settings"]["method"]["name"] = "dflash"
    draft, sealed = tmp_path / "unsealed", tmp_path / "other" / "other-step1"
    shutil.copytree(step, draft)
    (draft / "manifest.json").unlink()
    (draft / "state.json").write_text(json.dumps(state))
    sealed.parent.mkdir()
    files.publish(draft, sealed)
    message = fails([*base[:-2], f"output_dir={tmp_path / 'new'}", f"train.resume_from={sealed}"], 5, capsys)
    assert "was trained by method 'dflash', this run uses 'eagle3'" in message
    assert not (tmp_path / "new").exists()


def test_features_of_other_layers_and_damaged_shards_are_refused(
    prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = prepared
    features = tmp_path / "features"
    base = ["train", folder / "c.yaml", *settings, f"output_dir={tmp_path / 'a'}", f"features.path={features}", "train.steps=1"]
    assert main([str(word) for word in base]) == 0
    base[-3] = f"output_dir={tmp_path / 'b'}"
    message = fails([*base, "model.aux_layer_ids=[1,2]"], 4, capsys)
    assert "aux_layer_ids" in message
    shard = next(features.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-3] ^= 1
    shard.write_bytes(content)
    assert shard.name in fails(base, 4, capsys), "one flipped bit"
    shard.write_bytes(content[:-7])
    assert shard.name in fails(base, 4, capsys), "truncated"


def test_a_folder_that_holds_no_features_is_named_before_the_target_is_loaded(
    prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, settings = prepared
    run = tmp_path / "run"
    words = [str(folder / "c.yaml"), *settings, f"output_dir={tmp_path / 'other'}", f"features.path={run / 'features'}", "train.steps=1"]
    (run / "features").mkdir(parents=True)
    loads = Target.loads
    assert f"features.path='{run}/features': is no folder of features" in fails(["train", *words], 4, capsys)
    (run / "features" / "train").mkdir()
    (run / "features" / "train" / "manifest.json").write_text("{}")
    for command in (["train", *words], ["train", *words, "--plan"], ["prepare", *words]):
        assert f"features.path='{run}/features': is no folder of features" in (message := fails(command, 4, capsys))
        assert f"give '{run}/features/train'." in message
    assert Target.loads == loads


def test_a_tokenizer_without_chat_template(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = prepared
    bare = make_text_target(tmp_path / "bare", template="")
    rows = write_rows(tmp_path / "rows.jsonl", 12)
    words = [
        "train",
        folder / "c.yaml",
        *settings,
        f"output_dir={tmp_path / 'run'}",
        f"model.target_path={bare}",
        f"data.train_path={rows}",
    ]
    message = fails([*words, f"data.eval_path={rows}"], 3, capsys)
    assert "data.chat_template" in message


def test_wandb_offline_keeps_its_id_over_a_resume(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    run = tmp_path / "run"
    for steps, more in ((1, []), (2, [f"train.resume_from={run / 'latest'}", "train.allow_config_change=true"])):
        train(World(), config_of(prepared, run, f"train.steps={steps}", "log.wandb=offline", *more))
    sessions = [path.name for path in (run / "wandb").glob("offline-run-*")]
    assert len(sessions) == 2
    assert len({name.split("-", 3)[-1] for name in sessions}) == 1, "one id"


def test_excluded_samples_are_never_trained_on(prepared: tuple[Path, list[str]], tmp_path: Path) -> None:
    config = config_of(prepared, tmp_path / "run", "train.epochs=1", "data.exclude_ids=[r0,r5]")
    controller = build_controller(config, World())
    seen = [sample_id for window in controller.data for batch in window.batches for sample_id in batch.ids]
    controller.checkpoints.release()
    controller.log.close()
    assert len(seen) == 22
    assert not {"r0", "r5"} & set(seen)


def test_show_marks_the_answer(prepared: tuple[Path, list[str]], capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = prepared
    assert main(["prepare", str(folder / "c.yaml"), *settings, "--show", "1"]) == 0
    shown = capsys.readouterr().out
    assert "⟦" in shown
    assert shown.index("<|assistant|>") < shown.index("⟦")


def test_show_needs_no_held_out_rows(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = prepared
    words = [word for word in settings if not word.startswith("data.eval_path")]
    words += [f"data.train_path={write_rows(tmp_path / 'rows.jsonl', 3)}", "--show", "5"]
    assert main(["prepare", str(folder / "c.yaml"), *words]) == 0
    assert [line.split(",")[0] for line in capsys.readouterr().out.splitlines() if line.startswith("---")] == ["--- r0", "--- r1", "--- r2"]


def test_plan_writes_nothing(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = prepared
    run = tmp_path / "run"
    assert main(["train", str(folder / "c.yaml"), *settings, f"output_dir={run}", "train.epochs=2", "--plan"]) == 0
    plan = capsys.readouterr().out
    assert "12 of 4 samples" in plan, "24 samples twice, 4 at a time"
    assert not run.exists()


def test_held_out_rows_that_are_trained_on_are_told(
    prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The six held-out prompts of this folder are the first six of training, and greedy decoding answered them alike."""
    folder, settings = prepared
    base = ["train", str(folder / "c.yaml"), *settings, f"output_dir={tmp_path / 'run'}", "train.steps=1"]
    told = "Warning: 6 of 6 held-out samples are trained on too: r0, r1, r2, r3, r4, ...; "
    assert main([*base, "--plan"]) == 0
    assert capsys.readouterr().out.count(told) == 1
    assert main(base) == 0
    assert capsys.readouterr().err.count(told) == 1
    assert main([*base, "--plan", "data.exclude_ids=[r0,r1,r2,r3,r4,r5]"]) == 0
    assert "trained on too" not in capsys.readouterr().out


def test_answers_that_are_not_the_targets_own_are_told_once(
    prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The very sentence of `specforge eval`; of the target's own answers nothing is said."""
    folder, settings = prepared
    run = tmp_path / "run"
    base = ["train", str(folder / "c.yaml"), *settings, "train.steps=2", "train.eval_every=1"]
    rows = write_rows(tmp_path / "rows.jsonl", 6)
    assert main([*base, f"output_dir={run}", f"data.eval_path={rows}"]) == 0
    told = capsys.readouterr().err
    assert main(["eval", str(run / "config.yaml"), "--checkpoint", str(run / "best")]) == 0
    reason = next(line for line in capsys.readouterr().err.splitlines() if line.startswith("walk_acc_len is left out: "))
    assert told.count("walk_acc_len") == 1 == told.count(f"Warning: {reason} The best checkpoint is picked by eval/acc_len.\n")
    assert main([*base, f"output_dir={tmp_path / 'own'}"]) == 0
    assert "left out" not in capsys.readouterr().err


def test_commands_explain_themselves(capsys: pytest.CaptureFixture[str]) -> None:
    for command in COMMANDS:
        with pytest.raises(SystemExit) as ended:
            main([command, "--help"])
        assert ended.value.code == 0
        shown = capsys.readouterr().out
        assert f"usage: specforge {command}" in shown
        if command in ("train", "prepare", "eval"):
            assert KEYS_HELP in " ".join(shown.split())
    assert main(["trian"]) == 2
    assert "no command" in capsys.readouterr().err


def test_a_command_that_lacks_something_says_what(capsys: pytest.CaptureFixture[str]) -> None:
    assert fails(["export", "--to", "hf"], 2, capsys) == "specforge export: give --checkpoint, --to and --out, or --check alone.\n"
    for command in ("train", "prepare", "produce"):
        with pytest.raises(SystemExit):
            main([command])
        assert capsys.readouterr().err.endswith("required: config\n")


def test_the_last_line_of_eval_is_json(prepared: tuple[Path, list[str]], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, settings = prepared
    run = tmp_path / "run"
    assert main(["train", str(folder / "c.yaml"), *settings, f"output_dir={run}", "train.steps=1"]) == 0
    capsys.readouterr()
    assert main(["eval", str(run / "config.yaml"), "--checkpoint", str(run / "best"), "--calibrate"]) == 0
    numbers = json.loads(capsys.readouterr().out.splitlines()[-1])
    calibration = Calibration.read(run / "best" / "draft", numbers["eval/draft_tokens"])
    assert len(calibration.scale) == len(numbers["eval/calibration/platt/per_position_ece"]) == numbers["eval/draft_tokens"]
    assert numbers["target_loads"] == 0 or Target.loads > 0
    assert numbers["eval/samples"] == 6


def test_lines_reach_a_file_when_they_are_printed() -> None:
    """What leaves at the exit comes after the last word on the other stream, which waits for nothing."""
    story = (
        "import atexit, sys; from specforge.cli.__main__ import run_and_exit; sys.argv = ['specforge', '--version'];"
        "atexit.register(sys.stderr.write, 'the end\\n'); run_and_exit()"
    )
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    words = [sys.executable, "-c", story]
    said = subprocess.run(words, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=True)
    assert said.stdout == f"{__version__}\nthe end\n"


def test_threads_that_wait_sleep() -> None:
    """OpenMP says what it was told when it is loaded."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    told = subprocess.run(
        [sys.executable, "-m", "specforge", "doctor"], env={**environment, "OMP_DISPLAY_ENV": "true"}, capture_output=True, text=True
    )
    assert "OMP_WAIT_POLICY = 'PASSIVE'" in told.stderr


@pytest.mark.parametrize(("ranks", "said", "expected"), [(1, "1", 1), (1, None, 4), (2, "1", 2)])
def test_who_says_how_many_threads(ranks: int, said: str | None, expected: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of one rank the user, of several nobody: torchrun's own 1 is not what anybody asked for."""
    before = torch.get_num_threads()
    monkeypatch.setattr(os, "cpu_count", lambda: 4)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if said:
        monkeypatch.setenv("OMP_NUM_THREADS", said)
    torch.set_num_threads(1)
    try:
        set_threads(World(size=ranks, local_size=ranks))
        assert torch.get_num_threads() == expected
    finally:
        torch.set_num_threads(before)
