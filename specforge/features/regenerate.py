"""The target's own answers to prompts: what drafters are trained on.

Every rank appends its answers to a file of its own in the hidden folder `.NAME.parts` beside the result, one JSON row a
line, so that a killed run goes on where it stopped, at any world size. At the end rank 0 joins them in the order of the prompts.
"""

import contextlib
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from specforge import files
from specforge.distributed.world import World
from specforge.errors import FeatureError
from specforge.features.generation import Answer, Sampling, generate
from specforge.features.rendezvous import Rendezvous
from specforge.features.store import require_unique
from specforge.features.target import Target

_SETTINGS = "settings.json"
_log = logging.getLogger(__name__)


class Prompt(Protocol):
    """A conversation up to the assistant's turn; prompt_ids [S] are its tokens, the assistant's header included."""

    @property
    def id(self) -> str: ...
    @property
    def domain(self) -> str: ...
    @property
    def messages(self) -> list[dict[str, Any]]: ...
    @property
    def prompt_ids(self) -> np.ndarray: ...


@dataclass(frozen=True)
class Regenerated:
    """Counts of prompts: answered, of these without an end within the allowed tokens, and left out as too long for the target."""

    answered: int
    unfinished: int
    too_long: int


def regenerate(
    prompts: Sequence[Prompt],
    load_target: Callable[[], Target],
    tokenizer: PreTrainedTokenizerBase,
    out_path: Path,
    world: World,
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    batch_rows: int = 128,
) -> Regenerated:
    """Write the answers to `out_path` as JSONL. All ranks call it together and see the same disk.

    A row has id, domain, conversations (the prompt's messages and the answer), finished, and the very tokens: input_ids
    [S] and loss_mask [S], 1 on the answer with its end-of-turn token. A prompt that leaves less than `max_new_tokens` of
    the target's positions gets a shorter answer; one that leaves none is left out, counted and logged.

    Raises:
        FeatureError: `out_path` exists, or an interrupted run with other settings or prompts left its answers there.
    """
    parts = out_path.with_name(f".{out_path.name}.parts")
    with files.writable(out_path.parent, FeatureError), Rendezvous(out_path.parent, world) as meeting, contextlib.ExitStack() as held:
        if world.is_main:
            lock = files.Lock(parts.with_name(f"{parts.name}.lock"))
            if not lock.try_acquire():
                raise FeatureError(f"{out_path}: another job writes it now; wait for it or choose another path.")
            held.callback(lock.release)
            _begin(out_path, parts, prompts, {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed})
        meeting.meet("begun")
        answered = {row["id"] for row in _answered(parts)}
        meeting.meet("read")
        target = load_target()
        room = target.config.max_position_embeddings
        pending = [prompt for prompt in prompts if prompt.id not in answered and len(prompt.prompt_ids) < room]
        pending.sort(key=lambda prompt: -len(prompt.prompt_ids))
        batches = [pending[first : first + batch_rows] for first in range(0, len(pending), batch_rows)]
        writer = _Answerer(target, tokenizer, Sampling(temperature, seed), max_new_tokens)
        writer.answer(batches[world.rank :: world.size], parts / f"rank-{world.rank:05d}.jsonl", world)
        meeting.meet("answered")
        counts = meeting.meet("joined", _join(prompts, parts, out_path, room) if world.is_main else None)
    return Regenerated(*counts[0])


