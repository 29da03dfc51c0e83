"""DFlash against a slow form in float64 that builds each block by itself, and what its plan promises."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from specforge.config.methods import DFlashOptions
from specforge.distributed import World
from specforge.errors import ConfigError, SpecForgeError
from specforge.eval.evaluator import Evaluator
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.methods.base import Moment
from specforge.methods.dflash import DFlash, derive_config
from tests.tiny import AUX

SLIDING: dict[str, Any] = {"layers": 3, "layer_types": ("full_attention", "sliding_attention", "full_attention"), "sliding_window": 6}
LOSSES = ["ce", "kl", "tv", "lk_alpha", "lk_lambda", "dpace", "dpace_prefix", "dpace_continuation"]
MOMENT = Moment(seed=3, step=7, total_steps=10)


def make_dflash(target_path: Path, store: LocalFeatureStore, **options: Any) -> DFlash:
    """In float64, with sharp weights: attention decides what is said, and every norm has a weight of its own."""
    chosen: dict[str, Any] = {"block_size": 5, "anchors": 4, "layers": 2, "loss_chunk_rows": 7, "position_decay": 3.0, **options}
    method = DFlash.build(DFlashOptions(**chosen), TargetTables.read(target_path), store, 0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in method.draft.parameters():
        parameter.data *= 2 if parameter.dim() == 2 else 0.5 + torch.rand(len(parameter), generator=generator, dtype=torch.float64)
    return method


def ragged(store: LocalFeatureStore) -> list[SampleFeatures]:
    """Documents with a prompt and a gap between two answers, and one in the middle that is supervised from its first token on."""
    samples = [store.read(number) for number in range(len(store))]
    samples[2] = replace(samples[2], loss_mask=torch.ones_like(samples[2].loss_mask))
    return samples


def slow_logits(method: DFlash, sample: SampleFeatures, anchor: int) -> torch.Tensor:
    """Logits [B, V] of one block, by modules and lists of keys."""
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
        hidden = hidden + layer.mlp.down_proj(F.silu(layer.mlp.gate_proj(x)) * layer.mlp.up_proj(x))
    return draft.norm(hidden) @ method.head_VH.T


def slow_losses(method: DFlash, sample: SampleFeatures, anchor: int, log_q_KV: torch.Tensor) -> tuple[list[torch.Tensor], list[float]]:
    """Loss and weight of each draft of a block that counts."""
    options, losses, weights, survival = method.options, [], [], 1.0
    reached: list[float] = []
    for k, log_q in enumerate(log_q_KV, 1):
        label, logits = int(sample.input_ids[anchor + k]), method.head_VH @ sample.last[anchor + k - 1].double()
        kl, accepted = -(logits.softmax(-1) * log_q).sum(), torch.minimum(logits.softmax(-1), log_q.exp()).sum()
        share = torch.exp(-options.lk_eta * accepted.detach())
        entropy = -(logits.softmax(-1) * logits.log_softmax(-1)).sum()
        losses.append({
            "kl": kl, "tv": 1 - accepted, "lk_alpha": -accepted.log(), "lk_lambda": share * (kl - entropy) + (1 - share) * (1 - accepted)
        }.get(options.loss, -log_q[label]))  # fmt: skip
        weights.append(float(np.float32(np.exp(-(k - 1) / options.position_decay))))
        survival *= (1 - options.dpace_alpha) * log_q[label].exp().item() + options.dpace_alpha
        reached.append(survival)
    if options.loss.startswith("dpace"):
        paces = {"dpace": [sum(reached[k:]) for k in range(len(reached))], "dpace_prefix": reached}
        paces["dpace_continuation"] = [ahead / reach for ahead, reach in zip(paces["dpace"], reached, strict=True)]
        return [pace * loss for pace, loss in zip(paces[options.loss], losses, strict=True)], [1.0] * len(losses)
    return [weight * loss for weight, loss in zip(weights, losses, strict=True)], weights


def slow_document(method: DFlash, sample: SampleFeatures, anchors: list[int]) -> tuple[torch.Tensor, float, dict[tuple[int, int], int]]:
    """Loss sum, weight and proposals (start, k) of the given blocks of one document."""
    loss, weight = torch.zeros((), dtype=torch.float64), 0.0
    proposals: dict[tuple[int, int], int] = {}
    for anchor in anchors:
        drafts = 0
        while drafts < method.draft_tokens and anchor + drafts + 1 < len(sample.loss_mask) and sample.loss_mask[anchor + drafts + 1]:
            drafts += 1
        log_q_KV = slow_logits(method, sample, anchor)[1 : drafts + 1].log_softmax(-1)
        losses, weights = slow_losses(method, sample, anchor, log_q_KV)
        loss, weight = loss + sum(losses), weight + sum(weights)
        proposals |= {(anchor, k): int(log_q.argmax()) for k, log_q in enumerate(log_q_KV, 1)}
    return loss, weight, proposals


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["evaluation", "training"])
@pytest.mark.parametrize("options", [{"loss": loss} for loss in LOSSES] + [SLIDING], ids=str)
def test_blocks_equal_the_slow_form(options: dict[str, Any], moment: Moment | None, target_path: Path, store: LocalFeatureStore) -> None:
    """Loss, gradients, weight, counts and proposals."""
    method, samples = make_dflash(target_path, store, **options), ragged(store)
    batch = DraftBatch.pack(range(len(store)), samples)
    plan = method.plan(batch, moment)
    output = method(batch, plan)
    names, parameters = zip(*method.draft.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output.loss_sum, parameters)
    starts = batch.documents.starts.tolist()
    each = [
        slow_document(method, sample, [a - start for a in plan.anchors_A.tolist() if start <= a < end])
        for sample, start, end in zip(samples, starts, starts[1:], strict=False)
    ]
    expected = sum((loss for loss, _, _ in each), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-10, atol=0)
    assert plan.weight == pytest.approx(sum(weight for _, weight, _ in each), rel=1e-12)
    for name, got, wanted in zip(names, gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=partial("{}: {}".format, name))

    proposals = {(start + s, k): token for start, (_, _, found) in zip(starts, each, strict=False) for (s, k), token in found.items()}
    rows, columns = output.proposals_TK.ge(0).nonzero(as_tuple=True)
    assert proposals == {(s, k + 1): int(output.proposals_TK[s, k]) for s, k in zip(rows.tolist(), columns.tolist(), strict=True)}
    count, correct = np.zeros(method.draft_tokens), np.zeros(method.draft_tokens)
    for (s, k), token in proposals.items():
        count[k - 1] += 1
        correct[k - 1] += token == int(batch.argmax[s + k - 1])
    assert output.tally["count"].tolist() == count.tolist()
    assert output.tally["correct"].tolist() == correct.tolist()
    assert (output.confidences_TK > 0).equal(output.proposals_TK >= 0)


def test_an_evaluation_begins_at_every_start(target_path: Path, store: LocalFeatureStore) -> None:
    method, batch = make_dflash(target_path, store), DraftBatch.pack(range(len(store)), ragged(store))
    mask, document = batch.loss_mask, torch.from_numpy(batch.documents.index_T)
    starts = (mask[:-1] & mask[1:] & (document[:-1] == document[1:])).nonzero()[:, 0]
    assert method.plan(batch).anchors_A.tolist() == starts.tolist()
    starts = method.plan(DraftBatch.read(store, range(len(store)))).anchors_A
    numbers = Evaluator(store, World(), draft_tokens=4, micro_batch_tokens=40, bootstrap=0).evaluate(method)
    assert numbers["eval/starts"] == len(starts)


def test_anchors_follow_from_seed_step_and_sample_alone(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_dflash(target_path, store)

    def drawn(numbers: list[int], moment: Moment) -> dict[int, list[int]]:
        batch = DraftBatch.read(store, numbers)
        anchors, first = method.plan(batch, moment).anchors_A, batch.documents.starts
        return {
            number: [a - start for a in anchors.tolist() if start <= a < end]
            for number, start, end in zip(numbers, first.tolist(), first[1:].tolist(), strict=False)
        }

    together = drawn([0, 1, 2, 3, 4, 5], MOMENT)
    assert together == {number: drawn([number], MOMENT)[number] for number in (5, 2, 0, 1, 3, 4)}
    assert together == drawn([3, 5, 1, 0, 4, 2], MOMENT)
    assert {len(anchors) for anchors in together.values()} == {1, 4}, "four, or all of a short sample"
    for moment in (replace(MOMENT, step=8), replace(MOMENT, seed=4)):
        assert drawn([0, 1, 2, 3, 4, 5], moment) != together
    assert len({tuple(drawn([5], replace(MOMENT, step=step))[5]) for step in range(20)}) > 10
    twins = method.plan(DraftBatch.pack([5, 6], [store.read(5)] * 2), MOMENT).anchors_A
    assert (twins[4:] - len(store.read(5).input_ids)).tolist() != twins[:4].tolist(), "the same text, another sample"
    everywhere = {a for step in range(60) for a in drawn([5], replace(MOMENT, step=step))[5]}
    assert everywhere == set(method.plan(DraftBatch.read(store, [5])).anchors_A.tolist())


def test_documents_do_not_leak(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_dflash(target_path, store, **SLIDING)

    def proposed(numbers: list[int]) -> list[torch.Tensor]:
        batch = DraftBatch.read(store, numbers)
        output = method(batch, method.plan(batch))
        return list(output.confidences_TK.split(batch.documents.lengths))

    for packed, alone in zip(proposed([1, 3, 0]), [proposed([number])[0] for number in (1, 3, 0)], strict=True):
        torch.testing.assert_close(packed, alone, rtol=1e-6, atol=0)


def test_a_batch_without_a_start_weighs_nothing_and_still_has_gradients(target_path: Path, store: LocalFeatureStore) -> None:
    """No sample at all, and a sample of which no two neighbours are supervised."""
    method, lonely = make_dflash(target_path, store).float(), store.read(1)
    lonely = replace(lonely, loss_mask=torch.arange(len(lonely.input_ids)) % 2 == 0)
    for batch in (DraftBatch.empty(store.meta), DraftBatch.pack([1], [lonely])):
        for moment in (None, MOMENT):
            method.zero_grad()
            plan = method.plan(batch, moment)
            output = method(batch, plan)
            output.loss_sum.backward()
            assert (plan.weight, output.loss_sum.item(), output.tally["count"].sum()) == (0, 0, 0)
            assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"block_size": 300}, r"block_size=300: the target has 256 positions"),
        ({"mask_token_id": 64}, r"mask_token_id=64: the target has 64 ids"),
        ({"mask_token_id": 31}, r"mask_token_id=31: occurs in the training rows"),
        ({"layers": 2, "layer_types": ("full_attention",)}, r"layer_types=\['full_attention'\]"),
        ({"sliding_window": 4}, r"sliding_window=4"),
        ({"block_size": 1}, r"block_size=1: must be at least 2"),
        ({"dpace_alpha": 0.0}, r"dpace_alpha=0.0"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any], message: str, target_path: Path, store: LocalFeatureStore) -> None:
    with pytest.raises(SpecForgeError, match=message):
        make_dflash(target_path, store, **options)


@pytest.mark.parametrize("layers", [(0, 1, 2), (1, 2, 4), (1, 2, 5)])
def test_layers_that_no_engine_hands_out_are_refused(layers: tuple[int, ...], target_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"aux_layer_ids=\[.*\]: must lie between 1 and 3"):
        derive_config(DFlashOptions(), TargetTables.read(target_path), layers, 0)


def test_the_mask_token_is_the_highest_unused_id(target_path: Path, store: LocalFeatureStore) -> None:
    used = {int(token) for number in range(len(store)) for token in store.read(number).input_ids}
    assert make_dflash(target_path, store).draft.config.mask_token_id == max(set(range(64)) - used)
    assert make_dflash(target_path, store, mask_token_id=1).draft.config.mask_token_id == 1


def test_captured_layers() -> None:
    """The published five of 36, one of a single layer, and what a shallow target has."""
    for layers, of, expected in (
        (5, 36, (2, 10, 18, 26, 34)), (1, 36, (19,)), (2, 8, (2, 6)), (5, 8, (2, 3, 4, 5, 6)), (5, 4, AUX), (2, 4, (1, 3)), (5, 2, (1,))
    ):  # fmt: skip
        assert DFlashOptions(layers=layers).captured_layers(of) == expected
