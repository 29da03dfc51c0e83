"""What the shape of every draft says, most of it its target's, and how a stored shape is read."""

from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any, Self, get_origin, get_type_hints

from specforge import files
from specforge.config.methods import DraftOptions
from specforge.errors import CheckpointError
from specforge.features.tables import TargetConfig
from specforge.models.draft_folder import read_draft_config


@dataclass(frozen=True, kw_only=True)
class DraftConfig:
    """A checkpoint's `config.json` holds its fields."""

    hidden_size: int
    target_hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    rms_norm_eps: float
    vocab_size: int
    max_position_embeddings: int
    rope_parameters: dict[str, Any]
    aux_layer_ids: tuple[int, ...]
    """Indices into Hugging Face `hidden_states`, ascending."""
    experts: int = 0
    """Of each layer's feed-forward, `intermediate_size` wide; 0: it is dense."""
    experts_per_token: int = 2

    @classmethod
    def of_target(cls, target: TargetConfig, options: DraftOptions, aux_layer_ids: tuple[int, ...], **own: Any) -> Self:
        """The same width, heads, RoPE and context length as the target; `own`: the other fields."""
        return cls(
            hidden_size=target.hidden_size,
            target_hidden_size=target.hidden_size,
            intermediate_size=options.intermediate_size or target.intermediate_size,
            num_hidden_layers=options.layers,
            num_attention_heads=target.num_attention_heads,
            num_key_value_heads=target.num_key_value_heads,
            head_dim=target.head_dim,
            rms_norm_eps=target.rms_norm_eps,
            vocab_size=target.vocab_size,
            max_position_embeddings=target.max_position_embeddings,
            rope_parameters=target.rope_parameters,
            aux_layer_ids=aux_layer_ids,
            experts=options.experts,
            experts_per_token=options.experts_per_token,
            **own,
        )

    @classmethod
    def read(cls, folder: Path) -> Self:
        """The shape of a checkpointed draft.

        Raises:
            CheckpointError: `config.json` is missing or no such shape.
        """
        stored = {field.name: field.default for field in fields(cls) if field.default is not MISSING} | read_draft_config(folder)
        lists = {name: list for name, hint in get_type_hints(cls).items() if get_origin(hint) is tuple}
        kinds: dict[str, Any] = {**files.kinds_of(cls), **lists}
        files.check_fields(stored, f"{folder}/config.json", CheckpointError, **kinds)
        values: dict[str, Any] = {name: tuple(stored[name]) if name in lists else stored[name] for name in kinds}
        return cls(**values)

    def require_in(self, folder: Path, stored: "DraftConfig") -> None:
        """Raise CheckpointError unless the draft `stored` in `folder` has this shape."""
        differing = [
            f"{key} is {getattr(stored, key)!r}, this run wants {wanted!r}"
            for key, wanted in vars(self).items()
            if getattr(stored, key) != wanted
        ]
        if differing:
            raise CheckpointError(
                f"draft in {folder}: {'; '.join(differing)}. Set method.options to the draft's values or train a new draft."
            )
