"""Feature stores and evaluation cache entries that somebody damaged or forged."""

from pathlib import Path

import pytest
from safetensors.torch import load_file

from specforge.config.schema import EvalConfig
from specforge.eval.cache import META, EvalCache
from specforge.features.store import LocalFeatureStore
from tests.hostile.harness import outcomes, reseal, wrong
from tests.hostile.variants import (
    Variant,
    damaged,
    json_fields,
    json_texts,
    names_in,
    other_tensors,
    replaced,
    safetensors_headers,
    strangers,
)  # fmt: skip
from tests.tiny import make_samples, make_store

Case = tuple[str, Variant, bool]
SHARD = "features-00000.safetensors"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory, target_path: Path) -> Path:
    return make_store(tmp_path_factory.mktemp("store") / "s", target_path, make_samples([9, 12, 5])).folder


def read_all(folder: Path, verified: bool = True) -> object:
    store = LocalFeatureStore(folder)
    if verified:
        store.verify()
    described = [store.ids, store.domains, store.lengths, store.supervised, vars(store.meta), store.truncated, store.unsupervised]
    return [described, [vars(store.read(number)) for number in range(len(store))], store.supervised_counts(64)]


def test_damage_under_the_checksums_is_refused(store: Path, tmp_path: Path) -> None:
    cases: list[Case] = []
    for name in ("index.json", SHARD):
        original = (store / name).read_bytes()
        variants = (*damaged(original, flips=40), *replaced(tmp_path / "canary", tmp_path / "marker"), *strangers(tmp_path / "marker"))
        cases += [(name, variant, False) for variant in variants]
    found = outcomes(store, cases, read_all, tmp_path)
    assert len(found) == len(cases) > 100
    assert wrong(found, ("refused",)) == {}


def test_index_is_checked_although_tensors_are_not(store: Path, tmp_path: Path) -> None:
    """A store is opened by the sizes of its shards; what is small is read anyway."""
    cases = [("index.json", variant, False) for variant in damaged((store / "index.json").read_bytes(), flips=40)]
    found = outcomes(store, cases, lambda folder: read_all(folder, verified=False), tmp_path)
    assert wrong(found, ("refused",)) == {}


def test_forged_checksums_do_not_help(store: Path, tmp_path: Path) -> None:
    index, shard = ((store / name).read_bytes() for name in ("index.json", SHARD))
    place = (tmp_path / "canary", tmp_path / "marker")
    cases = [("index.json", variant, True) for variant in (*replaced(*place), *json_texts(index), *json_fields(index))]
    cases += [(SHARD, variant, True) for variant in (*replaced(*place), *safetensors_headers(shard))]
    for name in load_file(store / SHARD):
        cases += [(SHARD, variant, True) for variant in other_tensors(name)]
    found = outcomes(store, cases, read_all, tmp_path, reseal)
    assert len(found) == len(cases) > 200
    assert wrong(found, ("refused", "equal")) == {}


def test_manifest(store: Path, tmp_path: Path) -> None:
    original = (store / "manifest.json").read_bytes()
    place = (tmp_path / "canary", tmp_path / "marker")
    variants = (
        *damaged(original, flips=40), *replaced(*place), *json_texts(original), *json_fields(original), *names_in(original, place[1]),
    )  # fmt: skip
    found = outcomes(store, [("manifest.json", variant, False) for variant in variants], read_all, tmp_path)
    assert len(found) == len(variants) > 100
    assert wrong(found, ("refused", "equal")) == {}


def test_cache_entry_is_produced_again_or_refused(tmp_path: Path) -> None:
    """Whatever lies at the place of an entry, those who ask get what they would have produced."""
    config = EvalConfig(eval_data_path="rows", cache_dir=str(tmp_path / "base"))

    def produce(folder: Path) -> None:
        (folder / "part").mkdir()
        (folder / "part" / "features.json").write_text("true")

    def read(folder: Path) -> object:
        cache = EvalCache(folder)
        before = cache.try_get(config)
        entry = cache.get_or_produce(config, produce)
        assert before in (None, entry)
        assert not entry.is_symlink()
        assert not list(folder.glob(".*staging*"))
        return (entry / "part" / "features.json").read_text()

    base = tmp_path / "base"
    key = EvalCache(base).get_or_produce(config, produce).name
    original = (base / key / META).read_bytes()
    place = (tmp_path / "canary", tmp_path / "marker")
    meta = (*damaged(original, flips=30), *replaced(*place), *json_texts(original), *json_fields(original), *names_in(original, place[1]))
    cases: list[Case] = [(f"{key}/{META}", variant, False) for variant in meta]
    cases += [(f"{key}/part/features.json", variant, False) for variant in (*damaged(b"true"), *replaced(*place))]
    cases += [(key, variant, False) for variant in _instead_of_a_folder()]
    cases += [(f"{key}/x.safetensors", ("not listed", lambda path: path.write_text("x")), False)]
    found = outcomes(base, cases, read, tmp_path)
    assert len(found) == len(cases) > 120
    assert wrong(found, ("equal",)) == {}


def _instead_of_a_folder() -> list[Variant]:
    def put(path: Path, make: str) -> None:
        away = path.with_name("away")
        path.rename(away)
        if make == "a link to nothing":
            path.symlink_to("nothing")
        elif make == "a link to a folder":
            path.symlink_to(away)
        elif make == "a file":
            path.write_text("x")
        elif make == "an empty folder":
            path.mkdir()

    kinds = ("a link to nothing", "a link to a folder", "a file", "an empty folder", "nothing")
    return [(kind, lambda path, kind=kind: put(path, kind)) for kind in kinds]  # type: ignore[misc]
