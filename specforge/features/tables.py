"""The target's tables: embedding and head, read from its safetensors without loading the model, and its shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from specforge import files
from specforge.errors import FeatureError

_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
_WEIGHTS_INDEX = "model.safetensors.index.json"
_LARGEST_COUNT = 2**16


@dataclass(frozen=True, kw_only=True)
class TargetConfig:
    """What a draft takes over from its target's configuration, under one set of names for all families."""

    model_type: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_parameters: dict[str, Any]
    tie_word_embeddings: bool
    bos_token_id: int | None
    eos_token_ids: tuple[int, ...]

    @classmethod
    def read(cls, folder: Path) -> "TargetConfig":
        """Raises FeatureError where `folder` has no configuration that transformers understands."""
        path = folder / "config.json"
        if not path.exists():
            raise FeatureError(f"model.target_path={str(folder)!r}: there is no config.json; give a Hugging Face model folder.")
        _check_counts(files.read_object(path, FeatureError), path)
        with files.foreign(
            path, FeatureError, "model.target_path must be a Hugging Face folder of a language model with rotary or learned positions"
        ):
            found = cls._of(AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False), folder)
        files.check_fields(vars(found), str(path), FeatureError, **files.kinds_of(cls))
        return found

    @classmethod
    def _of(cls, whole: PretrainedConfig, folder: Path) -> "TargetConfig":
        config = whole.get_text_config()
        heads = config.num_attention_heads
        return cls(
            model_type=config.model_type,
            hidden_size=config.hidden_size,
            intermediate_size=getattr(config, "intermediate_size", None) or 4 * config.hidden_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=heads,
            num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            vocab_size=config.vocab_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
            rope_parameters=dict(getattr(config, "rope_parameters", None) or {"rope_type": "default", "rope_theta": 10_000.0}),
            tie_word_embeddings=bool(whole.tie_word_embeddings),
            bos_token_id=config.bos_token_id,
            eos_token_ids=_eos_token_ids(folder, config.eos_token_id),
        )


def _check_counts(values: Any, path: Path) -> None:
    """Libraries make lists as long as a configuration says, for each layer or label; `values` is a part of one."""
    for value in values.values() if isinstance(values, dict) else values:
        if isinstance(value, dict | list):
            _check_counts(value, path)
    for name, value in values.items() if isinstance(values, dict) else ():
        if name.startswith("num_") and isinstance(value, int | float) and not 0 <= value <= _LARGEST_COUNT:
            raise FeatureError(f"{path}: {name}={files.shown(value)} must lie between 0 and {_LARGEST_COUNT}; download the target again.")


def _eos_token_ids(folder: Path, configured: Any) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, which chat models keep complete, else config.json's."""
    generation = folder / "generation_config.json"
    ids = files.read_object(generation, FeatureError).get("eos_token_id") if generation.exists() else None
    ids = configured if ids is None else ids
    listed = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(files.is_a(token, int) for token in listed):
        raise FeatureError(f"{folder}: eos_token_id={files.shown(ids)} must be a token id or a list of them; download the target again.")
    return tuple(listed)


@dataclass(frozen=True)
class TargetTables:
    """embedding [V, H] and head [V, H] in the dtype of the target's files; the same tensor where the target ties them."""

    embedding: torch.Tensor
    head: torch.Tensor
    config: TargetConfig

    @classmethod
    def read(cls, path: str | Path) -> "TargetTables":
        """
        Raises:
            FeatureError: `path` has no such tables; the message names the keys that were seen.
        """
        folder = Path(path)
        config = TargetConfig.read(folder)
        file_of = _file_of_each_key(folder)
        embedding_key = _key_for(_EMBEDDING_NAMES, file_of)
        head_key = _key_for(_HEAD_NAMES, file_of)
        if head_key is None and config.tie_word_embeddings:
            head_key = embedding_key
        if embedding_key is None or head_key is None:
            sought, names = ("embedding", _EMBEDDING_NAMES) if embedding_key is None else ("head", _HEAD_NAMES)
            raise FeatureError(
                f"model.target_path={str(path)!r}: no {sought} found, a key ending in {' or '.join(names)}; "
                f"its keys are {', '.join(sorted(file_of)[:12])}, ... ({len(file_of)}); choose an unquantised causal language model."
            )
        embedding = _read_table(embedding_key, file_of, config)
        head = embedding if head_key == embedding_key else _read_table(head_key, file_of, config)
        return cls(embedding, head, config)


def _file_of_each_key(folder: Path) -> dict[str, Path]:
    if (folder / _WEIGHTS_INDEX).exists():
        listed = files.read_object(folder / _WEIGHTS_INDEX, FeatureError, weight_map=dict)["weight_map"]
        return {key: files.inside(folder, name, FeatureError) for key, name in listed.items()}
    file_of = {}
    for path in sorted(folder.glob("*.safetensors")):
        with files.open_tensors(path, FeatureError) as tensors:
            file_of.update(dict.fromkeys(tensors.keys(), path))
    return file_of


def _key_for(names: tuple[str, ...], file_of: Mapping[str, Path]) -> str | None:
    """The shortest key ending in one of `names`: longer ones belong to extra layers that predict several tokens."""
    matching = [key for key in file_of if any(f".{key}".endswith(f".{name}") for name in names)]
    return min(matching, key=lambda key: (len(key), key), default=None)


def _read_table(key: str, file_of: Mapping[str, Path], config: TargetConfig) -> torch.Tensor:
    with files.open_tensors(file_of[key], FeatureError) as tensors:
        table = tensors.get_tensor(key) if key in tensors.keys() else torch.empty(0)  # noqa: SIM118
    if table.dim() != 2 or table.shape[1] != config.hidden_size or table.shape[0] < config.vocab_size or not table.is_floating_point():
        raise FeatureError(
            f"{file_of[key]}: {key} is {table.dtype} of shape {list(table.shape)}, not numbers of shape "
            f"[{config.vocab_size} or more, {config.hidden_size}]; choose an unquantised target."
        )
    return table
