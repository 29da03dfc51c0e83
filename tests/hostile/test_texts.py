"""Configuration files, target folders and metrics as an enemy would write them. No checksum covers them."""

import json
import re
from pathlib import Path

import pytest

from specforge.config.load import load_config, to_dict
from specforge.errors import ConfigError
from specforge.features.tables import TargetConfig, TargetTables
from specforge.log.run_log import read_metrics
from tests.hostile.harness import outcomes, wrong
from tests.hostile.variants import (
    Harm,
    Variant,
    content,
    damaged,
    json_fields,
    json_texts,
    other_tensors,
    replaced,
    safetensors_headers,
)  # fmt: skip

ANYTHING = ("refused", "equal", "different")
CONFIG = """\
run_id: a
output_dir: out
model: {target_path: t, aux_layer_ids: [1, 2, 3]}
data:
  train_path: rows.jsonl
  exclude_ids: [x, 'y']
train: {steps: 3, learning_rate: 1e-3}
method: {name: eagle3, options: {draft_tokens: 3}}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(f"{n}: &{n} [{', '.join([f'*{p}'] * 9)}]\n" for p, n in zip("abcdefgh", "bcdefghi"))


def yaml_texts(marker: Path) -> list[Variant]:
    texts = [
        f"run_id: !!python/object/apply:os.mknod ['{marker}']", f"run_id: !!python/object/new:os.mknod ['{marker}']",
        "run_id: !!python/name:os.system", "run_id: !!python/module:os", "model: !!map {}", "run_id: !local x", "run_id: ! x",
        "run_id: !!binary '///'", "run_id: !!int x", "run_id: !!timestamp x", "x: !!set {a, b}", "x: !!omap [a: 1]",
        BOMB, "run_id: &a x\noutput_dir: *a", "model: &m {target_path: *m}", "<<: {run_id: b}", "run_id: a\nrun_id: b",
        "[" * 100_000, "{a: " * 100_000, "a: [" + "[" * 50 + "]" * 50 + "]", "- " * 50_000,
        "a:\n" + "".join(" " * n + "a:\n" for n in range(500)),
        "train: {steps: " + "9" * 5000 + "}", "train: {steps: 1e999}", "train: {learning_rate: .nan}", "train: {learning_rate: 1e999}",
        "train: {steps: 0x" + "f" * 5000 + "}", "train: {steps: 1:2:3}", "train: {steps: .inf}", "seed: -.inf",
        "run_id: ${output_dir}\noutput_dir: ${run_id}", "run_id: ${run_id}", "run_id: ${oc.env:NOT_THERE}", "run_id: ${nothing:x}",
        "run_id: ${", "run_id: '${a.b.c}'", "output_dir: ${${${a}}}", "run_id: ???", "method: {name: ???}",
        "null: 3", "1: 2", "[a]: b", "? {a: b}\n: c", "{}: 3", "true: false", "? \n: 3", "1.5: 2", "model.target_path: x",
        "model: [1, 2]", "model: x", "model: null", "method: null", "method: x", "method: [x]", "method: {name: null}",
        "method: {name: [x]}", "method: {name: {a: b}}", "method: {options: null}", "method: {options: [x]}", "method: {options: x}",
        "method: {name: ../../x}", "method: {name: __class__}", "data: {exclude_ids: {a: b}}", "data: {exclude_ids: [[x]]}",
        "data: {exclude_ids: null}", "model: {aux_layer_ids: [x]}", "model: {aux_layer_ids: 3}", "model: {aux_layer_ids: [null]}",
        "run_id: ../x", "run_id: ''", "run_id: [x]", "run_id: null", "train: {steps: true}", "train: {steps: x}", "train: {steps: -1}",
        "train: {steps: 2001-01-01}", "unknown: 3", "train: {unknown: 3}",
        "a", "[]", "- a", "3", "null", "", "#", "---\n...\n---\n", "a: b: c",
        "a: 'x", "a: \"\\x\"", "%YAML 9.9\n---\na: 1", "%TAG ! tag:x:\n---\na: 1", "\t", "a: |\n",
        "\ufeffrun_id: b", "a: \x01", "@", "`", "\x00",
    ]  # fmt: skip
    added: list[Variant] = [(f"added {text[:40]!r}", content(CONFIG + text + "\n")) for text in texts]
    return [(f"only {text[:40]!r}", content(text)) for text in texts] + added


def names_a_key(message: str) -> bool:
    """The checks of a section know the key and its value, not where they were given."""
    return re.match(r"[a-z_.]+=", message) is not None


def test_configuration(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    (base / "c.yaml").write_text(CONFIG)
    place = (tmp_path / "canary", tmp_path / "marker")
    variants = (*damaged(CONFIG.encode(), flips=60), *replaced(*place), *yaml_texts(place[1]))
    cases = [("c.yaml", variant, False) for variant in variants]
    found = outcomes(base, cases, lambda folder: to_dict(load_config(folder / "c.yaml")), tmp_path, names=names_a_key)
    assert len(found) == len(variants) > 200
    assert wrong(found, ANYTHING) == {}


@pytest.mark.parametrize("text", ["run_id: !!python/name:os.system", "run_id: ! x", "run_id: &a x\noutput_dir: *a", BOMB])
def test_tags_anchors_and_aliases_are_refused_before_anything_is_made(tmp_path: Path, text: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(ConfigError, match=r"c\.yaml' line 1: tags \(!\), anchors \(&\) and aliases \(\*\) are not allowed"):
        load_config(tmp_path / "c.yaml")


def test_metrics(tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    lines = [{"step": 1, "loss": 2.5}, {"event": "resume", "step": 0, "superseded_to_step": 1}, {"step": 1, "acc": [0.5, None]}]
    original = "".join(json.dumps(line) + "\n" for line in lines).encode()
    (base / "m.jsonl").write_bytes(original)
    place = (tmp_path / "canary", tmp_path / "marker")
    variants: list[Variant] = [*damaged(original, flips=60), *replaced(*place), *json_texts(original.splitlines()[0])]
    for _, harm in [*json_texts(original.splitlines()[1]), *json_fields(original.splitlines()[1])]:
        variants.append(("followed by a line", followed(harm, original)))
    read = [lambda folder, kept=kept: read_metrics(folder / "m.jsonl", superseded=kept) for kept in (True, False)]
    for reader in read:
        found = outcomes(base, [("m.jsonl", variant, False) for variant in variants], reader, tmp_path)
        assert len(found) == len(variants) > 100
        assert wrong(found, ANYTHING) == {}


def followed(harm: Harm, original: bytes) -> Harm:
    def both(path: Path) -> None:
        harm(path)
        path.write_bytes(path.read_bytes() + b"\n" + original)

    return both


@pytest.mark.parametrize("kind", ["config", "generation", "weights", "index"])
def test_target(target_path: Path, tmp_path: Path, kind: str) -> None:
    base = tmp_path / "base"
    base.mkdir()
    for path in target_path.iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    index = {"metadata": {}, "weight_map": dict.fromkeys(("model.embed_tokens.weight", "lm_head.weight"), "model.safetensors")}
    (base / "model.safetensors.index.json").write_text(json.dumps(index))
    names = {"config": "config.json", "generation": "generation_config.json", "weights": "model.safetensors"}
    name = names.get(kind, "model.safetensors.index.json")
    original = (base / name).read_bytes()
    variants = [*damaged(original, flips=30), *replaced(tmp_path / "canary", tmp_path / "marker")]
    variants += [*safetensors_headers(original), *other_tensors("lm_head.weight")] if kind == "weights" else []
    variants += [*json_texts(original), *json_fields(original)] if kind != "weights" else []
    if kind == "index":
        variants += [
            (f"names {text[:20]!r}", content(json.dumps({**index, "weight_map": {"lm_head.weight": text, "embed_tokens.weight": text}})))
            for text in ("../../canary/secret", "/etc/passwd", "", "\ud800", "x" * 300, "a\0b", "config.json", ".")
        ]
    if kind == "config":
        variants += [
            (f"{field} = {value}", content(json.dumps({**json.loads(original), field: value})))
            for field in ("num_hidden_layers", "num_labels", "vocab_size", "num_attention_heads", "hidden_size", "head_dim")
            for value in (0, -1, 10**9, 2**70, 1e300)
        ]
        foreign = {"model_type": "qwen3", "auto_map": {"AutoConfig": "evil.Config"}, "architectures": ["X"], "num_hidden_layers": 10**9}
        for text in ({"model_type": "no such"}, {"model_type": "custom", "auto_map": foreign["auto_map"]}, foreign):
            variants.append((f"{str(text)[:60]}", content(json.dumps({**json.loads(original), **text}))))

    def read(folder: Path) -> object:
        tables = TargetTables.read(folder)
        return [vars(TargetConfig.read(folder)), tables.embedding, tables.head]

    found = outcomes(base, [(name, variant, False) for variant in variants], read, tmp_path)
    assert len(found) == len(variants) > 40
    assert wrong(found, ANYTHING) == {}
