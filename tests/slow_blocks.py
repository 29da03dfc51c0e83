"""A method of blocks against a slow form in float64, written from its formulas, that builds each block by itself."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.layers.moe import SparseMoE
from specforge.methods.base import Moment, StepOutput
from specforge.methods.dflash import DFlash

SlowBlock = Callable[[SampleFeatures, int, int], tuple[torch.Tensor, list[float], torch.Tensor]]
"""Sample, anchor and number of drafts that count -> loss, weight of each draft, logits [K, V]."""


def sharpen(method: DFlash) -> None:
    """Weights at which attention decides what is said, every norm has a weight of its own, and no matrix is 0."""
    generator = torch.Generator().manual_seed(1)
    for parameter in method.draft.parameters():
        if parameter.dim() >= 2 and parameter.any():
            parameter.data *= 2
        elif parameter.dim() == 2:
            parameter.data.normal_(generator=generator)
        else:
            parameter.data += 0.5 * torch.rand(len(parameter), generator=generator, dtype=torch.float64) - 0.25


def ragged(store: LocalFeatureStore) -> list[SampleFeatures]:
    """Documents with a prompt and a gap between two answers, and one in the middle that is supervised from its first token on."""
    samples = [store.read(number) for number in range(len(store))]
    samples[2] = replace(samples[2], loss_mask=torch.ones_like(samples[2].loss_mask))
    return samples


def slow_outputs(method: DFlash, sample: SampleFeatures, anchor: int) -> torch.Tensor:
    """Outputs [B, H] of one block, after the final norm, by modules and lists of keys."""
    draft, config, size = method.draft, method.draft.config, method.draft.config.block_size
    ids = torch.tensor([int(sample.input_ids[anchor])] + [config.mask_token_id] * (size - 1))
    hidden = F.embedding(ids, method.embedding_VH)
    context = draft.hidden_norm(draft.fc(sample.aux[:anchor].double()))
    position = torch.arange(anchor + size)
    cos, sin = (x[0, :, None].double() for x in draft.rotary.tables(torch.zeros(1), position[None]))

    def turned(x: torch.Tensor, first: int) -> torch.Tensor:
        left, right = x.chunk(2, -1)
        return x * cos[first : first + len(x)] + torch.cat([-right, left], -1) * sin[first : first + len(x)]

    for layer, kind in zip(draft.stack, config.layer_types, strict=True):
        own, x = layer.self_attn, layer.input_layernorm(hidden)
        q, k, v = (proj(x).unflatten(-1, (-1, config.head_dim)) for proj in (own.q_proj, own.k_proj, own.v_proj))
        context_k, context_v = (proj(context).unflatten(-1, (-1, config.head_dim)) for proj in (own.k_proj, own.v_proj))
        q = turned(own.q_norm(q), anchor)
        k = torch.cat([turned(own.k_norm(context_k), 0), turned(own.k_norm(k), anchor)])
        v = torch.cat([context_v, v])
        k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], 1) for x in (k, v))
        mixed = []
        for row in range(size):
            at = anchor + row
            seen = range(anchor + size) if kind == "full_attention" else range(max(at - config.sliding_window + 1, 0), at + 1)
            scores = torch.stack([(q[row] * k[t]).sum(-1) for t in seen]) / config.head_dim**0.5
            mixed.append((scores.softmax(0)[..., None] * v[list(seen)]).sum(0).flatten())
        hidden = hidden + own.o_proj(torch.stack(mixed))
        x = layer.post_attention_layernorm(hidden)
        mlp, sparse = layer.mlp, isinstance(layer.mlp, SparseMoE)
        hidden = hidden + (mlp(x).out_TD if sparse else mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x)))
    final: torch.Tensor = draft.norm(hidden)
    return final


def target_logits(method: DFlash, sample: SampleFeatures, position: int) -> torch.Tensor:
    return method.head_VH @ sample.last[position].double()


def slow_losses(method: Any, sample: SampleFeatures, anchor: int, log_q_KV: torch.Tensor) -> list[torch.Tensor]:
    """Of each draft that counts, not weighed, for the losses of DFlash."""
    options, losses = method.options, []
    for k, log_q in enumerate(log_q_KV, 1):
        label, logits = int(sample.input_ids[anchor + k]), target_logits(method, sample, anchor + k - 1)
        kl, accepted = -(logits.softmax(-1) * log_q).sum(), torch.minimum(logits.softmax(-1), log_q.exp()).sum()
        share = torch.exp(-options.lk_eta * accepted.detach())
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
        losses.append({
            "kl": kl, "tv": 1 - accepted, "lk_alpha": -accepted.log(), "lk_lambda": share * (kl - entropy) + (1 - share) * (1 - accepted)
        }.get(options.loss, -log_q[label]))  # fmt: skip
    return losses


def slow_decay(method: DFlash, drafts: int) -> list[float]:
    return [float(np.float32(np.exp(-k / method.options.position_decay))) for k in range(drafts)]


def slow_weights(method: Any, sample: SampleFeatures, anchor: int, log_q_KV: torch.Tensor) -> tuple[list[float], list[float]]:
    """Of the losses of DFlash, and what counts for the weight of the batch."""
    options, survival, reached = method.options, 1.0, list[float]()
    if not options.loss.startswith("dpace"):
        decay = slow_decay(method, len(log_q_KV))
        return decay, decay
    for k, log_q in enumerate(log_q_KV, 1):
        survival *= (1 - options.dpace_alpha) * log_q[int(sample.input_ids[anchor + k])].exp().item() + options.dpace_alpha
        reached.append(survival)
    paces = {"dpace": [sum(reached[k:]) for k in range(len(reached))], "dpace_prefix": reached}
    paces["dpace_continuation"] = [ahead / reach for ahead, reach in zip(paces["dpace"], reached, strict=True)]
    return paces[options.loss], [1.0] * len(reached)


def assert_equals_slow_form(method: DFlash, store: LocalFeatureStore, moment: Moment | None, slow_block: SlowBlock) -> StepOutput:
    """Loss, gradients, weight, counts and proposals of the `ragged` samples."""
    samples = ragged(store)
    batch = DraftBatch.pack(range(len(store)), samples)
    plan = method.plan(batch, moment)
    output = method(batch, plan)
    names, parameters = zip(*method.draft.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output.loss_sum, parameters)
    expected, weight, proposals = torch.zeros((), dtype=torch.float64), 0.0, dict[tuple[int, int], int]()
    for sample, (start, end) in zip(samples, pairwise(batch.documents.starts.tolist()), strict=True):
        for anchor in (a - start for a in plan.anchors_A.tolist() if start <= a < end):
            drafts = 0
            while drafts < method.draft_tokens and anchor + drafts + 1 < len(sample.loss_mask) and sample.loss_mask[anchor + drafts + 1]:
                drafts += 1
            loss, weights, logits_KV = slow_block(sample, anchor, drafts)
            expected, weight = expected + loss, weight + sum(weights)
            proposals |= {(start + anchor, k): int(logits.argmax()) for k, logits in enumerate(logits_KV, 1)}
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-10, atol=0)
    assert plan.weight == pytest.approx(weight, rel=1e-12)
    wanted_gradients = torch.autograd.grad(expected, parameters, allow_unused=True, materialize_grads=True)
    for name, got, wanted in zip(names, gradients, wanted_gradients, strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=partial("{}: {}".format, name))

    rows, columns = output.proposals_TK.ge(0).nonzero(as_tuple=True)
    assert proposals == {(s, k + 1): int(output.proposals_TK[s, k]) for s, k in zip(rows.tolist(), columns.tolist(), strict=True)}
    count, correct = np.zeros(method.draft_tokens), np.zeros(method.draft_tokens)
    for (s, k), token in proposals.items():
        count[k - 1] += 1
        correct[k - 1] += token == int(batch.argmax[s + k - 1])
    assert output.tally["count"].tolist() == count.tolist()
    assert output.tally["correct"].tolist() == correct.tolist()
    assert (output.confidences_TK > 0).equal(output.proposals_TK >= 0)
    return output
