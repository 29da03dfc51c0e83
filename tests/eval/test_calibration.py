"""Statistics of confidence against slow exact forms, and scalings against distortions that are known."""

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from specforge.config.schema import TrainConfig
from specforge.distributed import World
from specforge.errors import CheckpointError
from specforge.eval.acceptance import answers
from specforge.eval.calibration import (
    Chains,
    auc,
    brier,
    expected_calibration_error,
    fit,
    fit_platt,
    fit_temperatures,
    histogram,
    is_for_fit,
    measure,
    pcoc,
)
from specforge.eval.evaluator import Evaluator
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore
from specforge.features.tables import TargetTables
from specforge.methods.eagle3 import Eagle3
from specforge.models.calibration import FILE, Calibration, write_calibrations
from specforge.training.backend import FSDPTrainingBackend
from specforge.training.checkpoint import CheckpointManager
from specforge.training.run_folder import resolve
from specforge.training.state import TrainState
from tests.hostile.harness import outcomes, wrong
from tests.hostile.variants import damaged, json_fields, json_texts, replaced
from tests.ranks import run_ranks
from tests.tiny import make_method, make_samples, make_store

K = 3
PLATT = {"platt": Calibration((0.5, 1.0, 2.0), (0.5, 0.0, -1.0)), "temperature": Calibration((0.5, 1.0, 2.0), (0.0,) * 3)}


