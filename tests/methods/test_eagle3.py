"""Training-time test against a slow form that recomputes each row from its own dense key list."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch.nn import functional as F

from specforge import files
from specforge.config.methods import Eagle3Options
from specforge.data.vocabulary import DraftVocabulary
from specforge.errors import CheckpointError
from specforge.features.batch import DraftBatch
from specforge.features.store import LocalFeatureStore, SampleFeatures
from specforge.features.tables import TargetTables
from specforge.methods.base import StepOutput
from specforge.methods.eagle3 import Eagle3
from tests.tiny import make_method

OPTIONS: list[dict[str, object]] = [
    {},
    {"layers": 2, "draft_tokens": 4},
    {"fc_norm": True, "norm_output": True, "draft_vocab_size": 0},
    {"norm_before_fc": True, "head": "frozen", "layers": 2},
    {"experts": 3, "experts_per_token": 2, "layers": 2},
]


def step(method: Eagle3, batch: DraftBatch) -> StepOutput:
    return method(batch, method.plan(batch))


def slow_document(method: Eagle3, sample: SampleFeatures) -> tuple[torch.Tensor, float, dict[tuple[int, int], int]]:
    """Loss sum, weight and proposals of one document: every row at every step, dense attention over a list of keys."""
    draft, gamma = method.draft, method.options.step_decay
    ids, mask, tokens = sample.input_ids.long(), sample.loss_mask, len(sample.input_ids)
    kept = torch.arange(draft.config.draft_vocab_size) + draft.d2t
    head = method.teacher_head_DH if draft.lm_head is None else draft.lm_head.weight
    fed = draft.fuse(sample.aux)
    keys: list[list[list[tuple[torch.Tensor, torch.Tensor]]]] = [[[] for _ in range(tokens)] for _ in draft.layers]
    loss, weight, proposals = torch.zeros(()), 0.0, {}
    for j in range(method.draft_tokens):
        hidden = draft.norm(fed) if j and draft.config.norm_output else fed
        position = torch.arange(tokens) + j
        embedded = F.embedding(ids.roll(-1 - j), method.embedding_VH)
        cos, sin = (x[0, :, None] for x in draft.rotary.tables(hidden, position[None]))
        for depth, layer in enumerate(draft.layers):
            x = layer.hidden_norm(hidden) if depth else torch.cat([layer.input_layernorm(embedded), layer.hidden_norm(hidden)], -1)
            q, k, v = (proj(x).unflatten(-1, (-1, layer.head_dim)) for proj in (layer.q_proj, layer.k_proj, layer.v_proj))
            q, k = (x * cos + torch.cat([-x.chunk(2, -1)[1], x.chunk(2, -1)[0]], -1) * sin for x in (q, k))
            for t in range(tokens):
                keys[depth][t].append((k[t], v[t]))
            mixed = []
            for t in range(tokens):
                seen = [keys[depth][s][0] for s in range(t + 1)] + keys[depth][t][1:]
                repeat = q.shape[1] // k.shape[1]
                seen_k = torch.stack([pair[0] for pair in seen], 1).repeat_interleave(repeat, 0)
                seen_v = torch.stack([pair[1] for pair in seen], 1).repeat_interleave(repeat, 0)
                scores = (seen_k @ q[t][:, :, None])[..., 0] * layer.head_dim**-0.5
                mixed.append((scores.softmax(-1)[:, None] @ seen_v)[:, 0].flatten())
            hidden = hidden + layer.o_proj(torch.stack(mixed))
            x = layer.post_attention_layernorm(hidden)
            dense = layer.moe is None
            hidden = hidden + (layer.down_proj(F.silu(layer.gate_proj(x)) * layer.up_proj(x)) if dense else layer.moe(x).out_TD)
        fed = hidden
        log_q = (draft.norm(hidden) @ head.T).log_softmax(-1)
        for t in range(tokens - 2 - j):
            if not mask[t + 2 + j]:
                continue
            proposals[t + 1, j] = int(kept[log_q[t].argmax()])
            if int(sample.argmax[t + 1 + j]) in set(kept.tolist()):
                teacher = (method.teacher_head_DH @ sample.last[t + 1 + j]).softmax(-1)
                loss = loss - gamma**j * (teacher * log_q[t]).sum()
                weight += gamma**j
    return loss, weight, proposals


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_packed_rows_equal_the_slow_form(options: dict[str, object], target_path: Path, store: LocalFeatureStore) -> None:
    method = make_method(target_path, store, **options)
    samples = [store.read(i) for i in range(len(store))]
    batch = DraftBatch.pack(range(len(store)), samples)
    output, weight = step(method, batch), method.plan(batch).weight
    output.loss_sum.backward()
    fast = {name: p.grad.clone() for name, p in method.named_parameters()}
    method.zero_grad()

    slow = [slow_document(method, sample) for sample in samples]
    sum(loss for loss, _, _ in slow).backward()
    torch.testing.assert_close(output.loss_sum, sum(loss for loss, _, _ in slow), rtol=1e-5, atol=1e-5)
    assert weight == pytest.approx(sum(w for _, w, _ in slow))
    for name, parameter in method.named_parameters():
        torch.testing.assert_close(fast[name], parameter.grad, rtol=1e-4, atol=1e-5)
    for number, (_, _, proposals) in enumerate(slow):
        start = int(batch.documents.starts[number])
        rows = output.proposals_TK[start : start + len(samples[number].input_ids)]
        assert {(t, j): int(rows[t, j]) for t, j in proposals} == proposals
        assert int((rows >= 0).sum()) == len(proposals)


def test_documents_do_not_leak(target_path: Path, store: LocalFeatureStore) -> None:
    """Changing one packed document changes nothing of the other, although both supervise tokens up to the border."""
    method = make_method(target_path, store, draft_tokens=4)
    first, second, third = store.read(1), store.read(3), store.read(0)
    alone = step(method, DraftBatch.pack([1], [first]))
    alone.loss_sum.backward()
    expected = {name: p.grad.clone() for name, p in method.named_parameters()}
    for other in (second, third):
        method.zero_grad()
        packed = DraftBatch.pack([1, 3], [first, other])
        output = step(method, packed)
        by_itself = step(method, DraftBatch.pack([3], [other]))
        torch.testing.assert_close(output.loss_sum - by_itself.loss_sum, alone.loss_sum, rtol=1e-5, atol=1e-5)
        (output.loss_sum - by_itself.loss_sum).backward()
        for name, parameter in method.named_parameters():
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=2e-5)


def test_a_batch_without_targets_weighs_nothing_and_still_has_gradients(target_path: Path, store: LocalFeatureStore) -> None:
    method = make_method(target_path, store, layers=2)
    batch = DraftBatch.empty(store.meta)
    assert method.plan(batch).weight == 0
    output = step(method, batch)
    assert output.loss_sum.item() == 0
    output.loss_sum.backward()
    assert all(p.grad is not None and not p.grad.any() for p in method.parameters())


def test_weight_counts_only_targets_in_the_draft_vocabulary(target_path: Path, store: LocalFeatureStore) -> None:
    whole = make_method(target_path, store, draft_vocab_size=0, step_decay=1.0)
    reduced = make_method(target_path, store, draft_vocab_size=20, step_decay=1.0)
    batch = DraftBatch.pack([1], [store.read(1)])
    mask, argmax = batch.loss_mask, batch.argmax.long()
    pairs = [(t + 1 + j) for j in range(3) for t in range(len(mask) - 2 - j) if mask[t + 2 + j]]
    assert whole.plan(batch).weight == len(pairs)
    inside = sum(bool(reduced.draft.t2d[argmax[p]]) for p in pairs)
    assert 0 < inside < len(pairs)
    assert reduced.plan(batch).weight == inside


def test_activation_checkpointing_gives_the_same_bits_from_less_memory(target_path: Path, store: LocalFeatureStore) -> None:
    """What autograd saves outside of checkpoints shrinks by more than the hidden states and queries that these hold on to."""
    batch = DraftBatch.pack(range(len(store)), [store.read(i) for i in range(len(store))])
    results = []
    for checkpointing in (False, True):
        method = make_method(target_path, store, layers=2, draft_tokens=4, activation_checkpointing=checkpointing)
        saved: dict[int, torch.UntypedStorage] = {}

        def keep(tensor: torch.Tensor, saved: dict[int, torch.UntypedStorage] = saved) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            loss_sum = step(method, batch).loss_sum
        bytes_saved = sum(storage.nbytes() for storage in saved.values())
        loss_sum.backward()
        results.append((loss_sum.detach(), [p.grad for p in method.parameters()], bytes_saved))
    (loss, gradients, plain_bytes), (again, gradients_again, checkpoint_bytes) = results
    assert torch.equal(loss, again)
    assert all(torch.equal(left, right) for left, right in zip(gradients, gradients_again, strict=True))
    held_bytes = 4 * 2 * batch.documents.num_tokens * (32 + 32) * 4  # steps, layers, rows, hidden state and query, float32
    assert checkpoint_bytes + held_bytes < plain_bytes


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_block_sparse_attention_gives_the_same_evaluation(target_path: Path, store: LocalFeatureStore) -> None:
    batch = DraftBatch.pack(range(len(store)), [store.read(number) for number in range(len(store))])
    plain, flex = (make_method(target_path, store, layers=2, attention=attention) for attention in ("blocks", "flex"))
    with torch.no_grad():
        expected, got = (method(batch, method.plan(batch)) for method in (plain, flex))
    torch.testing.assert_close(got.loss_sum, expected.loss_sum, rtol=1e-5, atol=0)
    assert torch.equal(got.proposals_TK, expected.proposals_TK)


def test_a_vocabulary_that_does_not_fit_is_refused(target_path: Path, store: LocalFeatureStore, tmp_path: Path) -> None:
    tables = TargetTables.read(target_path)
    method = Eagle3.build(Eagle3Options(draft_vocab_size=50), tables, store, 0)
    files.write_json(tmp_path / "config.json", method.config_dict())
    for kept, size in ((40, tables.config.vocab_size), (50, tables.config.vocab_size + 1)):
        foreign = DraftVocabulary(np.arange(kept), size)
        save_file({"d2t": torch.from_numpy(foreign.d2t), "t2d": torch.from_numpy(foreign.t2d)}, tmp_path / "model.safetensors")
        with pytest.raises(CheckpointError, match=f"its tables map {kept} ids to {size}, but config.json says draft_vocab_size=50"):
            Eagle3.read(method.options, tables, tmp_path)
