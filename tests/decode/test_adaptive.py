"""How many tokens to draft and to verify, against every policy there is and against the drafts of real decoding."""

import itertools
import math

import numpy as np
import pytest
import torch

from specforge.decode.adaptive import AdaptiveLength, calibrated
from specforge.decode.costs import CostCurve, measure_costs
from specforge.decode.drafter import NgramDrafter, NoDrafter
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.engine import Decoder
from specforge.decode.sampling import Sampling
from specforge.errors import ConfigError
from specforge.features.batch import DraftBatch
from specforge.features.store import SampleFeatures
from specforge.features.target import Target
from specforge.methods.eagle3 import Eagle3
from specforge.models.calibration import Calibration
from tests.tiny import make_method, make_samples, make_store, make_target

AS_IT_IS = Calibration((1.0,) * 6, (0.0,) * 6)
"""Leaves confidence as it is."""


def play(rule: AdaptiveLength, confidences_XK: list[list[float]], rows: int = 1) -> list[tuple[int, int]]:
    """Tokens drafted and drafts verified in rounds whose drafts have these confidences; all that survive half are accepted."""
    rule.begin(rows)
    rule.saw([1] * rows)
    lengths = []
    for confidence_K in confidences_XK:
        rule.start()
        drafted = 0
        while rule.goes_on():
            rule.drafted([confidence_K[drafted]] * rows)
            drafted += 1
        verified = rule.verified()
        lengths.append((drafted, verified))
        rule.saw([1 + int((np.cumprod(confidence_K)[:verified] > 0.5).sum())] * rows)
    return lengths


@pytest.mark.parametrize("probability", [0.0, 1e-9, 0.2, 0.5, 0.97, 1.0])
def test_calibrated_is_the_stored_calibration(probability: float) -> None:
    expected = Calibration((0.7,), (-0.4,)).apply(torch.tensor([probability], dtype=torch.float64))
    assert calibrated(probability, 0.7, -0.4) == pytest.approx(expected.item(), abs=1e-12)


@pytest.mark.parametrize(
    ("draft_s", "verify_s"),
    [
        ((0.0, 0.1, 0.2, 0.3), (1.0, 1.0, 1.0, 1.0)),
        ((0.0, 0.2, 0.4, 0.6), (1.0, 1.3, 1.6, 1.9)),
        ((0.0, 0.01, 0.4, 0.41), (1.0, 1.0, 1.0, 2.0)),
        ((0.0, 0.5, 0.5, 0.5), (1.0, 1.1, 1.4, 1.5)),
    ],
)
def test_lengths_are_the_best_of_all_policies(draft_s: tuple[float, ...], verify_s: tuple[float, ...]) -> None:
    """Confidences of two values, independent from draft to draft and true: every policy is a table of what to do after each history
    of confidences. The best of all tables by E[tokens] / E[seconds] is compared with what is done after learning."""
    costs, values, chances = CostCurve(draft_s, verify_s), (0.95, 0.3), (0.7, 0.3)
    expected = best_rate(costs, values, chances)
    rule, rng = AdaptiveLength(AS_IT_IS, costs), np.random.default_rng(0)
    rule.begin(1)
    rule.saw([1])
    tokens = seconds = 0.0
    for number in range(6000):
        confidence_K = rng.choice(values, size=costs.draft_tokens, p=chances)
        rule.start()
        drafted = 0
        while rule.goes_on():
            rule.drafted([confidence_K[drafted]])
            drafted += 1
        verified = rule.verified()
        survival_K = np.cumprod(confidence_K)[:verified]
        right = rng.random(costs.draft_tokens) < confidence_K
        rule.saw([1 + int(np.logical_and.accumulate(right)[:verified].sum())])
        if number >= 1000:
            tokens, seconds = tokens + 1 + survival_K.sum(), seconds + costs.seconds(drafted, verified)
    assert 0.985 * expected < tokens / seconds < 1.01 * expected


def best_rate(costs: CostCurve, values: tuple[float, ...], chances: tuple[float, ...]) -> float:
    """Over all policies, by going through every tree of decisions (Dinkelbach's iteration over the exact expectation)."""

    def best(rate: float, history: tuple[int, ...]) -> tuple[float, float]:
        """Tokens and seconds of the best that can follow; of equal worth any."""
        survivals = np.cumprod([values[place] for place in history])
        options = [(1 + survivals[:kept].sum(), costs.seconds(len(history), kept)) for kept in range(len(history) + 1)]
        if len(history) < costs.draft_tokens:
            after = [best(rate, (*history, place)) for place in range(len(values))]
            options.append(tuple(sum(c * a[part] for c, a in zip(chances, after, strict=True)) for part in (0, 1)))
        return max(options, key=lambda option: option[0] - rate * option[1])

    rate = 0.0
    for _ in range(50):
        tokens, seconds = best(rate, ())
        rate = tokens / seconds
    return rate


