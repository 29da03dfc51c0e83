"""Chaos: kill a training again and again, mostly while it saves, and compare what comes out with a run that nobody disturbed.

Two runs of the same settings on the embedded target: one is left alone; of the other all processes get SIGKILL at random
moments, and it is started again from `latest` until it has ended. Everything is compared bit by bit, so it runs in fp32.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil
import torch
from safetensors.torch import load_file

from specforge import files
from specforge.config import load_config
from specforge.config.load import dump_config
from specforge.demo.conversations import conversations
from specforge.demo.corpus import Split
from specforge.distributed import World
from specforge.errors import CheckpointError, SpecForgeError
from specforge.log.run_log import read_metrics
from specforge.training.run_folder import Checkpoint, find_checkpoints, newest, read_best, read_state

TARGET = Path(__file__).parent / "target"
IN_A_SAVE = 0.8
"""Share of the kills that wait for a save to begin."""
PATIENCE_S = 300.0


@dataclass
class Damage:
    """What the kills did; everything but the first two should stay zero."""

    kills: int = 0
    resumes: int = 0
    lost_best: int = 0
    torn: int = 0
    loss_mismatches: int = 0
    phases: Counter[str] = field(default_factory=Counter)


class Chaos:
    """The two runs below `out`. Each kill costs a start, so a run takes about as many steps as it is killed times three."""

    def __init__(self, out: Path, kills: int, ranks: int, seed: int) -> None:
        self.out, self.kills, self.ranks = out, kills, ranks
        self.calm, self.cut = out / "calm", out / "cut"
        self.steps = 10 + 3 * kills
        self.damage = Damage()
        self._random = random.Random(seed)

    def run(self) -> Damage:
        if self.out.exists():
            shutil.rmtree(self.out)
        self._write_inputs()
        self._train(self.calm).wait_for_end()
        while self.damage.kills < self.kills:
            self._start_and_kill()
        self._train(self.cut).wait_for_end()
        self._compare_losses()
        self._compare_ends()
        return self.damage

    def _write_inputs(self) -> None:
        self.out.mkdir(parents=True)
        counts: tuple[tuple[Split, int], ...] = (("train", 96), ("heldout", 24))
        for split, count in counts:
            rows = ({name: row[name] for name in ("id", "domain", "conversations")} for row in conversations(split, count))
            (self.out / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        settings = {
            "output_dir": self.calm,
            "run_id": "chaos",
            "model.target_path": TARGET,
            "method.options.draft_tokens": 2,
            "method.options.draft_vocab_size": 512,
            "data.train_path": self.out / "train.jsonl",
            "data.eval_path": self.out / "heldout.jsonl",
            "data.max_length": 128,
            "features.path": self.out / "features" / "train",
            "features.cache_dir": self.out / "features",
            "train.steps": self.steps,
            "train.batch_samples": 4,
            "train.micro_batch_tokens": 256,
            "train.learning_rate": 2e-3,
            "train.log_every": 1,
            "train.eval_every": 2,
            "train.save_every": 1,
            "eval.bootstrap": 0,
            "checkpoint.keep": 2,
        }
        config = load_config(None, [f"{key}={value}" for key, value in settings.items()])
        (self.out / "chaos.yaml").write_text(dump_config(config))

    def _train(self, folder: Path) -> "Job":
        stand = newest(folder)
        words = [f"output_dir={folder}", *([f"train.resume_from={folder / 'latest'}"] if stand else [])]
        self.damage.resumes += stand is not None
        return Job(self.out / "chaos.yaml", words, self.ranks, self.out / "output.txt")

    def _start_and_kill(self) -> None:
        job = self._train(self.cut)
        before = newest(self.cut)
        steps_first = self._random.randint(1, 5)
        job.wait_until(lambda: (stand := newest(self.cut)) is not None and stand.step >= (before.step if before else 0) + steps_first)
        if self._random.random() < IN_A_SAVE:
            job.wait_until(lambda: bool(list(_staged(self.cut))))
        time.sleep(self._random.uniform(0.0, 0.06))
        if not job.kill():
            raise SpecForgeError(f"the run in {self.cut} ended before it was killed {self.kills} times; this is a mistake in the script.")
        self.damage.kills += 1
        self.damage.phases[self._phase()] += 1
        self._inspect()
        print(f"kill {self.damage.kills:>3}: {_line(self.damage)}", flush=True)

    def _phase(self) -> str:
        """What the kill interrupted, read from what lies in the folder."""
        stand, best = newest(self.cut), read_best(self.cut)
        if stand is None:
            return "first save"
        for step, staged in _staged(self.cut):
            if step <= stand.step:
                return "rotation"
            return "rename" if (staged / files.MANIFEST).is_file() else "writing"
        if (self.cut / "latest").resolve().name != stand.path.name:
            return "latest"
        stored = files.read_json(stand.path / "state.json", CheckpointError)["best"]
        if stored and (best is None or stored["step"] != best.step or (self.cut / "best").resolve().name != best.checkpoint):
            return "best"
        return "between saves"

    def _inspect(self) -> None:
        """Every complete checkpoint is whole, and the best evaluation up to the newest one is known."""
        try:
            for checkpoint in find_checkpoints(self.cut):
                read_state(checkpoint, World())
        except CheckpointError:
            self.damage.torn += 1
        stand = newest(self.cut)
        if stand is None:
            return
        calm = read_metrics(self.calm / "metrics.jsonl")
        scores = {line["step"]: line["eval/acc_len"] for line in calm if "eval/acc_len" in line and line["step"] <= stand.step}
        stored = files.read_json(stand.path / "state.json", CheckpointError)["best"]
        on_disk = read_best(self.cut)
        known = max([best for best in (stored and stored["score"], on_disk and on_disk.score) if best], default=None)
        self.damage.lost_best += known != max(scores.values())

    def _compare_losses(self) -> None:
        """All lines count, those of steps that a kill took back too."""
        calm = {line["step"]: line["train/loss"] for line in read_metrics(self.calm / "metrics.jsonl") if "train/loss" in line}
        cut = [(line["step"], line["train/loss"]) for line in read_metrics(self.cut / "metrics.jsonl") if "train/loss" in line]
        self.damage.loss_mismatches += sum(loss != calm[step] for step, loss in cut)
        self.damage.loss_mismatches += len(calm.keys() - {step for step, _ in cut})

    def _compare_ends(self) -> None:
        ends = [_tensors(find_checkpoints(folder)[-1]) for folder in (self.calm, self.cut)]
        equal = ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
        self.damage.loss_mismatches += not equal


class Job:
    """One start of the training, with all its processes."""

    def __init__(self, config: Path, words: Sequence[str], ranks: int, output: Path) -> None:
        launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"] if ranks > 1 else []
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        self._output = output
        with output.open("w") as file:
            self._process = subprocess.Popen(
                [sys.executable, *launch, "-m", "specforge", "train", str(config), *words],
                env=environment, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip

    def wait_until(self, true: Callable[[], bool]) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        while self._process.poll() is None and not true():
            if time.monotonic() > deadline_s:
                self.kill()
                raise SpecForgeError(f"the training made no progress for {PATIENCE_S:.0f} s; its output is {self._output}.")
            time.sleep(0.001)

    def wait_for_end(self) -> None:
        if self._process.wait():
            raise SpecForgeError(f"the training ended with exit code {self._process.returncode}; its output is {self._output}.")

    def kill(self) -> bool:
        """SIGKILL to all processes at once; torchrun's workers are in sessions of their own. False where it had ended."""
        if self._process.poll() is not None:
            return False
        family = [self._process.pid, *(child.pid for child in psutil.Process(self._process.pid).children(recursive=True))]
        for pid in family:
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                continue
        self._process.wait()
        while any(psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE for pid in family):
            time.sleep(0.01)
        return True


