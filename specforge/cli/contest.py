"""The same prompts decoded with a draft and by the target alone, turn by turn, so that one run compares both."""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from specforge.cli.draft import Draft
from specforge.cli.inputs import load_tokenizer
from specforge.cli.streaming import Printer
from specforge.config.schema import ModelConfig, RunConfig
from specforge.data.conversations import Row, prompt_of, read_rows
from specforge.data.template import Encoder
from specforge.decode.drafter import Drafter, NoDrafter
from specforge.decode.engine import Decoded, Decoder
from specforge.decode.sampling import Sampling
from specforge.decode.session import TargetSession
from specforge.decode.statistics import Rounds, mean_of_texts
from specforge.errors import DataError
from specforge.eval.acceptance import answers
from specforge.features.regenerate import end_token_ids
from specforge.features.tables import TargetConfig
from specforge.features.target import Target


@dataclass(frozen=True)
class Asked:
    """A prompt [S] and how many tokens may follow it."""

    id: str
    domain: str
    prompt_ids: np.ndarray
    max_new_tokens: int


@dataclass(frozen=True)
class Turn:
    """A batch of prompts, decoded. `alone` is empty without a baseline."""

    asked: list[Asked]
    texts: list[Decoded]
    seconds: float
    alone: list[Decoded]
    alone_s: float


def read_prompts(
    target_path: Path, texts: Sequence[str] | None, rows_path: str | None, max_new_tokens: int
) -> tuple[list[Asked], PreTrainedTokenizerBase]:
    """Each text as a user's message, or each row up to its closing answer, under the target's chat template.

    Raises:
        DataError: a row asks nothing, or leaves no room for one new token in the target's positions.
    """
    room = TargetConfig.read(target_path).max_position_embeddings
    tokenizer = load_tokenizer(RunConfig(model=ModelConfig(target_path=str(target_path))))
    encoder = Encoder(tokenizer, max_length=sys.maxsize)
    if rows_path is None:
        rows = [Row(f"prompt-{number}", messages=[{"role": "user", "content": text}]) for number, text in enumerate(texts or (), 1)]
    else:
        rows = read_rows(rows_path)
    prompts = []
    for row in rows:
        ids_S = _prompt_ids(row, encoder).astype(np.int64)
        if len(ids_S) >= room:
            raise DataError(
                f"prompt {row.id!r}: its {len(ids_S)} tokens and one new one exceed the target's max_position_embeddings={room}; "
                "shorten it or leave it out."
            )
        prompts.append(Asked(row.id, row.domain, ids_S, min(max_new_tokens, room - len(ids_S))))
    return prompts, tokenizer


def _prompt_ids(row: Row, encoder: Encoder) -> np.ndarray:
    """The messages before the closing answer or, of a row of tokens, all that comes before the last supervised run."""
    if row.input_ids is None:
        return encoder.prompt_ids(prompt_of(row), row.tools)
    sample = encoder.encode(row)
    first = [len(sample.input_ids), *(first for first, _ in answers(sample.loss_mask))][-1]
    if first == 0:
        raise DataError(f"{row.name} holds an answer only: nothing is asked; give it a prompt or leave it out.")
    return sample.input_ids[:first]


