"""What an engine computes from a folder, in plain products: no cache, no packing, no fusion.

Shapes: N tokens, S steps, R rows of a block, H hidden, F all captured layers, D draft vocabulary, V target vocabulary, h query heads,
g key heads, w width of a head.
"""

import torch
from torch.nn import functional as F

from specforge.export.contract.rope import rotate
from specforge.export.contract.served import Network, Served


class _Weights:
    """Tensors by name, in the data type of the computation."""

    def __init__(self, served: Served, dtype: torch.dtype) -> None:
        self.network = served.network
        self._tensors = {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in served.tensors.items()}

    def __getitem__(self, name: str) -> torch.Tensor:
        return self._tensors[name]

    def norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x * (x.square().mean(-1, keepdim=True) + self.network.eps).rsqrt() * self[name]

    def linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return x @ self[f"{name}.weight"].T

    def feed_forward(self, hidden_NH: torch.Tensor, layer: str) -> torch.Tensor:
        x = self.norm(hidden_NH, f"{layer}.post_attention_layernorm.weight")
        gate = self.linear(x, f"{layer}.mlp.gate_proj")
        return hidden_NH + self.linear(gate * gate.sigmoid() * self.linear(x, f"{layer}.mlp.up_proj"), f"{layer}.mlp.down_proj")

    def heads(self, x_NH: torch.Tensor, name: str, count: int) -> torch.Tensor:
        return self.linear(x_NH, name).reshape(len(x_NH), count, self.network.head_dim)

    def rotated(self, x_Nhw: torch.Tensor, position_N: torch.Tensor) -> torch.Tensor:
        return rotate(x_Nhw, position_N, self.network.rope, self.network.max_positions)