def confidences(rounds: int, draft_tokens: int, seed: int = 0) -> list[list[float]]:
    return np.random.default_rng(seed).beta(2, 1, (rounds, draft_tokens)).tolist()


def test_calibration_is_applied_position_by_position() -> None:
    costs = CostCurve((0.0, 0.1, 0.3, 0.5, 0.7, 0.9), (1.0, 1.1, 1.2, 1.3, 1.4, 1.5))
    calibration, given = Calibration((0.5, 1.0, 2.0, 1.0, 1.0), (0.5, -0.5, 1.0, 0.0, 0.3)), confidences(200, 5)
    scaled = calibration.apply(torch.tensor(given, dtype=torch.float64)).tolist()

    def lengths(calibration: Calibration, confidences_XK: list[list[float]]) -> list[tuple[int, int]]:
        rule, seen = AdaptiveLength(calibration, costs), []
        rule.begin(1)
        rule.saw([1])
        for confidence_K in confidences_XK:
            rule.start()
            drafted = 0
            while rule.goes_on():
                rule.drafted([confidence_K[drafted]])
                drafted += 1
            seen.append((drafted, rule.verified()))
            rule.saw([2])
        return seen

    expected = lengths(AS_IT_IS, scaled)
    assert lengths(calibration, given) == expected
    assert lengths(AS_IT_IS, given) != expected
    assert len(set(expected)) > 4


@pytest.mark.parametrize(("step_s", "later"), [(0.2, (2, 2)), (0.4, (1, 1))])
def test_time_is_worth_what_it_brings(step_s: float, later: tuple[int, int]) -> None:
    """A sure first draft that costs nothing makes r = 2 tokens a second; a second one of survival 0.55 may then cost 0.275 s."""
    rule = AdaptiveLength(AS_IT_IS, CostCurve((0.0, 0.0, step_s), (1.0,) * 3))
    rule.begin(1)
    rule.saw([1])
    lengths = []
    for number in range(400):
        rule.start()
        drafted = 0
        while rule.goes_on():
            rule.drafted([[1.0, 0.55][drafted]])
            drafted += 1
        lengths.append((drafted, rule.verified()))
        rule.saw([2 + (number * 11 % 20 < 11 and drafted == 2)])
    assert lengths[0] == (2, 2)
    assert lengths[-1] == later


def test_free_drafts_are_all_drafted_and_unaffordable_ones_never() -> None:
    free = AdaptiveLength(AS_IT_IS, CostCurve((0.0,) * 6, (1.0,) * 6))
    assert set(play(free, confidences(50, 5))) == {(5, 5)}
    unaffordable = AdaptiveLength(AS_IT_IS, CostCurve((0.0, *[math.inf] * 5), (1.0,) * 6))
    assert set(play(unaffordable, confidences(50, 5))) == {(0, 0)}


def test_dearer_drafts_are_fewer() -> None:
    lengths = []
    for step_s in (0.0, 0.05, 0.2, 0.4, 0.6, 1.5):
        costs = CostCurve(tuple(step_s * drafts for drafts in range(6)), (1.0,) * 6)
        lengths.append(np.mean([drafted for drafted, _ in play(AdaptiveLength(AS_IT_IS, costs), confidences(400, 5))]))
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] == 5
    assert 0.5 < lengths[2] < 4.5
    assert lengths[-1] < 0.1


def test_dear_places_leave_drafts_unverified() -> None:
    """At r = 1 token a second, a second draft of survival 0.9 * 0.2 is not worth the 0.3 s of its place; the first is."""
    rule = AdaptiveLength(AS_IT_IS, CostCurve((0.0, 0.0, 0.0), (1.0, 1.3, 1.6)))
    assert play(rule, [[0.9, 0.2]]) == [(2, 1)]
    assert play(AdaptiveLength(AS_IT_IS, rule.costs), [[0.9, 0.9]]) == [(2, 2)]
    assert rule.rounds.sum() == rule.rounds[2, 1] == 1


