"""`config.json` of both layouts, read as the engines read it: the original one (EAGLE, SGLang, vLLM) and that of speculators (vLLM)."""

from typing import Any

from specforge.errors import ExportError
from specforge.export.contract.keys import Keys
from specforge.export.contract.rope import both_forms
from specforge.export.contract.served import Network
from specforge.export.contract.unknown import require_neutral

ARCHITECTURES = {
    "LlamaForCausalLMEagle3": "eagle3",
    "PeagleLlamaForCausalLM": "peagle",
    "DFlashDraftModel": "dflash",
    "Qwen3DSparkModel": "dspark",
}
SPECULATORS = ("eagle3", "peagle", "dflash", "dspark")
_FLAGS = {
    "norm_before_fc": "missing, engines do not normalise before the fusion",
    "fc_norm": "missing, engines do not normalise the captured layers",
    "norm_output": "missing, engines hand on the plain state",
}
_MOST_LAYERS = 1024
_FIRST = "engines look for the block there first"
_RESIDUAL = "SGLang adds the plain feature whatever this says, vLLM asks it, and readers differ in what a missing key means"


def read_config(values: Any, where: str) -> Network:
    """Raises ExportError where an engine would take the configuration for something else than its neighbour does."""
    keys = Keys(values, where)
    if "speculators_model_type" in keys.values:
        return _speculators(keys)
    named = keys.values.get("architectures")
    if named not in [[name] for name in ARCHITECTURES]:
        raise keys.wrong("architectures", f"must be a list of one of {', '.join(ARCHITECTURES)}, or no engine finds the network")
    require_neutral(keys)
    kind = ARCHITECTURES[named[0]]
    if kind in ("eagle3", "peagle"):
        return _eagle(keys, kind)
    inner = keys.inner("dflash_config", _FIRST)
    if kind == "dflash" and "projector_type" in {**keys.values, **inner.values}:
        inner.exactly("projector_type", "domino", "no other is known")
        kind = "domino"
    return _block(keys, inner, kind)


def _shape(keys: Keys) -> dict[str, Any]:
    keys.exactly("tie_word_embeddings", False, "true would tie the draft's head to its embedding")
    keys.exactly("hidden_act", "silu", "these networks have no other")
    keys.exactly("attention_bias", False, "SGLang has no biases here")
    shape: dict[str, Any] = {
        "hidden": keys.count("hidden_size"),
        "intermediate": keys.count("intermediate_size"),
        "layers": keys.count("num_hidden_layers", most=_MOST_LAYERS),
        "heads": keys.count("num_attention_heads"),
        "groups": keys.count("num_key_value_heads"),
        "head_dim": keys.count("head_dim", 2),
        "vocab": keys.count("vocab_size"),
        "max_positions": keys.count("max_position_embeddings"),
        "eps": keys.number("rms_norm_eps"),
        "rope": both_forms(keys),
    }
    if shape["heads"] % shape["groups"]:
        raise keys.wrong("num_key_value_heads", f"must divide num_attention_heads={shape['heads']}")
    return shape


def _agree(left: tuple[int, ...], right: tuple[int, ...], names: str, where: str) -> tuple[int, ...]:
    """Two lists of layers, both as indices of hidden states."""
    if left != right:
        raise ExportError(
            f"{where}: {names} mean hidden states {list(left)} and {list(right)}; SGLang reads the one, vLLM the other, and "
            "they must capture the same."
        )
    if left[0] < 1:
        raise ExportError(f"{where}: {names} mean hidden state {left[0]}; SGLang can name none below 1.")
    return left


def _output_of(layers: tuple[int, ...]) -> tuple[int, ...]:
    """0-based layers whose output is captured, as indices of hidden states."""
    return tuple(layer + 1 for layer in layers)


