"""Keys on which engines act and which none of these drafts needs: only a value that changes nothing is let through."""

from typing import Any

from specforge.export.contract.keys import Keys

_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "quantization_config": (),
    "compression_config": (),
    "text_config": (),
    "dspark_config": (),
    "bias": (False,),
    "mlp_bias": (False,),
    "logit_scale": (1.0,),
    "output_multiplier": (1.0,),
    "final_logit_softcapping": (),
    "use_aux_norm": (False,),
    "rope_is_neox_style": (True,),
    "is_neox_style": (True,),
    "partial_rotary_factor": (1.0,),
    "mrope_section": (),
    "is_causal": (False,),
    "use_swa": (False,),
    "swa_window_size": (),
    "attention_sink_bias": (False,),
    "attention_value_scale": (1.0,),
    "conv_kernel_size": (),
    "selector_rank": (),
    "pard_token": (),
    "ptd_token_id": (),
    "dspark_noise_token_id": (),
    "dspark_block_size": (),
    "dspark_markov_rank": (),
    "dspark_target_layer_ids": (),
}
_TYPES = ("float32", "bfloat16", "float16")


def require_neutral(keys: Keys) -> None:
    """Raises ExportError where an object of the configuration asks an engine for another computation than `logits` has."""
    for key, allowed in _NEUTRAL.items():
        value = keys.values.get(key)
        if value is not None and not any(value == each and isinstance(value, bool) == isinstance(each, bool) for each in allowed):
            raise keys.wrong(key, "engines act on it, and drafts here are made without")
    for key in ("torch_dtype", "dtype"):
        if key in keys.values and keys.values[key] not in _TYPES:
            raise keys.wrong(key, f"must be one of {', '.join(_TYPES)}, in which engines compute")
    if {"torch_dtype", "dtype"} <= keys.values.keys() and keys.values["dtype"] != keys.values["torch_dtype"]:
        raise keys.wrong("dtype", "torch_dtype says otherwise")
