"""`config.json` and tensor names of the two layouts: the original one (EAGLE, SGLang, vLLM) and that of speculators (vLLM).

A captured layer is an index j of Hugging Face `hidden_states` here and at vLLM's top level; SGLang's `eagle_config` and every
`target_layer_ids` count the layers whose output it is, j - 1.
"""

from typing import Any

import torch

from specforge.export.trained import TrainedDraft

_ARCHITECTURES = {
    "eagle3": "LlamaForCausalLMEagle3",
    "peagle": "PeagleLlamaForCausalLM",
    "dflash": "DFlashDraftModel",
    "domino": "DFlashDraftModel",
    "dspark": "Qwen3DSparkModel",
}
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
_FEED_FORWARD = ("gate_proj", "up_proj", "down_proj")


def config_of(trained: TrainedDraft, format_name: str) -> dict[str, Any]:
    return _speculators(trained) if format_name == "speculators" else _original(trained)


def tensors_of(trained: TrainedDraft, format_name: str) -> dict[str, torch.Tensor]:
    """By the engines' names, contiguous, each with memory of its own; in the data type of the checkpoint."""
    state = {name: tensor.detach() for name, tensor in trained.method.draft.state_dict().items()}
    if trained.is_chain:
        tensors = {_chain_name(name): tensor for name, tensor in state.items()}
        tensors["lm_head.weight"] = trained.head_XH.to(state["fc.weight"].dtype)
        tensors["d2t"] = state["d2t"].to(torch.int64)
        for number in range(1, trained.config.num_hidden_layers):
            # The norm before attention has one name in SGLang and another in vLLM.
            tensors[f"layers.{number}.input_layernorm.weight"] = tensors[f"layers.{number}.hidden_norm.weight"]
    else:
        tensors = state
    if format_name == "hf" or (format_name == "speculators" and trained.is_chain):
        # speculators takes a block draft's tables from the target, and a chain draft's embedding from its own file alone.
        tensors["embed_tokens.weight"] = trained.embedding_VH
    if format_name == "hf":
        tensors.setdefault("lm_head.weight", trained.head_XH)
    return {name: tensor.contiguous().clone() for name, tensor in tensors.items()}


def _chain_name(name: str) -> str:
    *path, module, kind = name.rsplit(".", 2) if name.count(".") > 1 else [name, ""]
    part = "self_attn." if module in _ATTENTION else "mlp." if module in _FEED_FORWARD else ""
    return ".".join([*path, f"{part}{module}", kind]) if path else name


def _layers(trained: TrainedDraft) -> dict[str, Any]:
    """What both layouts say of the layers."""
    config, rope = trained.config, {"rope_type": "default", **trained.config.rope_parameters}
    scaling = {key: value for key, value in rope.items() if key != "rope_theta"}
    return {
        "model_type": "llama" if trained.is_chain else "qwen3",
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.rms_norm_eps,
        "vocab_size": config.vocab_size,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_parameters": rope,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": None if scaling == {"rope_type": "default"} else scaling,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": False,
        # What engines compute in, whatever the file holds: SGLang makes float16 of float32, and the target's features would not fit it.
        "torch_dtype": str(trained.embedding_VH.dtype).removeprefix("torch."),
    }


def _shared(trained: TrainedDraft) -> dict[str, Any]:
    """What both layouts say at the top level."""
    config = trained.config
    if trained.is_chain:
        flags = {name: getattr(config, name) for name in ("norm_before_fc", "fc_norm", "norm_output")}
        mask = {"mask_token_id": config.mask_token_id} if trained.name == "peagle" else {}
        top = {"draft_vocab_size": config.draft_vocab_size, "norm_before_residual": False, **flags, **mask}
    else:
        top = {"draft_vocab_size": config.vocab_size, "block_size": config.block_size, "mask_token_id": config.mask_token_id}
    if trained.name == "dflash":
        top |= {"sample_from_anchor": False}
    return {"target_hidden_size": config.target_hidden_size, **top, **(_dspark(config) if trained.name == "dspark" else {})}


def _dspark(config: Any) -> dict[str, Any]:
    return {
        "sample_from_anchor": True,
        "markov_rank": config.markov_rank,
        "markov_head_type": config.markov_head_type,
        "enable_confidence_head": True,
        "confidence_head_with_markov": True,
    }


def _original(trained: TrainedDraft) -> dict[str, Any]:
    config, ids = trained.config, list(trained.config.aux_layer_ids)
    outputs = [j - 1 for j in ids]
    top = {"architectures": [_ARCHITECTURES[trained.name]], **_layers(trained), **_shared(trained), "eagle_aux_hidden_state_layer_ids": ids}
    if trained.is_chain:
        eagle = {"use_aux_hidden_state": True, "eagle_aux_hidden_state_layer_ids": outputs, "norm_before_fc": config.norm_before_fc}
        return {**top, "num_aux_hidden_states": len(ids), "eagle_config": eagle}
    block: dict[str, Any] = {"mask_token_id": config.mask_token_id, "target_layer_ids": outputs, "block_size": config.block_size}
    if not config.sliding_window:
        block["causal"] = False
    if trained.name == "domino":
        domino = {"gru_hidden_dim": config.gru_hidden_dim, "emb_dim": config.emb_dim, "shift_label": True, "pure_draft_prefix_len": 1}
        block |= {"projector_type": "domino", **domino}
        top |= domino
    if trained.name == "dspark":
        block |= {key: value for key, value in _dspark(config).items() if key != "sample_from_anchor"}  # vLLM asks the top level alone
    return {
        **top,
        "layer_types": list(config.layer_types),
        "sliding_window": config.sliding_window or None,
        "use_sliding_window": config.sliding_window > 0,
        "num_target_layers": trained.target.num_hidden_layers,
        "target_layer_ids": outputs,
        "dflash_config": block,
    }


def _speculators(trained: TrainedDraft) -> dict[str, Any]:
    config, ids = trained.config, list(trained.config.aux_layer_ids)
    layers = _layers(trained)
    proposal = {"proposal_type": "greedy", "speculative_tokens": trained.served_tokens, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    top: dict[str, Any] = {
        "architectures": [_ARCHITECTURES[trained.name]],
        "speculators_model_type": trained.name,
        "speculators_config": {
            "algorithm": trained.name,
            "proposal_methods": [proposal],
            "default_proposal_method": "greedy",
            "verifier": {"name_or_path": str(trained.target_path), "architectures": []},
        },
        "transformer_layer_config": layers,
        "tie_word_embeddings": False,
        "torch_dtype": layers["torch_dtype"],
        **_shared(trained),
    }
    if trained.is_chain:
        return top | {"eagle_aux_hidden_state_layer_ids": ids}
    layers |= {"layer_types": list(config.layer_types), "sliding_window": config.sliding_window or None}
    return top | {"aux_hidden_state_layer_ids": ids, "sliding_window_non_causal": True}
