"""What the suite's demonstrations promise, and flex attention."""

import json
import os
import subprocess
import sys
import typing
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from specforge.demo.bundle import TASKS, write_bundle
from specforge.distributed import World
from specforge.features.target import Target
from specforge.log.progress import progress
from specforge.suite.bundle import read_examples, read_tasks
from specforge.suite.evaluate import Evaluation, Manner, Mode, TaskResult
from specforge.suite.prompts import Draw
from specforge.suite.scoring import Model
from specforge.suite.token_cache import TokenCache
from tests.suite.bundles import write_bundle as write_words
from tests.suite.test_scoring import LONGEST
from tests.texts import make_text_target

pytestmark = pytest.mark.long


def test_sharing_prefixes_changes_no_answer_and_takes_at_most_a_twentieth_more_memory() -> None:
    script = Path(__file__).parents[2] / "scripts" / "prefix_demo.sh"
    environment = {**os.environ, "SPECFORGE_VENV": sys.prefix}
    done = subprocess.run([script, "--examples", "20"], env=environment, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    numbers = json.loads(done.stdout.splitlines()[-1])
    assert list(numbers) == ["no shots", "ten shots, a draw per example", "ten shots, one block"]
    for exact, tree in ((pair["exact"], pair["tree"]) for pair in numbers.values()):
        assert exact["accuracy"] == tree["accuracy"]
        assert 2 * tree["slots"] < tree["row_tokens"] == exact["row_tokens"] <= exact["slots"]
        assert tree["peak_mib"] < 1.05 * exact["peak_mib"]


def test_the_bundle_of_the_quickstart(tmp_path: Path) -> None:
    """All three kinds, from no shots to ten; each has its examples, and names can be told apart."""
    tasks = read_tasks(write_bundle(tmp_path / "bundle", 30))
    assert [(task.label, task.shots) for task in tasks] == [(label, shots) for label, _, _, shots, _, _ in TASKS]
    assert {task.kind for task in tasks} == {"multiple_choice", "schema", "language_modeling"}
    for task in tasks:
        examples = read_examples(task)
        assert len(examples) == 30
        if task.label.startswith("names"):
            assert all(len(set(example.continuations)) == 4 for example in examples)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch, when it compiles what transformers asks for
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_every_mode_with_flex_attention(dtype: torch.dtype, tmp_path: Path) -> None:
    """Heads of 32 numbers: PyTorch's compiled kernel for CPUs is wrong for some lengths where they are smaller."""
    torch.compiler.reset()  # a process compiles a function for so many shapes and types and no more
    folder, tasks = make_text_target(tmp_path / "target"), read_tasks(write_words(tmp_path / "bundle"))
    config = LlamaConfig(
        vocab_size=300, hidden_size=64, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        max_position_embeddings=LONGEST, initializer_range=0.3,
    )  # fmt: skip

    def results(attention: str, dtype: torch.dtype, mode: Mode) -> list[TaskResult]:
        torch.manual_seed(0)
        model = Model(Target(LlamaForCausalLM._from_config(config, attn_implementation=attention).to(dtype).eval()))
        assert not model.why_no_tree
        cache = TokenCache(tmp_path / "cache", folder, lambda: AutoTokenizer.from_pretrained(folder), "eos")
        manner = Manner(mode, piece_tokens=64)
        return list(Evaluation(cache, Draw(), World()).results(model, tasks, manner, progress(None)))

    expected = results("sdpa", dtype, "exact")
    for mode in typing.get_args(Mode):
        for exact, flex in zip(expected, results("flex_attention", dtype, mode), strict=True):
            np.testing.assert_allclose(flex.answers.loss_R, exact.answers.loss_R, rtol=0, atol=2e-5 if dtype == torch.float32 else 0.15)
            if dtype == torch.float32:
                assert flex.answers.predicted_E.tolist() == exact.answers.predicted_E.tolist()