def _eagle(keys: Keys, kind: str) -> Network:
    keys.exactly("model_type", "llama", "SGLang builds a Llama layer")
    shape, inner = _shape(keys), keys.inner("eagle_config", "SGLang reads the captured layers there and nowhere else, else takes its own")
    inner.exactly("use_aux_hidden_state", True, "else no layer is captured")
    sglang = _output_of(inner.ids("eagle_aux_hidden_state_layer_ids", "SGLang captures its own default layers without"))
    vllm = keys.ids("eagle_aux_hidden_state_layer_ids", "vLLM captures its own default layers without")
    ids = _agree(sglang, vllm, "eagle_config.eagle_aux_hidden_state_layer_ids and eagle_aux_hidden_state_layer_ids", keys.where)
    keys.exactly("num_aux_hidden_states", len(ids), "that many layers are captured")
    own = _eagle_own(keys, kind, shape)
    inner.exactly("norm_before_fc", dict(own)["norm_before_fc"], "it stands at the top level too")
    if kind == "peagle" and "dflash_config" in keys.values:
        raise keys.wrong("dflash_config", "vLLM looks for the mask token there first; leave it out")
    feature, draft_vocab = keys.count("target_hidden_size"), keys.count("draft_vocab_size")
    if kind == "eagle3" and feature * len(ids) == shape["hidden"]:
        raise keys.wrong("target_hidden_size", "all captured layers together are as wide as the draft; SGLang then leaves out the fusion")
    return Network(kind=kind, hidden_state_ids=ids, feature=feature, draft_vocab=draft_vocab, own=own, **shape)


def _eagle_own(keys: Keys, kind: str, shape: dict[str, Any]) -> tuple[tuple[str, Any], ...]:
    keys.exactly("norm_before_residual", False, _RESIDUAL)
    own: list[tuple[str, Any]] = [(name, keys.flag(name, why)) for name, why in _FLAGS.items()]
    if kind == "peagle":
        own.append(("mask_token_id", _mask_token(keys, shape["vocab"])))
    return tuple(own)


def _mask_token(keys: Keys, vocab: int) -> int:
    token = keys.count("mask_token_id", 0)
    if token >= vocab:
        raise keys.wrong("mask_token_id", f"must be an id of the target, below {vocab}")
    return token


def _block(keys: Keys, inner: Keys, kind: str) -> Network:
    keys.exactly("model_type", "qwen3", "its layers are those of Qwen3, with norms of queries and keys")
    shape = _shape(keys)
    require_neutral(inner)
    ids = _agree(
        _output_of(inner.ids("target_layer_ids", "engines capture layers of their own choice without")),
        keys.ids("eagle_aux_hidden_state_layer_ids", "vLLM asks it first"),
        "dflash_config.target_layer_ids and eagle_aux_hidden_state_layer_ids",
        keys.where,
    )
    if _output_of(keys.ids("target_layer_ids", "readers of the top level take it from here")) != ids:
        raise keys.wrong("target_layer_ids", "dflash_config.target_layer_ids says otherwise")
    if ids[-1] >= keys.count("num_target_layers"):
        raise keys.wrong("num_target_layers", f"hidden state {ids[-1]} is that of its last layer or beyond, which no engine hands out")
    token = _mask_token(keys, shape["vocab"])
    inner.exactly("mask_token_id", token, "it stands at the top level too")
    inner.exactly("block_size", keys.count("block_size", 2), "it stands at the top level too")
    own = _block_own(keys, keys, kind, shape, token)
    slides = "sliding_attention" in dict(own)["layer_types"]
    keys.exactly("use_sliding_window", slides, "layer_types says so")
    if not slides:
        inner.exactly("causal", False, "rows of a block see each other")
    elif {"causal", "is_causal"} & {*keys.values, *inner.values}:
        raise keys.wrong("is_causal", "it and causal give all layers one direction; sliding ones look back alone and full ones do not")
    if kind == "domino":
        for name in ("gru_hidden_dim", "emb_dim"):
            own += ((name, inner.count(name)),)
        inner.exactly("shift_label", True, "row k predicts the token behind it")
        inner.exactly("pure_draft_prefix_len", 1, "SGLang knows no other")
    for key, value in inner.values.items():
        if keys.values.get(key, value) != value:
            raise keys.wrong(key, f"dflash_config says {value!r}, and engines differ in which they ask first")
    keys.exactly("draft_vocab_size", shape["vocab"], "it has no vocabulary of its own")
    return Network(kind=kind, hidden_state_ids=ids, feature=keys.count("target_hidden_size"), draft_vocab=shape["vocab"], own=own, **shape)


