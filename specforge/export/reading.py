"""EAGLE-3 and DFlash drafts of others, in the original layout or that of speculators, as checkpoints of this program.

What published drafts leave out is taken as engines take it; what a draft of this program cannot be is refused, never adapted in silence.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from specforge import files
from specforge.config.methods import DFlashOptions, registered
from specforge.data.vocabulary import DraftVocabulary
from specforge.errors import ConfigError, ExportError
from specforge.export.contract.keys import Keys
from specforge.export.contract.unknown import require_neutral
from specforge.features.tables import TargetTables

_PICKLES = (".bin", ".pt", ".pth")
_CHAINS = ("LlamaForCausalLMEagle3", "Eagle3LlamaForCausalLM", "LlamaForCausalLM")
_LEGACY_NORMS = {
    "aux_norm_low.weight": "fc_norm.0.weight",
    "aux_norm_mid.weight": "fc_norm.1.weight",
    "aux_norm_high.weight": "fc_norm.2.weight",
}
_PARTS = ("transformer_layer_config", "speculators_config", "dflash_config", "eagle_config", "rope_parameters", "rope_scaling")
_RECORD = "specforge.json"
_BLOCK_SIZE = 16
"""What engines take where a DFlash draft does not say."""
_IDS = "eagle_aux_hidden_state_layer_ids"


@dataclass(frozen=True)
class Imported:
    name: str
    """Of the method."""
    options: Any
    config: Any
    tensors: dict[str, torch.Tensor]


def read_layout(folder: Path, tables: TargetTables, draft_tokens: int | None) -> Imported:
    """
    Args:
        draft_tokens: for how many drafts EAGLE-3 was trained; None: as many as the folder says.

    Raises:
        ExportError: the folder holds no such draft, or one that does not work as drafts of this program do.
        ConfigError: nothing says for how many drafts it was trained.
    """
    stored = files.read_object(folder / "config.json", ExportError)
    layers = stored.get("transformer_layer_config") or stored
    for part in (stored, layers):
        files.check_fields(
            {name: part.get(name) or {} for name in _PARTS}, f"{folder}/config.json", ExportError, **dict.fromkeys(_PARTS, dict)
        )
    kind = _kind(folder, stored)
    tensors = _read_tensors(folder)
    _require_plain(folder, stored, layers, len(tensors))
    _require_rope(folder, layers, tables)
    ids = _captured(folder, stored, kind, layers["num_hidden_layers"], tables.config.num_hidden_layers)
    if kind == "eagle3":
        return _eagle3(folder, stored, layers, tensors, tables, ids, draft_tokens)
    return _dflash(folder, stored, layers, tensors, tables, ids)


def _kind(folder: Path, stored: dict[str, Any]) -> str:
    if "speculators_model_type" in stored:
        kind = stored["speculators_model_type"]
    else:
        named = next(iter(stored.get("architectures") or ()), "none") if isinstance(stored.get("architectures"), list) else "none"
        kind = "eagle3" if named in _CHAINS else "dflash" if named == "DFlashDraftModel" else named
        if kind == "dflash" and "projector_type" in (stored.get("dflash_config") or {}):
            kind = "domino"
    if kind not in ("eagle3", "dflash"):
        raise ExportError(f"{folder}/config.json: is a draft of kind {files.shown(kind)}; only EAGLE-3 and DFlash are imported.")
    return str(kind)


def _read_tensors(folder: Path) -> dict[str, torch.Tensor]:
    """By name without `model.` and with `layers.0` for EAGLE's `midlayer`."""
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
        found = f"holds {pickles[0]}, a pickle, which can execute what it likes" if pickles else "holds no weights"
        raise ExportError(
            f"{folder}: {found}; take a copy with model.safetensors, or convert it where it may do harm to nobody "
            "(torch.load with weights_only=True, then safetensors.torch.save_file)."
        )
    tensors: dict[str, torch.Tensor] = {}
    for path in shards:
        with files.open_tensors(path, ExportError) as shard:
            for name in shard.keys():  # noqa: SIM118
                plain = name.removeprefix("model.").replace("midlayer.", "layers.0.", 1)
                if plain in tensors:
                    raise ExportError(f"{path}: {name} occurs twice in {folder}; take another copy.")
                if "rotary_emb" not in plain:
                    tensors[plain] = shard.get_tensor(name)
    return tensors


