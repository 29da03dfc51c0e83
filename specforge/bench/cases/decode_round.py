"""Rounds of greedy decoding with the embedded target: whatever drafts, the text is the target's own.

`eagle3` is a draft of random weights, which shows what drafting and verifying cost when nothing is accepted.
"""

from functools import cache

import numpy as np
import torch
from transformers import AutoTokenizer

from specforge.bench.case import Case, Configuration, Lever, Outputs, Quality, Work
from specforge.bench.cases.embedded import FOLDER, load_embedded
from specforge.config.methods import Eagle3Options
from specforge.data.vocabulary import DraftVocabulary
from specforge.decode.drafter import Drafter, NgramDrafter, NoDrafter
from specforge.decode.eagle3 import Eagle3Drafter
from specforge.decode.engine import Decoded, Decoder
from specforge.features.tables import TargetTables
from specforge.features.target import aux_layer_ids
from specforge.methods.eagle3 import Eagle3, derive_config
from specforge.models.eagle3 import Eagle3Draft

TEXTS = (
    "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n    return a",
    "for name in names:\n    print(name)\n\nfor value in values:\n",
    "import os\nimport sys\n\nclass Reader:\n    def __init__(self, path):\n        self.path = path\n",
    "if x is None:\n    raise ValueError('x must not be None')\nif y is None:\n",
)


class DecodeRoundCase(Case):
    def __init__(self) -> None:
        levers = {"drafter": Lever(("none", "ngram", "eagle3"), "none", "ngram"), "draft_tokens": Lever((), "4", "4")}
        super().__init__("decode-round", levers, {"texts": 4, "new_tokens": 32})

    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        target, drafts = load_embedded(device), int(configuration.levers["draft_tokens"])
        new_tokens = int(configuration.problem["new_tokens"])
        decoder = Decoder(target, _drafter(configuration.levers["drafter"], drafts, device))
        tokenizer = AutoTokenizer.from_pretrained(FOLDER, local_files_only=True)
        texts = [TEXTS[number % len(TEXTS)] for number in range(int(configuration.problem["texts"]))]
        prompts = [np.array(tokenizer(text)["input_ids"], dtype=np.int64) for text in texts]
        said: list[Decoded] = []

        def run() -> Outputs:
            said[:] = decoder.decode(prompts, new_tokens)
            return {f"text {number}": torch.tensor(text.ids) for number, text in enumerate(said)}

        def quality(outputs: Outputs) -> Quality:
            rounds = [tokens for text in said for tokens in text.committed]
            return {"acc_len": sum(rounds) / len(rounds), "draft_tokens": float(drafts)}

        return Work(run, quality)

    def tolerance(self, configuration: Configuration) -> float:
        return 0.0


def _drafter(name: str, draft_tokens: int, device: torch.device) -> Drafter:
    if name == "none":
        return NoDrafter()
    return NgramDrafter(draft_tokens) if name == "ngram" else Eagle3Drafter(_random_eagle3().to(device), draft_tokens)


@cache
def _random_eagle3() -> Eagle3:
    torch.manual_seed(0)
    tables, options = TargetTables.read(FOLDER), Eagle3Options(draft_vocab_size=0)
    config = derive_config(options, tables, aux_layer_ids(tables.config.num_hidden_layers), tables.config.vocab_size)
    return Eagle3(options, Eagle3Draft(config, DraftVocabulary(np.arange(tables.config.vocab_size), tables.config.vocab_size)), tables)
