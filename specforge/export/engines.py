"""Which engine loads which draft, and why not: SGLang 0.5.23 and vLLM 0.33.0."""

from typing import Any

from specforge.errors import ExportError
from specforge.export.contract.rope import TYPES
from specforge.features.tables import TargetConfig

FORMATS = {
    "hf": "the original layout with the target's embedding and head beside the draft, for readers that have no target",
    "sglang": "the original layout, for SGLang",
    "vllm": "the original layout, for vLLM",
    "speculators": "the layout of speculators, which vLLM serves by itself",
}
ENGINES = {"sglang": "SGLang 0.5.23", "vllm": "vLLM 0.33.0"}
_ENGINE_OF = {"sglang": "sglang", "vllm": "vllm", "speculators": "vllm"}
_DEEPSEEK = ("deepseek_v2", "deepseek_v3", "deepseek_v32")


def loaded_by(name: str, config: Any, target: TargetConfig, format_name: str) -> tuple[str, ...]:
    """The engines that serve such a draft as it was trained from a folder of this format."""
    readers = ("vllm",) if format_name == "speculators" else tuple(ENGINES)
    return tuple(engine for engine in readers if not why_not(name, config, target, engine))


def require_loadable(name: str, config: Any, target: TargetConfig, format_name: str) -> None:
    """Raises ExportError, with the reason, where the engine of a format would load the draft wrongly or not at all."""
    reason = why_no_format(name, config, target, format_name)
    if reason:
        others = [other for other in FORMATS if not why_no_format(name, config, target, other)]
        way_out = f"choose --to {' or '.join(others)}" if others else "no other format helps; train it otherwise"
        raise ExportError(f"--to {format_name}: a {name} draft of this shape cannot be exported so: {reason}; {way_out}.")


def why_no_format(name: str, config: Any, target: TargetConfig, format_name: str) -> str:
    """Why a draft is not written in a format; empty: it is. What both engines can read must suit at least one."""
    reason = _for_all(config, target)
    if not reason and format_name in _ENGINE_OF:
        return why_not(name, config, target, _ENGINE_OF[format_name])
    if not reason and not loaded_by(name, config, target, format_name):
        return "; ".join(why_not(name, config, target, engine) for engine in ENGINES)
    return reason


def why_not(name: str, config: Any, target: TargetConfig, engine: str) -> str:
    """Why an engine does not serve such a draft as it was trained; empty: it does."""
    return _sglang(name, config, target) if engine == "sglang" else _vllm(name, config)


def _for_all(config: Any, target: TargetConfig) -> str:
    if config.experts:
        return f"its feed-forwards are mixtures of {config.experts} experts, and engines know only dense ones in drafts"
    if config.aux_layer_ids[-1] >= target.num_hidden_layers:
        return f"it reads hidden state {config.aux_layer_ids[-1]}, the output of its target's last layer, which engines do not hand over"
    rope = config.rope_parameters
    kind = rope.get("rope_type", "default")
    if kind not in TYPES:
        return f"its target's RoPE is {kind!r}, of which engines and this program's check know only {', '.join(TYPES)} alike"
    if rope.get("partial_rotary_factor", 1.0) != 1.0 or "mrope_section" in rope:
        return "its target rotates part of each head, or in sections, and engines do not do so in drafts"
    if (config.max_position_embeddings, rope) != (target.max_position_embeddings, target.rope_parameters):
        return (
            f"it was made for {config.max_position_embeddings} positions and RoPE {rope}, the target has {target.max_position_embeddings} "
            f"and {target.rope_parameters}"
        )
    return ""


def _sglang(name: str, config: Any, target: TargetConfig) -> str:
    if name == "peagle":
        return "SGLang has no P-EAGLE"
    ids = config.aux_layer_ids
    if ids[0] == 0:
        return "it reads the target's embeddings (hidden state 0), which SGLang cannot hand to a draft"
    if name == "eagle3":
        if len(ids) * config.target_hidden_size == config.hidden_size:
            return "all captured layers together are as wide as the draft, and SGLang then leaves out the fusion"
        if target.model_type in _DEEPSEEK and ids[0] != 2:
            return f"of {target.model_type} targets SGLang counts layers as of all others only where the first captured hidden state is 2"
    return ""


def _vllm(name: str, config: Any) -> str:
    if name == "domino":
        return "vLLM has no Domino"
    if name == "dspark" and config.markov_head_type != "vanilla":
        return f"vLLM knows the vanilla Markov head alone, not {config.markov_head_type!r}"
    if "sliding_attention" in getattr(config, "layer_types", ()):
        return "vLLM has one switch for the direction of attention in all layers, and the sliding ones are causal"
    if config.aux_layer_ids[0] == 0:
        return "it reads the target's embeddings (hidden state 0), which the layout's two counts of layers cannot both name"
    return ""
