import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from specforge.data.conversations import Row, read_rows
from specforge.data.template import Encoder, Sample, encode_all, show
from specforge.errors import DataError
from tests.data.tokenizers import (
    CHATML,
    CHATML_ENDING,
    CHATML_MARKED,
    CHATML_MARKED_TWICE,
    CHATML_WITHOUT_PROMPT,
    INSTRUCTION,
    LAST_TURN_THINKS,
    PLAIN,
    TWO_CLOSINGS,
    WIDE_HEADER,
    byte_level_tokenizer,
    word_tokenizer,
)

TWO_TURNS = [
    {"role": "system", "content": "be kind"},
    {"role": "user", "content": "hello there"},
    {"role": "assistant", "content": "I am well, thank you. "},
    {"role": "user", "content": "How are you “today”?"},
    {"role": "assistant", "content": "\nyes, naïve 🙂"},
]


def row(messages: list[dict[str, str]], tools: list[dict[str, str]] | None = None) -> Row:
    return Row("r", messages=messages, tools=tools)


def answers(sample: Sample, tokenizer: Any) -> list[str]:
    """The text of every run of supervised tokens."""
    runs = np.split(np.arange(len(sample.input_ids)), np.flatnonzero(np.diff(sample.loss_mask)) + 1)
    return [tokenizer.decode(sample.input_ids[run]) for run in runs if sample.loss_mask[run[0]]]


def test_marked_and_unmarked_templates_and_preformatted_text_give_the_same_sample() -> None:
    marked, unmarked = (Encoder(byte_level_tokenizer(template), 512) for template in (CHATML_MARKED, CHATML))
    text = byte_level_tokenizer(CHATML).apply_chat_template(TWO_TURNS, tokenize=False)
    samples = [marked.encode(row(TWO_TURNS)), unmarked.encode(row(TWO_TURNS))]
    samples += [marked.encode(Row("r", text=text)), unmarked.encode(Row("r", text=text))]
    for sample in samples[1:]:
        np.testing.assert_array_equal(sample.input_ids, samples[0].input_ids)
        np.testing.assert_array_equal(sample.loss_mask, samples[0].loss_mask)
    assert samples[0].input_ids.dtype == np.int32
    assert samples[0].loss_mask.dtype == np.bool_


def test_ids_are_those_of_the_tokenizer_and_the_mask_is_that_of_transformers_where_no_token_straddles() -> None:
    tokenizer = byte_level_tokenizer(CHATML_MARKED)
    expected = tokenizer.apply_chat_template(TWO_TURNS, return_dict=True, return_assistant_tokens_mask=True)
    sample = Encoder(tokenizer, 512).encode(row(TWO_TURNS))
    assert sample.input_ids.tolist() == expected["input_ids"]
    assert sample.loss_mask.tolist() == [bool(value) for value in expected["assistant_masks"]]


def test_both_answers_are_supervised_with_their_end_of_turn_and_nothing_behind_it() -> None:
    tokenizer = byte_level_tokenizer()
    sample = Encoder(tokenizer, 512).encode(row(TWO_TURNS))
    assert answers(sample, tokenizer) == ["I am well, thank you. <|im_end|>", "\nyes, naïve 🙂<|im_end|>"]


@pytest.mark.parametrize("template", [CHATML, CHATML_MARKED, CHATML_MARKED_TWICE])
@pytest.mark.parametrize("preformatted", [False, True])
def test_last_turn_only(template: str, preformatted: bool) -> None:
    tokenizer = byte_level_tokenizer(template)
    text = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    given = Row("r", text=text) if preformatted else row(TWO_TURNS)
    assert answers(Encoder(tokenizer, 512, last_turn_only=True).encode(given), tokenizer) == ["\nyes, naïve 🙂<|im_end|>"]