def end_token_ids(target: Target, tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """The ids that end an answer: the target's generation settings and the tokenizer name them.

    Raises:
        FeatureError: neither names one, so that no answer could end.
    """
    settings = target.model.generation_config
    named = settings.eos_token_id if settings is not None else None
    ids = {*(named if isinstance(named, list) else [named]), tokenizer.eos_token_id} - {None}
    if not ids:
        raise FeatureError(
            f"target {target.path!r}: neither generation_config.json nor the tokenizer names eos_token_id; add the end-of-turn token's id."
        )
    return ids


class _Answerer:
    """Answers batches of prompts and appends the rows to a file."""

    def __init__(self, target: Target, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, max_new_tokens: int) -> None:
        self.target, self.tokenizer, self.sampling = target, tokenizer, sampling
        self.max_new_tokens = max_new_tokens
        self.end_ids = end_token_ids(target, tokenizer)

    def answer(self, batches: Sequence[Sequence[Prompt]], part: Path, world: World) -> None:
        """Append one row a prompt to `part`; a batch is on the disk before the next begins."""
        total = sum(len(batch) for batch in batches)
        _drop_torn_line(part)
        with part.open("a") as file, tqdm(total=total, unit="prompt", desc="answer", disable=None if world.is_main else True) as bar:
            for batch in batches:
                answers = generate(
                    self.target,
                    [prompt.prompt_ids for prompt in batch],
                    [prompt.id for prompt in batch],
                    max_new_tokens=self.max_new_tokens,
                    end_ids=self.end_ids,
                    sampling=self.sampling,
                )
                file.writelines(json.dumps(self._row(*pair), ensure_ascii=False) + "\n" for pair in zip(batch, answers, strict=True))
                file.flush()
                os.fsync(file.fileno())
                bar.update(len(batch))

    def _row(self, prompt: Prompt, answer: Answer) -> dict[str, Any]:
        said = answer.ids[:-1] if answer.finished else answer.ids
        content = self.tokenizer.decode(said, skip_special_tokens=True)
        prompt_ids = np.asarray(prompt.prompt_ids).tolist()
        return {
            "id": prompt.id,
            "domain": prompt.domain,
            "conversations": [*prompt.messages, {"role": "assistant", "content": content}],
            "finished": answer.finished,
            "input_ids": prompt_ids + answer.ids,
            "loss_mask": [0] * len(prompt_ids) + [1] * len(answer.ids),
        }


def _begin(out_path: Path, parts: Path, prompts: Sequence[Prompt], settings: dict[str, Any]) -> None:
    if out_path.exists():
        raise FeatureError(f"{out_path}: exists already; use it, remove it, or choose another path.")
    require_unique([prompt.id for prompt in prompts])
    content = hashlib.sha256()
    for prompt in prompts:
        content.update(json.dumps([prompt.id, np.asarray(prompt.prompt_ids).tolist()]).encode())
    settings = {**settings, "prompts": content.hexdigest()}
    parts.mkdir(parents=True, exist_ok=True)
    if not (parts / _SETTINGS).exists():
        files.write_json(parts / _SETTINGS, settings)
    earlier = files.read_json(parts / _SETTINGS, FeatureError)
    if earlier != settings:
        differing = ", ".join(key for key in settings if earlier.get(key) != settings[key])
        raise FeatureError(
            f"{parts}: an interrupted run with other settings ({differing}) left its answers there; "
            f"restore the settings to go on with it, or remove that folder to begin anew."
        )


def _answered(parts: Path) -> Iterator[dict[str, Any]]:
    """The rows of all parts; the last line of a part may be torn and is then no row."""
    for part in sorted(parts.glob("rank-*.jsonl")):
        with part.open() as file:
            for line in file:
                if line.endswith("\n"):
                    yield json.loads(line)


def _drop_torn_line(part: Path) -> None:
    if part.exists():
        with part.open("rb+") as file:
            file.truncate(file.read().rfind(b"\n") + 1)


def _join(prompts: Sequence[Prompt], parts: Path, out_path: Path, room: int) -> tuple[int, int, int]:
    rows = {row["id"]: row for row in _answered(parts)}
    too_long = [prompt.id for prompt in prompts if len(prompt.prompt_ids) >= room]
    if too_long:
        _log.warning("%d prompts leave no room in the target's %d positions and were left out: %s, ...", len(too_long), room, too_long[0])
    in_order = [rows[prompt.id] for prompt in prompts if prompt.id in rows]
    files.write_text(out_path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in in_order))
    shutil.rmtree(parts)
    return len(in_order), sum(not row["finished"] for row in in_order), len(too_long)
