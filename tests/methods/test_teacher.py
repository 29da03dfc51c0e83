"""A teacher cut down to its likeliest ids: the formula in slow form, its limits, and what a store of it takes on the disk."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from specforge.distributed import World
from specforge.features import teacher as teacher_module
from specforge.features.batch import DraftBatch
from specforge.features.capture import capture_features
from specforge.features.store import FeatureMeta, LocalFeatureStore, bytes_per_token
from specforge.features.target import Target
from specforge.features.teacher import likeliest
from specforge.methods.teacher import CompressedTeacher, ExactTeacher
from tests.tiny import AUX, VOCAB, make_method, make_samples

META = FeatureMeta(target_path="t", target_fingerprint="f", aux_layer_ids=AUX, dtype="float32", hidden_size=32, vocab_size=VOCAB)


def captured(folder: Path, target_path: Path, top_k: int) -> LocalFeatureStore:
    samples, load = make_samples([20, 9, 31, 14]), lambda: Target.load(target_path, "float32")
    meta = replace(META, teacher_top_k=top_k)
    return capture_features(samples, load, folder / f"top{top_k}", meta, World(), capture_tokens=1, shard_bytes=2**20)


def loss_and_gradient(store: LocalFeatureStore, target_path: Path) -> tuple[float, torch.Tensor]:
    method = make_method(target_path, store)
    batch = DraftBatch.read(store, range(len(store)))
    output = method(batch, method.plan(batch))
    output.loss_sum.backward()
    return float(output.loss_sum.detach()), torch.cat([p.grad.flatten() for p in method.parameters() if p.grad is not None])


@pytest.mark.parametrize("tile", [(1024, 32_768), (3, 10)])
def test_the_likeliest_ids_are_the_models(tile: tuple[int, int], target_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(teacher_module, "_ROWS", tile[0])
    monkeypatch.setattr(teacher_module, "_COLUMNS", tile[1])
    target = Target.load(target_path, "float32")
    last = torch.randn(8, 32, generator=torch.Generator().manual_seed(0))
    log_probs = (last @ target.head.weight.T).log_softmax(-1)
    ids, kept = likeliest(target, last, (last @ target.head.weight.T).logsumexp(-1), 5)
    expected, expected_ids = log_probs.topk(5)
    assert torch.equal(ids, expected_ids.int())
    torch.testing.assert_close(kept, expected.half(), atol=0, rtol=2**-10)


def test_the_formula_in_slow_form() -> None:
    generator = torch.Generator().manual_seed(0)
    probs = (3 * torch.randn(6, 20, generator=generator)).softmax(-1).double()
    kept_V = [1, 2, 5, 7, 11, 12, 19]
    to_draft = torch.full((20,), -1, dtype=torch.int32)
    to_draft[kept_V] = torch.arange(7, dtype=torch.int32)
    top, ids = probs.topk(4)
    teacher = CompressedTeacher(ids.int(), top.log(), to_draft, 7)
    renormalised, own = teacher.distribution(1, 6, torch.float64), teacher.log_probs(1, 6, torch.float64).exp()
    for row in range(5):
        p, known = probs[row + 1], ids[row + 1].tolist()
        tail = (1 - sum(float(p[i]) for i in known)) / 16
        spread = torch.tensor([float(p[i]) if i in known else tail for i in kept_V], dtype=torch.float64)
        torch.testing.assert_close(own[row], spread)
        torch.testing.assert_close(renormalised[row], spread / spread.sum())


def test_all_ids_are_the_exact_teacher() -> None:
    generator = torch.Generator().manual_seed(0)
    last, head = torch.randn(6, 8, generator=generator).double(), torch.randn(20, 8, generator=generator).double()
    kept = torch.tensor([0, 3, 4, 9, 18])
    to_draft = torch.full((20,), -1, dtype=torch.int32)
    to_draft[kept] = torch.arange(5, dtype=torch.int32)
    log_probs, ids = (last @ head.T).log_softmax(-1).topk(20)
    exact = ExactTeacher(last, head[kept], (last @ head.T).logsumexp(-1))
    compressed = CompressedTeacher(ids.int(), log_probs, to_draft, 5)
    torch.testing.assert_close(exact.log_probs(2, 6, torch.float64), (last @ head.T).log_softmax(-1)[2:, kept])
    torch.testing.assert_close(compressed.log_probs(0, 6, torch.float64), exact.log_probs(0, 6, torch.float64))
    torch.testing.assert_close(compressed.distribution(0, 6, torch.float64), exact.distribution(0, 6, torch.float64))


def test_a_rounded_teacher_is_never_surer_than_certain() -> None:
    """In bfloat16 a logit of 30.07 is 30.125."""
    last, head = torch.tensor([[30.07]]), torch.tensor([[1.0], [0.0]], dtype=torch.bfloat16)
    normaliser = (last @ head.float().T).logsumexp(-1)
    assert float((last.bfloat16() @ head.T).float()[0, 0] - normaliser) > 0.05
    log_probs = ExactTeacher(last, head, normaliser).log_probs(0, 1, torch.float32)
    torch.testing.assert_close(log_probs[0], torch.tensor([0.0, -30.125]))
    torch.testing.assert_close(ExactTeacher(last, head, None).log_probs(0, 1, torch.float32), log_probs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_sure_target_whose_ids_the_draft_lacks_is_spread_evenly(dtype: torch.dtype) -> None:
    """-1e-9 is 0 in float16, so nothing is left for other ids, and the draft has none of the known ones."""
    to_draft = torch.tensor([0, 1, 2, -1, -1], dtype=torch.int32)
    teacher = CompressedTeacher(torch.tensor([[3, 4]], dtype=torch.int32), torch.tensor([[-1e-9, -20.0]]).half(), to_draft, 3)
    assert teacher.log_probs(0, 1, dtype).isfinite().all()
    torch.testing.assert_close(teacher.distribution(0, 1, dtype), torch.full((1, 3), 1 / 3, dtype=dtype))


def test_more_ids_teach_more_exactly(tmp_path: Path, target_path: Path) -> None:
    """All ids leave the rounding of log-probabilities to float16: 2^-11 of at most 16 nats, so 1 % of a probability."""
    exact_loss, exact = loss_and_gradient(captured(tmp_path, target_path, 0), target_path)
    errors = []
    for top_k in (2, 8, 24, VOCAB):
        loss, gradient = loss_and_gradient(captured(tmp_path, target_path, top_k), target_path)
        errors.append((abs(loss / exact_loss - 1), float((gradient - exact).norm() / exact.norm())))
    assert errors == sorted(errors, reverse=True)
    assert all(error < 0.01 for error in errors[-1])
    assert errors[0][1] > 0.1, "two ids are not enough"


@pytest.mark.parametrize("top_k", [0, 8])
def test_a_compressed_store_is_smaller_by_what_is_promised(top_k: int, tmp_path: Path, target_path: Path) -> None:
    store = captured(tmp_path, target_path, top_k)
    tensor_bytes = 0
    for path in store.folder.glob("*.safetensors"):
        header_bytes = 8 + int.from_bytes(path.read_bytes()[:8], "little")
        tensor_bytes += path.stat().st_size - header_bytes
    assert tensor_bytes == int(store.lengths.sum()) * bytes_per_token(3, 32, "float32", top_k)
    assert (store.read(0).last.numel() == 0) == (top_k > 0)
    assert store.read(0).top_ids.shape == ((20, top_k) if top_k else (0,))