def test_a_token_astride_the_beginning_is_not_supervised_although_trimmed_offsets_hide_it() -> None:
    """The header "Answer: " and the answer "yes" share the token " yes", whose trimmed offsets begin at the y."""
    tokenizer = byte_level_tokenizer(PLAIN)
    sample = Encoder(tokenizer, 512).encode(row([{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes yes"}]))
    assert [tokenizer.decode([token]) for token in sample.input_ids[-3:]] == [" yes", " yes", "\n"]
    assert sample.loss_mask.tolist()[-4:] == [False, False, True, True]


def test_counting_the_tokens_of_a_retokenised_prefix_would_start_in_the_header() -> None:
    """Alone, the header's two spaces are one token; in the whole text, the second one belongs to the answer's first word."""
    tokenizer = byte_level_tokenizer(WIDE_HEADER)
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "yes yes"}]
    sample = Encoder(tokenizer, 512).encode(row(messages))
    prefix = tokenizer(tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, tokenize=False))["input_ids"]
    pieces = [tokenizer.decode([token]) for token in sample.input_ids]
    assert "".join(pieces[len(prefix) :]) == " yes yes\n"
    assert answers(sample, tokenizer) == [" yes\n"]


def test_white_space_that_no_token_covers_does_not_extend_an_answer() -> None:
    """Here an answer ends in white space without a token, where the mask of transformers runs on to the end of the text."""
    tokenizer = word_tokenizer(CHATML_MARKED.replace("<|im_end|>{% endgeneration %}", "<|im_end|> {% endgeneration %}"))
    messages = [{"role": role, "content": content} for role, content in (("user", "how"), ("assistant", "yes"), ("user", "are you"))]
    sample = Encoder(tokenizer, 512).encode(row(messages))
    theirs = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)["assistant_masks"]
    assert answers(sample, tokenizer) == ["yes <|im_end|>"]
    assert sum(theirs) > sample.loss_mask.sum()


def test_a_template_without_headers_supervises_what_follows_the_instruction() -> None:
    tokenizer = byte_level_tokenizer(INSTRUCTION)
    sample = Encoder(tokenizer, 512).encode(row(TWO_TURNS[1:]))
    assert answers(sample, tokenizer) == [" I am well, thank you. <|endoftext|>", " \nyes, naïve 🙂<|endoftext|>"]


def test_what_a_template_adds_behind_the_end_of_turn_is_not_supervised() -> None:
    tokenizer = byte_level_tokenizer(CHATML_ENDING)
    sample = Encoder(tokenizer, 512).encode(row(TWO_TURNS[:3]))
    assert tokenizer.decode(sample.input_ids).endswith("thank you. <|im_end|>\n<|endoftext|>")
    assert answers(sample, tokenizer) == ["I am well, thank you. <|im_end|>"]


def test_truncation_cuts_and_says_so() -> None:
    encoder = Encoder(byte_level_tokenizer(), 512)
    whole = encoder.encode(row(TWO_TURNS))
    length = len(whole.input_ids)
    assert not whole.truncated
    assert not Encoder(byte_level_tokenizer(), length).encode(row(TWO_TURNS)).truncated
    cut = Encoder(byte_level_tokenizer(), length - 1).encode(row(TWO_TURNS))
    assert cut.truncated
    np.testing.assert_array_equal(cut.input_ids, whole.input_ids[:-1])
    np.testing.assert_array_equal(cut.loss_mask, whole.loss_mask[:-1])


def test_a_template_that_rewrites_earlier_turns_is_refused_unless_only_the_last_turn_counts() -> None:
    tokenizer = byte_level_tokenizer(LAST_TURN_THINKS)
    with pytest.raises(DataError, match=r"tiny-bpe.*up to and including turn 2 differently.*generation.*last_turn_only"):
        Encoder(tokenizer, 512).encode(row(TWO_TURNS))
    sample = Encoder(tokenizer, 512, last_turn_only=True).encode(row(TWO_TURNS))
    assert answers(sample, tokenizer) == ["<think>\n</think>\n\nyes, naïve 🙂<|im_end|>"]