class Contest:
    """Decodes batches with the draft, printing what it says, and then with the target alone."""

    def __init__(
        self,
        target: Target,
        tokenizer: PreTrainedTokenizerBase,
        draft: Draft,
        sampling: Sampling,
        *,
        sampled_draft: bool,
        seed: int,
        baseline: bool,
        colour: bool,
    ) -> None:
        self.target, self.greedy, self.draft_tokens = target, sampling.temperature == 0, draft.draft_tokens
        self._tokenizer, self._colour, self._sampling = tokenizer, colour, sampling
        self._seed, self._end_ids = seed, end_token_ids(target, tokenizer)
        drafter = draft.drafter(target, sampling if sampled_draft else None, self._generator(1))
        self._drafted = self._decoder(drafter)
        self._alone = self._decoder(NoDrafter()) if baseline and draft.draft_tokens else None
        self._warm = False

    def turn(self, asked: Sequence[Asked]) -> Turn:
        """Both decode the batch. The first batch is begun once before it is timed, since first calls take longer."""
        if not self._warm:
            self._warm = True
            for decoder in (self._drafted, self._alone):
                if decoder is not None:
                    decoder.decode([each.prompt_ids for each in asked], [min(each.max_new_tokens, 2) for each in asked])
        printer = Printer(self._tokenizer, self._colour) if len(asked) == 1 else None
        if printer is not None:
            print(f"[{asked[0].id}] ", end="", flush=True)
        texts, seconds = self._timed(self._drafted, asked, printer)
        if printer is None:
            for each, text in zip(asked, texts, strict=True):
                print(f"[{each.id}] {self._tokenizer.decode(text.ids, skip_special_tokens=True)}")
        else:
            printer.end()
        alone, alone_s = ([], 0.0) if self._alone is None else self._timed(self._alone, asked, None)
        return Turn(list(asked), texts, seconds, alone, alone_s)

    def margin(self, context_S: np.ndarray) -> float:
        """By how much the target's best logit after the context exceeds its second best."""
        session = TargetSession(self.target, 1, len(context_S))
        last_B1H = session.prefill([context_S]).last_BNH[:, -1:]
        best, second = session.logits(last_B1H)[0, 0].topk(2).values.tolist()
        return best - second

    def _decoder(self, drafter: Drafter) -> Decoder:
        return Decoder(self.target, drafter, end_ids=self._end_ids, sampling=self._sampling, generator=self._generator(0))

    def _generator(self, stream: int) -> torch.Generator:
        return torch.Generator(self.target.device).manual_seed(2 * self._seed + stream)

    def _timed(self, decoder: Decoder, asked: Sequence[Asked], printer: Printer | None) -> tuple[list[Decoded], float]:
        self._settle()
        began_s = time.perf_counter()
        texts = decoder.decode(
            [each.prompt_ids for each in asked], [each.max_new_tokens for each in asked], None if printer is None else printer.watch
        )
        self._settle()
        return texts, time.perf_counter() - began_s - (0.0 if printer is None else printer.spent_s)

    def _settle(self) -> None:
        if self.target.device.type == "cuda":
            torch.cuda.synchronize(self.target.device)


def numbers_of(contest: Contest, turns: Sequence[Turn]) -> dict[str, Any]:
    """Rounds, over all texts and by domain; speed, prompts included; where greedy texts are not the target's own."""
    asked, texts = [each for turn in turns for each in turn.asked], [text for turn in turns for text in turn.texts]
    new_tokens, seconds = sum(len(text.ids) for text in texts), sum(turn.seconds for turn in turns)
    numbers: dict[str, Any] = {
        "prompts": len(asked), "new_tokens": new_tokens, "finished": sum(text.finished for text in texts),
        **_rounds(texts, contest.draft_tokens), "tokens_per_s": new_tokens / seconds,
    }  # fmt: skip
    domains = sorted({each.domain for each in asked} - {""})
    numbers["domains"] = {
        domain: _rounds([text for each, text in zip(asked, texts, strict=True) if each.domain == domain], contest.draft_tokens)
        for domain in domains
    }
    alone = [text for turn in turns for text in turn.alone]
    if alone:
        numbers["target_tokens_per_s"] = sum(len(text.ids) for text in alone) / sum(turn.alone_s for turn in turns)
        numbers["speed_up"] = numbers["tokens_per_s"] / numbers["target_tokens_per_s"]
    if alone and contest.greedy:
        numbers |= _differences(contest, asked, texts, alone)
    return numbers


def _rounds(texts: Sequence[Decoded], draft_tokens: int) -> dict[str, Any]:
    rounds = Rounds.of(texts, draft_tokens)
    return {**rounds.numbers(), "mean_tokens_per_round": mean_of_texts(texts) if rounds.rounds else None}


def _differences(contest: Contest, asked: Sequence[Asked], texts: Sequence[Decoded], alone: Sequence[Decoded]) -> dict[str, Any]:
    differing = [place for place, (text, other) in enumerate(zip(texts, alone, strict=True)) if text.ids != other.ids]
    numbers: dict[str, Any] = {"same_texts": len(texts) - len(differing), "first_divergence": None}
    if differing:
        first, text, other = asked[differing[0]], texts[differing[0]].ids, alone[differing[0]].ids
        place = next(i for i, (a, b) in enumerate(zip(text, other, strict=False)) if a != b)
        margin = contest.margin(np.concatenate([first.prompt_ids, np.array(other[:place], dtype=np.int64)]))
        numbers["first_divergence"] = {
            "id": first.id, "place": place, "draft_token": text[place], "target_token": other[place], "margin": margin,
        }  # fmt: skip
    return numbers
