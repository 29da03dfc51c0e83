"""What every registered method keeps, by being registered, and two of them with experts in their layers as well."""

from collections.abc import Callable
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from specforge import files
from specforge.config.methods import METHODS, Registered
from specforge.config.schema import TrainConfig
from specforge.decode.drafter import Drafter, NoDrafter
from specforge.decode.engine import Decoder
from specforge.distributed import World
from specforge.eval.evaluator import Evaluator
from specforge.eval.live import decode_answers
from specforge.eval.simulate import simulate
from specforge.features.batch import DraftBatch
from specforge.features.loader import FeatureDataLoader
from specforge.features.store import LocalFeatureStore
from specforge.features.tables import TargetTables
from specforge.features.target import Target
from specforge.methods.base import Moment
from specforge.training.backend import FSDPTrainingBackend
from tests.ranks import run_ranks
from tests.training.test_resume import controller_for, fingerprint, same, truncate_after
from tests.training.test_steps import assert_equal, whole

TINY = {
    "draft_tokens": 3, "block_size": 4, "layers": 1, "draft_vocab_size": 50, "anchors": 4, "loss_chunk_rows": 7, "gru_hidden_dim": 16,
    "emb_dim": 8, "markov_rank": 8,
}  # fmt: skip
"""Where a method has such an option."""
STEPS = 3
MOMENT = Moment(seed=0, step=5, total_steps=10)

EXPERTS = {"experts": 4, "intermediate_size": 24, "layers": 2, "balance_weight": 1.0}
OF_EXPERTS = " of experts"

each_method = pytest.mark.parametrize("name", [*METHODS, "eagle3" + OF_EXPERTS, "dflash" + OF_EXPERTS])


def entry(name: str) -> Registered:
    return METHODS[name.removesuffix(OF_EXPERTS)]


def make(name: str, target_path: Path, store: LocalFeatureStore, seed: int = 0, **others: Any) -> Any:
    options = entry(name).options
    known = {field.name for field in fields(options)}
    variant = EXPERTS if name.endswith(OF_EXPERTS) else {}
    chosen = options(**{key: value for key, value in TINY.items() if key in known} | variant | others)
    return entry(name).load().build(chosen, TargetTables.read(target_path), store, seed)


def drafter_of(name: str, method: Any, draft_tokens: int) -> Drafter:
    return entry(name).load_drafter()(method, draft_tokens)


def learn(method: Any, store: LocalFeatureStore, steps: int) -> Any:
    """The method, after so many steps on all samples at once; the anchors are those of each step."""
    batch, optimiser = DraftBatch.read(store, range(len(store))), torch.optim.AdamW(method.parameters(), lr=1e-2)
    for step in range(steps):
        plan = method.plan(batch, Moment(0, step, steps))
        optimiser.zero_grad()
        (method(batch, plan).loss_sum / plan.weight).backward()
        optimiser.step()
    return method


@pytest.fixture(scope="module")
def learned(answered_path: Path, answered: LocalFeatureStore) -> Callable[[str], Any]:
    known: dict[str, Any] = {}

    def of(name: str) -> Any:
        if name not in known:
            known[name] = learn(make(name, answered_path, answered), answered, 120)
        return known[name]

    return of


def train(world: World, name: str, target_path: Path, folder: Path, micro_batch_tokens: int, **others: Any) -> dict[str, torch.Tensor]:
    """Parameters after a few clipped steps, and the norms before clipping."""
    store = LocalFeatureStore(folder)
    config = TrainConfig(batch_samples=4, learning_rate=1e-2, clip_norm=0.1, micro_batch_tokens=micro_batch_tokens)
    method = make(name, target_path, store, **others)
    backend = FSDPTrainingBackend(method, config, replace(world, local_rank=world.rank, local_size=world.size))
    data = FeatureDataLoader(store, 0, config.batch_samples, config.micro_batch_tokens, STEPS * config.batch_samples, world)
    norms = []
    for step, window in enumerate(data):
        plans = [method.plan(batch, Moment(0, step, STEPS)) for batch in window.batches]
        weight = float(world.sum_(torch.tensor(sum(plan.weight for plan in plans), dtype=torch.float64)))
        for index, (batch, plan) in enumerate(zip(window.batches, plans, strict=True)):
            backend.backward(backend(batch, plan).loss_sum, weight, boundary=index == len(plans) - 1)
        norms.append(backend.clip().detach().clone())
        backend.step(config.learning_rate)
    return {**{name: whole(p) for name, p in method.named_parameters()}, "gradient norms": torch.stack(norms)}


