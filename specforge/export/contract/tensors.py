"""The tensors of a draft folder: which there must be, of which shape and type, and none beside them.

SGLang drops names that it does not know and leaves what is missing as it was allocated; vLLM refuses some of it. So names are exact here.
"""

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from specforge.errors import ExportError
from specforge.export.contract.served import Network

FILE = "model.safetensors"
_PICKLES = (".bin", ".pt", ".pth", ".pkl", ".ckpt")
Shapes = dict[str, tuple[int, ...]]


def required(network: Network) -> Shapes:
    """Name and shape of every tensor that must be there."""
    hidden, n = network.hidden, network
    shapes: Shapes = {"fc.weight": (hidden, n.fused), "norm.weight": (hidden,)}
    eagle = n.kind in ("eagle3", "peagle")
    for number in range(n.layers):
        layer, width = f"layers.{number}", 2 * hidden if eagle and number == 0 else hidden
        shapes[f"{layer}.self_attn.q_proj.weight"] = (n.heads * n.head_dim, width)
        for name in ("k_proj", "v_proj"):
            shapes[f"{layer}.self_attn.{name}.weight"] = (n.groups * n.head_dim, width)
        shapes[f"{layer}.self_attn.o_proj.weight"] = (hidden, n.heads * n.head_dim)
        for name in ("gate_proj", "up_proj"):
            shapes[f"{layer}.mlp.{name}.weight"] = (n.intermediate, hidden)
        shapes[f"{layer}.mlp.down_proj.weight"] = (hidden, n.intermediate)
        for name in ("input_layernorm", "post_attention_layernorm", *(("hidden_norm",) if eagle else ())):
            shapes[f"{layer}.{name}.weight"] = (hidden,)
        if not eagle:
            for name in ("q_norm", "k_norm"):
                shapes[f"{layer}.self_attn.{name}.weight"] = (n.head_dim,)
    return shapes | (_eagle(n) if eagle else _block(n))


def _eagle(n: Network) -> Shapes:
    shapes: Shapes = {"lm_head.weight": (n.draft_vocab, n.hidden), "d2t": (n.draft_vocab,), "t2d": (n.vocab,)}
    if n["norm_before_fc"]:
        shapes["input_norm.weight"] = (n.fused,)
    if n["fc_norm"]:
        shapes |= {f"fc_norm.{number}.weight": (n.feature,) for number in range(len(n.hidden_state_ids))}
    if n.kind == "peagle":
        shapes["mask_hidden"] = (1, 1, n.fused)
    return shapes


def _block(n: Network) -> Shapes:
    shapes: Shapes = {"hidden_norm.weight": (n.hidden,)}
    if n.kind == "domino":
        state, rank = n["gru_hidden_dim"], n["emb_dim"]
        shapes["prefix_gru.weight_ih_l0"] = (3 * state, n.hidden)
        shapes["prefix_gru.weight_hh_l0"] = (3 * state, state)
        shapes["embed_proj.0.weight"] = (rank, n.hidden + state)
        shapes["embed_proj.2.weight"] = (n.vocab, rank)
    if n.kind == "dspark":
        rank, head = n["markov_rank"], n["markov_head_type"]
        shapes |= {f"markov_head.markov_w{number}.weight": (n.vocab, rank) for number in (1, 2)}
        shapes |= {"confidence_head.proj.weight": (1, n.hidden + rank), "confidence_head.proj.bias": (1,)}
        if head == "gated":
            shapes |= {"markov_head.gate_proj.weight": (rank, n.hidden + rank), "markov_head.gate_proj.bias": (rank,)}
        if head == "rnn":
            shapes |= {"markov_head.joint_proj.weight": (3 * rank, 2 * rank + n.hidden), "markov_head.joint_proj.bias": (3 * rank,)}
    return shapes


def tables_of(n: Network) -> Shapes:
    """Copies of the target's tables that a folder may hold beside the draft."""
    tables: Shapes = {"embed_tokens.weight": (n.vocab, n.hidden)}
    return tables if n.kind in ("eagle3", "peagle") else tables | {"lm_head.weight": (n.vocab, n.hidden)}


