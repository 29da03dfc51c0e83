"""A task as tokens: every text tokenised once, what is scored of it, and nothing that depends on model, batches or ranks.

Shapes: R texts (rows), E examples, N tokens of all rows.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import pairwise
from typing import Self

import numpy as np

from specforge.errors import DataError
from specforge.suite.prompts import Prompt

Tokenise = Callable[[list[str]], list[list[int]]]
"""Texts to ids, without special tokens."""


@dataclass(frozen=True)
class TaskTokens:
    """Row r has the tokens `token_N[row_start_R1[r] : row_start_R1[r + 1]]`; all positions below count within a row."""

    token_N: np.ndarray
    """int32."""
    row_start_R1: np.ndarray
    """int64, N at the end."""
    scored_R: np.ndarray
    """Where CORE's span begins, int32; it ends with the row. The end itself where there is nothing to score."""
    continuation_R: np.ndarray
    """Where the continuation begins, as lm-evaluation-harness sees it, int32."""
    chars_R: np.ndarray
    """Length of the continuation as written, int32."""
    bytes_R: np.ndarray
    """The same in UTF-8."""
    example_start_E1: np.ndarray
    """First row of each example, int32, R at the end."""
    gold_E: np.ndarray
    """Place of the right row in its example, int32."""
    classes: np.ndarray
    """1 where all examples choose between the same texts in the same order, so that places are classes; int32, one number."""

    def __len__(self) -> int:
        return len(self.gold_E)

    @cached_property
    def lengths_R(self) -> np.ndarray:
        return np.diff(self.row_start_R1)

    def row(self, index: int) -> np.ndarray:
        return self.token_N[self.row_start_R1[index] : self.row_start_R1[index + 1]]

    def rows_of(self, example: int) -> range:
        return range(int(self.example_start_E1[example]), int(self.example_start_E1[example + 1]))

    @cached_property
    def first_R(self) -> np.ndarray:
        """Where the first token that any rule needs stands; the token before it predicts it, so never 0."""
        return np.maximum(np.minimum(self.scored_R, self.continuation_R), 1)

    @cached_property
    def prediction_start_R1(self) -> np.ndarray:
        """Where the predictions of a row begin among those of all rows; the tokens from `first_R` to the row's end are predicted."""
        return np.concatenate([[0], np.cumsum(self.lengths_R - self.first_R)])

    def tensors(self) -> dict[str, np.ndarray]:
        return {field.name: getattr(self, field.name) for field in fields(self)}

    def cropped(self, longest: int, label: str) -> Self:
        """Each row cut to its last `longest` tokens, as CORE does.

        Raises:
            DataError: what is scored of a row would begin where no token is left to predict it.
        """
        lengths_R = self.lengths_R
        cut_R = np.maximum(lengths_R - longest, 0)
        if not cut_R.any():
            return self
        lost_R = (cut_R > 0) & (self.scored_R < lengths_R) & (self.scored_R - cut_R < 1)
        if lost_R.any():
            row = int(lost_R.argmax())
            example = int(np.searchsorted(self.example_start_E1, row, "right")) - 1
            scored = lengths_R[row] - self.scored_R[row]
            raise DataError(
                f"task {label!r}, example {example}: {scored} of its {lengths_R[row]} tokens are scored and the model reads {longest}; "
                "take a model of longer context, or leave the task out by --tasks."
            )
        keep_N = np.arange(len(self.token_N)) >= np.repeat(self.row_start_R1[:-1] + cut_R, lengths_R)
        changed = {
            "token_N": self.token_N[keep_N],
            "row_start_R1": np.concatenate([[0], np.cumsum(lengths_R - cut_R)]),
            "scored_R": (self.scored_R - cut_R).astype(np.int32),
            "continuation_R": np.maximum(self.continuation_R - cut_R, 0).astype(np.int32),
        }
        return type(self)(**{**self.tensors(), **changed})


def tokenise(prompts: Sequence[Prompt], kind: str, tokenise: Tokenise, bos: int | None) -> TaskTokens:
    """Tokens and spans of a task, by CORE's rules: multiple choice scores what comes after the longest beginning that all rows share,
    a schema the longest ending that they share, language modelling what comes after the tokens of the context alone.

    Args:
        bos: put before each text; None: nothing.
    """
    first = [] if bos is None else [bos]
    texts = [text for prompt in prompts for text in prompt.texts]
    before = [start for prompt in prompts for start in prompt.before]
    rows = [first + ids for ids in tokenise(texts)]
    stripped = [start.rstrip() for start in before]
    contexts = dict(zip(different := list(dict.fromkeys(stripped)), tokenise(different), strict=True))
    sizes = [len(prompt.texts) for prompt in prompts]
    starts_E1 = np.concatenate([[0], np.cumsum(sizes)])
    scored: list[int] = []
    for begin, end in pairwise(starts_E1.tolist()):
        of_example = rows[begin:end]
        if kind == "multiple_choice":
            shared = _shared(of_example)
            scored += [shared] * len(of_example)
        elif kind == "schema":
            ending = _shared([row[::-1] for row in of_example])
            scored += [len(row) - ending for row in of_example]
        else:
            scored.append(_shared([of_example[0], first + contexts[stripped[begin]]]))
    continuation = [min(len(first) + len(contexts[start]), len(row)) for start, row in zip(stripped, rows, strict=True)]
    written = [continuation for prompt in prompts for continuation in prompt.continuations]
    choices = {prompt.continuations for prompt in prompts}
    return TaskTokens(
        token_N=np.array([token for row in rows for token in row], dtype=np.int32),
        row_start_R1=np.concatenate([[0], np.cumsum([len(row) for row in rows])]),
        scored_R=np.array(scored, dtype=np.int32),
        continuation_R=np.array(continuation, dtype=np.int32),
        chars_R=np.array([len(text) for text in written], dtype=np.int32),
        bytes_R=np.array([len(text.encode()) for text in written], dtype=np.int32),
        example_start_E1=starts_E1.astype(np.int32),
        gold_E=np.array([prompt.gold for prompt in prompts], dtype=np.int32),
        classes=np.array([kind == "multiple_choice" and len(choices) == 1 and len(prompts) > 1], dtype=np.int32),
    )


def _shared(rows: Sequence[list[int]]) -> int:
    """How many tokens all rows have in common at their beginning: as many as the first and the last in order."""
    first, last = min(rows), max(rows)
    return next((place for place, (one, other) in enumerate(zip(first, last, strict=False)) if one != other), min(len(first), len(last)))
