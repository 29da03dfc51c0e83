"""The P-EAGLE draft: EAGLE-3's layers, and a learned feature for tokens that are not known yet (arXiv 2602.01469).

Row t at depth d >= 1 carries this feature and the embedding of the mask token, at RoPE position t + d, and predicts token t+2+d. It
sees the first rows of tokens 0..t and itself at the depths before, so that no depth waits for another.
"""

from dataclasses import dataclass

import torch
from torch import nn

from specforge.data.vocabulary import DraftVocabulary
from specforge.models.eagle3 import Eagle3Config, Eagle3Draft


@dataclass(frozen=True, kw_only=True)
class PEagleConfig(Eagle3Config):
    mask_token_id: int
    """The target's id whose embedding stands for a token that is not known."""


class PEagleDraft(Eagle3Draft):
    config: PEagleConfig
    config_type = PEagleConfig

    def __init__(self, config: PEagleConfig, vocabulary: DraftVocabulary) -> None:
        super().__init__(config, vocabulary)
        self.mask_hidden = nn.Parameter(torch.ones(1, 1, self.fc.in_features))

    def fuse_with_mask(self, aux_TF: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Captured layers [T, A*H] -> [T, H], and what stands for those of an unknown token, [1, H].

        Together, so that every batch gives the latter a gradient: the reduction over ranks would wait for one that is missing.
        """
        aux_TF = torch.cat([aux_TF.to(self.mask_hidden.dtype), self.mask_hidden.flatten(0, 1)])
        fused_TH, mask_1H = self.fuse(aux_TF).split([len(aux_TF) - 1, 1])
        return fused_TH, mask_1H
