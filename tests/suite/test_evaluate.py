"""One evaluation, as often as wanted: what is kept, audited, compared with no question, and done within a training."""

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any, Self

import numpy as np
import pytest
import torch
from torch.nn import functional as F
from transformers import AutoTokenizer, LlamaForCausalLM

from specforge.distributed import World
from specforge.features.target import Target
from specforge.log.progress import progress
from specforge.suite.bundle import Task, read_examples, read_tasks
from specforge.suite.evaluate import Evaluation, Manner, TaskResult
from specforge.suite.in_training import SuiteInTraining
from specforge.suite.prompts import Draw, chosen
from specforge.suite.scoring import Model
from specforge.suite.token_cache import TokenCache
from tests.suite.bundles import write_bundle
from tests.texts import make_text_target

EOS = 3


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_text_target(tmp_path_factory.mktemp("evaluate") / "target")


@pytest.fixture(scope="module")
def tasks(target: Path) -> list[Task]:
    return read_tasks(write_bundle(target.parent / "bundle"))


def make(target: Path, **more: Any) -> Evaluation:
    cache = TokenCache(target.parent / "cache", target, lambda: AutoTokenizer.from_pretrained(target), "eos")
    return Evaluation(cache, Draw(), World(), **more)


def results(evaluation: Evaluation, target: Path, tasks: list[Task], manner: Manner, ahead_tasks: int = 1) -> list[TaskResult]:
    return list(evaluation.results(Model(Target.load(target, "float32")), tasks, manner, progress(None), ahead_tasks))


@pytest.mark.parametrize("mode", ["exact", "batched", "tree", "auto"])
def test_what_is_preloaded_is_not_brought_again(mode: Any, target: Path, tasks: list[Task]) -> None:
    evaluation = make(target)
    evaluation.preload(Model(Target.load(target, "float32")), tasks, Manner(mode))
    moved = evaluation.resident.moved
    assert moved > len(tasks)
    first = results(evaluation, target, tasks, Manner(mode))
    again = results(evaluation, target, tasks, Manner(mode), ahead_tasks=3)
    assert evaluation.resident.moved == moved
    for one, other in zip(first, again, strict=True):
        np.testing.assert_allclose(one.answers.loss_R, other.answers.loss_R, rtol=0, atol=1e-6)


def test_the_least_recently_used_goes(target: Path, tasks: list[Task]) -> None:
    """Room for the batches of two tasks: the third one takes that of the first, and a task larger than all of it is never kept."""
    roomy = make(target)
    sizes = []
    for task in tasks[:3]:
        before = roomy.resident.held_bytes
        roomy.preload(Model(Target.load(target, "float32")), [task], Manner("batched"))
        sizes.append(roomy.resident.held_bytes - before)
    expected = results(roomy, target, tasks[:3], Manner("batched"))

    tight = make(target, resident_bytes=sizes[1] + sizes[2])
    found = results(tight, target, tasks[:3], Manner("batched"))
    assert tight.resident.held_bytes == sizes[1] + sizes[2]
    moved = tight.resident.moved
    results(tight, target, tasks[1:3], Manner("batched"))
    assert tight.resident.moved == moved
    results(tight, target, tasks[:1], Manner("batched"))
    assert tight.resident.moved > moved
    none = make(target, resident_bytes=1)
    found += results(none, target, tasks[:3], Manner("batched"))
    assert none.resident.held_bytes == 0
    for one, other in zip([*expected, *expected], found, strict=True):
        np.testing.assert_array_equal(one.answers.loss_R, other.answers.loss_R)


def test_an_audit_measures_the_difference_and_names_what_it_could_turn(target: Path, tasks: list[Task]) -> None:
    [exact] = results(make(target), target, tasks[:1], Manner("exact", audit_examples=4))
    assert exact.audit is not None and (exact.audit.examples, exact.audit.largest_difference, exact.audit.at_risk) == (4, 0.0, [])
    [tree] = results(make(target), target, tasks[:1], Manner("tree", audit_examples=100))
    assert tree.audit is not None and tree.audit.examples == 12
    difference = np.abs(tree.answers.loss_R - exact.answers.loss_R).max()
    assert tree.audit.largest_difference == difference < 1e-5
    assert tree.audit.at_risk == np.flatnonzero(tree.answers.margin_E <= 2 * difference).tolist()