def _require_plain(folder: Path, stored: dict[str, Any], layers: dict[str, Any], tensors: int) -> None:
    """No key that would make its layers others than those of a draft here."""
    where = f"{folder}/config.json"
    for part in (stored, layers, stored.get("eagle_config") or {}, stored.get("dflash_config") or {}):
        require_neutral(Keys({name: value for name, value in part.items() if name != "use_aux_norm"}, where))
    if layers.get("hidden_act", "silu") != "silu":
        raise ExportError(f"{where}: hidden_act is {files.shown(layers['hidden_act'])}; feed-forwards of drafts here have silu.")
    files.check_fields(layers, where, ExportError, num_hidden_layers=int, intermediate_size=int)
    if not 0 < layers["num_hidden_layers"] <= tensors:
        raise ExportError(
            f"{where}: num_hidden_layers is {layers['num_hidden_layers']}, and its weights are {tensors} tensors; take another copy."
        )


def _require_rope(folder: Path, layers: dict[str, Any], tables: TargetTables) -> None:
    nested = layers.get("rope_parameters") or {}
    flat = {**(layers.get("rope_scaling") or {}), "rope_theta": layers.get("rope_theta", 10_000.0)}
    found = {"rope_type": "default", **(nested or flat)}
    found["rope_type"] = found.pop("type", found["rope_type"])
    wanted = {"rope_type": "default", **tables.config.rope_parameters}
    if found != wanted:
        raise ExportError(f"{folder}/config.json: its RoPE is {found}, the target's {wanted}; drafts here rotate as their target does.")


