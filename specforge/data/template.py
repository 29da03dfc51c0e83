"""Rows become samples: token ids with a mask of the tokens that are supervised. S is the number of tokens of a sample."""

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby, islice
from pathlib import Path

import numpy as np
from tokenizers import processors
from transformers import PreTrainedTokenizerBase

from specforge.data.answers import ChatTemplate, Span
from specforge.data.conversations import Message, Row, Tools
from specforge.errors import DataError

MIN_TOKENS = 3
"""A shorter sample holds no place from which a draft could start."""
_NAMED_IDS = 5


@dataclass(frozen=True, eq=False)
class Sample:
    """`input_ids` int32 [S], `loss_mask` bool [S]; `truncated` if tokens beyond the maximal length were cut off."""

    id: str
    domain: str
    input_ids: np.ndarray
    loss_mask: np.ndarray
    truncated: bool


@dataclass(frozen=True)
class EncodedSet:
    """The usable samples, and what became of the other rows (counts, and the first few ids)."""

    samples: list[Sample]
    num_rows: int
    truncated: int
    unsupervised: int
    unsupervised_ids: tuple[str, ...]
    short: int
    short_ids: tuple[str, ...]


class Encoder:
    """Tokenises whole rows once, with the chat template of `tokenizer` or of the file `chat_template`.

    A token is supervised iff its first character lies in an answer. So a token astride the beginning of an answer is not (the
    target never writes it: its prompt ends there), and one astride the end is. Raises DataError for tokenizers without character
    offsets, and for a missing template as soon as a row needs it.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, max_length: int, chat_template: str = "", last_turn_only: bool = False) -> None:
        if not tokenizer.is_fast:
            raise DataError(
                f"Tokenizer {tokenizer.name_or_path!r} gives no character offsets, which locate the answers; "
                "use its fast version (tokenizer.json), or rows with `input_ids` and `loss_mask` made elsewhere."
            )
        self._tokenizer = _with_true_offsets(tokenizer)
        self._max_length = max_length
        self._template_path = chat_template
        self._last_turn_only = last_turn_only
        self._vocabulary_size = len(tokenizer)

    @cached_property
    def template(self) -> ChatTemplate:
        if self._template_path:
            path = Path(self._template_path)
            if not path.is_file():
                raise DataError(f"data.chat_template={self._template_path!r}: no such file; give the path of a Jinja template.")
            return ChatTemplate(self._tokenizer, path.read_text(encoding="utf-8"), f"The chat template {path}")
        text = self._tokenizer.chat_template
        text = text.get("default") if isinstance(text, dict) else text
        name = self._tokenizer.name_or_path
        if not text:
            raise DataError(f"Tokenizer {name!r} has no chat template; give one with data.chat_template (the path of a Jinja file).")
        return ChatTemplate(self._tokenizer, text, f"The chat template of tokenizer {name!r}")

    @property
    def template_text(self) -> str:
        """The Jinja text in force."""
        return self.template.text

    @property
    def template_digest(self) -> str:
        """SHA-256 of the Jinja text in force."""
        return self.template.digest

    def encode(self, row: Row) -> Sample:
        """The sample of a row, cut to the maximal length. Raises DataError naming the row."""
        try:
            ids, mask = self._tokens(row)
        except DataError as error:
            raise DataError(f"{row.name}: {error}") from None
        cut = self._max_length
        return Sample(row.id, row.domain, ids[:cut].astype(np.int32), mask[:cut], truncated=len(ids) > cut)

    def prompt_ids(self, messages: list[Message], tools: Tools | None = None) -> np.ndarray:
        """What the target reads before it answers `messages`: int32 [P], the header of its answer included, never cut."""
        return self._offsets(self.template.render(messages, tools, prompt=True))[0].astype(np.int32)

    def _tokens(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        if row.messages is not None:
            text, spans = self.template.conversation_answers(row.messages, row.tools, self._last_turn_only)
        elif row.text is not None:
            text, spans = row.text, self.template.text_answers(row.text, self._last_turn_only)
        else:
            return self._given_tokens(row)
        ids, begins = self._offsets(text)
        return ids, _inside(begins, spans)

    def _given_tokens(self, row: Row) -> tuple[np.ndarray, np.ndarray]:
        ids, mask = np.asarray(row.input_ids, dtype=np.int64), np.asarray(row.loss_mask, dtype=bool)
        if ids.shape != mask.shape:
            raise DataError(f"loss_mask has {mask.size} values for {ids.size} input_ids; they must be equally long.")
        if ids.size and not 0 <= ids.min() <= ids.max() < self._vocabulary_size:
            raise DataError(
                f"input_ids reach from {ids.min()} to {ids.max()}, but the tokenizer {self._tokenizer.name_or_path!r} has "
                f"{self._vocabulary_size} tokens; tokenise the row with this tokenizer, or correct model.tokenizer_path."
            )
        return ids, mask

    def _offsets(self, text: str) -> tuple[np.ndarray, np.ndarray]:
        """Token ids [S] of the text, and the character [S] at which each token begins."""
        encoded = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        offsets = np.asarray(encoded["offset_mapping"], dtype=np.int64).reshape(-1, 2)
        return np.asarray(encoded["input_ids"], dtype=np.int64), offsets[:, 0]


def encode_all(rows: Sequence[Row], encoder: Encoder) -> EncodedSet:
    """Encode every row and keep the samples with at least MIN_TOKENS tokens and one of them supervised.

    Raises DataError naming the template if no sample is left.
    """
    encoded = [encoder.encode(row) for row in rows]
    short = [sample.id for sample in encoded if len(sample.input_ids) < MIN_TOKENS]
    long_enough = [sample for sample in encoded if len(sample.input_ids) >= MIN_TOKENS]
    unsupervised = [sample.id for sample in long_enough if not sample.loss_mask.any()]
    samples = [sample for sample in long_enough if sample.loss_mask.any()]
    if not samples:
        templated = any(row.input_ids is None for row in rows)
        raise DataError(
            f"{encoder.template.name if templated else 'The given loss_mask'}: not one of {len(rows)} rows has a supervised token "
            f"({len(short)} are shorter than {MIN_TOKENS} tokens); "
            "check that the rows hold answers, that the template fits them, and that data.max_length reaches the first answer."
        )
    return EncodedSet(
        samples, len(rows), sum(sample.truncated for sample in encoded),
        len(unsupervised), tuple(unsupervised[:_NAMED_IDS]), len(short), tuple(short[:_NAMED_IDS]),
    )  # fmt: skip


def show(samples: Iterable[Sample], tokenizer: PreTrainedTokenizerBase, n: int, colour: bool = False) -> str:
    """The first `n` samples as text with the supervised tokens between ⟦ and ⟧, in green where `colour` (for terminals)."""
    opening, closing = ("\033[32m⟦", "⟧\033[0m") if colour else ("⟦", "⟧")
    blocks = []
    for sample in islice(samples, n):
        tokens = zip(sample.input_ids.tolist(), sample.loss_mask.tolist(), strict=True)
        runs = [
            (supervised, str(tokenizer.decode([token for token, _ in run])))
            for supervised, run in groupby(tokens, key=lambda token: token[1])
        ]
        domain = f", domain {sample.domain}" if sample.domain else ""
        cut = ", truncated" if sample.truncated else ""
        head = f"--- {sample.id}{domain}: {len(sample.input_ids)} tokens, {int(sample.loss_mask.sum())} supervised{cut}"
        blocks.append(head + "\n" + "".join(f"{opening}{text}{closing}" if supervised else text for supervised, text in runs))
    return "\n".join(blocks)


def _inside(begins: np.ndarray, spans: Sequence[Span]) -> np.ndarray:
    mask = np.zeros(len(begins), dtype=bool)
    for begin, end in spans:
        mask |= (begins >= begin) & (begins < end)
    return mask


def _with_true_offsets(tokenizer: PreTrainedTokenizerBase) -> PreTrainedTokenizerBase:
    """A copy that yields the same ids with offsets that cover every character of a token.

    Post-processors add special tokens, which templates already write, and may trim white space off the offsets: a token " yes"
    astride the border between "Answer: " and "yes" would seem to lie inside the answer.
    """
    exact = copy.deepcopy(tokenizer)
    exact.backend_tokenizer.post_processor = processors.Sequence([])
    return exact
