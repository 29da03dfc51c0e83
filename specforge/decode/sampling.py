"""How a token is chosen from logits, by the target and by a draft that samples.

Shapes: X any leading dimensions, V vocabulary, C candidates of top-k.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from specforge.errors import ConfigError
from specforge.features.generation import draw


@dataclass(frozen=True)
class Sampling:
    """Temperature, then top-k, then top-p. The defaults are greedy.

    The same rule serves target and draft, so p and q of speculative sampling are cut alike: most probable tokens first, of
    equal logits the lowest id first, and of this order the first tokens remain. Top-k keeps exactly k of them; top-p keeps,
    of the distribution that top-k left, the fewest whose mass reaches it, and so at least one.
    """

    temperature: float = 0.0
    """Divides the logits; 0 is the arg-max."""
    top_k: int = 0
    """0 keeps all tokens."""
    top_p: float = 1.0
    """1 keeps all tokens."""

    def __post_init__(self) -> None:
        if self.temperature != 0 and not 1e-4 <= self.temperature < math.inf:
            raise ConfigError(f"temperature={self.temperature}: must be 0 (greedy) or a number from 1e-4; 1 is the target as it is.")
        if self.top_k < 0:
            raise ConfigError(f"top_k={self.top_k}: must not be negative; 0 keeps all tokens.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p={self.top_p}: must lie in (0, 1]; 1 keeps all tokens.")

    def probabilities(self, logits_XV: torch.Tensor) -> torch.Tensor:
        """The distribution that tokens are drawn from [X, V]: float64 of float64 logits, float32 of all others."""
        logits_XV = logits_XV if logits_XV.dtype == torch.float64 else logits_XV.float()
        if self.temperature == 0:
            return torch.zeros_like(logits_XV).scatter_(-1, logits_XV.argmax(dim=-1, keepdim=True), 1.0)
        logits_XV = logits_XV / self.temperature
        return logits_XV.masked_fill(~self._kept(logits_XV), -math.inf).softmax(dim=-1) if self._cuts else logits_XV.softmax(dim=-1)

    def choose(self, logits_XV: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        """A token for every row of logits [X]: the first arg-max, or a sample."""
        if self.temperature == 0:
            return logits_XV.argmax(dim=-1)
        return draw(self.probabilities(logits_XV), uniforms(logits_XV.shape[:-1], generator))

    @property
    def _cuts(self) -> bool:
        return self.top_k > 0 or self.top_p < 1

    def _kept(self, logits_XV: torch.Tensor) -> torch.Tensor:
        highest_XC = logits_XV.topk(min(self.top_k or logits_XV.shape[-1], logits_XV.shape[-1])).values
        mass_XC = highest_XC.double().softmax(dim=-1).cumsum(dim=-1)
        enough = self.top_p if self.top_p < 1 else math.inf  # rounded, the mass may reach 1 before the last token
        count_X1 = (mass_XC[..., :-1] < enough).sum(dim=-1, keepdim=True) + 1
        least_X1 = highest_XC.gather(-1, count_X1 - 1)
        above_XV, tied_XV = logits_XV > least_X1, logits_XV == least_X1
        return above_XV | tied_XV & (tied_XV.cumsum(dim=-1, dtype=torch.int32) <= count_X1 - above_XV.sum(dim=-1, keepdim=True))


def uniforms(shape: Sequence[int], generator: torch.Generator) -> torch.Tensor:
    """Float64 numbers in [0, 1), on the device of the generator."""
    return torch.rand(shape, generator=generator, dtype=torch.float64, device=generator.device)
