"""Attention within packed documents, with whatever each way has to make of a batch's layout before its first layer."""

import torch

from specforge.bench.case import Case, Configuration, Lever, Outputs, Work
from specforge.bench.cases.lengths import skewed_lengths
from specforge.bench.cases.precision import DTYPE, DTYPES, tolerance_of
from specforge.layers.attention_choice import lacking_on, resolve
from specforge.layers.documents import Documents
from specforge.layers.packed import PackedLayout
from specforge.layers.packed_attention import IMPLEMENTATIONS, prepare


class PackedAttentionCase(Case):
    def __init__(self) -> None:
        levers = {"attn": Lever(("auto", *IMPLEMENTATIONS), "sdpa", "auto"), "dtype": DTYPE}
        super().__init__("packed-attention", levers, {"documents": 50, "tokens": 3500, "heads": 4, "head_width": 32})

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        documents, tokens, heads, width = map(int, configuration.problem.values())
        dtype, lengths = DTYPES[configuration.levers["dtype"]], skewed_lengths(documents, tokens)
        qkv = torch.randn(3, sum(lengths), heads, width, generator=torch.Generator().manual_seed(0))
        q_ThD, k_ThD, v_ThD = (x.to(device, dtype) for x in (qkv[0] / width**0.5, qkv[1], qkv[2]))
        name = resolve(configuration.levers["attn"], device, dtype, gradient=False).name

        @torch.no_grad()
        def run() -> Outputs:
            attention = prepare(name, PackedLayout(Documents(lengths), device))
            return {"out_ThD": attention(q_ThD, k_ThD, v_ThD)}

        return Work(run)

    def tolerance(self, configuration: Configuration) -> float:
        return tolerance_of(configuration.levers["dtype"])

    def lacking(self, lever: str, choice: str, configuration: Configuration, device: torch.device) -> str | None:
        return lacking_on(choice, device, DTYPES[configuration.levers["dtype"]]) if lever == "attn" else None
