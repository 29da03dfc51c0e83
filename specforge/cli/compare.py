"""`specforge compare`: every drafting method on the embedded target, with equal rows, steps and parameters and several seeds.

The target answers prompts, its features are captured once, and each recipe `configs/*-embedded.yaml` is trained on them with each seed,
two trainings at a time with one thread each. Then, nothing beside it, each method trains a few steps more for its speed, in turns, and
the drafts of the first seed decode in turns. What an earlier call has trained is kept. The table is Markdown, the last line JSON.

Walks are those of all K drafts after the last step (docs/evaluation.md). The interval holds the mean over seeds with 95 %, were seeds
and held-out answers drawn anew: half of it is 1.96 sqrt(v + w / S), v the mean variance over answers, w that over S seeds.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import fmean, median, variance
from typing import Any

import numpy as np

from specforge import files
from specforge.cli.demo import ANSWER_TOKENS, CALM, TARGET
from specforge.config import load_config
from specforge.config.methods import registered
from specforge.demo.rows import split_answers, write_prompts
from specforge.errors import ConfigError, SpecForgeError
from specforge.log.run_log import read_metrics

CONFIGS = Path(__file__).parents[2] / "configs"
INTERMEDIATE_SIZES = {"eagle3": 1112, "peagle": 468, "dflash": 864, "domino": 512, "dspark": 408}
"""Widths of the feed-forward that give every draft 1.30 million parameters, within 0.1 %."""
AUX_LAYER_IDS = (1, 2, 3)
HELDOUT = 260
DOMAINS = ("complete", "docstring", "literal", "prose")
TIMED_STEPS, TIMED_LAPS = 60, 2


class Comparison:
    def __init__(self, out: Path, steps: int, seeds: int, rows: int) -> None:
        self.out, self.steps, self.seeds, self.rows = out, steps, seeds, rows

    def run(self) -> dict[str, Any]:
        """The numbers of the JSON line."""
        from specforge.cli.draft_clock import draft_seconds

        self._claim()
        self._make_rows()
        self._specforge("prepare", str(recipe("eagle3")), *self._settings("eagle3", 0, self._run("eagle3", 0)), log="rows.log")
        with ThreadPoolExecutor(max_workers=2) as both:
            list(both.map(lambda job: self._train(*job), product(range(self.seeds), INTERMEDIATE_SIZES)))
        numbers = {name: self._numbers(name) for name in INTERMEDIATE_SIZES}
        for name, tokens_per_s in self._training_speeds().items():
            numbers[name]["train_tokens_per_s"] = tokens_per_s
        drafts = {name: self._run(name, 0) / "latest" for name in INTERMEDIATE_SIZES}
        for name, seconds in draft_seconds(drafts, self.out / "heldout.jsonl").items():
            numbers[name]["draft_ms"] = 1e3 * seconds
        return {"steps": self.steps, "seeds": self.seeds, "rows": self.rows, "methods": numbers}

    def _claim(self) -> None:
        """A folder holds trainings of one length on one number of rows."""
        asked, note = {"steps": self.steps, "rows": self.rows}, self.out / "comparison.json"
        if not note.exists():
            self.out.mkdir(parents=True, exist_ok=True)
            files.write_text(note, files.json_line(asked))
        elif (stored := files.read_json(note)) != asked:
            raise ConfigError(
                f"--out {self.out}: holds trainings of {files.shown(stored)}, asked for are {asked}; "
                "ask for the same, or choose another folder."
            )

    def _make_rows(self) -> None:
        if (self.out / "heldout.jsonl").exists():
            return
        prompts, answers = self.out / "prompts.jsonl", self.out / "answers.jsonl"
        write_prompts(prompts, self.rows, HELDOUT)
        self._specforge(
            "prepare", str(CONFIGS / "eagle3-embedded.yaml"), f"model.target_path={TARGET}", f"data.train_path={prompts}",
            "--regenerate", str(answers), "--max-new-tokens", str(ANSWER_TOKENS), log="rows.log",
        )  # fmt: skip
        split_answers(answers)

    def _settings(self, name: str, seed: int, run: Path) -> list[str]:
        settings = {
            "run_id": run.name, "output_dir": run, "seed": seed, "model.target_path": TARGET,
            "model.aux_layer_ids": list(AUX_LAYER_IDS), "features.path": self.out / "captured", "features.cache_dir": self.out / "features",
            "method.options.intermediate_size": INTERMEDIATE_SIZES[name],
            "data.train_path": self.out / "train.jsonl", "data.eval_path": self.out / "heldout.jsonl",
            "train.steps": self.steps, "train.eval_every": max(self.steps // 4, 1), "train.save_every": max(self.steps // 4, 1),
        }  # fmt: skip
        return [f"{key}={value}" for key, value in settings.items()]

    def _run(self, name: str, seed: int) -> Path:
        return self.out / f"{name}-{seed}"

    def _train(self, seed: int, name: str) -> None:
        run = self._run(name, seed)
        if self._last(run).get("step") == self.steps:
            return
        resume = [f"train.resume_from={run / 'latest'}"] if (run / "latest").exists() else []
        self._specforge("train", str(recipe(name)), *self._settings(name, seed, run), *resume, log=f"{run.name}.log")
        print(f"{run.name}: walk {self._last(run)['eval/walk_acc_len']:.3f}", flush=True)

    def _specforge(self, *words: str, log: str) -> None:
        with (self.out / log).open("a") as file:
            command = [sys.executable, "-m", "specforge", *words]
            done = subprocess.run(command, env={**os.environ, **CALM}, check=False, stdout=file, stderr=subprocess.STDOUT)
        if done.returncode:
            raise SpecForgeError(f"`specforge {' '.join(words)}` failed with exit code {done.returncode}; {self.out / log} says why.")

    def _last(self, run: Path) -> dict[str, Any]:
        evaluated = [line for line in read_metrics(run / "metrics.jsonl") if "eval/walk_acc_len" in line]
        return evaluated[-1] if evaluated else {}

    def _numbers(self, name: str) -> dict[str, Any]:
        from specforge.features.tables import TargetTables

        runs = [self._run(name, seed) for seed in range(self.seeds)]
        lasts = [self._last(run) for run in runs]
        walks = [last["eval/walk_acc_len"] for last in lasts]
        over_answers = fmean(((last["eval/walk_acc_len_high"] - last["eval/walk_acc_len_low"]) / 3.92) ** 2 for last in lasts)
        options = load_config(recipe(name), self._settings(name, 0, runs[0])).method.options
        return {
            "draft_tokens": lasts[0]["eval/draft_tokens"],
            "parameters": registered(name).load().count_parameters(options, TargetTables.read(TARGET), AUX_LAYER_IDS),
            "walk": fmean(walks),
            "half_interval": 1.96 * (over_answers + (variance(walks) if len(walks) > 1 else 0.0) / len(walks)) ** 0.5,
            "walks": walks,
            "survival": np.mean([last["eval/survival"] for last in lasts], 0).tolist(),
            "domains": {domain: fmean(last[f"eval/{domain}/walk_acc_len"] for last in lasts) for domain in DOMAINS},
            "ngram": lasts[0]["eval/ngram_walk_acc_len"],
            "ngram_domains": {domain: lasts[0][f"eval/{domain}/ngram_walk_acc_len"] for domain in DOMAINS},
        }

    def _training_speeds(self) -> dict[str, float]:
        """Median of the training tokens of a second, one thread; the first interval, which warms up, does not count."""
        steps = min(TIMED_STEPS, self.steps)
        few = [
            f"train.steps={steps}",
            f"train.log_every={max(steps // 6, 1)}",
            "train.eval_every=0",
            "train.save_every=0",
            "eval.max_samples=1",
        ]
        speeds: dict[str, list[float]] = {name: [] for name in INTERMEDIATE_SIZES}
        for _, (name, of_name) in product(range(TIMED_LAPS), speeds.items()):
            with tempfile.TemporaryDirectory(dir=self.out) as folder:
                run = Path(folder) / name
                self._specforge("train", str(recipe(name)), *self._settings(name, 0, run), *few, log="speed.log")
                measured = [line["perf/tokens_per_s"] for line in read_metrics(run / "metrics.jsonl") if "perf/tokens_per_s" in line]
            of_name.extend(measured[1:])
        return {name: median(of_name) for name, of_name in speeds.items()}


def recipe(name: str) -> Path:
    return CONFIGS / f"{name}-embedded.yaml"


def table(numbers: dict[str, Any]) -> str:
    methods = numbers["methods"]
    any_method = next(iter(methods.values()))
    rows = [
        [
            name, f"{of['parameters'] / 1e6:.3f} M", f"{of['walk']:.3f} ± {of['half_interval']:.3f}",
            " ".join(f"{share:.2f}" for share in of["survival"]), *(f"{of['domains'][domain]:.2f}" for domain in DOMAINS),
            f"{of['train_tokens_per_s']:,.0f}", f"{of['draft_ms']:.2f}",
        ]
        for name, of in sorted(methods.items(), key=lambda item: -item[1]["walk"])
    ]  # fmt: skip
    ngram = [f"{any_method['ngram_domains'][domain]:.2f}" for domain in DOMAINS]
    rows.append(["n-gram", "0", f"{any_method['ngram']:.3f}", "", *ngram, "", ""])
    head = ["method", "parameters", "walk", "s_1 .. s_K", *DOMAINS, "training tokens/s", "draft ms a round"]
    best = {column: max(rows, key=lambda row: float(row[column])) for column in range(4, 4 + len(DOMAINS))}
    for column, row in best.items():
        row[column] = f"**{row[column]}**"
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def run(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(prog="specforge compare", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/methods"), help="folder of the trainings (default runs/methods)")
    parser.add_argument("--steps", type=int, default=2000, help="of each training (default 2000)")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each method (default 3)")
    parser.add_argument("--rows", type=int, default=12000, help="prompts to train on (default 12000)")
    given = parser.parse_args(words)
    for name, least in (("steps", 2), ("seeds", 1), ("rows", 1)):
        if getattr(given, name) < least:
            raise ConfigError(f"--{name} {getattr(given, name)}: must be at least {least}; give a larger number.")
    numbers = Comparison(given.out, given.steps, given.seeds, given.rows).run()
    print(table(numbers))
    print(files.json_line(numbers))
    return 0