def read_tensors(folder: Path, network: Network) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The draft's tensors and the copies of the target's tables.

    Raises:
        ExportError: a file or tensor is missing, damaged, of another shape or type, or one that no engine reads.
    """
    found = _load(folder)
    needed, optional = required(network), tables_of(network)
    missing = [name for name in needed if name not in found]
    if missing:
        raise ExportError(f"{folder / FILE}: {', '.join(missing[:4])} is missing; engines would go on with random weights. Export again.")
    extra = sorted(set(found) - set(needed) - set(optional))
    if extra:
        hint = "; names must not begin with model." if extra[0].startswith("model.") else ""
        raise ExportError(f"{folder / FILE}: {', '.join(extra[:4])}: no engine reads this of a {network.kind} draft{hint}. Export again.")
    for name, tensor in found.items():
        shape = {**optional, **needed}[name]
        if tuple(tensor.shape) != shape:
            raise ExportError(f"{folder / FILE}: {name} has shape {list(tensor.shape)}, config.json makes it {list(shape)}. Export again.")
        _check_type(folder, name, tensor)
    if "d2t" in needed:
        _check_vocabulary(folder, found["d2t"], found["t2d"], network)
    for number in range(1, network.layers if network.kind in ("eagle3", "peagle") else 0):
        left, right = (f"layers.{number}.{name}.weight" for name in ("hidden_norm", "input_layernorm"))
        if not torch.equal(found[left], found[right]):
            raise ExportError(f"{folder / FILE}: {left} and {right} differ; SGLang reads the one, vLLM the other. Export again.")
    return {name: found[name] for name in needed}, {name: found[name] for name in optional if name in found and name not in needed}


def _load(folder: Path) -> dict[str, torch.Tensor]:
    pickles = sorted(path.name for path in folder.iterdir() if path.suffix in _PICKLES)
    if pickles:
        raise ExportError(f"{folder / pickles[0]}: a pickle can execute what it likes and is not read; leave only {FILE}.")
    indices = sorted(path.name for path in folder.glob("*.index.json"))
    if indices:
        raise ExportError(f"{folder / indices[0]}: engines look for weights where it says and not in {FILE}; remove it.")
    shards = sorted(path.name for path in folder.glob("*.safetensors") if path.is_file())
    if shards != [FILE]:
        raise ExportError(f"{folder}: its safetensors are {shards}, must be {FILE} alone: not every engine reads several. Export again.")
    try:
        with safe_open(folder / FILE, framework="pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as cause:
        raise ExportError(f"{folder / FILE}: is truncated or damaged ({cause}). Export again or copy it again.") from cause


def _check_type(folder: Path, name: str, tensor: torch.Tensor) -> None:
    wanted = {"d2t": (torch.int64,), "t2d": (torch.bool,)}.get(name, (torch.float32, torch.bfloat16, torch.float16))
    if tensor.dtype not in wanted:
        raise ExportError(f"{folder / FILE}: {name} is {tensor.dtype}, must be {' or '.join(map(str, wanted))}. Export again.")
    if tensor.is_floating_point() and not bool(tensor.isfinite().all()):
        raise ExportError(f"{folder / FILE}: {name} holds numbers that are not finite. Take another checkpoint.")


def _check_vocabulary(folder: Path, d2t: torch.Tensor, t2d: torch.Tensor, network: Network) -> None:
    if len(d2t) > 1 and torch.equal(d2t, torch.arange(len(d2t))):
        raise ExportError(
            f"{folder / FILE}: d2t is 0, 1, 2, ...; it must hold offsets, target id minus draft id; for the whole vocabulary zeros."
        )
    kept = torch.arange(len(d2t)) + d2t
    if bool((kept < 0).any()) or bool((kept >= network.vocab).any()) or bool((kept.diff() <= 0).any()):
        raise ExportError(f"{folder / FILE}: draft id + d2t must ascend below {network.vocab}; d2t holds offsets, not target ids.")
    member = torch.zeros(network.vocab, dtype=torch.bool)
    member[kept] = True
    if not torch.equal(member, t2d):
        first = int((member != t2d).nonzero()[0])
        raise ExportError(f"{folder / FILE}: d2t and t2d disagree on target id {first}; both must be of one vocabulary.")