@each_method
@pytest.mark.parametrize(("world", "micro_batch_tokens"), [(1, 200), (2, 64), (4, 64)])
def test_every_split_learns_the_same(world: int, micro_batch_tokens: int, name: str, target_path: Path, store: LocalFeatureStore) -> None:
    expected = train(World(), name, target_path, store.folder, 40)
    for rank_result in run_ranks(train, name, target_path, store.folder, micro_batch_tokens, world=world):
        assert_equal(rank_result, expected)


@each_method
@pytest.mark.parametrize("moment", [None, MOMENT], ids=["evaluation", "training"])
def test_packed_is_separate(moment: Moment | None, name: str, target_path: Path, store: LocalFeatureStore) -> None:
    """Loss, weight, tallies, proposals and confidences, in any order of the samples."""
    method = make(name, target_path, store)
    samples = list(range(len(store)))
    for order in (samples, samples[::-1]):
        batch = DraftBatch.read(store, order)
        plan = method.plan(batch, moment)
        with torch.no_grad():
            together = method(batch, plan)
            alone = [(each, method.plan(each, moment)) for each in (DraftBatch.read(store, [sample]) for sample in order)]
            outputs = [method(each, own) for each, own in alone]
        assert plan.weight == pytest.approx(sum(own.weight for _, own in alone))
        torch.testing.assert_close(together.loss_sum, sum(output.loss_sum for output in outputs), rtol=1e-5, atol=1e-5)
        assert torch.equal(together.proposals_TK, torch.cat([output.proposals_TK for output in outputs]))
        torch.testing.assert_close(together.confidences_TK, torch.cat([output.confidences_TK for output in outputs]), rtol=1e-4, atol=1e-6)
        for key, value in together.tally.items():
            torch.testing.assert_close(value, sum(output.tally[key] for output in outputs), rtol=1e-5, atol=1e-4)


@each_method
def test_evaluation_neither_draws_nor_disturbs(name: str, target_path: Path, store: LocalFeatureStore) -> None:
    method = make(name, target_path, store)
    batch = DraftBatch.read(store, range(len(store)))
    drawn, state = method.plan(batch, MOMENT).weight, (torch.get_rng_state(), np.random.get_state()[1].tolist())
    with torch.no_grad():
        first, second = (method(batch, method.plan(batch)) for _ in range(2))
    assert torch.equal(first.loss_sum, second.loss_sum) and torch.equal(first.proposals_TK, second.proposals_TK)
    assert method.plan(batch, MOMENT).weight == drawn
    assert torch.equal(torch.get_rng_state(), state[0]) and np.random.get_state()[1].tolist() == state[1]
    starts_T = batch.loss_mask & batch.loss_mask.roll(-1) & (torch.from_numpy(batch.documents.position_T).roll(-1) > 0)
    starts_T[-1] = False
    assert (first.proposals_TK[starts_T, 0] >= 0).all(), "a start inside an answer is not drafted from"


@each_method
def test_a_batch_without_targets_weighs_nothing(name: str, target_path: Path, store: LocalFeatureStore) -> None:
    method = make(name, target_path, store)
    batch = DraftBatch.empty(store.meta)
    plan = method.plan(batch, MOMENT)
    output = method(batch, plan)
    output.loss_sum.backward()
    assert plan.weight == 0 and output.loss_sum.item() == 0
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


@each_method
def test_a_stored_draft_is_the_same_draft(name: str, target_path: Path, store: LocalFeatureStore, tmp_path: Path) -> None:
    """Through its folder: shape from config.json, tensors from safetensors, into a draft that began otherwise."""
    method = learn(make(name, target_path, store), store, 2)
    files.write_json(tmp_path / "config.json", method.config_dict())
    save_file({key: value.contiguous() for key, value in method.draft.state_dict().items()}, tmp_path / "model.safetensors")
    again = entry(name).load().read(method.options, TargetTables.read(target_path), tmp_path)
    again.draft.load_state_dict(load_file(tmp_path / "model.safetensors"))
    batch = DraftBatch.read(store, range(len(store)))
    with torch.no_grad():
        left, right = (each(batch, each.plan(batch)) for each in (method, again))
    assert torch.equal(left.loss_sum, right.loss_sum) and torch.equal(left.proposals_TK, right.proposals_TK)


