"""Text on a terminal while its tokens are decoded."""

import sys
import time
from collections.abc import Sequence
from typing import TextIO

from transformers import PreTrainedTokenizerBase

_HALF = "\ufffd"
_GREEN, _PLAIN = "\x1b[32m", "\x1b[0m"


class Detokeniser:
    """Ids in, text out, piece by piece; a character whose bytes are not all there yet is kept back.

    A window of ids is decoded with and without the new ones, and the difference is the piece: what a token says may depend on
    the token before it. The window begins where a piece with text began.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._window: list[int] = []
        self._said = 0
        """Ids of the window whose text is out."""

    def add(self, token: int) -> str:
        self._window.append(token)
        piece = self._piece()
        return "" if piece.endswith(_HALF) else self._out(piece)

    def end(self) -> str:
        """What was kept back and will not be completed."""
        return self._out(self._piece())

    def _piece(self) -> str:
        return self._text(self._window)[len(self._text(self._window[: self._said])) :]

    def _out(self, piece: str) -> str:
        if piece:
            self._window = self._window[self._said :]
        self._said = len(self._window)
        return piece

    def _text(self, ids: Sequence[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text


class Printer:
    """Prints the text of one row as the decoder commits it; drafted tokens in colour where asked.

    `spent_s` is the time that this took, which is none of the decoder's.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, colour: bool, out: TextIO | None = None) -> None:
        self._detokeniser = Detokeniser(tokenizer)
        self._colour, self._out = colour, out or sys.stdout
        self.spent_s = 0.0

    def watch(self, row: int, tokens: Sequence[int], drafted: int) -> None:
        began_s = time.perf_counter()
        for place, token in enumerate(tokens):
            self._print(self._detokeniser.add(token), self._colour and place < drafted)
        self._out.flush()
        self.spent_s += time.perf_counter() - began_s

    def end(self) -> None:
        self._print(self._detokeniser.end() + "\n", False)

    def _print(self, piece: str, coloured: bool) -> None:
        self._out.write(f"{_GREEN}{piece}{_PLAIN}" if coloured and piece else piece)