def chains_of(
    seed: int, starts: int, scale: tuple[float, ...] = (1.0,) * K, bias: tuple[float, ...] = (0.0,) * K, spread: float = 1.5
) -> Chains:
    """Random chains, a third of them cut short: draft k is right with probability sigmoid(scale_k z + bias_k), and says sigmoid(z)."""
    generator = torch.Generator().manual_seed(seed)
    z_XK = spread * torch.randn(starts, len(scale), generator=generator, dtype=torch.float64) + 0.5
    true_XK = torch.sigmoid(z_XK * torch.tensor(scale) + torch.tensor(bias))
    length_X1 = torch.randint(1, len(scale) + 1, (starts, 1), generator=generator)
    length_X1[: 2 * starts // 3] = len(scale)
    exists_XK = torch.arange(len(scale)) < length_X1
    right_XK = (torch.rand(true_XK.shape, generator=generator, dtype=torch.float64) < true_XK) & exists_XK
    return Chains(torch.sigmoid(z_XK), right_XK, exists_XK)


def exact_auc(probability: torch.Tensor, right: torch.Tensor) -> float:
    """From mid-ranks: (sum of the ranks of positives - P (P + 1) / 2) / (P N)."""
    values, place = np.unique(probability.numpy(), return_inverse=True)
    last_rank = np.cumsum(np.bincount(place, minlength=len(values)))
    rank = (np.concatenate([[0], last_rank[:-1]]) + 1 + last_rank)[place] / 2
    positives = int(right.sum())
    return float((rank[right.numpy()].sum() - positives * (positives + 1) / 2) / (positives * (len(rank) - positives)))


@pytest.mark.parametrize("shift", [-9.0, -2.0, 0.0, 8.0], ids=lambda shift: f"logit {shift:+.0f}")
def test_auc_of_the_histogram_is_that_of_mid_ranks(shift: float) -> None:
    """Also where almost all probabilities are near 0 or 1, and with ties."""
    generator = torch.Generator().manual_seed(0)
    z = 1.5 * torch.randn(100_000, generator=generator, dtype=torch.float64)
    right = torch.rand(len(z), generator=generator, dtype=torch.float64) < torch.sigmoid(z)
    probability = torch.sigmoid(z + shift)
    probability[:5000] = probability[0]
    assert float(auc(histogram(probability, right))) == pytest.approx(exact_auc(probability, right), abs=1e-4)


def test_numbers_by_hand() -> None:
    """p = 0.1 wrong, 0.4 right, 0.4 wrong, 0.9 right. AUC: pairs (0.4, 0.1) 1, (0.4, 0.4) 1/2, (0.9, both) 2, of 4.

    Fewer events than groups: events of one bin are one group, so ECE = (0.1 + |0.8 - 1| + 0.1) / 4.
    """
    sums = histogram(torch.tensor([0.1, 0.4, 0.4, 0.9], dtype=torch.float64), torch.tensor([False, True, False, True]))
    assert float(auc(sums)) == pytest.approx(3.5 / 4)
    assert float(pcoc(sums)) == pytest.approx(1.8 / 2)
    assert float(expected_calibration_error(sums)) == pytest.approx(0.4 / 4)
    assert float(brier(sums)) == pytest.approx((0.01 + 0.36 + 0.16 + 0.01) / 4)


def test_ece_groups_hold_equally_many_events() -> None:
    """Confidence is too high in every second fifteenth of the events and too low in the others; any other grouping mixes the two."""
    generator = torch.Generator().manual_seed(0)
    probability = torch.sigmoid(2 * torch.randn(30_000, generator=generator, dtype=torch.float64)).sort().values
    error = 0.2 * (-1.0) ** torch.arange(15).repeat_interleave(2000)
    right = torch.rand(30_000, generator=generator, dtype=torch.float64) < probability + error
    parts = zip(probability.chunk(15), right.double().chunk(15), strict=True)
    slow = sum(float((p.sum() - y.sum()).abs()) for p, y in parts) / len(right)
    assert slow > 0.15
    assert float(expected_calibration_error(histogram(probability, right))) == pytest.approx(slow, rel=0.05)


def test_parts_add_up() -> None:
    whole = chains_of(0, 5000)
    cuts = [0, 0, 1, 700, 702, 5000]
    parts = [Chains(whole.probability_XK[a:b], whole.right_XK[a:b], whole.exists_XK[a:b]) for a, b in itertools.pairwise(cuts)]
    torch.testing.assert_close(sum(part.sums() for part in reversed(parts)), whole.sums(), rtol=0, atol=1e-9)
    assert torch.equal(Chains.join(parts, K).sums(), whole.sums())


def test_pcoc_is_predicted_over_measured_accepted_length() -> None:
    """Accepted lengths counted start by start: sum over k of the product of c_1..c_k, and drafts before the first wrong one."""
    chains = chains_of(1, 400, scale=(0.4, 1.5, 1.0), bias=(1.0, -1.0, 0.0))
    predicted, measured = 0.0, 0
    for probability, right, exists in zip(chains.probability_XK.tolist(), chains.right_XK.tolist(), chains.exists_XK.tolist(), strict=True):
        survival, alive = 1.0, True
        for p, y in list(zip(probability, right, strict=True))[: sum(exists)]:
            survival, alive = survival * p, alive and y
            predicted += survival
            measured += alive
    numbers = measure({"raw": chains}, World())
    assert numbers["raw/pcoc"] == pytest.approx(predicted / measured, rel=1e-12)
    assert abs(numbers["raw/pcoc"] - 1) > 0.05


def test_conditional_events_have_a_right_prefix() -> None:
    chains = Chains(
        torch.full((4, 2), 0.5, dtype=torch.float64),
        torch.tensor([[True, True], [True, False], [False, True], [True, False]]),
        torch.tensor([[True, True], [True, True], [True, True], [True, False]]),
    )
    totals = chains.sums().sum(1)
    assert totals[:, 0].tolist() == [4, 2, 7], "second drafts of the first two starts; all seven drafts survive or not"
    assert totals[:, 1].tolist() == [3, 1, 4]


def test_bias_is_at_most_the_calibration_error() -> None:
    for seed in range(20):
        chains = chains_of(seed, 300, scale=(0.3 + 0.1 * seed, 1.0, 1.0), bias=(1.0, -1.0, 0.2))
        sums = chains.sums()
        rate = sums[..., 1].sum(-1) / sums[..., 0].sum(-1)
        assert ((pcoc(sums) - 1).abs() * rate <= expected_calibration_error(sums) + 1e-12).all()


def test_a_monotone_distortion_moves_calibration_and_not_ranking() -> None:
    chains = chains_of(2, 50_000)
    before = measure({"raw": chains}, World())
    after = measure({"raw": chains.scaled(Calibration((1.6,) * K, (0.7,) * K))}, World())
    assert after["raw/per_position_auc"] == pytest.approx(before["raw/per_position_auc"], abs=1e-4)
    for name, least in (("ece", 0.03), ("pcoc", 0.03)):
        assert all(
            abs(new - old) > least for new, old in zip(after[f"raw/per_position_{name}"], before[f"raw/per_position_{name}"], strict=True)
        )
    assert before["raw/per_position_ece"] == pytest.approx([0, 0, 0], abs=0.02)


def test_platt_recovers_a_known_distortion() -> None:
    """150,000 starts: the standard error of scale and bias is about 0.01 at the first position and 0.02 at the last."""
    scale, bias = (0.5, 1.7, 1.0), (0.8, -0.6, 0.3)
    calibration = fit_platt(chains_of(3, 150_000, scale, bias), World())
    assert calibration.scale == pytest.approx(scale, abs=0.08)
    assert calibration.bias == pytest.approx(bias, abs=0.08)
    held = chains_of(4, 100_000, scale, bias)
    numbers = measure({"raw": held, "platt": held.scaled(calibration)}, World())
    assert min(numbers["raw/per_position_ece"][:2]) > 0.09
    assert max(*numbers["platt/per_position_ece"], numbers["platt/ece"]) < 0.015
    assert numbers["platt/pcoc"] == pytest.approx(1, abs=0.02)


def test_temperatures_recover_a_known_distortion() -> None:
    """The grid is 2 % fine, and the ECE is flat near its minimum."""
    scale = (0.5, 1.7, 1.0)
    calibration = fit_temperatures(chains_of(3, 40_000, scale), World())
    assert calibration.scale == pytest.approx(scale, rel=0.1)
    assert calibration.bias == (0, 0, 0)
    held = chains_of(4, 40_000, scale)
    numbers = measure({"raw": held, "temperature": held.scaled(calibration)}, World())
    assert numbers["temperature/ece"] < numbers["raw/ece"] / 3
    assert numbers["temperature/pcoc"] == pytest.approx(1, abs=0.02)


def test_scales_stay_above_zero() -> None:
    """Confidence that ranks the wrong way round, or separates perfectly, or was never seen."""
    z = torch.randn(5000, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    exists = torch.ones_like(z, dtype=torch.bool)
    for right in (z < 0, z > 0, z > 9):
        for calibration in fit(Chains(torch.sigmoid(3 * z), right, exists), World()).values():
            ordered = calibration.apply(torch.sigmoid(3 * z.sort(0).values))
            assert torch.isfinite(ordered).all()
            assert (ordered.diff(dim=0) >= 0).all()
            assert ordered[-1] > ordered[0]
    nothing = Chains.join([], 2)
    assert all(calibration == Calibration((1.0, 1.0), (0.0, 0.0)) for calibration in fit(nothing, World()).values())


def fitted(world: World, whole: Chains, cuts: list[int]) -> dict[str, Calibration]:
    mine = slice(cuts[world.rank], cuts[world.rank + 1])
    return fit(Chains(whole.probability_XK[mine], whole.right_XK[mine], whole.exists_XK[mine]), world)


@pytest.mark.parametrize("cuts", [[0, 4000, 6000], [0, 4000, 4000, 6000]], ids=str)
def test_ranks_fit_what_one_rank_fits(cuts: list[int]) -> None:
    """The starts of the first rank and those of the last are distorted in opposite ways; the rank between them has none."""
    whole = Chains.join([chains_of(5, 4000, scale=(0.5,) * K), chains_of(6, 2000, scale=(2.0,) * K, bias=(1.0,) * K)], K)
    expected = fit(whole, World())
    for got in run_ranks(fitted, whole, cuts, world=len(cuts) - 1):
        for name, calibration in expected.items():
            assert got[name].scale == pytest.approx(calibration.scale, rel=1e-9)
            assert got[name].bias == pytest.approx(calibration.bias, abs=1e-9)


def calibrated(world: World, target_path: Path, folder: Path) -> tuple[dict[str, object], dict[str, Calibration]]:
    store = LocalFeatureStore(folder)
    evaluator = Evaluator(store, world, draft_tokens=K, micro_batch_tokens=60, bootstrap=0)
    with torch.no_grad():
        return evaluator.calibrate(make_method(target_path, store))[:2]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> LocalFeatureStore:
    return make_store(tmp_path_factory.mktemp("features") / "store", target_path, make_samples([40, 9, 21, 5, 17, 12, 30, 33]))


def test_ranks_change_no_scaling(target_path: Path, store: LocalFeatureStore) -> None:
    numbers, scalings = calibrated(World(), target_path, store.folder)
    for got, found in run_ranks(calibrated, target_path, store.folder, world=2):
        assert got.keys() == numbers.keys()
        for name, value in numbers.items():
            assert got[name] == pytest.approx(value, rel=1e-6, abs=1e-9, nan_ok=True), name
        for name, calibration in scalings.items():
            assert found[name].scale == pytest.approx(calibration.scale, rel=1e-4)
            assert found[name].bias == pytest.approx(calibration.bias, abs=1e-4)


def slow_confidences(method: Eagle3, store: LocalFeatureStore, number: int) -> dict[tuple[int, int], float]:
    """(start, position) -> probability of the proposed token, from whole logits of the document alone."""
    batch = DraftBatch.pack([number], [store.read(number)])
    plan = method.plan(batch)
    head = method.teacher_head_DH if method.draft.lm_head is None else method.draft.lm_head.weight
    found = {}
    for k, (step, hidden) in enumerate(zip(plan.steps, method._hidden_states(batch, plan), strict=False)):
        logits = hidden * method.draft.norm.weight @ head.T
        ids = logits.argmax(-1)
        for row in step.supervised_S:
            found[int(step.rows_R[row]) + 1, k] = float(logits[row].double().exp()[ids[row]] / logits[row].double().exp().sum())
    return found


def test_confidence_is_the_probability_of_what_is_proposed(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_method(target_path, store)
    batch = DraftBatch.pack(range(len(store)), [store.read(number) for number in range(len(store))])
    with torch.no_grad():
        output = method(batch, method.plan(batch))
        assert ((output.confidences_TK > 0) == (output.proposals_TK >= 0)).all()
        for number in range(len(store)):
            first = int(batch.documents.starts[number])
            slow = slow_confidences(method, store, number)
            got = {place: float(output.confidences_TK[first + place[0], place[1]]) for place in slow}
            assert got == pytest.approx(slow, rel=1e-5)


def test_evaluation_measures_the_half_that_fits_nothing(target_path: Path, store: LocalFeatureStore) -> None:
    """PCOC and Brier of the survival, from slow confidences and from what the target says, start by start."""
    method = make_method(target_path, store)
    numbers, _ = calibrated(World(), target_path, store.folder)
    halves = [is_for_fit(store.ids[number]) for number in range(len(store))]
    assert 2 <= sum(halves) <= len(halves) - 2
    events = []
    with torch.no_grad():
        rows = method(
            batch := DraftBatch.pack(range(len(store)), [store.read(i) for i in range(len(store))]), method.plan(batch)
        ).proposals_TK
        for number in (number for number, half in enumerate(halves) if not half):
            slow, sample, first_row = slow_confidences(method, store, number), store.read(number), int(batch.documents.starts[number])
            for first, last in answers(sample.loss_mask.numpy()):
                for start in range(first, last):
                    survival, alive = 1.0, True
                    for k in range(min(K, last - start)):
                        survival *= slow[start, k]
                        alive = alive and int(rows[first_row + start, k]) == int(sample.argmax[start + k])
                        events.append((survival, alive))
    assert 0 < sum(alive for _, alive in events) < len(events)
    assert numbers["eval/calibration/raw/pcoc"] == pytest.approx(sum(p for p, _ in events) / sum(y for _, y in events), rel=1e-5)
    assert numbers["eval/calibration/raw/brier"] == pytest.approx(sum((p - y) ** 2 for p, y in events) / len(events), rel=1e-5)


def test_training_measures_what_calibration_measures(target_path: Path, store: LocalFeatureStore) -> None:
    numbers, _ = calibrated(World(), target_path, store.folder)
    with torch.no_grad():
        plain = Evaluator(store, World(), draft_tokens=K, micro_batch_tokens=60, bootstrap=0).evaluate(make_method(target_path, store))
    assert {f"eval/calibration/raw/{name}" for name in ("auc", "pcoc", "ece", "brier")} < plain.keys() < numbers.keys()
    for name, value in plain.items():
        assert value == pytest.approx(numbers[name], nan_ok=True), name


def test_a_calibration_is_read_as_it_was_written(tmp_path: Path) -> None:
    write_calibrations(tmp_path, PLATT)
    assert Calibration.read(tmp_path, 2) == PLATT["platt"]
    assert Calibration.read(tmp_path, 3, "temperature") == PLATT["temperature"]
    probability = torch.tensor([[0.5, 0.25, 0.8]])
    expected = torch.sigmoid(torch.tensor([[0.5, np.log(1 / 3), 2 * np.log(4) - 1]]))
    torch.testing.assert_close(PLATT["platt"].apply(probability), expected.float())
    assert torch.equal(PLATT["platt"].apply(probability[:, :2]), PLATT["platt"].apply(probability)[:, :2])


def test_a_calibration_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"calibration\.json: is missing; make it with `specforge eval --calibrate`"):
        Calibration.read(tmp_path, 3)
    write_calibrations(tmp_path, PLATT)
    with pytest.raises(CheckpointError, match=r"calibrated for 3 positions, asked for 4.*eval\.draft_tokens=4"):
        Calibration.read(tmp_path, 4)
    with pytest.raises(CheckpointError, match="calibrated for 3 positions, asked for 4"):
        PLATT["platt"].apply(torch.rand(4))
    for name, value in (("scale", [1.0, 0.0, 1.0]), ("scale", [1.0, -1.0, 1.0]), ("bias", [0.0]), ("bias", [0.0, "1", 0.0])):
        stored = json.loads((tmp_path / FILE).read_text())
        stored["platt"][name] = value
        (tmp_path / "other").mkdir(exist_ok=True)
        (tmp_path / "other" / FILE).write_text(json.dumps(stored))
        with pytest.raises(CheckpointError, match=r"calibration\.json: platt"):
            Calibration.read(tmp_path / "other", 3)


def test_a_calibrated_checkpoint_still_verifies_resumes_and_rotates(target_path: Path, store: LocalFeatureStore, tmp_path: Path) -> None:
    backend = FSDPTrainingBackend(make_method(target_path, store), TrainConfig(), World())
    manager = CheckpointManager(tmp_path / "run", World(), keep=1)
    manager.claim()
    for step in (1, 2):
        manager.save(TrainState("r", step, step), backend, backend.method.config_dict(), {})
        manager.wait()
        checkpoint = resolve(tmp_path / "run" / "latest")
        write_calibrations(checkpoint.path / "draft", PLATT)
        assert manager.load(checkpoint, backend)[0].step == step
        assert Eagle3.read(backend.method.options, TargetTables.read(target_path), checkpoint.path / "draft").draft_tokens == K
        assert [path.name for path in sorted((tmp_path / "run").glob("**/calibration.json"))] == [FILE], "the older one went with its draft"
    manager.release()


def test_hostile_calibrations(tmp_path: Path) -> None:
    """No checksum covers the file, so other numbers may be found there; nothing else may."""
    folder = tmp_path / "draft"
    folder.mkdir()
    write_calibrations(folder, PLATT)
    original = (folder / FILE).read_bytes()
    variants = [*damaged(original), *replaced(tmp_path / "canary", tmp_path / "marker"), *json_texts(original)]
    found = outcomes(folder, [(FILE, variant, False) for variant in variants], lambda copy: Calibration.read(copy, 3).scale, tmp_path)
    assert wrong(found, ("refused", "equal", "different")) == {}
    fields = [(FILE, variant, False) for variant in json_fields(original, free=("temperature",))]
    found = outcomes(folder, fields, lambda copy: Calibration.read(copy, 3).scale, tmp_path)
    assert len(found) == len(fields) > 30
    assert wrong(found, ("refused",)) == {}
