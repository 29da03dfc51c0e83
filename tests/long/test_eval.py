"""Real torchrun: `specforge eval --live --simulate` says at two ranks what one process says."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.test_eval_live import OWN, TREES, no_number
from tests.long.test_kill import command
from tests.texts import make_text_target, write_rows

pytestmark = pytest.mark.long
LAUNCHERS = ([sys.executable], [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"])


def test_eval_at_two_ranks_says_what_one_says(tmp_path: Path) -> None:
    """On the target's own answers; the last rank has fewer of them."""
    make_text_target(tmp_path / "target")
    write_rows(tmp_path / "rows.jsonl", 30)
    write_rows(tmp_path / "prompts.jsonl", 7)
    (tmp_path / "c.yaml").write_text("method: {name: eagle3, options: {draft_tokens: 3, draft_vocab_size: 100}}\n")
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    settings = [f"model.target_path={tmp_path / 'target'}", f"data.train_path={tmp_path / 'prompts.jsonl'}", f"output_dir={tmp_path}"]
    prepare = [str(tmp_path / "c.yaml"), *settings, "--regenerate", str(tmp_path / "heldout.jsonl"), "--max-new-tokens", "12"]
    subprocess.run([sys.executable, "-m", "specforge", "prepare", *prepare], env=environment, check=True)
    subprocess.run(command(tmp_path, tmp_path / "run"), env=environment, check=True, capture_output=True)

    words = ["-m", "specforge", "eval", str(tmp_path / "run" / "config.yaml"), "--checkpoint", str(tmp_path / "run" / "best")]
    said = []
    for launcher in LAUNCHERS:
        done = subprocess.run(
            [*launcher, *words, "--live", "5", "--simulate", *TREES], env=environment, check=True, stdout=subprocess.PIPE, text=True
        )
        text, _, last = done.stdout.rstrip("\n").rpartition("\n")
        numbers = json.loads(last, parse_constant=no_number)
        assert f"decoded {numbers['eval/live/tokens_per_round']:.6f}" in text
        said.append({name: value for name, value in numbers.items() if name not in OWN})
    alone, pair = said
    assert alone["eval/live/predicted_tokens_per_round"] == alone["eval/live/tokens_per_round"]
    assert alone.keys() == pair.keys()
    exact = [name for name in alone if name != "eval/avg_loss" and "/calibration/" not in name]
    assert {name: pair[name] for name in exact} == {name: alone[name] for name in exact}
