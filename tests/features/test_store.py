"""Stores give back what was written, bit by bit, and refuse what was damaged or belongs to another target."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from specforge import files
from specforge.errors import FeatureError
from specforge.features.overlap import why_not_held_out
from specforge.features.source import EncodedSamples
from specforge.features.store import TENSORS, FeatureMeta, FeatureWriter, LocalFeatureStore, SampleFeatures

META = FeatureMeta(
    target_path="t", target_fingerprint="abc", template_digest="d", aux_layer_ids=(1, 2), dtype="bfloat16", hidden_size=8, vocab_size=50,
    mask_options=(("last_turn_only", "False"),),
)  # fmt: skip
LENGTHS = (5, 1, 9, 4, 12, 3)
SAMPLE_BYTES = META.bytes_per_token


def sample(number: int, length: int) -> tuple[SimpleNamespace, SampleFeatures]:
    generator = torch.Generator().manual_seed(number)
    ids = torch.randint(0, 50, (length,), generator=generator, dtype=torch.int32)
    mask = torch.arange(length) >= 2
    features = SampleFeatures(
        ids, mask,
        torch.randn(length, 16, generator=generator).bfloat16(),
        torch.randn(length, 8, generator=generator).bfloat16(),
        ids.flip(0), torch.randn(length, generator=generator),
    )  # fmt: skip
    tokens = SimpleNamespace(id=f"s{number}", domain="ab"[number % 2], input_ids=ids.numpy(), loss_mask=mask.numpy(), truncated=number == 4)
    return tokens, features


def write(folder: Path, shard_tokens: int = 14) -> Path:
    with FeatureWriter(folder, META, shard_tokens * SAMPLE_BYTES) as writer:
        for number, length in enumerate(LENGTHS):
            writer.add(*sample(number, length))
    return folder


@pytest.mark.parametrize(("shard_tokens", "shards"), [(1, 6), (14, 4), (1000, 1)])
def test_round_trip_is_bitwise(tmp_path: Path, shard_tokens: int, shards: int) -> None:
    store = LocalFeatureStore(write(tmp_path / "store", shard_tokens))
    assert len(list(store.folder.glob("*.safetensors"))) == shards
    assert len(store) == 6
    for number in (3, 0, 5, 1, 4, 2):
        expected = sample(number, LENGTHS[number])[1]
        read = store.read(number)
        for name in TENSORS:
            assert getattr(read, name).dtype == getattr(expected, name).dtype
            assert torch.equal(getattr(read, name), getattr(expected, name))
        assert all(
            torch.equal(one, other) for one, other in zip(store.tokens(number), (expected.input_ids, expected.loss_mask), strict=True)
        )


def test_index_knows_the_samples(tmp_path: Path) -> None:
    store = LocalFeatureStore(write(tmp_path / "store"))
    assert store.ids == [f"s{number}" for number in range(6)]
    assert store.domains == list("ababab")
    assert store.lengths.tolist() == list(LENGTHS)
    assert store.supervised.tolist() == [max(length - 2, 0) for length in LENGTHS]
    assert (store.truncated, store.unsupervised) == (1, 1)
    assert store.meta == META
    assert store.aux_layer_ids == (1, 2)


def test_index_is_known_without_reading_features(tmp_path: Path) -> None:
    folder = write(tmp_path / "store")
    for shard in folder.glob("*.safetensors"):
        shard.write_bytes(bytes(shard.stat().st_size))
    store = LocalFeatureStore(folder)
    assert store.lengths.sum() == sum(LENGTHS)
    with pytest.raises(FeatureError, match="not readable as safetensors"):
        store.read(0)


def test_supervised_tokens_are_counted(tmp_path: Path) -> None:
    counts = LocalFeatureStore(write(tmp_path / "store")).supervised_counts(50)
    ids = np.concatenate([sample(number, length)[0].input_ids[2:] for number, length in enumerate(LENGTHS)])
    assert counts.tolist() == np.bincount(ids, minlength=50).tolist()


def test_store_of_no_samples(tmp_path: Path) -> None:
    with FeatureWriter(tmp_path / "store", META, 100):
        pass
    store = LocalFeatureStore(tmp_path / "store")
    assert len(store) == 0
    assert store.supervised_counts(50).sum() == 0


def test_flipped_bit_is_named(tmp_path: Path) -> None:
    store = LocalFeatureStore(write(tmp_path / "store"))
    store.verify()
    shard = store.folder / "features-00001.safetensors"
    data = bytearray(shard.read_bytes())
    data[-3] ^= 1
    shard.write_bytes(data)
    with pytest.raises(FeatureError, match=r"features-00001.safetensors.*SHA-256.*make .* again"):
        LocalFeatureStore(store.folder).verify()


def test_truncated_shard_is_refused_at_once(tmp_path: Path) -> None:
    folder = write(tmp_path / "store")
    os.truncate(folder / "features-00000.safetensors", 300)
    with pytest.raises(FeatureError, match=r"features-00000.safetensors.*has 300 bytes"):
        LocalFeatureStore(folder)


def test_missing_store_and_other_format_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FeatureError, match=r"features.path=.*specforge prepare"):
        LocalFeatureStore(tmp_path / "absent")
    folder = write(tmp_path / "store")
    index = json.loads((folder / "index.json").read_text())
    (folder / "index.json").write_text(json.dumps({**index, "format": 9}))
    manifest = json.loads((folder / "manifest.json").read_text())
    index_path = folder / "index.json"
    manifest["files"]["index.json"] = {"size_bytes": index_path.stat().st_size, "sha256": files.sha256_file(index_path)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(FeatureError, match="store format 9 is not 2"):
        LocalFeatureStore(folder)


def test_features_of_another_target_are_refused_with_the_difference(tmp_path: Path) -> None:
    store = LocalFeatureStore(write(tmp_path / "store"))
    store.expect(target_fingerprint="abc", aux_layer_ids=(1, 2), dtype="bfloat16")
    with pytest.raises(FeatureError) as refusal:
        store.expect(target_fingerprint="xyz", aux_layer_ids=(1, 3), dtype="bfloat16")
    assert "target_fingerprint: the store has 'abc', wanted is 'xyz'" in str(refusal.value)
    assert "aux_layer_ids: the store has (1, 2), wanted is (1, 3)" in str(refusal.value)
    assert "dtype" not in str(refusal.value)


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["aux", "last", "logsumexp"])
def test_features_that_are_no_numbers_are_never_published(tmp_path: Path, name: str, number: float) -> None:
    tokens, good = sample(4, 12)
    assert good.is_finite()
    bad = getattr(good, name).clone()
    bad.view(-1)[-1] = number

    def write_bad() -> None:
        with FeatureWriter(tmp_path / "store", META, 1000) as writer:
            writer.add(tokens, replace(good, **{name: bad}))

    with pytest.raises(FeatureError, match=r"sample 's4'.*NaN"):
        write_bad()
    assert list(tmp_path.iterdir()) == []


def test_sums_that_overflow_are_not_mistaken_for_damage() -> None:
    good = sample(4, 12)[1]
    assert replace(good, last=torch.full((12, 8), 3e38)).is_finite()


def test_held_out_samples_that_are_trained_on_are_counted_by_content(tmp_path: Path) -> None:
    """Of six, s0 to s2 are trained on under other names; s3's words under another mask, s4 is excluded, s5 is of other words."""
    heldout = LocalFeatureStore(write(tmp_path / "store"))
    again = [SimpleNamespace(**{**vars(sample(number, LENGTHS[number])[0]), "id": f"t{number}"}) for number in range(5)]
    again[3].loss_mask = np.array([True, True, False, False])
    again.append(sample(9, LENGTHS[5])[0])
    reason = why_not_held_out(heldout, EncodedSamples(again), ["t4"])
    assert reason is not None and reason.startswith("3 of 6 held-out samples are trained on too: s0, s1, s2; ")
    assert "s0, s1, s2, s4; " in str(why_not_held_out(heldout, EncodedSamples(again)))
    assert why_not_held_out(heldout, EncodedSamples(again[3:]), ["t4"]) is None
