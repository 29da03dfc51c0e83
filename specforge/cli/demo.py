"""`specforge demo`: the whole story on two cores, measured while you watch.

The embedded target answers prompts made from this machine's Python sources; a draft is trained on the answers by two
FSDP ranks, killed with SIGKILL, resumed from its best checkpoint, and measured on packages that nothing was trained on.
Then the target is scored on a small suite of tasks.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import psutil

from specforge import files
from specforge.config import load_config
from specforge.config.load import dump_config
from specforge.demo.bundle import write_bundle
from specforge.demo.rows import split_answers, write_prompts
from specforge.errors import SpecForgeError
from specforge.log.run_log import read_metrics

TRAIN_PROMPTS, HELDOUT_PROMPTS, ANSWER_TOKENS = 2400, 260, 64
SUITE_EXAMPLES = 20
STEPS, EVERY, KILL_AFTER = 600, 100, 240
CALM = {
    "OMP_NUM_THREADS": "1",
    "OMP_WAIT_POLICY": "PASSIVE",
    "MALLOC_MMAP_THRESHOLD_": str(2**32),
    "MALLOC_TRIM_THRESHOLD_": str(2**34),
    "MALLOC_TOP_PAD_": str(2**28),
}
"""On busy cores waiting threads should sleep, and large buffers should be reused rather than returned to the system."""
PROMPT = "Write the rest of this function. def read_lines(path):"
TARGET = Path(__file__).parent.parent / "demo" / "target"


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="specforge demo", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--out", type=Path, default=Path("runs/quickstart"), help="run folder (default runs/quickstart); an earlier one is replaced"
    )
    parser.add_argument("--target", type=Path, default=TARGET, help="another Hugging Face folder in place of the embedded target")
    given = parser.parse_args(words)
    Story(given.out, given.target).tell()
    return 0


class Story:
    """The steps of the demo, each a command that a user could type."""

    def __init__(self, out: Path, target: Path) -> None:
        self.out, self.target = out, target
        self.run_folder, self.config_path = out / "run", out / "train.yaml"
        self.began_s = time.monotonic()

    def tell(self) -> None:
        self._make_room()
        self._say("1. prompts from the Python sources of this machine; held-out prompts come from packages nobody trained on")
        write_prompts(self.out / "prompts.jsonl", TRAIN_PROMPTS, HELDOUT_PROMPTS)
        self._say(f"2. the target answers them: greedy, at most {ANSWER_TOKENS} tokens each, on two processes")
        answers = self.out / "answers.jsonl"
        self._torchrun(
            "prepare", str(self.config_path), f"data.train_path={self.out / 'prompts.jsonl'}",
            "--regenerate", str(answers), "--max-new-tokens", str(ANSWER_TOKENS),
        )  # fmt: skip
        train, heldout = split_answers(answers)
        print(f"{train} answers to train on, {heldout} held out")
        self._say(f"3. train an EAGLE-3 draft on two FSDP ranks; SIGKILL after step {KILL_AFTER}")
        killed_at = self._train_and_kill()
        best = files.read_json(self.run_folder / "best_meta.json")
        self._say(f"4. killed at step {killed_at}; resume from the best checkpoint, step {best['step']}")
        self._torchrun("train", str(self.config_path), f"train.resume_from={self.run_folder / 'best'}")
        self._say("5. measure the best checkpoint on the held-out answers; its features are in the cache, so no target is loaded")
        numbers = self._evaluate()
        self._say("6. score the target on a small suite of tasks, and how much of it the draft would have foreseen")
        numbers["core"] = self._score_suite()
        self._say("what was measured")
        self._summary(numbers, best["step"])

    def _say(self, text: str) -> None:
        print(f"\n[{time.monotonic() - self.began_s:5.0f} s] {text}", flush=True)

    def _make_room(self) -> None:
        if self.out.exists():
            if not self.config_path.is_file():
                raise SpecForgeError(f"--out={self.out}: exists and is not a demo's folder; choose another one.")
            shutil.rmtree(self.out)
        self.out.mkdir(parents=True)
        settings = {
            "output_dir": self.run_folder,
            "run_id": "demo",
            "model.target_path": self.target,
            "method.name": "eagle3",
            "method.options.draft_tokens": 4,
            "method.options.draft_vocab_size": 2048,
            "method.options.fc_norm": True,
            "method.options.norm_output": True,
            "data.train_path": self.out / "train.jsonl",
            "data.eval_path": self.out / "heldout.jsonl",
            "data.max_length": 256,
            "train.steps": STEPS,
            "train.batch_samples": 16,
            "train.micro_batch_tokens": 2048,
            "train.learning_rate": 4e-3,
            "train.warmup_steps": 20,
            "train.eval_every": EVERY,
            "train.save_every": EVERY,
            "train.log_every": 20,
            "checkpoint.keep": 2,
        }
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        self.config_path.write_text(dump_config(config))

    def _command(self, *words: str) -> list[str]:
        return [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "specforge", *words]

    def _environment(self) -> dict[str, str]:
        return {**os.environ, **CALM, "PYTHONWARNINGS": "ignore"}

    def _torchrun(self, *words: str) -> None:
        command = self._command(*words)
        print("$ torchrun " + " ".join(command[3:]), flush=True)
        done = subprocess.run(command, env=self._environment(), check=False)
        if done.returncode:
            raise SpecForgeError(f"the command above failed with exit code {done.returncode}; its own message says why.")

    def _train_and_kill(self) -> int:
        command = self._command("train", str(self.config_path))
        print("$ torchrun " + " ".join(command[3:]), flush=True)
        with subprocess.Popen(command, env=self._environment(), start_new_session=True) as process:
            while process.poll() is None and self._step() < KILL_AFTER:
                time.sleep(0.2)
            if process.poll() is not None:
                raise SpecForgeError(f"training ended with exit code {process.returncode} before it could be killed.")
            for pid in [process.pid, *_descendants(process.pid)]:
                os.kill(pid, signal.SIGKILL)
        return self._step()

    def _step(self) -> int:
        return max((line.get("step", 0) for line in read_metrics(self.run_folder / "metrics.jsonl")), default=0)

    def _evaluate(self) -> dict[str, Any]:
        return json.loads(self._specforge("eval", str(self.config_path), "--checkpoint", str(self.run_folder / "best"))[-1])

    def _score_suite(self) -> float:
        bundle = write_bundle(self.out / "bundle", SUITE_EXAMPLES)
        *lines, last = self._specforge(
            "suite", "--model", str(self.target), "--bundle", str(bundle), "--bos", "eos", "--draft", str(self.run_folder / "best"),
            "--cache", str(self.out / "suite-tokens"), "--out", str(self.out / "suite"),
        )  # fmt: skip
        print("\n".join(lines))
        return float(json.loads(last)["core"])

    def _specforge(self, *words: str) -> list[str]:
        """The lines that a command prints."""
        print("$ specforge " + " ".join(words), flush=True)
        environment = {**self._environment(), "OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        done = subprocess.run([sys.executable, "-m", "specforge", *words], env=environment, check=False, stdout=subprocess.PIPE, text=True)
        if done.returncode:
            raise SpecForgeError(f"the command above failed with exit code {done.returncode}; its own message says why.")
        return done.stdout.splitlines()

    def _summary(self, numbers: dict[str, Any], resumed_from_step: int) -> None:
        from specforge.cli.table import acceptance_table

        lines = read_metrics(self.run_folder / "metrics.jsonl", superseded=False)
        print(loss_curve([(line["step"], line["train/loss"]) for line in lines if "train/loss" in line]))
        for line in lines:
            if "eval/acc_len" in line:
                names = ("walk_acc_len", "ngram_walk_acc_len", "acc_len", "simulated_acc_len")
                lengths = (line.get(f"eval/{name}", float("nan")) for name in names)
                print("step {:>4}  walk {:.3f} (n-gram {:.3f})  acc_len {:.3f}  simulated {:.3f}".format(line["step"], *lengths))
        print()
        print(acceptance_table(numbers))
        loads, forwards, cache_s = (numbers[name] for name in ("target_loads", "target_forwards", "cache_s"))
        print(f"features: {loads} loads and {forwards} forwards of the target; cache hit and verification {cache_s} s")
        print(closing_words(numbers, self.out, self.target))
        last = {
            "walk": numbers.get("eval/walk_acc_len"),
            "walk_low": numbers.get("eval/walk_acc_len_low"),
            "walk_high": numbers.get("eval/walk_acc_len_high"),
            "ngram_walk": numbers.get("eval/ngram_walk_acc_len"),
            "acc_len": numbers["eval/acc_len"],
            "simulated_acc_len": numbers["eval/simulated_acc_len"],
            "core": numbers["core"],
            "best_step": files.read_json(self.run_folder / "best_meta.json")["step"],
            "resumed_from_step": resumed_from_step,
            "final_step": lines[-1]["step"],
            "seconds": round(time.monotonic() - self.began_s, 1),
        }
        print(files.json_line(last))


def loss_curve(points: Sequence[tuple[int, float]], width: int = 48) -> str:
    """One bar a point, longer for a larger loss."""
    highest = max(loss for _, loss in points)
    return "\n".join(f"step {step:>4}  loss {loss:6.3f}  {'█' * max(1, round(width * loss / highest))}" for step, loss in points)


def closing_words(numbers: dict[str, Any], out: Path, target: Path) -> str:
    """What was found, where it lies, and how to look further."""

    def walk(name: str) -> str:
        low, high = numbers[f"eval/{name}_low"], numbers[f"eval/{name}_high"]
        return f"{numbers[f'eval/{name}']:.3f} [{low:.2f}, {high:.2f}]"

    mib = sum(path.stat().st_size for path in out.rglob("*") if path.is_file() and not path.is_symlink()) / 2**20
    lines = [f"The draft is {out / 'run' / 'best' / 'draft'}; all of {out} takes {mib:.0f} MiB of disk. To look further:"]
    if "eval/walk_acc_len" in numbers:
        of_ngram = walk("ngram_walk_acc_len")
        lines.insert(
            0, f"A round commits {walk('walk_acc_len')} tokens with the draft and {of_ngram} with the n-gram drafter (95 % intervals)."
        )
    return "\n".join([
        "", *lines,
        f"  source {os.path.relpath(Path(sys.prefix) / 'bin' / 'activate')}",
        f"  specforge report {out / 'run'} --out report.html",
        f"  specforge generate --target {os.path.relpath(target)} --draft {out / 'run' / 'best'} --prompt '{PROMPT}'",
    ])  # fmt: skip


def _descendants(pid: int) -> list[int]:
    """All processes below `pid`; torchrun's workers are in sessions of their own, so a process group does not hold them."""
    return [child.pid for child in psutil.Process(pid).children(recursive=True)]
