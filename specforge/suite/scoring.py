"""Log-probabilities of the tokens that a task asks for, from forwards over padded batches or over pieces of a prefix tree.

Shapes: B rows of a forward, S tokens of its longest, M nodes of a piece, Q predictions of a task, X predictions of a forward, H hidden
size, V vocabulary.
"""

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from specforge import files
from specforge.decode.cache import PassingCache
from specforge.decode.session import TargetSession
from specforge.distributed import World
from specforge.errors import ConfigError, SpecForgeError
from specforge.features.target import Target
from specforge.suite.batches import Batch, collate
from specforge.suite.forest import Forest, TreePiece, plant
from specforge.suite.resident import ahead
from specforge.suite.tokens import TaskTokens

_LOGIT_ROWS = 256
"""Rows of logits that exist at a time."""
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-3, torch.bfloat16: 0.3, torch.float16: 0.05}
"""Largest difference, in nats, between a small tree and its rows that is rounding; attention often takes its softmax in float32."""


class Predictions:
    """What the model says of a task's tokens; filled forward by forward on its device, read once."""

    def __init__(self, tokens: TaskTokens, target: Target) -> None:
        total, device = int(tokens.prediction_start_R1[-1]), target.device
        wide = torch.promote_types(target.dtype, torch.float32)
        self.logp_Q = torch.zeros(total, dtype=wide, device=device)
        """Natural logarithm of the probability; 0 until noted."""
        self.is_best_Q = torch.zeros(total, dtype=wide, device=device)
        """1 where no other token is likelier."""

    def note(self, logits_XV: torch.Tensor, token_X: torch.Tensor, place_X: torch.Tensor) -> None:
        logits_XV = logits_XV.to(self.logp_Q.dtype)
        self.logp_Q[place_X] = logits_XV.gather(1, token_X[:, None])[:, 0] - logits_XV.logsumexp(-1)
        self.is_best_Q[place_X] = (logits_XV.argmax(-1) == token_X).to(self.is_best_Q.dtype)

    def reduced(self, world: World) -> tuple[np.ndarray, np.ndarray]:
        """Both as arrays, float64 and bool, of all ranks, each of which noted a part."""
        logp_Q, is_best_Q = world.sum_(torch.stack([self.logp_Q, self.is_best_Q])).double().cpu().numpy()
        return logp_Q, is_best_Q > 0


class Model:
    """A language model that is asked for some of its predictions only.

    Args:
        longest: tokens that it reads; 0: as its configuration says.
    """

    def __init__(self, target: Target, longest: int = 0) -> None:
        self.target = target
        self.longest = longest or int(getattr(target.config, "max_position_embeddings", 0)) or 2**31
        self.why_not_plain = _reason(lambda: target.require_plain_head(np.arange(8) % target.vocab_size))
        """Why its logits are not head times hidden state; empty where they are."""
        self._asked: dict[str, Any] = {"use_cache": False}
        self.why_no_tree = self.why_not_plain or _reason(self._compare_a_tree)
        """Why it cannot score a prefix tree; empty where it can."""
        if not self.why_no_tree:  # so its layers take any cache
            self._asked["past_key_values"] = PassingCache(target.num_layers)

    def batch_forwards(self, batches: Iterable[Batch], found: Predictions) -> Iterator[Batch]:
        """Each batch when its forward is done; they are on the model's device."""
        for batch in batches:
            self._score_batch(batch, found)
            yield batch

    @torch.no_grad()
    def tree_forwards(self, forest: Forest, pieces: Iterable[TreePiece], found: Predictions) -> Iterator[TreePiece]:
        """As `batch_forwards`; `pieces` are those of the forest, on the model's device.

        Raises:
            ConfigError: the model's attention takes no such mask, or nobody can tell it positions.
        """
        session = TargetSession(self.target, 1, forest.capacity, text_tokens=forest.longest)
        for piece in pieces:
            session.lengths = [piece.past]
            last_MH = session.forward(piece.ids_1M, piece.tree()).last_BNH[0]
            if piece.kept:
                session.keep([range(piece.slots)])
            self._note(last_MH[piece.node_X], piece.token_X, piece.place_X, found)
            yield piece

    @torch.no_grad()
    def _score_batch(self, batch: Batch, found: Predictions) -> None:
        """Padding stands behind all that is real, so the model's own causal mask will do."""
        if self.why_not_plain:
            logits_BSV = self.target.model(input_ids=batch.ids_BS, use_cache=False).logits
            found.note(logits_BSV[batch.row_Q, batch.column_Q], batch.token_Q, batch.place_Q)
            return
        last_BSH = self.target.decoder(input_ids=batch.ids_BS, **self._asked).last_hidden_state
        self._note(last_BSH[batch.row_Q, batch.column_Q], batch.token_Q, batch.place_Q, found)

    def _note(self, last_XH: torch.Tensor, token_X: torch.Tensor, place_X: torch.Tensor, found: Predictions) -> None:
        for last, token, place in zip(last_XH.split(_LOGIT_ROWS), token_X.split(_LOGIT_ROWS), place_X.split(_LOGIT_ROWS), strict=True):
            found.note(self.target.logits(last), token, place)

    def _compare_a_tree(self) -> None:
        """Raises ConfigError where rows of a small tree do not get the numbers that they get alone."""
        tokens = _small_task(self.target.vocab_size)
        alone, together = Predictions(tokens, self.target), Predictions(tokens, self.target)
        with files.foreign(Path(self.target.path), ConfigError, "score it in batches"):
            forest, device = plant(tokens, range(len(tokens)), budget=8), self.target.device
            for _ in self.batch_forwards(ahead((collate(tokens, [example]) for example in range(len(tokens))), device), alone):
                pass
            for _ in self.tree_forwards(forest, ahead(forest.pieces, device), together):
                pass
        difference = float((alone.logp_Q - together.logp_Q).abs().max())
        if not difference <= _TOLERANCE[self.target.dtype]:
            raise ConfigError(f"rows of a prefix tree differ by {difference:.2g} nats from the same rows alone")


def _small_task(vocab_size: int) -> TaskTokens:
    """Two examples of two rows; all share three tokens, the rows of one example five more."""
    rng = np.random.default_rng(0)
    text = rng.integers(0, vocab_size, 40).astype(np.int32)
    rows = [
        np.concatenate([text[:3], text[5 + 5 * example :][:5], text[20 + 8 * choice + example :][:6]])
        for example in (0, 1)
        for choice in (0, 1)
    ]
    ones_R, zeros_E = np.ones(4, dtype=np.int32), np.zeros(2, dtype=np.int32)
    return TaskTokens(
        np.concatenate(rows), 14 * np.arange(5), scored_R=ones_R, continuation_R=ones_R, chars_R=ones_R, bytes_R=ones_R,
        example_start_E1=np.array([0, 2, 4], dtype=np.int32), gold_E=zeros_E, classes=zeros_E[:1],
    )  # fmt: skip


def _reason(check: Callable[[], object]) -> str:
    """Why the check fails; empty where it does not."""
    try:
        check()
    except SpecForgeError as reason:
        return str(reason)
    return ""
