"""CORE's own evaluation, restated plainly: one example at a time, all logits, Python's lists."""

from typing import Any

import torch
from torch.nn import functional as F

from specforge.suite.prompts import Prompt


def rows_and_spans(prompt: Prompt, kind: str, tokenizer: Any, bos: int) -> tuple[list[list[int]], list[int]]:
    """Rows of ids, and where what is scored begins; it ends with the row."""

    def ids(text: str) -> list[int]:
        return [bos, *tokenizer(text, add_special_tokens=False)["input_ids"]]

    rows = [ids(text) for text in prompt.texts]
    shortest = min(map(len, rows))
    if kind == "multiple_choice":
        same = [len({row[place] for row in rows}) == 1 for place in range(shortest)]
        return rows, [[*same, False].index(False)] * len(rows)
    if kind == "schema":
        same = [len({row[-1 - place] for row in rows}) == 1 for place in range(shortest)]
        return rows, [len(row) - [*same, False].index(False) for row in rows]
    context = ids(prompt.before[0])
    same = [one == other for one, other in zip(rows[0], context, strict=False)]
    return rows, [[*same, False].index(False)]


@torch.no_grad()
def evaluate(model: Any, prompt: Prompt, kind: str, tokenizer: Any, bos: int, longest: int) -> tuple[list[float], bool, int]:
    """Mean losses of the rows, whether the example is right, and what was predicted (0 for a text without rivals)."""
    rows, starts = rows_and_spans(prompt, kind, tokenizer, bos)
    starts = [start - max(len(row) - longest, 0) for start, row in zip(starts, rows, strict=True)]
    rows = [row[-longest:] for row in rows]
    width = max(map(len, rows))
    ids = torch.tensor([row + [bos] * (width - len(row)) for row in rows])
    logits = model(input_ids=ids).logits
    losses, greedy = [], False
    for row, (own, start) in enumerate(zip(rows, starts, strict=True)):
        span = slice(start - 1, len(own) - 1) if start else slice(0, 0)
        target = torch.tensor(own[start:] if start else [], dtype=torch.long)
        losses.append(F.cross_entropy(logits[row, span], target).item())
        greedy = bool((logits[row, span].argmax(-1) == target).all())
    if kind == "language_modeling":
        return losses, greedy, 0
    predicted = losses.index(min(losses))
    return losses, predicted == prompt.gold, predicted