@torch.no_grad()
def test_pointwise_mutual_information(target: Path, tasks: list[Task]) -> None:
    """log p(choice | question) - log p(choice | "Answer:"), text by text with the model itself."""
    model, tokenizer = LlamaForCausalLM.from_pretrained(target), AutoTokenizer.from_pretrained(target)

    def logp(context: str, choice: str) -> float:
        before = [EOS, *tokenizer(context, add_special_tokens=False)["input_ids"]]
        ids = [EOS, *tokenizer(f"{context} {choice}", add_special_tokens=False)["input_ids"]]
        logits = model(input_ids=torch.tensor([ids])).logits[0, len(before) - 1 : -1]
        return -F.cross_entropy(logits, torch.tensor(ids[len(before) :]), reduction="sum").item()

    [result] = results(make(target), target, tasks[:1], Manner(rule="pmi"))
    examples = chosen(read_examples(tasks[0]), Draw())
    expected = [
        logp("Answer:", choice) - logp(context, choice)
        for example in examples
        for context, choice in zip(example.contexts, example.continuations, strict=True)
    ]
    np.testing.assert_allclose(result.answers.loss_R, expected, rtol=0, atol=2e-4)
    assert result.answers.predicted_E.tolist() == np.array(expected).reshape(12, 4).argmin(1).tolist()


def test_a_training_goes_on_as_if_nothing_had_been_scored(target: Path, tasks: list[Task]) -> None:
    model = LlamaForCausalLM.from_pretrained(target)
    model.lm_head.weight.requires_grad_(False)
    model.train()
    model(input_ids=torch.arange(4, 40)[None], labels=torch.arange(4, 40)[None]).loss.backward()
    before = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    hook = SuiteInTraining(make(target), tasks, Manner(), every_steps=5)
    assert hook(model, 4) == {}
    numbers = hook(model, 5)
    after = {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()}
    assert model.training and all(before[name][0] == after[name][0] and before[name][1] is after[name][1] for name in before)
    centred = {f"suite/{x.task.label}": x.numbers()["centred"] for x in results(make(target), target, tasks, Manner())}
    assert numbers == {"suite/core": fmean(centred.values()), **centred}


class Told:
    """What a loop says of its progress."""

    def __init__(self) -> None:
        self.units: list[int] = []
        self.tasks: list[str] = []

    def update(self, n: int = 1) -> None:
        self.units.append(n)

    def set_postfix(self, numbers: Mapping[str, float | str]) -> None:
        self.tasks.append(str(numbers["task"]))

    def close(self) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...


@pytest.mark.parametrize("mode", ["exact", "batched", "tree"])
def test_progress_is_in_unique_tokens_whatever_the_mode(mode: Any, target: Path, tasks: list[Task]) -> None:
    told, model = Told(), Model(Target.load(target, "float32"))
    found = list(make(target).results(model, tasks, Manner(mode), told))
    prefixes = [
        {tuple(x.tokens.row(r)[:n]) for r in range(len(x.tokens.lengths_R)) for n in range(1, x.tokens.lengths_R[r])} for x in found
    ]
    assert sum(told.units) == sum(map(len, prefixes))
    assert len(told.units) > len(tasks) and min(told.units) >= 0
    assert told.tasks == [f"{number}/{len(tasks)} {task.label}" for number, task in enumerate(tasks, 1)]


def test_audits_of_different_sizes_are_different_work(target: Path, tasks: list[Task]) -> None:
    evaluation = make(target)
    sizes = [
        result.audit.examples
        for n in (2, 5)
        for result in results(evaluation, target, tasks[:1], Manner("tree", audit_examples=n))
        if result.audit
    ]
    assert sizes == [2, 5]
    [again] = results(evaluation, target, tasks[:1], Manner("tree", audit_examples=5))
    [fresh] = results(make(target), target, tasks[:1], Manner("tree", audit_examples=5))
    assert again.audit == fresh.audit