def test_cheap_third_place_is_seen_beyond_a_dear_second() -> None:
    """Drafts of survival 0.9: the second alone costs 1 s for less than a token, the second and third together no more."""
    rule = AdaptiveLength(AS_IT_IS, CostCurve((0.0, 0.0, 1.0, 1.0), (1.0,) * 4))
    assert play(rule, [[0.9, 0.99, 0.99]]) == [(3, 3)]
    assert play(AdaptiveLength(AS_IT_IS, CostCurve((0.0, 0.0, 1.0), (1.0,) * 3)), [[0.9, 0.99]]) == [(1, 1)]


def test_what_it_knows_of_its_drafts_is_worth_between_fixed_lengths_and_an_oracle() -> None:
    """Confidence 0 or 1 and true: what is verified is exactly what is right, at the price of one draft beyond it.
    The first rounds learn how often drafts are right."""
    costs = CostCurve((0.0, 0.1, 0.2, 0.3, 0.4), (1.0, 1.2, 1.4, 1.6, 1.8))
    right_XK = np.random.default_rng(1).random((2000, 4)) < 0.7
    accepted_X = np.logical_and.accumulate(right_XK, axis=1).sum(1)
    lengths = play(AdaptiveLength(AS_IT_IS, costs), right_XK.astype(float).tolist())
    lengths, accepted_X = lengths[100:], accepted_X[100:]
    assert [verified for _, verified in lengths] == accepted_X.tolist()
    tokens = (1 + accepted_X).sum()
    adaptive = tokens / sum(itertools.starmap(costs.seconds, lengths))
    oracle = tokens / sum(costs.seconds(accepted, accepted) for accepted in accepted_X)
    fixed = [(1 + np.minimum(accepted_X, length)).sum() / (1900 * costs.seconds(length, length)) for length in range(5)]
    assert max(fixed) < adaptive < oracle


def test_a_batch_shares_the_cost() -> None:
    """One row is not worth 0.7 s of drafting at r = 1 after a draft of 0.6; two rows are, unless one has ended."""
    costs = CostCurve((0.0, 0.0, 0.7), (1.0,) * 3)
    assert play(AdaptiveLength(AS_IT_IS, costs), [[0.6, 0.9]]) == [(1, 1)]
    rule = AdaptiveLength(AS_IT_IS, CostCurve((0.0, 0.0, 1.1), (2.0,) * 3))
    assert play(rule, [[0.6, 0.9]], rows=2) == [(2, 2)]
    ended = AdaptiveLength(AS_IT_IS, CostCurve((0.0, 0.0, 0.5), (1.0,) * 3))
    ended.begin(2)
    ended.saw([5, 0])
    ended.start()
    ended.drafted([0.6, 1.0])
    assert not ended.goes_on()


def test_long_drafts_are_tried_again() -> None:
    """Drafts that never were right are given up, and given another chance after some hundred rounds."""
    rule = AdaptiveLength(AS_IT_IS, CostCurve((0.0, 0.3), (1.0, 1.0)))
    drafted = [length for length, _ in play(rule, [[0.0]] * 4000)]
    assert drafted[0] == 1
    assert 0.005 < np.mean(drafted) < 0.05
    assert max(drafted[2000:]) == 1


@pytest.mark.parametrize(
    ("draft_s", "verify_s"), [((), ()), ((0.0, 0.1), (1.0,)), ((0.0, -0.1), (1.0, 1.0)), ((0.0,), (0.0,)), ((0.0, 0.1), (1.0, 0.9))]
)
def test_cost_curves_that_cannot_be_are_refused(draft_s: tuple[float, ...], verify_s: tuple[float, ...]) -> None:
    with pytest.raises(ConfigError, match="cost curve"):
        CostCurve(draft_s, verify_s)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> tuple[Target, Eagle3, list[np.ndarray]]:
    folder = tmp_path_factory.mktemp("adaptive")
    path = make_target(folder / "target")
    samples = make_samples([20, 9, 14])
    method = make_method(path, make_store(folder / "store", path, samples), draft_tokens=5)
    return Target.load(path, "float32"), method, [sample.input_ids.astype(np.int64) for sample in samples]


def unsure(bias: float) -> Calibration:
    """Makes of an untrained draft's low confidence numbers on both sides of one half."""
    return Calibration((1.0,) * 5, (bias,) * 5)


