"""Evaluator: one pass over the evaluation features, counts first, ratios last.

Each sample is read by exactly one rank. Sums stay on the device until the loop is over; then they are added over the
ranks in one reduction. Nothing random happens, so an evaluation neither disturbs nor depends on training.
"""

from collections import Counter
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import numpy as np
import torch

from specforge.data.packing import pack
from specforge.decode.ngram import proposals as ngram_proposals
from specforge.distributed import World
from specforge.eval.acceptance import GREEDY_MATCH_MINIMUM, Columns, acceptance, count_sample
from specforge.eval.bootstrap import interval, poisson_weights
from specforge.eval.calibration import Chains, fit, groups, is_for_fit, measure
from specforge.eval.walked import Walked, walked_answers
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore
from specforge.methods.base import Method, StepOutput
from specforge.models.calibration import Calibration

FEWEST_SAMPLES = 10
"""A domain of fewer has no interval: a bootstrap over so few knows too little of how samples differ."""


class _Sums(NamedTuple):
    """Sums over samples. Place 0 is all of them, then comes a place a domain."""

    counts: np.ndarray
    """[1 + domains, width]"""
    replicates: np.ndarray
    """Tokens and rounds of the walk in each replicate of the bootstrap: [1 + domains, replicates, 2]"""


class Calibrated(NamedTuple):
    """An evaluation with all that it can say of a draft's confidence."""

    numbers: dict[str, Any]
    scalings: dict[str, Calibration]
    groups: dict[str, list[list[list[float]]]]
    """Reliability of each version of the confidence; see `calibration.groups`."""
    walked: list[Walked]
    """The rounds of the answers of a few samples, in the order of the samples."""