@each_method
def test_resumed_equals_uninterrupted(name: str, target_path: Path, store: LocalFeatureStore, tmp_path: Path) -> None:
    """Bit by bit, planned for in the loader's thread, from step 2 on."""

    def run(resume: str = "") -> dict[str, torch.Tensor]:
        controller = controller_for(World(), tmp_path, target_path, store.folder, resume, make=partial(make, name))
        controller.fit()
        return fingerprint(controller)

    expected = run()
    truncate_after(tmp_path, 2)
    assert same([run("latest")], [expected])


@each_method
@pytest.mark.parametrize("draft_tokens", [1, 2, 3])
@pytest.mark.parametrize("trained", [True, False])
def test_walk_is_live(
    trained: bool, draft_tokens: int, name: str, learned: Callable[[str], Any], answered_path: Path, answered: LocalFeatureStore
) -> None:
    """And what is simulated along the stored answers; the text is the target's own."""
    method = learned(name) if trained else make(name, answered_path, answered, seed=3)
    evaluator = Evaluator(answered, World(), draft_tokens=draft_tokens, micro_batch_tokens=100, bootstrap=0)
    with torch.no_grad():
        numbers = evaluator.evaluate(method)
    decoder = Decoder(Target.load(answered_path, "float32"), drafter_of(name, method, draft_tokens))
    live = decode_answers(decoder, answered, range(len(answered)), batch_rows=5)
    assert all(answer.same for answer in live)
    committed = [tokens for answer in live for tokens in answer.decoded.committed]
    assert numbers["eval/walk_acc_len"] == sum(committed) / len(committed)
    assert simulate(drafter_of(name, method, draft_tokens), answered, range(len(answered)), torch.device("cpu"), batch_rows=4) == [
        answer.decoded for answer in live
    ]


@each_method
def test_greedy_text_is_the_targets_own(name: str, answered_path: Path, answered: LocalFeatureStore) -> None:
    """In float64, prompts of several lengths together, with and without an end token."""
    target, rng = Target.load(answered_path, "float64"), np.random.default_rng(1)
    method = make(name, answered_path, answered).double()
    prompts = [rng.integers(3, target.vocab_size, length) for length in (3, 9, 5)]
    alone = Decoder(target, NoDrafter()).decode(prompts, 60)
    end_id = alone[0].ids[30]
    for end_ids in ((), (end_id,)):
        expected = Decoder(target, NoDrafter(), end_ids=end_ids).decode(prompts, 60)
        got = Decoder(target, drafter_of(name, method, method.draft_tokens), end_ids=end_ids).decode(prompts, 60)
        assert [text.ids for text in got] == [text.ids for text in expected]


@each_method
def test_whole_chains_are_accepted_once_it_knows_the_text(
    name: str, learned: Callable[[str], Any], answered_path: Path, answered: LocalFeatureStore
) -> None:
    method = learned(name)
    decoder = Decoder(Target.load(answered_path, "float32"), drafter_of(name, method, method.draft_tokens))
    texts = [answer.decoded for answer in decode_answers(decoder, answered, range(len(answered)), batch_rows=10)]
    assert max(count for text in texts for count in text.accepted) == method.draft_tokens
    committed = [tokens for text in texts for tokens in text.committed]
    assert sum(committed) / len(committed) > 1.5


@each_method
def test_zeroed_features_lower_acceptance(name: str, learned: Callable[[str], Any], answered: LocalFeatureStore) -> None:
    method = learned(name)
    evaluator = Evaluator(answered, World(), draft_tokens=method.draft_tokens, micro_batch_tokens=100, bootstrap=0)

    def without_features(batch: DraftBatch, plan: Any) -> Any:
        return method(replace(batch, aux=torch.zeros_like(batch.aux)), plan)

    with torch.no_grad():
        good, bad = (evaluator.evaluate(method, forward)["eval/walk_acc_len"] for forward in (method, without_features))
    assert bad - 1 < 0.7 * (good - 1)