def _attend(q_Nhw: torch.Tensor, k_Mgw: torch.Tensor, v_Mgw: torch.Tensor, seen_NM: torch.Tensor) -> torch.Tensor:
    share = q_Nhw.shape[1] // k_Mgw.shape[1]
    k_Mhw, v_Mhw = (x.repeat_interleave(share, 1) for x in (k_Mgw, v_Mgw))
    scores_hNM = torch.einsum("nhw,mhw->hnm", q_Nhw, k_Mhw) / q_Nhw.shape[-1] ** 0.5
    weights_hNM = scores_hNM.masked_fill(~seen_NM, -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhw->nhw", weights_hNM, v_Mhw).flatten(1)


def fuse(served: Served, aux_NF: torch.Tensor) -> torch.Tensor:
    """[N, H] of captured layers, low to high."""
    w, n = _Weights(served, aux_NF.dtype), served.network
    return _fuse(w, n, aux_NF)


def _fuse(w: _Weights, n: Network, aux_NF: torch.Tensor) -> torch.Tensor:
    if n.kind in ("eagle3", "peagle"):
        if n["fc_norm"]:
            parts = aux_NF.split(n.feature, -1)
            aux_NF = torch.cat([w.norm(part, f"fc_norm.{number}.weight") for number, part in enumerate(parts)], -1)
        if n["norm_before_fc"]:
            aux_NF = w.norm(aux_NF, "input_norm.weight")
        return w.linear(aux_NF, "fc")
    return w.norm(w.linear(aux_NF, "fc"), "hidden_norm.weight")


def chain_logits(served: Served, aux_NF: torch.Tensor, embedded_SNH: torch.Tensor) -> torch.Tensor:
    """Logits [S, N, D] of EAGLE-3 and P-EAGLE: of a chain of S drafts begun at each of N tokens of one text.

    Args:
        embedded_SNH: what row n is fed at step s; for P-EAGLE the mask token's embedding from step 1 on.
    """
    w, n = _Weights(served, aux_NF.dtype), served.network
    rows, steps = len(aux_NF), len(embedded_SNH)
    prefix: list[tuple[torch.Tensor, torch.Tensor]] = []
    own: list[list[tuple[torch.Tensor, torch.Tensor]]] = [[] for _ in range(n.layers)]
    hidden_NH, logits = _fuse(w, n, aux_NF), []
    for step in range(steps):
        if step and n.kind == "peagle":
            hidden_NH = _fuse(w, n, w["mask_hidden"].flatten(0, 1)).expand(rows, -1)
        for number in range(n.layers):
            layer = f"layers.{number}"
            x_NX = w.norm(hidden_NH, f"{layer}.hidden_norm.weight")
            if number == 0:
                x_NX = torch.cat([w.norm(embedded_SNH[step], f"{layer}.input_layernorm.weight"), x_NX], -1)
            position_N = torch.arange(rows) + step
            q, k, v = (
                w.heads(x_NX, f"{layer}.self_attn.{name}_proj", count) for name, count in (("q", n.heads), ("k", n.groups), ("v", n.groups))
            )
            q, k = w.rotated(q, position_N), w.rotated(k, position_N)
            if step == 0:
                prefix.append((k, v))
            else:
                own[number].append((k, v))
            mixed = [_row(q, row, prefix[number], own[number]) for row in range(rows)]
            hidden_NH = w.feed_forward(hidden_NH + w.linear(torch.cat(mixed), f"{layer}.self_attn.o_proj"), layer)
        normed_NH = w.norm(hidden_NH, "norm.weight")
        logits.append(w.linear(normed_NH, "lm_head"))
        if n["norm_output"]:
            hidden_NH = normed_NH
    return torch.stack(logits)


def _row(
    q_Nhw: torch.Tensor, row: int, prefix: tuple[torch.Tensor, torch.Tensor], own: list[tuple[torch.Tensor, torch.Tensor]]
) -> torch.Tensor:
    """One row sees the first step's keys up to its own place and what it added itself."""
    k, v = (torch.cat([prefix[part][: row + 1], *(step[part][row : row + 1] for step in own)]) for part in (0, 1))
    return _attend(q_Nhw[row : row + 1], k, v, torch.ones(1, len(k), dtype=torch.bool))


def block_states(served: Served, aux_NF: torch.Tensor, embedded_RH: torch.Tensor) -> torch.Tensor:
    """Outputs [R, H] of a block whose anchor stands behind N tokens, after the final norm."""
    w, n = _Weights(served, aux_NF.dtype), served.network
    context_NH, hidden_RH = _fuse(w, n, aux_NF), embedded_RH
    before, rows = len(context_NH), len(embedded_RH)
    key_M, row_R = torch.arange(before + rows), torch.arange(before, before + rows)
    for number, kind in enumerate(n["layer_types"]):
        layer, attention = f"layers.{number}", f"layers.{number}.self_attn"
        x_RH = w.norm(hidden_RH, f"{layer}.input_layernorm.weight")
        q = w.rotated(w.norm(w.heads(x_RH, f"{attention}.q_proj", n.heads), f"{attention}.q_norm.weight"), row_R)
        both_MH = torch.cat([context_NH, x_RH])
        k = w.rotated(w.norm(w.heads(both_MH, f"{attention}.k_proj", n.groups), f"{attention}.k_norm.weight"), key_M)
        seen_RM = torch.ones(rows, before + rows, dtype=torch.bool)
        if kind == "sliding_attention":
            distance_RM = row_R[:, None] - key_M
            seen_RM = (distance_RM >= 0) & (distance_RM < n["sliding_window"])
        mixed = _attend(q, k, w.heads(both_MH, f"{attention}.v_proj", n.groups), seen_RM)
        hidden_RH = w.feed_forward(hidden_RH + w.linear(mixed, f"{attention}.o_proj"), layer)
    return w.norm(hidden_RH, "norm.weight")


def block_logits(
    served: Served, states_RH: torch.Tensor, head_VH: torch.Tensor, previous_K: torch.Tensor, embedded_KH: torch.Tensor
) -> torch.Tensor:
    """Logits [K, V] of the drafts of a block; `previous_K` is the token before each, `embedded_KH` its embedding in the target."""
    w, n = _Weights(served, states_RH.dtype), served.network
    if n.kind == "dflash":
        return states_RH[1:] @ head_VH.T
    base_RV = states_RH @ head_VH.T
    if n.kind == "domino":
        return base_RV + _domino(w, states_RH, embedded_KH)
    return base_RV + w.linear(_markov(w, n, states_RH, previous_K), "markov_head.markov_w2")


def _domino(w: _Weights, states_RH: torch.Tensor, embedded_KH: torch.Tensor) -> torch.Tensor:
    state_G, added = states_RH.new_zeros(w["prefix_gru.weight_hh_l0"].shape[1]), [torch.zeros(w["embed_proj.2.weight"].shape[0])]
    for place, (embedded_H, hidden_H) in enumerate(zip(embedded_KH, states_RH, strict=True)):
        reset, update, new = (w["prefix_gru.weight_ih_l0"] @ embedded_H).chunk(3)
        reset_s, update_s, new_s = (w["prefix_gru.weight_hh_l0"] @ state_G).chunk(3)
        candidate, keep = (new + (reset + reset_s).sigmoid() * new_s).tanh(), (update + update_s).sigmoid()
        state_G = (1 - keep) * candidate + keep * state_G
        if place:
            squeezed = w["embed_proj.0.weight"] @ torch.cat([hidden_H, state_G])
            added.append(w["embed_proj.2.weight"] @ (squeezed * squeezed.sigmoid()))
    return torch.stack([added[0].to(states_RH.dtype), *added[1:]])


def _markov(w: _Weights, n: Network, states_RH: torch.Tensor, previous_K: torch.Tensor) -> torch.Tensor:
    embedded_KR, kind = w["markov_head.markov_w1.weight"][previous_K], n["markov_head_type"]
    if kind == "vanilla":
        return embedded_KR
    if kind == "gated":
        gate = w.linear(torch.cat([states_RH, embedded_KR], -1), "markov_head.gate_proj") + w["markov_head.gate_proj.bias"]
        return gate.sigmoid() * embedded_KR
    state, outputs = torch.zeros_like(embedded_KR[0]), []
    for embedded, hidden in zip(embedded_KR, states_RH, strict=True):
        joint = w["markov_head.joint_proj.weight"] @ torch.cat([state, embedded, hidden]) + w["markov_head.joint_proj.bias"]
        gate, candidate, output = joint.chunk(3)
        state = gate.sigmoid() * state + (1 - gate.sigmoid()) * candidate.tanh()
        outputs.append(output.tanh())
    return torch.stack(outputs)


def confidences(served: Served, states_RH: torch.Tensor, previous_K: torch.Tensor) -> torch.Tensor:
    """[K]: how probably each draft of a DSpark block is accepted."""
    w = _Weights(served, states_RH.dtype)
    x_KX = F.pad(torch.cat([states_RH, w["markov_head.markov_w1.weight"][previous_K]], -1), (0, 1), value=1.0)
    return (x_KX @ torch.cat([w["confidence_head.proj.weight"][0], w["confidence_head.proj.bias"]])).sigmoid()