class Evaluator:
    """Measures drafts on one feature store; the n-gram drafter is measured once, as the baseline to beat.

    Args:
        store: evaluation features; every sample counts exactly once over all ranks.
        draft_tokens: K, the length of the drafted chain; the first K proposals of a method count.
        micro_batch_tokens: token budget of one forward; results do not depend on it.
    """

    def __init__(
        self,
        store: LocalFeatureStore,
        world: World,
        *,
        draft_tokens: int,
        micro_batch_tokens: int,
        max_samples: int = 0,
        bootstrap: int = 1000,
        seed: int = 0,
    ) -> None:
        self._store = store
        self._world = world
        self._columns = Columns(draft_tokens)
        self._draft_tokens = draft_tokens
        self._replicates = bootstrap
        self._seed = seed
        self._samples = min(max_samples or len(store), len(store))
        of_domain = Counter(store.domains[index] for index in range(self._samples))
        self._domains = {name: of_domain[name] for name in sorted(of_domain) if name}
        self._mine = list(range(world.rank, self._samples, world.size))
        lengths = [int(store.lengths[index]) for index in self._mine]
        budget = max([micro_batch_tokens, *lengths])
        self._batches = [[self._mine[place] for place in places] for places in pack(lengths, budget, 1)[0] if places] if lengths else []
        self._ngram = self._reduced({sample: self._count(sample, None) for sample in self._mine})

    def evaluate(self, method: Method, forward: Callable[..., StepOutput] | None = None) -> dict[str, Any]:
        """`eval/*` numbers of a draft, equal on all ranks.

        Args:
            forward: how to call the method (a backend, say); the method itself if None.
        """
        numbers, chains, _ = self._pass(method, forward or method)
        return numbers | _named(measure({"raw": self._half(chains, for_fit=False)}, self._world))

    def calibrate(self, method: Method, forward: Callable[..., StepOutput] | None = None, walked_of_domain: int = 0) -> Calibrated:
        """What `evaluate` gives, the same numbers of scaled confidences, and the scalings. The samples that fit are not measured.

        Args:
            walked_of_domain: of so many samples of each domain, the first ones, the rounds are told one by one.
        """
        numbers, chains, walked = self._pass(method, forward or method, self._first_of_domains(walked_of_domain))
        scalings = fit(self._half(chains, for_fit=True), self._world)
        measured = self._half(chains, for_fit=False)
        versions = {"raw": measured, **{name: measured.scaled(calibration) for name, calibration in scalings.items()}}
        of_ranks = self._world.gather_objects([answer.as_dict() for answer in walked])
        told = sorted((Walked(**answer) for answers in of_ranks for answer in answers), key=lambda answer: (answer.sample, answer.first))
        return Calibrated(numbers | _named(measure(versions, self._world)), scalings, groups(versions, self._world), told)

    def _first_of_domains(self, count: int) -> set[int]:
        of_domain: dict[str, list[int]] = {}
        for sample in range(self._samples):
            of_domain.setdefault(self._store.domains[sample], []).append(sample)
        return {sample for samples in of_domain.values() for sample in samples[:count]}

    def _pass(
        self, method: Method, forward: Callable[..., StepOutput], told: Collection[int] = ()
    ) -> tuple[dict[str, Any], dict[int, Chains], list[Walked]]:
        """The numbers of what was proposed, and this rank's chains by sample and answers of the samples `told`."""
        device = self._world.device
        loss_sum, weight, proposed, confidences = torch.zeros((), dtype=torch.float64, device=device), 0.0, [], []
        for samples in self._batches:
            batch = DraftBatch.read(self._store, samples)
            plan = method.plan(batch)
            output = forward(batch.to(device), plan)
            loss_sum += output.loss_sum.detach().double().sum()
            weight += plan.weight
            proposed.append(output.proposals_TK)
            confidences.append(output.confidences_TK)
        samples = [sample for batch_samples in self._batches for sample in batch_samples]
        lengths = [int(self._store.lengths[sample]) for sample in samples]
        table, chains, walked = dict[int, np.ndarray](), dict[int, Chains](), list[Walked]()
        if samples:
            tables = (torch.cat(rows)[:, : self._draft_tokens].cpu().split(lengths) for rows in (proposed, confidences))
            for sample, proposals_SK, confidences_SK in zip(samples, *tables, strict=True):
                table[sample] = self._count(sample, proposals_SK.numpy())
                ids_S, mask_S, argmax_S = (labels.numpy() for labels in self._store.labels(sample))
                chains[sample] = Chains.of(mask_S, argmax_S, proposals_SK.numpy(), confidences_SK)
                if sample in told:
                    walked += walked_answers(sample, ids_S, mask_S, proposals_SK.numpy())
        whole_loss, whole_weight = self._world.sum_(torch.stack([loss_sum, torch.full_like(loss_sum, weight)])).tolist()
        return self._numbers(self._reduced(table), whole_loss / max(whole_weight, 1e-9)), chains, walked

    def _half(self, chains: dict[int, Chains], *, for_fit: bool) -> Chains:
        return Chains.join([rows for sample, rows in chains.items() if is_for_fit(self._store.ids[sample]) is for_fit], self._draft_tokens)

    def _count(self, sample: int, proposals_SK: np.ndarray | None) -> np.ndarray:
        """The counts of a sample; of the n-gram drafter where no proposals are given."""
        ids_S, mask_S, argmax_S = (labels.numpy() for labels in self._store.labels(sample))
        if proposals_SK is None:
            starts = np.flatnonzero(mask_S)
            proposals_SK = np.full((len(ids_S), self._draft_tokens), -1, dtype=np.int64)
            proposals_SK[starts] = ngram_proposals(ids_S, starts, self._draft_tokens)
        return count_sample(ids_S, mask_S, argmax_S, proposals_SK)

    def _reduced(self, table: dict[int, np.ndarray]) -> _Sums:
        """The sums over the samples of all ranks."""
        places = {name: place for place, name in enumerate(self._domains, 1)}
        counts = np.zeros((1 + len(places), self._columns.width))
        replicates = np.zeros((1 + len(places), self._replicates, 2))
        for sample, of_sample in table.items():
            drawn = poisson_weights(self._seed, self._store.ids[sample], self._replicates)[:, None] * of_sample[self._columns.walk]
            domain = self._store.domains[sample]
            for place in [0, places[domain]] if domain else [0]:
                counts[place] += of_sample
                replicates[place] += drawn
        flat = torch.from_numpy(np.concatenate([counts.ravel(), replicates.ravel()]))
        whole = self._world.sum_(flat.to(self._world.device)).cpu().numpy()
        return _Sums(whole[: counts.size].reshape(counts.shape), whole[counts.size :].reshape(replicates.shape))

    def _numbers(self, sums: _Sums, avg_loss: float) -> dict[str, Any]:
        numbers: dict[str, Any] = {"eval/avg_loss": avg_loss, "eval/draft_tokens": self._draft_tokens, "eval/samples": self._samples}
        numbers |= {f"eval/{key}": value for key, value in acceptance(sums.counts[0], self._columns).items()}
        baseline = acceptance(self._ngram.counts[0], self._columns)
        numbers["eval/ngram_acc_len"] = baseline["acc_len"]
        if "walk_acc_len" in baseline:
            numbers["eval/ngram_walk_acc_len"] = baseline["walk_acc_len"]
            numbers["eval/ngram_walk_histogram"] = baseline["walk_histogram"]
            numbers |= self._intervals("eval/", sums, 0)
        for place, (name, samples) in enumerate(self._domains.items(), 1):
            numbers[f"eval/{name}/samples"] = samples
            of_draft, of_ngram = (acceptance(each.counts[place], self._columns) for each in (sums, self._ngram))
            numbers |= {f"eval/{name}/{key}": value for key, value in of_draft.items() if isinstance(value, float)}
            if "walk_acc_len" in of_ngram:
                numbers[f"eval/{name}/ngram_walk_acc_len"] = of_ngram["walk_acc_len"]
                if samples >= FEWEST_SAMPLES:
                    numbers |= self._intervals(f"eval/{name}/", sums, place)
        return numbers

    def _intervals(self, prefix: str, sums: _Sums, place: int) -> dict[str, float]:
        """`_low` and `_high` of both walks."""
        bounds = dict[str, float]()
        for name, of_drafter in (("walk_acc_len", sums), ("ngram_walk_acc_len", self._ngram)):
            tokens, rounds = of_drafter.replicates[place].T
            if self._replicates:
                low, high = interval(np.divide(tokens, rounds, out=np.full(len(rounds), np.nan), where=rounds > 0))
                bounds |= {f"{prefix}{name}_low": low, f"{prefix}{name}_high": high}
        return bounds


def _named(numbers: dict[str, Any]) -> dict[str, Any]:
    return {f"eval/calibration/{name}": value for name, value in numbers.items()}


def why_no_walk(numbers: dict[str, Any]) -> str | None:
    """The sentence that explains a missing `eval/walk_acc_len`; None where it is there."""
    if "eval/walk_acc_len" in numbers:
        return None
    return (
        f"walk_acc_len is left out: eval/greedy_match={numbers['eval/greedy_match']:.3f} is below {GREEDY_MATCH_MINIMUM}, so the answers "
        "are not the target's own greedy output; regenerate them with `specforge prepare --regenerate`."
    )
