"""The cases of `specforge bench run`, each a module of its own that is imported when it is asked for."""

import importlib

from specforge.bench.case import Case
from specforge.errors import ConfigError

CASES = {
    "packed-attention": ("specforge.bench.cases.attention:PackedAttentionCase", "causal attention within packed documents"),
    "moe": ("specforge.bench.cases.moe:MixtureCase", "a sparse mixture of experts"),
    "slots": ("specforge.bench.cases.slots:SlotsCase", "slots of hashed signs from one table"),
    "ranking": ("specforge.bench.cases.ranking:RankingCase", "inference of a small ranking model, from rows on the disk to a list"),
    "draft-step": ("specforge.bench.cases.draft_step:DraftStepCase", "one training step of EAGLE-3 or DFlash"),
    "decode-round": ("specforge.bench.cases.decode_round:DecodeRoundCase", "rounds of decoding with the embedded target"),
    "suite": ("specforge.bench.cases.suite:SuiteCase", "a small suite of tasks, scored in several modes"),
}


def load_case(name: str) -> Case:
    """
    Raises:
        ConfigError: there is no such case.
    """
    if name not in CASES:
        raise ConfigError(f"case {name!r}: there is none; choose one of {', '.join(CASES)}.")
    module, class_name = CASES[name][0].split(":")
    case: Case = getattr(importlib.import_module(module), class_name)()
    return case
