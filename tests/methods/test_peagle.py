"""P-EAGLE against a slow form in float64 that lays all rows of all depths side by side under one mask, and what its plan promises."""

from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from specforge.config.methods import PEagleOptions
from specforge.errors import CheckpointError, SpecForgeError
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.files import write_json
from specforge.methods.base import Moment
from specforge.methods.eagle3 import TTTPlan
from specforge.methods.peagle import PEagle

OPTIONS: list[dict[str, Any]] = [
    {},
    {"layers": 1, "draft_tokens": 2, "draft_vocab_size": 0, "step_decay": 0.8},
    {"fc_norm": True, "head": "frozen", "layers": 3},
    {"norm_before_fc": True, "loss": "tv"},
    {"loss": "lk_alpha", "activation_checkpointing": True},
]
MOMENT = Moment(seed=3, step=7, total_steps=10)


def make_peagle(target_path: Path, store: LocalFeatureStore, **options: Any) -> PEagle:
    """In float64, with sharp weights: attention decides what is said, and every norm has a weight of its own."""
    chosen: dict[str, Any] = {"draft_tokens": 4, "layers": 2, "draft_vocab_size": 40, "loss_chunk_rows": 7, **options}
    method = PEagle.build(PEagleOptions(**chosen), TargetTables.read(target_path), store, 0).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in method.draft.parameters():
        parameter.data *= 2 if parameter.dim() == 2 else 0.5 + torch.rand(parameter.shape, generator=generator, dtype=torch.float64)
    return method


def whole_batch(store: LocalFeatureStore) -> DraftBatch:
    return DraftBatch.read(store, range(len(store)))


def supervised(plan: TTTPlan) -> list[set[int]]:
    """The rows with a target, by depth."""
    return [set(step.rows_R[step.supervised_S].tolist()) for step in plan.steps]