def test_a_template_that_ignores_the_generation_prompt_is_refused_for_conversations_only() -> None:
    tokenizer = byte_level_tokenizer(CHATML_WITHOUT_PROMPT)
    with pytest.raises(DataError, match="ignores add_generation_prompt"):
        Encoder(tokenizer, 512).encode(row(TWO_TURNS))
    text = tokenizer.apply_chat_template(TWO_TURNS, tokenize=False)
    assert len(answers(Encoder(tokenizer, 512).encode(Row("r", text=text)), tokenizer)) == 2


def test_text_whose_turns_close_differently_is_refused() -> None:
    encoder = Encoder(byte_level_tokenizer(TWO_CLOSINGS), 512)
    with pytest.raises(DataError, match=r"Answers of preformatted text cannot be located.*tiny-bpe"):
        encoder.encode(Row("r", text="<|im_start|>user\nhello<|im_end|>"))


def test_text_with_an_unclosed_answer_before_another_is_refused() -> None:
    """Here headers are not preceded by the end of turn, so the next one may stand inside what looks like an answer."""
    encoder = Encoder(byte_level_tokenizer(INSTRUCTION), 512)
    with pytest.raises(DataError, match=r"Row 'r': text: two assistant headers ' \[/INST\]'"):
        encoder.encode(Row("r", text="[INST] how [/INST] yes [INST] are you [/INST] no<|endoftext|>"))


def test_text_with_two_answers_in_a_row() -> None:
    tokenizer = byte_level_tokenizer()
    turns = "".join(f"<|im_start|>assistant\n{answer}<|im_end|>\n" for answer in ("hello", "yes"))
    sample = Encoder(tokenizer, 512).encode(Row("r", text="<|im_start|>user\nhow<|im_end|>\n" + turns))
    assert answers(sample, tokenizer) == ["hello<|im_end|>", "yes<|im_end|>"]


def test_text_of_a_template_that_ends_turns_by_a_newline() -> None:
    tokenizer = byte_level_tokenizer(PLAIN)
    sample = Encoder(tokenizer, 512).encode(Row("r", text="Q: hello\nAnswer: yes no\nQ: how\nAnswer: no yes\n"))
    assert answers(sample, tokenizer) == [" no\n", " yes\n"]


def test_text_that_ends_inside_an_answer_is_supervised_to_its_end() -> None:
    tokenizer = byte_level_tokenizer()
    sample = Encoder(tokenizer, 512).encode(Row("r", text="<|im_start|>user\nhello<|im_end|>\n<|im_start|>assistant\nyes"))
    assert answers(sample, tokenizer) == ["yes"]


def test_tools_and_a_template_file_reach_the_text(tmp_path: Path) -> None:
    path = tmp_path / "with_tools.jinja"
    path.write_text("{% for t in tools or [] %}[{{ t['name'] }}]{% endfor %}" + CHATML)
    encoder = Encoder(byte_level_tokenizer(None), 512, chat_template=str(path))
    tokenizer = byte_level_tokenizer()
    assert encoder.template_text == path.read_text()
    assert tokenizer.decode(encoder.encode(row(TWO_TURNS, tools=[{"name": "search"}])).input_ids).startswith("[search]<|im_start|>")
    assert tokenizer.decode(encoder.encode(row(TWO_TURNS)).input_ids).startswith("<|im_start|>")
    assert encoder.template_digest != Encoder(byte_level_tokenizer(), 512).template_digest


def test_prompt_ids_are_what_stands_before_the_answer() -> None:
    encoder = Encoder(byte_level_tokenizer(), 512)
    sample = encoder.encode(row(TWO_TURNS))
    prompt = encoder.prompt_ids(TWO_TURNS[:2])
    first = int(np.flatnonzero(sample.loss_mask)[0])
    np.testing.assert_array_equal(prompt, sample.input_ids[:first])


