"""From log-probabilities to answers and scores.

The loss of a row is, in nats: `mean_token` the mean over CORE's span (arXiv 2406.11794); `sum` the sum over the continuation, `per_char`
and `per_byte` that sum over the length of the continuation as written (acc, acc_norm and acc_bytes of lm-evaluation-harness); `pmi` the sum
less what the same continuation loses after no question at all (Holtzman et al. 2021, arXiv 2104.08315), which is `sum` where rows do not
differ in their continuations. The smallest loss is the answer. A text of language modelling has no rivals: it is right when every token of
its span is the model's likeliest.

Shapes: R rows, E examples, Q predictions.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from specforge.suite.tokens import TaskTokens

Rule = Literal["mean_token", "sum", "per_char", "per_byte", "pmi"]


@dataclass(frozen=True)
class Answers:
    """Of the examples of a task, in their order."""

    loss_R: np.ndarray
    """By the rule; NaN where nothing is scored."""
    is_greedy_R: np.ndarray
    """Whether every scored token is the model's likeliest; true of nothing scored."""
    predicted_E: np.ndarray
    """Place of the answer in its example."""
    margin_E: np.ndarray
    """How much larger the next loss is than the answer's, in nats; infinite without rivals."""
    right_E: np.ndarray

    @property
    def accuracy(self) -> float:
        return float(self.right_E.mean())


def continuation_logp(tokens: TaskTokens, logp_Q: np.ndarray) -> np.ndarray:
    """Log-probability [R] of each continuation, in nats."""
    return _sums(tokens, logp_Q, np.maximum(tokens.continuation_R, 1))[0]


def answer(
    tokens: TaskTokens, logp_Q: np.ndarray, is_best_Q: np.ndarray, rule: Rule = "mean_token", no_question_R: np.ndarray | None = None
) -> Answers:
    """
    Args:
        no_question_R: `continuation_logp` after no question, for `pmi`; None: there is none.
    """
    scored_R = np.where(tokens.scored_R < 1, tokens.lengths_R, tokens.scored_R)  # nothing predicts the first token of a row
    span_sum_R, span_count_R = _sums(tokens, logp_Q, scored_R)
    if rule == "mean_token":
        with np.errstate(invalid="ignore"):
            loss_R = -span_sum_R / span_count_R
    else:
        loss_R = -continuation_logp(tokens, logp_Q)
        if rule in ("per_char", "per_byte"):
            loss_R /= np.maximum(tokens.chars_R if rule == "per_char" else tokens.bytes_R, 1)
        elif rule == "pmi" and no_question_R is not None:
            loss_R += no_question_R
    is_greedy_R = _sums(tokens, is_best_Q.astype(np.float64), scored_R)[0] == span_count_R
    predicted_E, margin_E, right_E = np.empty(len(tokens), np.int32), np.empty(len(tokens)), np.empty(len(tokens), bool)
    for example in range(len(tokens)):
        rows = tokens.rows_of(example)
        losses = loss_R[rows.start : rows.stop]
        predicted_E[example] = chosen = _smallest(losses)
        right_E[example] = chosen == tokens.gold_E[example] if len(rows) > 1 else is_greedy_R[rows.start]
        rivals = np.delete(losses, chosen)
        margin_E[example] = np.min(rivals, initial=np.inf) - losses[chosen]
    return Answers(loss_R, is_greedy_R, predicted_E, margin_E, right_E)


def centred(accuracy: float, baseline_pct: float) -> float:
    """0 at the random baseline, 1 at all right."""
    return (accuracy - baseline_pct / 100) / (1 - baseline_pct / 100)


@dataclass(frozen=True)
class ClassScores:
    """Of one class; a ratio without cases is 0."""

    precision: float
    recall: float
    f1: float


def class_scores(gold_E: np.ndarray, predicted_E: np.ndarray) -> list[ClassScores]:
    """Of each place, where places are classes (`TaskTokens.classes`)."""
    scores = []
    for place in range(int(max(gold_E.max(), predicted_E.max())) + 1):
        hits = int(((gold_E == place) & (predicted_E == place)).sum())
        precision = hits / max(int((predicted_E == place).sum()), 1)
        recall = hits / max(int((gold_E == place).sum()), 1)
        scores.append(ClassScores(precision, recall, 2 * precision * recall / (precision + recall) if hits else 0.0))
    return scores


def _smallest(losses: np.ndarray) -> int:
    """Python's `min` over a list, which CORE's own evaluation uses: NaN wins in the first place and never elsewhere."""
    return 0 if np.isnan(losses[0]) else int(np.nanargmin(losses))


def _sums(tokens: TaskTokens, value_Q: np.ndarray, begin_R: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Sum over the predictions of each row from token `begin_R` on, and their number."""
    start_R1 = tokens.prediction_start_R1
    first_R, end_R = start_R1[:-1] + np.minimum(begin_R, tokens.lengths_R) - tokens.first_R, start_R1[1:]
    sums_R = np.add.reduceat(np.append(value_Q, 0.0), np.stack([first_R, end_R], 1).ravel())[::2]
    return np.where(first_R < end_R, sums_R, 0.0), end_R - first_R