def _block_own(keys: Keys, layers: Keys, kind: str, shape: dict[str, Any], token: int) -> tuple[tuple[str, Any], ...]:
    """`layers` is the object that says what the layers are."""
    types = layers.values.get("layer_types")
    known = ("full_attention", "sliding_attention")
    if not isinstance(types, list) or len(types) != shape["layers"] or any(each not in known for each in types):
        raise layers.wrong("layer_types", f"must say full_attention or sliding_attention for each of {shape['layers']} layers")
    window = layers.count("sliding_window") if "sliding_attention" in types else 0
    if not window and layers.values.get("sliding_window") is not None:
        raise layers.wrong("sliding_window", "no layer slides; must be null")
    own: tuple[tuple[str, Any], ...] = (
        ("block_size", keys.count("block_size", 2)), ("mask_token_id", token), ("layer_types", tuple(types)), ("sliding_window", window),
    )  # fmt: skip
    if kind == "dflash":
        keys.exactly("sample_from_anchor", False, "row 0 predicts nothing; readers differ in what a missing key means")
    if kind != "dspark":
        return own
    keys.exactly("sample_from_anchor", True, "row 0 predicts the first draft; readers differ in what a missing key means")
    keys.exactly("enable_confidence_head", True, "the file holds one")
    keys.exactly("confidence_head_with_markov", True, "it reads the token before the row too; vLLM takes a missing key for false")
    head = keys.values.get("markov_head_type")
    if head not in ("vanilla", "gated", "rnn"):
        raise keys.wrong("markov_head_type", "must be vanilla, gated or rnn")
    return (*own, ("markov_rank", keys.count("markov_rank")), ("markov_head_type", head))


def _speculators(keys: Keys) -> Network:
    kind = keys.values["speculators_model_type"]
    if kind not in SPECULATORS:
        raise keys.wrong("speculators_model_type", f"must be one of {', '.join(SPECULATORS)}")
    inner = keys.inner("speculators_config", "vLLM finds target and number of drafts there")
    inner.exactly("algorithm", kind, "it is the model's type")
    if not isinstance(inner.inner("verifier", "vLLM starts this target").values.get("name_or_path"), str):
        raise inner.wrong("verifier", "must name the target by name_or_path")
    methods = inner.values.get("proposal_methods")
    if not isinstance(methods, list) or not methods:
        raise inner.wrong("proposal_methods", "must list at least one, with its speculative_tokens")
    proposed = Keys(methods[0], f"{inner.where}: proposal_methods[0]")
    proposed.count("speculative_tokens")
    proposed.exactly("verifier_accept_k", 1, "the target's own token alone is accepted")
    proposed.exactly("accept_tolerance", 0.0, "the target's own token alone is accepted")
    inner.exactly("default_proposal_method", proposed.values.get("proposal_type"), "it is the first of the list")
    layers = keys.inner("transformer_layer_config", "vLLM builds the layers from it")
    for part in (keys, layers):
        require_neutral(part)
    shape, feature = _shape(layers), keys.count("target_hidden_size")
    keys.exactly("tie_word_embeddings", False, "true would tie the draft's head to its embedding")
    name = "eagle_aux_hidden_state_layer_ids" if kind in ("eagle3", "peagle") else "aux_hidden_state_layer_ids"
    ids = keys.ids(name, "vLLM captures its own default layers without")
    if ids[0] < 1:
        raise keys.wrong(name, "means the embeddings, which this draft does not read")
    if kind in ("eagle3", "peagle"):
        own, model, draft_vocab = _eagle_own(keys, kind, shape), "llama", keys.count("draft_vocab_size")
    else:
        token = _mask_token(keys, shape["vocab"])
        own, model, draft_vocab = _block_own(keys, layers, kind, shape, token), "qwen3", shape["vocab"]
        keys.exactly("draft_vocab_size", draft_vocab, "it has no vocabulary of its own")
        if "sliding_attention" in dict(own)["layer_types"]:
            raise layers.wrong("layer_types", "vLLM has one switch for the direction of attention in all layers; use full_attention")
        if kind == "dspark":
            keys.exactly("markov_head_type", "vanilla", "vLLM knows no other")
        proposed.count("speculative_tokens", most=dict(own)["block_size"] - (kind == "dflash"))
        keys.exactly("sliding_window_non_causal", True, "rows of a block see each other")
    layers.exactly("model_type", model, f"vLLM finds the class of a {kind} draft by it")
    return Network(kind=kind, hidden_state_ids=ids, feature=feature, draft_vocab=draft_vocab, own=own, **shape)