def _captured(folder: Path, stored: dict[str, Any], kind: str, draft_layers: int, num_layers: int) -> tuple[int, ...]:
    """What it reads, as indices of hidden states; where it does not say, what engines capture then for such a draft."""
    block, eagle = stored.get("dflash_config") or {}, stored.get("eagle_config") or {}
    counted_from_1 = [stored.get(_IDS), stored.get("aux_hidden_state_layer_ids")]
    counted_from_0 = [eagle.get(_IDS), block.get("target_layer_ids"), stored.get("target_layer_ids")]
    found = set()
    for lists, added in ((counted_from_1, 0), (counted_from_0, 1)):
        for ids in lists:
            if ids is None:
                continue
            if not isinstance(ids, list) or not ids or not all(files.is_a(each, int) for each in ids) or sorted(set(ids)) != ids:
                raise ExportError(f"{folder}/config.json: captured layers {files.shown(ids)} must be different and ascend.")
            found.add(tuple(each + added for each in ids))
    if len(found) > 1:
        raise ExportError(
            f"{folder}/config.json: says that it reads hidden states {' and '.join(map(str, sorted(found)))}; ask its authors."
        )
    if not found and num_layers < max(7, draft_layers + 3):
        raise ExportError(f"{folder}/config.json: does not say which layers it reads, and a target of {num_layers} layers has no default.")
    if not found and kind == "dflash":
        return DFlashOptions(layers=draft_layers).captured_layers(num_layers)
    ids = found.pop() if found else (2, num_layers // 2, num_layers - 3)
    if ids[0] < 0 or ids[-1] >= num_layers:
        raise ExportError(
            f"{folder}/config.json: reads hidden states {ids}; of a target of {num_layers} layers drafts read 0 to {num_layers - 1}."
        )
    return ids


def _eagle3(
    folder: Path, stored: dict[str, Any], layers: dict[str, Any], tensors: dict[str, torch.Tensor], tables: TargetTables,
    ids: tuple[int, ...], draft_tokens: int | None,
) -> Imported:  # fmt: skip
    residual = stored.get("norm_before_residual", "speculators_model_type" in stored)
    if residual is not False:
        raise ExportError(f"{folder}/config.json: norm_before_residual is true, or not said; drafts here add the plain feature.")
    if stored.get("tie_word_embeddings") or (stored.get("eagle_config") or {}).get("use_aux_hidden_state") is False:
        raise ExportError(f"{folder}/config.json: its head is its embedding, or it captures no layers; drafts here have both of their own.")
    record = files.read_object(folder / _RECORD, ExportError) if (folder / _RECORD).exists() else {}
    tokens = draft_tokens or record.get("draft_tokens") or _proposed(stored)
    if not files.is_a(tokens, int):
        raise ConfigError(f"{folder}: does not say for how many drafts it was trained; give --draft-tokens.")
    _drop_table(folder, tensors, "embed_tokens.weight", tables.embedding[: tables.config.vocab_size])
    tensors = {_LEGACY_NORMS.get(name, name.replace("self_attn.", "").replace("mlp.", "")): tensor for name, tensor in tensors.items()}
    _one_norm(folder, tensors)
    vocab = tables.config.vocab_size
    d2t = tensors.setdefault("d2t", torch.zeros(vocab, dtype=torch.int64)).to(torch.int64)
    kept = torch.arange(d2t.numel()) + d2t
    if d2t.dim() != 1 or bool((kept < 0).any()) or bool((kept >= vocab).any()) or bool((kept.diff() <= 0).any()):
        raise ExportError(f"{folder}: draft id + d2t must ascend below {vocab}; its d2t holds no offsets.")
    member = torch.zeros(vocab, dtype=torch.bool)
    member[kept] = True
    if "t2d" in tensors and not torch.equal(tensors["t2d"].bool(), member):
        raise ExportError(f"{folder}: d2t and t2d disagree; they are of two vocabularies.")
    tensors |= {"d2t": d2t, "t2d": member}
    head = tensors.get("lm_head.weight")
    frozen = record["head"] == "target" if "head" in record else head is None or torch.equal(head, tables.head[kept].to(head.dtype))
    if frozen:
        _drop_table(folder, tensors, "lm_head.weight", tables.head[kept])
    norms = {"fc_norm": stored.get("use_aux_norm", False), **(stored.get("eagle_config") or {}), **stored}
    known = registered("eagle3")
    with files.foreign(folder / "config.json", ExportError, "its options are none that EAGLE-3 has here"):
        options = known.options(
            draft_tokens=tokens, layers=layers["num_hidden_layers"], draft_vocab_size=0 if len(d2t) == vocab else len(d2t),
            intermediate_size=layers["intermediate_size"], head="frozen" if frozen else "trained",
            **{name: bool(norms.get(name, False)) for name in ("fc_norm", "norm_before_fc", "norm_output")},
        )  # fmt: skip
    config = known.load().config_of(options, tables, ids, len(d2t))
    return _fitted(folder, layers, Imported("eagle3", options, config, tensors))


def _dflash(
    folder: Path, stored: dict[str, Any], layers: dict[str, Any], tensors: dict[str, torch.Tensor], tables: TargetTables,
    ids: tuple[int, ...],
) -> Imported:  # fmt: skip
    block = {**layers, **stored, **(stored.get("dflash_config") or {})}
    if block.get("causal") or block.get("is_causal") or stored.get("sliding_window_non_causal") is False:
        raise ExportError(f"{folder}/config.json: rows of its blocks do not see each other; a DFlash draft here lets them.")
    if block.get("sample_from_anchor"):
        raise ExportError(f"{folder}/config.json: sample_from_anchor is true; the anchor's row of a DFlash draft here predicts nothing.")
    own_map = "d2t" in tensors and bool(tensors["d2t"].any())
    if own_map or (stored.get("draft_vocab_size") or tables.config.vocab_size) != tables.config.vocab_size:
        raise ExportError(f"{folder}/config.json: it has a vocabulary of its own; a DFlash draft here has its target's.")
    for name in ("d2t", "t2d"):
        tensors.pop(name, None)
    vocab = tables.config.vocab_size
    _drop_table(folder, tensors, "embed_tokens.weight", tables.embedding[:vocab])
    _drop_table(folder, tensors, "lm_head.weight", tables.head[:vocab])
    if not files.is_a(block.get("mask_token_id"), int):
        named = f", only mask_token {files.shown(block['mask_token'])}" if "mask_token" in block else ""
        raise ExportError(
            f"{folder}/config.json: holds no mask_token_id{named}; write the id that its target's tokenizer has for it there."
        )
    known, types = registered("dflash"), tuple(block.get("layer_types") or ())
    with files.foreign(folder / "config.json", ExportError, "its options are none that DFlash has here"):
        options = known.options(
            block_size=block.get("block_size", _BLOCK_SIZE), layers=layers["num_hidden_layers"],
            intermediate_size=layers["intermediate_size"],
            mask_token_id=block["mask_token_id"], layer_types=types,
            sliding_window=block.get("sliding_window") or 0 if "sliding_attention" in types else 0,
        )  # fmt: skip
    config = known.load().config_of(options, tables, ids, block["mask_token_id"])
    return _fitted(folder, layers, Imported("dflash", options, config, tensors))


def _proposed(stored: dict[str, Any]) -> Any:
    methods = (stored.get("speculators_config") or {}).get("proposal_methods") or [{}]
    return methods[0].get("speculative_tokens")


def _drop_table(folder: Path, tensors: dict[str, torch.Tensor], name: str, table: torch.Tensor) -> None:
    """A copy of the target's table is not kept; another table is refused."""
    found = tensors.pop(name, None)
    if found is not None and not (found.shape == table.shape and torch.equal(found, table.to(found.dtype))):
        raise ExportError(f"{folder}: its {name} is not its target's; give the target of its training (its own is not imported).")


def _one_norm(folder: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Later layers have one norm before attention, under one name of each engine."""
    for name in [name for name in tensors if name.endswith("input_layernorm.weight") and not name.startswith("layers.0.")]:
        other = name.replace("input_layernorm", "hidden_norm")
        found = tensors.pop(name)
        if not torch.equal(tensors.setdefault(other, found), found):
            raise ExportError(f"{folder}: {name} and {other} differ; SGLang reads the one, vLLM the other.")


def _fitted(folder: Path, layers: dict[str, Any], imported: Imported) -> Imported:
    """What the folder says of its layers, and its tensors, against the draft that this program would make of it."""
    config = imported.config
    said = {
        "hidden_size": config.hidden_size, "num_attention_heads": config.num_attention_heads, "head_dim": config.head_dim,
        "num_key_value_heads": config.num_key_value_heads, "rms_norm_eps": config.rms_norm_eps, "vocab_size": config.vocab_size,
    }  # fmt: skip
    wrong = [f"{key} is {files.shown(layers[key])}, the target's {has}" for key, has in said.items() if layers.get(key, has) != has]
    if wrong:
        raise ExportError(f"{folder}/config.json: {'; '.join(wrong)}; drafts here have the shape of their target. Give its own target.")
    method = registered(imported.name).load()
    vocabulary = (_vocabulary(imported.tensors),) if "d2t" in imported.tensors else ()
    with torch.device("meta"):
        wanted = method.draft_type(config, *vocabulary).state_dict()
    faults = sorted(set(wanted) ^ set(imported.tensors))
    faults += [name for name in wanted if name in imported.tensors and wanted[name].shape != imported.tensors[name].shape]
    if faults:
        raise ExportError(f"{folder}: {', '.join(faults[:4])}: missing, too many, or of a shape that config.json does not say.")
    odd = [name for name, tensor in imported.tensors.items() if tensor.is_floating_point() and not bool(tensor.isfinite().all())]
    if odd:
        raise ExportError(f"{folder}: {odd[0]} holds numbers that are not finite; take another copy.")
    return imported


def _vocabulary(tensors: dict[str, torch.Tensor]) -> DraftVocabulary:
    return DraftVocabulary.from_tables(tensors["d2t"].numpy(), tensors["t2d"].numpy())