@pytest.mark.parametrize("together", [False, True])
@pytest.mark.parametrize(
    "costs",
    [
        CostCurve((0.0, 0.05, 0.2, 0.35, 0.5, 0.65), (1.0, 1.02, 1.04, 1.06, 1.08, 1.1)),
        CostCurve((0.0, 0.01, 0.02, 0.03, 0.04, 0.05), (1.0, 1.2, 1.4, 1.6, 1.8, 2.0)),
    ],
    ids=["dear drafts", "dear places"],
)
def test_greedy_text_is_the_targets(together: bool, costs: CostCurve, place: tuple[Target, Eagle3, list[np.ndarray]]) -> None:
    target, method, prompts = place
    rule = AdaptiveLength(unsure(1.0), costs)
    decoder, alone = Decoder(target, Eagle3Drafter(method, 5, adaptive=rule)), Decoder(target, NoDrafter())
    for batch in [prompts] if together else [[prompt] for prompt in prompts]:
        assert [text.ids for text in decoder.decode(batch, 60)] == [text.ids for text in alone.decode(batch, 60)]
    assert (rule.rounds > 0).sum() > 2
    assert (rule.rounds.trace() < rule.rounds.sum()) == (costs.verify_s[1] > 1.1), "fewer verified than drafted"


def test_a_round_of_no_drafts_is_a_round_of_the_target(place: tuple[Target, Eagle3, list[np.ndarray]]) -> None:
    target, method, prompts = place
    rule = AdaptiveLength(unsure(0.0), CostCurve((0.0, *[math.inf] * 5), (1.0,) * 6))
    texts = Decoder(target, Eagle3Drafter(method, 5, adaptive=rule)).decode(prompts, 20)
    assert [text.ids for text in texts] == [text.ids for text in Decoder(target, NoDrafter()).decode(prompts, 20)]
    assert [text.committed for text in texts] == [[1] * 19] * 3
    assert rule.rounds[0, 0] == rule.rounds.sum() == 19
    assert [text.accepted for text in Decoder(target, Eagle3Drafter(method, 0)).decode(prompts, 20)] == [[0] * 19] * 3


def test_confidence_is_that_of_the_evaluation(place: tuple[Target, Eagle3, list[np.ndarray]]) -> None:
    """What `calibration` was fitted to: StepOutput.confidences of the same start on the text that the drafts make."""
    target, method, prompts = place
    seen: list[list[float]] = []

    class Seen(AdaptiveLength):
        def drafted(self, confidence_B: list[float]) -> None:  # type: ignore[override]
            seen.append(confidence_B)
            super().drafted(confidence_B)

    rule = Seen(AS_IT_IS, CostCurve((0.0,) * 6, (1.0,) * 6))
    drafter, prompt = Eagle3Drafter(method, 5, adaptive=rule), prompts[0]
    drafter.begin([prompt], 40)
    features = target.capture([prompt.astype(np.int32)], method.draft.config.aux_layer_ids)[0]
    drafter.extend(torch.from_numpy(prompt[1:])[None], features["aux"][None, :-1].float(), [len(prompt) - 1])
    ids = drafter.propose().ids_BK[0].numpy()
    whole = np.concatenate([prompt, ids, [3]]).astype(np.int32)
    captured = target.capture([whole], method.draft.config.aux_layer_ids)[0]
    mask = torch.arange(len(whole)) >= len(prompt)
    batch = DraftBatch.pack([0], [SampleFeatures(torch.from_numpy(whole), mask, **captured)])
    output = method(batch, method.plan(batch))
    assert output.proposals_TK[len(prompt) - 1].tolist() == ids.tolist()
    assert [confidence for (confidence,) in seen] == pytest.approx(output.confidences_TK[len(prompt) - 1].tolist(), rel=1e-4)


def test_sampled_drafts_are_refused(place: tuple[Target, Eagle3, list[np.ndarray]]) -> None:
    rule = AdaptiveLength(unsure(0.0), CostCurve((0.0,) * 6, (1.0,) * 6))
    with pytest.raises(ConfigError, match="arg-max"):
        Eagle3Drafter(place[1], 5, Sampling(temperature=1.0), torch.Generator(), rule)


def test_costs_are_those_of_the_clock(place: tuple[Target, Eagle3, list[np.ndarray]]) -> None:
    """A clock that ticks when it is read is read twice a round: a tick of drafting, a tick of everything else."""
    ticks = itertools.count()
    costs = measure_costs(place[0], NgramDrafter, 3, place[2], clock=lambda: float(next(ticks)))
    assert costs == CostCurve((1.0,) * 4, (1.0,) * 4)
