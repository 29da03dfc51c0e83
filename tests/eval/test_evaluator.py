"""One evaluation, however it is cut: micro-batches, ranks, empty shards."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.eval.acceptance import answers
from specforge.eval.evaluator import Evaluator
from specforge.features.store import LocalFeatureStore
from specforge.training.backend import FSDPTrainingBackend
from tests.ranks import Collectives, run_ranks
from tests.tiny import make_answered, make_method, make_samples, make_store, train

K = 3


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> LocalFeatureStore:
    return make_store(tmp_path_factory.mktemp("features") / "store", target_path, make_samples([40, 9, 21, 5, 17, 12, 30]))


def evaluate(world: World, target_path: Path, folder: Path, micro_batch_tokens: int, max_samples: int = 0) -> dict[str, Any]:
    method = make_method(target_path, LocalFeatureStore(folder))
    backend = FSDPTrainingBackend(method, TrainConfig(), world)
    evaluator = Evaluator(
        LocalFeatureStore(folder), world, draft_tokens=K, micro_batch_tokens=micro_batch_tokens, max_samples=max_samples, bootstrap=50
    )
    with backend.whole(), Collectives() as seen:
        numbers = evaluator.evaluate(method, backend)
    return {**numbers, "collectives": seen.total}


def assert_same(got: dict[str, Any], expected: dict[str, Any]) -> None:
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if name == "eval/avg_loss":
            assert got[name] == pytest.approx(value, rel=1e-6)
        elif name.startswith("eval/calibration/"):
            assert got[name] == pytest.approx(value, rel=1e-6, nan_ok=True), name
        elif name != "collectives":
            assert got[name] == value, name


@pytest.mark.parametrize("micro_batch_tokens", [1, 60, 1000])
def test_micro_batches_change_nothing(micro_batch_tokens: int, target_path: Path, store: LocalFeatureStore) -> None:
    expected = evaluate(World(), target_path, store.folder, 100)
    assert_same(evaluate(World(), target_path, store.folder, micro_batch_tokens), expected)


@pytest.mark.parametrize(("world", "max_samples"), [(2, 0), (4, 0), (4, 2), (2, 1)])
def test_ranks_change_nothing(world: int, max_samples: int, target_path: Path, store: LocalFeatureStore) -> None:
    """4 ranks and 2 samples: two ranks have nothing to do, and nobody waits for them."""
    expected = evaluate(World(), target_path, store.folder, 60, max_samples)
    for numbers in run_ranks(evaluate, target_path, store.folder, 60, max_samples, world=world):
        assert_same(numbers, expected)
        assert numbers["collectives"] == 3, "one reduction of the loss, one of the counts, one of the confidences"


def test_another_draft_gives_other_numbers(target_path: Path, store: LocalFeatureStore) -> None:
    """Negative control: equality above is not the equality of constants."""
    expected = evaluate(World(), target_path, store.folder, 60)
    method = make_method(target_path, store, seed=1)
    evaluator = Evaluator(store, World(), draft_tokens=K, micro_batch_tokens=60, bootstrap=50)
    with torch.no_grad():
        numbers = evaluator.evaluate(method)
    assert numbers["eval/avg_loss"] != pytest.approx(expected["eval/avg_loss"], rel=1e-3)
    assert numbers["eval/per_position_acc"] != expected["eval/per_position_acc"]


def test_every_start_counts_once(target_path: Path, store: LocalFeatureStore) -> None:
    """A run of n supervised tokens has n - 1 starts."""
    runs = [last - first for i in range(len(store)) for first, last in answers(store.tokens(i)[1].numpy())]
    for world in (1, 2):
        assert {n["eval/starts"] for n in run_ranks(evaluate, target_path, store.folder, 60, world=world)} == {sum(runs)}


def test_fewer_drafts_are_a_prefix_of_more(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_method(target_path, store)
    with torch.no_grad():
        long, short = (Evaluator(store, World(), draft_tokens=k, micro_batch_tokens=60, bootstrap=0).evaluate(method) for k in (3, 2))
    assert long["eval/per_position_acc"][:2] == short["eval/per_position_acc"]
    assert long["eval/survival"][:2] == short["eval/survival"]


def test_counts_add_up_over_domains(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_method(target_path, store)
    evaluator = Evaluator(store, World(), draft_tokens=K, micro_batch_tokens=60, bootstrap=0)
    with torch.no_grad():
        numbers = evaluator.evaluate(method)
    assert {name.split("/")[1] for name in numbers if name.count("/") == 2} == {"a", "b"}
    low, high = sorted(numbers[f"eval/{domain}/acc_len"] for domain in "ab")
    assert low <= numbers["eval/acc_len"] <= high


def test_a_domains_interval_is_that_of_its_samples_alone(target_path: Path, tmp_path: Path) -> None:
    """Weights follow the sample's id, so what stands beside a domain changes nothing; nine samples are too few for an interval."""
    samples = [
        SimpleNamespace(**vars(sample) | {"id": f"{copy}{sample.id}", "domain": "ab"[copy]})
        for copy in (0, 1)
        for sample in make_answered(target_path)
    ]
    both = make_store(tmp_path / "both", target_path, samples[:19])
    alone = make_store(tmp_path / "alone", target_path, samples[:10])
    method = train(make_method(target_path, both), both)
    with torch.no_grad():
        of_both, of_alone = (
            Evaluator(store, World(), draft_tokens=K, micro_batch_tokens=60, bootstrap=200).evaluate(method) for store in (both, alone)
        )
    for name in ("walk_acc_len", "ngram_walk_acc_len"):
        bounds = [of_both[f"eval/a/{name}{bound}"] for bound in ("_low", "", "_high")]
        assert bounds == [of_alone[f"eval/{name}{bound}"] for bound in ("_low", "", "_high")] == sorted(bounds)
        assert bounds[0] < bounds[2] and bounds != [of_both[f"eval/{name}{bound}"] for bound in ("_low", "", "_high")]
        assert f"eval/b/{name}" in of_both and f"eval/b/{name}_low" not in of_both
    assert (of_both["eval/a/samples"], of_both["eval/b/samples"], of_both["eval/samples"]) == (10, 9, 19)