def _staged(folder: Path) -> Iterator[tuple[int, Path]]:
    """Unfinished step folders, with their steps."""
    for path in folder.glob(".*-step*.staging-*"):
        yield int(path.name.split("-step")[1].split(".")[0]), path


def _tensors(checkpoint: Checkpoint) -> dict[str, torch.Tensor]:
    return {
        f"{path.relative_to(checkpoint.path)}/{name}": tensor
        for path in checkpoint.path.rglob("*.safetensors")
        for name, tensor in load_file(path).items()
    }


def _line(damage: Damage) -> str:
    return ", ".join(f"{name} {value}" for name, value in vars(damage).items() if name not in ("kills", "phases"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/chaos.sh", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kills", type=int, help="how often to kill")
    parser.add_argument("--out", type=Path, default=Path("runs/chaos"), help="folder of both runs (default runs/chaos); replaced")
    parser.add_argument("--ranks", type=int, default=2, help="processes of the training (default 2)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    given = parser.parse_args()
    damage = Chaos(given.out, given.kills, given.ranks, given.seed).run()
    print("\ninterrupted        times")
    for phase, times in damage.phases.most_common():
        print(f"{phase:<16}{times:>8}  {'█' * times}")
    print(json.dumps({name: value for name, value in vars(damage).items() if name != "phases"}))
    sys.exit(bool(damage.lost_best or damage.torn or damage.loss_mismatches))


if __name__ == "__main__":
    main()
