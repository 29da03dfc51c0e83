"""The target's tables: embedding and head, read from its safetensors without loading the model, and its shape."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig

from specforge import files
from specforge.errors import FeatureError

_EMBEDDING_NAMES = ("embed_tokens.weight", "wte.weight", "embed_in.weight", "word_embeddings.weight", "tok_embeddings.weight")
_HEAD_NAMES = ("lm_head.weight", "embed_out.weight")
_WEIGHTS_INDEX = "model.safetensors.index.json"


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
        try:
            whole = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        except (OSError, ValueError, KeyError) as cause:
            raise FeatureError(
                f"model.target_path={str(folder)!r}: its config.json cannot be read ({cause}); give a Hugging Face model folder."
            ) from cause
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


def _eos_token_ids(folder: Path, configured: int | list[int] | None) -> tuple[int, ...]:
    """The ids that end an answer: those of generation_config.json, which chat models keep complete, else config.json's."""
    generation = folder / "generation_config.json"
    ids = files.read_json(generation, FeatureError).get("eos_token_id") if generation.is_file() else None
    ids = configured if ids is None else ids
    if ids is None:
        return ()
    return tuple(ids) if isinstance(ids, list) else (ids,)


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
    if (folder / _WEIGHTS_INDEX).is_file():
        listed = files.read_json(folder / _WEIGHTS_INDEX, FeatureError)["weight_map"]
        return {key: files.inside(folder, name, FeatureError) for key, name in listed.items()}
    file_of = {}
    for path in sorted(folder.glob("*.safetensors")):
        with _opened(path) as tensors:
            file_of.update(dict.fromkeys(tensors.keys(), path))
    return file_of


def _key_for(names: tuple[str, ...], file_of: Mapping[str, Path]) -> str | None:
    """The shortest key ending in one of `names`: longer ones belong to extra layers that predict several tokens."""
    matching = [key for key in file_of if any(f".{key}".endswith(f".{name}") for name in names)]
    return min(matching, key=lambda key: (len(key), key), default=None)


def _read_table(key: str, file_of: Mapping[str, Path], config: TargetConfig) -> torch.Tensor:
    with _opened(file_of[key]) as tensors:
        table = tensors.get_tensor(key)
    if table.dim() != 2 or table.shape[1] != config.hidden_size:
        raise FeatureError(
            f"{file_of[key]}: {key} has shape {list(table.shape)}, not [vocabulary, {config.hidden_size}]; choose an unquantised target."
        )
    return table


def _opened(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, FileNotFoundError) as cause:
        raise FeatureError(f"{path}: is missing or not readable as safetensors ({cause}); download the target again.") from cause