def slow_log_probs(method: PEagle, sample: SampleFeatures) -> dict[tuple[int, int], torch.Tensor]:
    """log q [D] of each row and depth (t, d): every one an element of a long sequence with a dense mask."""
    draft, tokens = method.draft, len(sample.input_ids)
    elements = [(t, d) for d in range(method.draft_tokens) for t in range(tokens)]
    ids = sample.input_ids.long().tolist()
    fed = torch.tensor([ids[(t + 1) % tokens] if d == 0 else draft.config.mask_token_id for t, d in elements])
    embedded = F.embedding(fed, method.embedding_VH.double())
    hidden = torch.cat([draft.fuse(sample.aux.double()), draft.fuse(draft.mask_hidden[0]).expand(len(elements) - tokens, -1)])
    cos, sin = (x[0, :, None].double() for x in draft.rotary.tables(torch.zeros(1), torch.tensor([[t + d for t, d in elements]])))
    seen = torch.tensor([[(e == 0 and s <= t) or (s == t and e <= d) for s, e in elements] for t, d in elements])
    for depth, layer in enumerate(draft.stack):
        x = layer.hidden_norm(hidden)
        if layer.input_layernorm is not None:
            x = torch.cat([layer.input_layernorm(embedded), x], -1)
        q, k, v = (proj(x).unflatten(-1, (-1, layer.head_dim)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
        q, k = (y * cos + torch.cat([-y.chunk(2, -1)[1], y.chunk(2, -1)[0]], -1) * sin for y in (q, k))
        k, v = (y.repeat_interleave(q.shape[1] // y.shape[1], 1) for y in (k, v))
        scores = torch.einsum("rhd,shd->hrs", q, k) / layer.head_dim**0.5
        mixed = torch.einsum("hrs,shd->rhd", scores.masked_fill(~seen, -torch.inf).softmax(-1), v).flatten(1)
        hidden = hidden + layer.o_proj(mixed)
        x = layer.post_attention_layernorm(hidden)
        hidden = hidden + layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x))
        assert (depth == 0) == (layer.input_layernorm is not None)
    head_DH = method.teacher_head_DH.double() if draft.lm_head is None else draft.lm_head.weight
    return dict(zip(elements, (draft.norm(hidden) @ head_DH.T).log_softmax(-1), strict=True))


def slow_document(
    method: PEagle, sample: SampleFeatures, kept: list[set[int]]
) -> tuple[torch.Tensor, float, dict[tuple[int, int], tuple[int, bool]]]:
    """Loss sum, weight, and proposals (start, k) with whether they are right, of the rows kept at each depth."""
    options, target_ids = method.options, torch.arange(method.draft.config.draft_vocab_size) + method.draft.d2t
    loss, weight, proposals = torch.zeros((), dtype=torch.float64), 0.0, {}
    for (t, d), log_q in slow_log_probs(method, sample).items():
        if t not in kept[d]:
            continue
        place, proposed = t + 1 + d, int(target_ids[log_q.argmax()])
        proposals[t + 1, d + 1] = proposed, proposed == int(sample.argmax[place])
        if int(sample.argmax[place]) not in target_ids.tolist():
            continue
        logits = method.teacher_head_DH.double() @ sample.last[place].double()
        accepted = torch.minimum((logits - sample.logsumexp[place].double()).exp(), log_q.exp()).sum()
        terms = {"kl": -(logits.softmax(-1) * log_q).sum(), "tv": 1 - accepted, "lk_alpha": -accepted.log()}
        loss = loss + float(np.float32(options.step_decay**d)) * terms[options.loss]
        weight += options.step_decay**d
    return loss, weight, proposals


@pytest.mark.parametrize("moment", [None, MOMENT], ids=["evaluation", "training"])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_depths_equal_the_slow_form(options: dict[str, Any], moment: Moment | None, target_path: Path, store: LocalFeatureStore) -> None:
    """Loss, gradients, weight, counts and proposals of ragged documents with prompts and a gap between two answers."""
    method, batch = make_peagle(target_path, store, **options), whole_batch(store)
    plan = method.plan(batch, moment)
    output = method(batch, plan)
    names, parameters = zip(*method.draft.named_parameters(), strict=True)
    gradients = torch.autograd.grad(output.loss_sum, parameters)
    starts = batch.documents.starts.tolist()
    each = [
        slow_document(method, store.read(number), [{row - start for row in rows if start <= row < end} for rows in supervised(plan)])
        for number, (start, end) in enumerate(pairwise(starts))
    ]
    expected = sum((loss for loss, _, _ in each), torch.zeros((), dtype=torch.float64))
    torch.testing.assert_close(output.loss_sum, expected, rtol=1e-10, atol=0)
    assert plan.weight == pytest.approx(sum(weight for _, weight, _ in each), rel=1e-12)
    for name, got, wanted in zip(names, gradients, torch.autograd.grad(expected, parameters), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-10, atol=1e-10, msg=partial("{}: {}".format, name))

    proposals = {(start + s, k): found for start, (_, _, of) in zip(starts, each, strict=False) for (s, k), found in of.items()}
    rows, columns = output.proposals_TK.ge(0).nonzero(as_tuple=True)
    assert {place: token for place, (token, _) in proposals.items()} == {
        (s, k + 1): int(output.proposals_TK[s, k]) for s, k in zip(rows.tolist(), columns.tolist(), strict=True)
    }
    count_K, correct_K = np.zeros(method.draft_tokens), np.zeros(method.draft_tokens)
    for (_, k), (_, right) in proposals.items():
        count_K[k - 1] += 1
        correct_K[k - 1] += right
    assert output.tally["count"].tolist() == count_K.tolist()
    assert output.tally["correct"].tolist() == correct_K.tolist()


def test_an_evaluation_keeps_every_row_with_a_target(target_path: Path, store: LocalFeatureStore) -> None:
    method, batch = make_peagle(target_path, store), whole_batch(store)
    mask, document = batch.loss_mask.tolist(), batch.documents.index_T.tolist()
    for depth, rows in enumerate(supervised(method.plan(batch))):
        reach = len(mask) - 2 - depth
        assert rows == {t for t in range(reach) if mask[t + 2 + depth] and document[t] == document[t + 2 + depth]}
    assert supervised(method.plan(batch)) == supervised(make_peagle(target_path, store, depth_ratio=1.0).plan(batch, MOMENT))


def test_depths_are_thinned_out_one_within_the_other(target_path: Path, store: LocalFeatureStore) -> None:
    """Of the longest sample, whose n rows have no target at a few depths only: the first ones, which the prompt ends, and the last."""
    method, batch = make_peagle(target_path, store, draft_tokens=8, depth_ratio=0.7, depth_floor=0.2), DraftBatch.read(store, [5])
    everything = supervised(method.plan(batch))
    n = len(set().union(*everything))
    kept_times = np.zeros((8, batch.documents.num_tokens))
    for step in range(400):
        kept = supervised(method.plan(batch, replace(MOMENT, step=step)))
        assert kept[0] == everything[0]
        for depth, share in enumerate((1.0, 0.7, 0.49, 0.343, 0.2401, 0.2, 0.2, 0.2)):
            lacking = n - len(everything[depth])
            assert kept[depth] <= everything[depth]
            assert np.ceil(n * share - 1e-9) - lacking <= len(kept[depth]) <= np.ceil(n * share - 1e-9)
            assert all(row in kept[before] for row in kept[depth] for before in range(depth) if row in everything[before])
            kept_times[depth, list(kept[depth])] += 1
    for depth, share in enumerate((1.0, 0.7, 0.49, 0.343, 0.2401, 0.2, 0.2, 0.2)):
        times = kept_times[depth, list(everything[depth])] / 400
        assert np.abs(times - np.ceil(n * share - 1e-9) / n).max() < 4.5 * (0.25 / 400) ** 0.5, "every row as often as the others"


def test_what_is_kept_follows_from_seed_step_and_sample_alone(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_peagle(target_path, store)

    def kept(numbers: list[int], moment: Moment) -> dict[int, list[list[int]]]:
        batch = DraftBatch.read(store, numbers)
        by_depth, first = supervised(method.plan(batch, moment)), batch.documents.starts.tolist()
        return {
            number: [sorted(row - start for row in rows if start <= row < end) for rows in by_depth]
            for number, start, end in zip(numbers, first, first[1:], strict=False)
        }

    together = kept([0, 1, 2, 3, 4, 5], MOMENT)
    assert together == {number: kept([number], MOMENT)[number] for number in (5, 2, 0, 1, 3, 4)}
    assert together == kept([3, 5, 1, 0, 4, 2], MOMENT)
    for moment in (replace(MOMENT, step=8), replace(MOMENT, seed=4)):
        assert kept([0, 1, 2, 3, 4, 5], moment) != together
    assert len({str(kept([5], replace(MOMENT, step=step))) for step in range(20)}) > 10


def test_a_batch_without_targets_weighs_nothing_and_still_has_gradients(target_path: Path, store: LocalFeatureStore) -> None:
    """No sample at all, and one whose only target is of depth 0, so that no mask row is computed."""
    method, lonely = make_peagle(target_path, store), store.read(1)
    for moment in (None, MOMENT):
        empty = DraftBatch.empty(store.meta)
        plan = method.plan(empty, moment)
        output = method(empty, plan)
        output.loss_sum.backward()
        assert (plan.weight, output.loss_sum.item(), output.tally["count"].sum()) == (0, 0, 0)
        assert all(p.grad is not None and not p.grad.any() for p in method.parameters())
        method.zero_grad()
    single = DraftBatch.pack([1], [replace(lonely, loss_mask=torch.arange(len(lonely.input_ids)) == 2)])
    method(single, method.plan(single)).loss_sum.backward()
    assert method.draft.mask_hidden.grad is not None and not method.draft.mask_hidden.grad.any()


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_block_sparse_attention_gives_the_same_evaluation(target_path: Path, store: LocalFeatureStore) -> None:
    batch = whole_batch(store)
    plain, flex = (make_peagle(target_path, store, attention=attention).float() for attention in ("blocks", "flex"))
    with torch.no_grad():
        expected, got = (method(batch, method.plan(batch)) for method in (plain, flex))
    torch.testing.assert_close(got.loss_sum, expected.loss_sum, rtol=1e-5, atol=0)
    assert torch.equal(got.proposals_TK, expected.proposals_TK)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"draft_tokens": 257}, r"draft_tokens=257: the target has 256 positions"),
        ({"mask_token_id": 64}, r"mask_token_id=64: the target has 64 ids"),
        ({"mask_token_id": 31}, r"mask_token_id=31: occurs in the training rows"),
        ({"mask_token_id": -2}, r"mask_token_id=-2: must be at least -1"),
        ({"depth_ratio": 0.0}, r"depth_ratio=0.0: must lie in \(0, 1\]"),
        ({"depth_floor": 1.5}, r"depth_floor=1.5: must lie in \(0, 1\]"),
        ({"norm_output": True}, r"norm_output=true: no depth of this draft reads another's output"),
    ],
    ids=str,
)
def test_what_does_not_fit_is_refused_by_name(options: dict[str, Any], message: str, target_path: Path, store: LocalFeatureStore) -> None:
    with pytest.raises(SpecForgeError, match=message):
        make_peagle(target_path, store, **options)


def test_the_mask_token_is_the_highest_unused_id_and_stays_what_it_is(target_path: Path, store: LocalFeatureStore, tmp_path: Path) -> None:
    used = {int(token) for number in range(len(store)) for token in store.read(number).input_ids}
    method = make_peagle(target_path, store)
    assert method.draft.config.mask_token_id == max(set(range(64)) - used)
    assert tuple(method.draft.mask_hidden.shape) == (1, 1, 3 * 32)
    stored = make_peagle(target_path, store, mask_token_id=1)
    write_json(tmp_path / "config.json", stored.config_dict())
    save_file({name: tensor.contiguous() for name, tensor in stored.draft.state_dict().items()}, tmp_path / "model.safetensors")
    tables = TargetTables.read(target_path)
    assert PEagle.read(replace(stored.options, mask_token_id=-1), tables, tmp_path).draft.config.mask_token_id == 1
    with pytest.raises(CheckpointError, match="mask_token_id is 1, this run wants 2"):
        PEagle.read(replace(stored.options, mask_token_id=2), tables, tmp_path)
