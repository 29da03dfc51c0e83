"""What the suite's demonstrations promise, and an attention that takes no tree."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoTokenizer

from specforge.demo.bundle import TASKS, write_bundle
from specforge.distributed import World
from specforge.log.progress import progress
from specforge.suite.bundle import read_examples, read_tasks
from specforge.suite.evaluate import Evaluation, Manner
from specforge.suite.prompts import Draw
from specforge.suite.scoring import Model
from specforge.suite.token_cache import TokenCache
from tests.suite.bundles import write_bundle as write_words
from tests.suite.test_scoring import make_model
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
def test_flex_attention_is_scored_in_batches(tmp_path: Path) -> None:
    folder, tasks = make_text_target(tmp_path / "target"), read_tasks(write_words(tmp_path / "bundle"))[:1]

    def evaluation() -> Evaluation:
        return Evaluation(TokenCache(tmp_path / "cache", folder, lambda: AutoTokenizer.from_pretrained(folder), "eos"), Draw(), World())

    model = Model(make_model("llama", "flex_attention"))
    assert model.why_no_tree
    [flex] = evaluation().results(model, tasks, Manner("tree"), progress(None))
    [sdpa] = evaluation().results(Model(make_model("llama", "sdpa")), tasks, Manner("exact"), progress(None))
    assert flex.mode == "batched"
    np.testing.assert_allclose(flex.answers.loss_R, sdpa.answers.loss_R, rtol=0, atol=2e-5)
    assert flex.answers.predicted_E.tolist() == sdpa.answers.predicted_E.tolist()
