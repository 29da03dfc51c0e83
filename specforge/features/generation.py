"""The target alone, continuing many prompts at once: left-padded, KV-cached, greedy or sampled.

Logits are float32 products of head and last hidden state, as in a capture, so that greedy text and captured arg-max agree
in half precision too.

Shapes: B prompts, S longest prompt of the batch, T largest number of new tokens, V vocabulary.
"""

import hashlib
import json
from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from specforge.features.target import Target

_SHRINK_BELOW = 7 / 8
"""Finished rows are dropped from the cache once fewer than this share of its rows is unfinished."""


@dataclass(frozen=True)
class Answer:
    """New token ids, the end-of-turn token included where the target gave one (`finished`)."""

    ids: list[int]
    finished: bool


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: temperature 0 is the arg-max; else by a number drawn from (seed, prompt id, position) alone,
    so that an answer depends neither on the batch nor on the rank that gives it."""

    temperature: float = 0.0
    seed: int = 0

    def uniforms(self, prompt_ids: Sequence[str], max_new_tokens: int) -> torch.Tensor:
        """[B, T] float64 in [0, 1)."""
        digests = [hashlib.sha256(json.dumps([self.seed, prompt_id]).encode()).digest() for prompt_id in prompt_ids]
        draws = [np.random.default_rng(int.from_bytes(digest[:16])).random(max_new_tokens) for digest in digests]
        return torch.from_numpy(np.stack(draws))

    def choose(self, logits_BV: torch.Tensor, uniform_B: torch.Tensor) -> torch.Tensor:
        """The next ids [B]."""
        if self.temperature == 0:
            return logits_BV.argmax(dim=-1)
        return draw((logits_BV / self.temperature).softmax(dim=-1), uniform_B)


def draw(weights_XV: torch.Tensor, uniform_X: torch.Tensor) -> torch.Tensor:
    """Ids [X] from weights that need not sum to 1, by uniforms in [0, 1): the inverse of the sums' float64 cumulation.

    A weight of 0 is never drawn, also where a parallel scan does not cumulate monotonically.
    """
    cumulated_XV = weights_XV.cumsum(dim=-1, dtype=torch.float64).masked_fill(weights_XV == 0, 0)
    threshold_X1 = uniform_X.unsqueeze(-1) * cumulated_XV.amax(dim=-1, keepdim=True)
    return (cumulated_XV > threshold_X1).byte().argmax(dim=-1)


@torch.no_grad()
def generate(
    target: Target,
    prompts: Sequence[np.ndarray],
    prompt_ids: Sequence[str],
    *,
    max_new_tokens: int,
    end_ids: Collection[int],
    sampling: Sampling,
) -> list[Answer]:
    """Continue every prompt (each [S] token ids) until an id of `end_ids`, for `max_new_tokens`, or to the target's last position."""
    longest = max(len(prompt) for prompt in prompts)
    ids_BS = torch.zeros(len(prompts), longest, dtype=torch.long)
    attended = torch.zeros(len(prompts), longest + max_new_tokens, dtype=torch.long)
    for row, prompt in enumerate(prompts):
        ids_BS[row, longest - len(prompt) :] = torch.tensor(np.asarray(prompt), dtype=torch.long)
        attended[row, longest - len(prompt) :] = 1
    target.require_plain_head(prompts[0])
    ids_BS, attended = ids_BS.to(target.device), attended.to(target.device)
    uniforms_BT = sampling.uniforms(prompt_ids, max_new_tokens).to(target.device)
    ends = torch.tensor(sorted(end_ids), dtype=torch.long, device=target.device)

    limits = [min(max_new_tokens, target.config.max_position_embeddings - len(prompt)) for prompt in prompts]
    answers: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    rows = list(range(len(prompts)))  # which prompt each row of the cache belongs to
    positions_BS = (attended[:, :longest].cumsum(dim=-1) - 1).clamp_min(0)
    cache = None
    for step in range(max_new_tokens):
        output = target.decoder(
            input_ids=ids_BS, attention_mask=attended[:, : longest + step], position_ids=positions_BS,
            past_key_values=cache, use_cache=True,
        )  # fmt: skip
        cache = output.past_key_values
        logits_BV = target.logits(output.last_hidden_state[:, -1].to(target.device))
        next_B = sampling.choose(logits_BV, uniforms_BT[:, step])
        for row, token, ended in zip(rows, next_B.tolist(), torch.isin(next_B, ends).tolist(), strict=True):
            if not finished[row] and len(answers[row]) < limits[row]:
                answers[row].append(token)
                finished[row] = ended
        ids_BS, positions_BS = next_B.unsqueeze(1), positions_BS[:, -1:] + 1
        going = [place for place, row in enumerate(rows) if not finished[row] and len(answers[row]) < limits[row]]
        if not going:
            break
        if len(going) < _SHRINK_BELOW * len(rows):
            kept = torch.tensor(going, device=target.device)
            cache.batch_select_indices(kept)
            rows = [rows[place] for place in going]
            ids_BS, positions_BS, attended, uniforms_BT = ids_BS[kept], positions_BS[kept], attended[kept], uniforms_BT[kept]
    return [Answer(ids, done) for ids, done in zip(answers, finished, strict=True)]