def test_given_tokens_are_taken_as_they_are_and_need_no_template() -> None:
    tokenizer = byte_level_tokenizer(None)
    sample = Encoder(tokenizer, 3).encode(Row("r", input_ids=[5, 6, 7, 8], loss_mask=[0, 1, 1, 0]))
    assert (sample.input_ids.tolist(), sample.loss_mask.tolist(), sample.truncated) == ([5, 6, 7], [False, True, True], True)
    with pytest.raises(DataError, match=rf"Row 'r'.*{len(tokenizer)} tokens"):
        Encoder(tokenizer, 3).encode(Row("r", input_ids=[len(tokenizer)], loss_mask=[1]))


def test_a_missing_template_names_tokenizer_and_key() -> None:
    with pytest.raises(DataError, match=r"'tiny-bpe' has no chat template.*data\.chat_template"):
        Encoder(byte_level_tokenizer(None), 512).encode(row(TWO_TURNS))


def test_a_template_that_refuses_a_row_names_it() -> None:
    tokenizer = byte_level_tokenizer("{{ raise_exception('roles must alternate') }}")
    with pytest.raises(DataError, match=r"^Row 'r': .*tiny-bpe.*roles must alternate"):
        Encoder(tokenizer, 512).encode(row(TWO_TURNS))


def test_a_row_that_was_read_is_refused_with_file_and_line(tmp_path: Path) -> None:
    """Token ranges, a missing template, and turns that are rendered differently once others follow."""
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps(row) for row in ({"input_ids": [9999], "loss_mask": [1]}, {"conversations": TWO_TURNS})))
    given, conversation = read_rows(path)
    for read, template, place in ((given, CHATML, 1), (conversation, None, 2), (conversation, LAST_TURN_THINKS, 2)):
        with pytest.raises(DataError, match=rf"rows\.jsonl:{place}: Row "):
            Encoder(byte_level_tokenizer(template), 512).encode(read)


def test_the_rows_that_the_page_shows_are_one_sample(tmp_path: Path) -> None:
    root = Path(__file__).parents[2]
    path = tmp_path / "rows.jsonl"
    path.write_text((root / "docs" / "data-format.md").read_text().partition("```json\n")[2].partition("```")[0])
    encoder = Encoder(AutoTokenizer.from_pretrained(root / "specforge" / "demo" / "target"), 512)
    conversation, given = (encoder.encode(read) for read in read_rows(path))
    np.testing.assert_array_equal(conversation.input_ids, given.input_ids)
    np.testing.assert_array_equal(conversation.loss_mask, given.loss_mask)


def test_rows_without_supervision_are_counted_and_named() -> None:
    rows = [Row("good", messages=TWO_TURNS), Row("asked", messages=TWO_TURNS[:2]), Row("tiny", input_ids=[1, 2], loss_mask=[1, 1])]
    encoded = encode_all(rows, Encoder(byte_level_tokenizer(), 40))
    assert [sample.id for sample in encoded.samples] == ["good"]
    assert (encoded.num_rows, encoded.truncated) == (3, 1)
    assert (encoded.unsupervised, encoded.unsupervised_ids) == (1, ("asked",))
    assert (encoded.short, encoded.short_ids) == (1, ("tiny",))
    with pytest.raises(DataError, match=r"tiny-bpe.*not one of 1 rows"):
        encode_all(rows[1:2], Encoder(byte_level_tokenizer(), 40))


def test_show_marks_the_supervised_tokens() -> None:
    tokenizer = byte_level_tokenizer()
    sample = Encoder(tokenizer, 512).encode(Row("r", "chat", messages=TWO_TURNS[1:3]))
    shown = show([sample, sample], tokenizer, 1)
    head, body = shown.split("\n", 1)
    assert head == f"--- r, domain chat: {len(sample.input_ids)} tokens, {sample.loss_mask.sum()} supervised"
    assert body == "<|im_start|>user\nhello there<|im_end|>\n<|im_start|>assistant\n⟦I am well, thank you. <|im_end|>⟧\n"
    assert "\033[32m⟦" in show([sample], tokenizer, 1, colour=True)
