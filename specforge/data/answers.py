"""Where the answers are in a rendered conversation, as character spans.

A span is the half-open character range of what the target itself would write in an assistant turn: after the header that the
generation prompt gives, up to and including the end-of-turn string, without the white space that templates put behind it.
"""

import hashlib
import re
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from specforge.data.conversations import Message, Tools
from specforge.errors import DataError

Span = tuple[int, int]

_GENERATION_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_MARK_THEM = "mark the answers in the template with {% generation %} ... {% endgeneration %} and name it in data.chat_template"

_QUESTION_1, _ANSWER_1, _QUESTION_2, _ANSWER_2 = "probequestionone", "probeanswerone", "probequestiontwo", "probeanswertwo"


@dataclass(frozen=True)
class _Markers:
    """What the template puts around an answer, read off a probe conversation."""

    header: str
    end_of_turn: str
    prompts: bool
    """Whether rendering with a generation prompt ends where the answer begins."""


class ChatTemplate:
    """A Jinja chat template in force for `tokenizer`; `name` says in messages which one it is."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, text: str, name: str) -> None:
        self._tokenizer = tokenizer
        self.text = text
        self.name = name
        self.marks_answers = _GENERATION_MARK.search(text) is not None

    @property
    def digest(self) -> str:
        """SHA-256 of the template text, in hexadecimal."""
        return hashlib.sha256(self.text.encode()).hexdigest()

    def render(self, messages: list[Message], tools: Tools | None = None, prompt: bool = False) -> str:
        """The conversation as text, with the header of the next answer if `prompt`. Raises DataError where the template refuses."""
        if not messages:
            raise DataError("nothing stands before the first assistant turn; begin the conversation with a user turn.")
        try:
            return str(
                self._tokenizer.apply_chat_template(
                    messages, tools=tools, chat_template=self.text, add_generation_prompt=prompt, tokenize=False
                )
            )
        except (TemplateError, TypeError) as error:
            raise self._refused(error) from None

    def conversation_answers(self, messages: list[Message], tools: Tools | None, last_only: bool) -> tuple[str, list[Span]]:
        """The rendered conversation and the ascending spans of its answers, or of the last one only.

        A template that marks generation is taken at its word. With any other, a turn begins where the conversation before it
        ends when rendered with a generation prompt, and ends where the conversation including it ends; both renderings must
        begin the rendered whole, else DataError.
        """
        if self.marks_answers:
            text, spans = self._marked_answers(messages, tools)
            return text, spans[-1:] if last_only else spans
        text = self.render(messages, tools)
        turns = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
        if turns and not self._markers.prompts:
            raise DataError(f"{self.name} ignores add_generation_prompt, so nothing tells a header from an answer; {_MARK_THEM}.")
        return text, [self._turn_span(text, messages, tools, number) for number in (turns[-1:] if last_only else turns)]

    def text_answers(self, text: str, last_only: bool) -> list[Span]:
        """The ascending spans of the answers in preformatted `text`: from the assistant header to the next end-of-turn string.

        Both strings are what the template itself puts around an answer. An answer without end of turn reaches to the end of
        the text. Raises DataError where the two strings do not tell the answers of the template's own rendering.
        """
        self._check_text_markers()
        spans = self._between_markers(text)
        if any(self._markers.header in text[begin:end] for begin, end in spans):
            raise DataError(
                f"text: two assistant headers {self._markers.header!r} without the end of turn {self._markers.end_of_turn!r} between them; "
                f"give the row as `conversations`, or text that {self.name} rendered."
            )
        return spans[-1:] if last_only else spans

    def _marked_answers(self, messages: list[Message], tools: Tools | None) -> tuple[str, list[Span]]:
        """Spans straight from the renderer: the token mask derived from them elsewhere supervises tokens astride a border."""
        special_tokens: dict[str, Any] = self._tokenizer.special_tokens_map
        try:
            rendered: Any = render_jinja_template(
                [messages], tools=tools, chat_template=self.text, return_assistant_tokens_mask=True, **special_tokens
            )
        except (TemplateError, TypeError) as error:
            raise self._refused(error) from None
        [text], [marked] = rendered
        spans: list[Span] = []
        for begin, end in marked:
            if spans and spans[-1][1] == begin:
                begin = spans.pop()[0]
            spans.append((begin, end))
        return text, [(begin, end) for begin, end in spans if begin < end]

    def _turn_span(self, text: str, messages: list[Message], tools: Tools | None, number: int) -> Span:
        before = self.render(messages[:number], tools, prompt=True)
        through = self.render(messages[: number + 1], tools)
        for part, rendered in (("before", before), ("up to and including", through)):
            if not text.startswith(rendered):
                raise DataError(
                    f"{self.name} renders the conversation {part} turn {number} differently once further turns follow, "
                    f"so the answer cannot be located; {_MARK_THEM}, or supervise the last turn only with data.last_turn_only=true."
                )
        closing = text.rfind(self._markers.end_of_turn, len(before), len(through))
        return len(before), closing + len(self._markers.end_of_turn) if closing >= 0 else len(through)

    def _between_markers(self, text: str) -> list[Span]:
        header, end_of_turn = self._markers.header, self._markers.end_of_turn
        spans: list[Span] = []
        found = text.find(header)
        while found >= 0:
            begin = found + len(header)
            closing = text.find(end_of_turn, begin)
            end = closing + len(end_of_turn) if closing >= 0 else len(text)
            spans.append((begin, end))
            found = text.find(header, closing) if closing >= 0 else -1
        return spans

    @cached_property
    def _markers(self) -> _Markers:
        question = [{"role": "user", "content": _QUESTION_1}]
        whole = self.render([*question, {"role": "assistant", "content": _ANSWER_1}])
        prompted = self.render(question, prompt=True)
        after_question, after_answer = self._after(prompted, _QUESTION_1), self._after(whole, _ANSWER_1)
        between = self._after(whole, _QUESTION_1).partition(_ANSWER_1)[0]
        prompts = prompted != self.render(question) or not between[len(after_question) :].strip()
        return _Markers(after_question if prompts else between, self._end_of_turn(after_answer), prompts)

    def _end_of_turn(self, closing: str) -> str:
        """Up to the first added token in what follows an answer; without one, all of it but white space behind it."""
        tokens = [token for token in self._tokenizer.added_tokens_encoder if token.strip() and token in closing]
        if tokens:
            first = min(tokens, key=lambda token: (closing.find(token), -len(token)))
            return closing[: closing.find(first) + len(first)]
        return closing.rstrip() or closing

    def _check_text_markers(self) -> None:
        turns = (("user", _QUESTION_1), ("assistant", _ANSWER_1), ("user", _QUESTION_2), ("assistant", _ANSWER_2))
        text = self.render([{"role": role, "content": content} for role, content in turns])
        usable = bool(self._markers.header and self._markers.end_of_turn)
        bodies = [text[begin:end] for begin, end in self._between_markers(text)] if usable else []
        found = [[answer in body and _QUESTION_2 not in body for answer in (_ANSWER_1, _ANSWER_2)] for body in bodies]
        if found != [[True, False], [False, True]]:
            raise DataError(
                f"Answers of preformatted text cannot be located by the header {self._markers.header!r} and the end of turn "
                f"{self._markers.end_of_turn!r} of {self.name}; give the rows as `conversations`, or as `input_ids` with `loss_mask`."
            )

    def _after(self, text: str, probe: str) -> str:
        if text.count(probe) != 1:
            raise DataError(f"{self.name} does not render the content of a turn as it stands, exactly once; {_MARK_THEM}.")
        return text.partition(probe)[2]

    def _refused(self, error: Exception) -> DataError:
        return DataError(f"{self.name} refuses the conversation ({error}); correct the row, or change data.chat_template.")
