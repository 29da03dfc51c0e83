"""`specforge bench decode`: draft lengths that adapt against every fixed one, and where a round's time goes."""

import argparse
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from specforge import files
from specforge.bench.decode import measure, table
from specforge.cli.draft import read_draft
from specforge.cli.inputs import encode
from specforge.config import KEYS_HELP, load_config
from specforge.distributed import World
from specforge.errors import DataError
from specforge.eval.acceptance import answers
from specforge.eval.calibration import is_for_fit
from specforge.features.target import Target
from specforge.models.calibration import Calibration


def arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("config", help="the configuration of the run, for example RUN/config.yaml")
    parser.add_argument("overrides", nargs="*", default=(), metavar="key=value", help=KEYS_HELP)
    parser.add_argument("--checkpoint", required=True, help="RUN/best, RUN/latest or a step folder, calibrated")
    parser.add_argument("--prompts", type=int, default=32, help="answers to decode, of those that no scaling was fitted on")
    parser.add_argument("--laps", type=int, default=6, help="how often; the fastest of each answer counts")


def run(given: argparse.Namespace) -> int:
    config = load_config(given.config, given.overrides)
    draft = read_draft(given.checkpoint, Path(config.model.target_path), config.eval.draft_tokens or None)
    calibration = Calibration.read(Path(draft.name) / "draft", draft.draft_tokens)
    target = Target.load(config.model.target_path, config.model.dtype, World.join().device)
    prompts = [
        (sample.input_ids[:first].astype(np.int64), last - first + 1)
        for sample in encode(config, "eval").samples if not is_for_fit(sample.id)
        for first, last in answers(sample.loss_mask) if first > 0
    ]  # fmt: skip
    if not prompts:
        raise DataError(f"data.eval_path={config.data.eval_path!r}: no answer is left to measure on; give more rows.")
    numbers = measure(
        target, lambda length, rule: replace(draft, draft_tokens=length, adaptive=rule).drafter(target, None, torch.Generator()),
        draft.draft_tokens, calibration, prompts[: given.prompts], given.laps,
    )  # fmt: skip
    print(table(numbers))
    print(files.json_line(numbers))
    return 0
