"""Tokens of tasks, made once for a tokenizer and found again by what they were made of.

An entry is a folder named by the SHA-256 of its identity: the bytes of tokenizer and data, the kind of task, shots, delimiter, seeds, how
many examples, what stands before each text, and the version of these rules. Neither model nor ranks nor batches are in it; rows are whole
and are cut to a model's length when it is known. Entries are complete or absent and carry checksums.
"""

import hashlib
import json
import logging
from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors.numpy import save_file

from specforge import files
from specforge.errors import DataError
from specforge.suite.bundle import Task, read_examples
from specforge.suite.prompts import ORDER_SEED, Draw, chosen, without_questions, write_prompts
from specforge.suite.tokens import TaskTokens, tokenise

FORMAT = 1
_FILE = "tokens.safetensors"
_TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json", "vocab.txt", "merges.txt",
    "*.model", "*.spm", "*.tiktoken",
)  # fmt: skip
_log = logging.getLogger(__name__)

First = Literal["bos", "eos", "none"]
"""The token before each text; `eos` is what lm-evaluation-harness takes where a tokenizer has no BOS."""


class TokenCache:
    """Tokens of the process, then those below `root`, then made anew.

    Args:
        tokenizer_path: folder of a tokenizer.
        load: reads it; called only where tokens are missing.
    """

    def __init__(self, root: Path, tokenizer_path: Path, load: Callable[[], Any], first: First = "bos") -> None:
        self.root, self._load, self._first = root, load, first
        self._fingerprints = files.Fingerprints(root / ".fingerprints.json")
        self._tokenizer_digest = self._digest_of(tokenizer_path)
        self._held: dict[str, TaskTokens] = {}

    def key(self, task: Task, draw: Draw, *, no_question: bool = False) -> str:
        if not task.path.is_file():
            raise DataError(f"{task.path}: there is no such file; task {task.label!r} needs it, or leave it out by --tasks.")
        identity = {
            "tokenizer": self._tokenizer_digest, "data": self._fingerprints.sha256(task.path), "kind": task.kind, "shots": task.shots,
            "delimiter": task.delimiter, "order_seed": ORDER_SEED, **asdict(draw), "first": self._first,
            "no_question": no_question, "format": FORMAT,
        }  # fmt: skip
        return hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()

    def get(self, task: Task, draw: Draw, *, no_question: bool = False) -> TaskTokens:
        """Of many processes that ask at once, one makes the tokens and the others wait for it.

        Args:
            no_question: the answers alone, `prompts.without_questions`.

        Raises:
            DataError: the data or the tokenizer cannot be used.
        """
        key = self.key(task, draw, no_question=no_question)
        if key not in self._held:
            entry = self.root / key
            try:
                self._held[key] = self._read(entry)  # an entry is complete or absent, so who only reads needs neither lock nor rights
            except DataError:
                with files.writable(self.root, DataError), files.Lock(self.root / f".{key}.lock"):
                    found = self._read_or_discard(entry) if entry.exists() else None
                    self._held[key] = found or self._make(entry, task, draw, no_question)
        return self._held[key]

    def _digest_of(self, folder: Path) -> str:
        found = sorted(path for name in _TOKENIZER_FILES for path in folder.glob(name))
        if not found:
            raise DataError(f"{folder}: {'holds no tokenizer' if folder.is_dir() else 'is no folder'}; give --tokenizer the folder of one.")
        return hashlib.sha256("".join(f"{path.name} {self._fingerprints.sha256(path)}\n" for path in found).encode()).hexdigest()

    def _make(self, entry: Path, task: Task, draw: Draw, no_question: bool) -> TaskTokens:
        prompts = write_prompts(task, chosen(read_examples(task), draw), draw)
        if no_question:
            prompts = without_questions(prompts)
        tokenizer = self._load()
        bos = None if self._first == "none" else _special(tokenizer, self._first)
        tokens = tokenise(prompts, task.kind, lambda texts: tokenizer(texts, add_special_tokens=False)["input_ids"], bos)
        if bos is None and (tokens.scored_R == 0).any():
            raise DataError(f"task {task.label!r}: some texts are scored from their first token, which nothing predicts; choose --bos eos.")
        files.sweep(entry)
        with files.staging(entry) as folder:
            save_file(tokens.tensors(), folder / _FILE)
        return tokens

    def _read(self, entry: Path) -> TaskTokens:
        files.verify(entry, DataError, fingerprints=self._fingerprints)
        with (
            files.open_tensors(entry / _FILE, DataError) as stored,
            files.foreign(entry / _FILE, DataError, "numpy has no such numbers"),
        ):
            arrays = {name: stored.get_tensor(name).numpy() for name in stored.keys()}  # noqa: SIM118
        return _checked(arrays, entry)

    def _read_or_discard(self, entry: Path) -> TaskTokens | None:
        try:
            return self._read(entry)
        except DataError as damage:
            _log.warning("tokens are damaged and will be made again: %s", damage)
            files.discard(entry)
            return None


def _special(tokenizer: Any, name: str) -> int:
    token_id = getattr(tokenizer, f"{name}_token_id")
    if token_id is None:
        raise DataError(
            f"--bos {name}: the tokenizer has no {name.upper()} token; choose --bos eos (as lm-evaluation-harness does) or --bos none."
        )
    return int(token_id)


def _checked(arrays: dict[str, np.ndarray], entry: Path) -> TaskTokens:
    """Offsets that grow from 0 to the number of what they divide, and spans inside their rows."""
    names = {field.name for field in fields(TaskTokens)}
    if arrays.keys() != names or any(array.ndim != 1 or array.dtype.kind != "i" for array in arrays.values()):
        raise DataError(f"{entry / _FILE}: does not hold the integers {', '.join(sorted(names))}; it is of another version.")
    tokens = TaskTokens(**arrays)
    rows, examples = len(tokens.row_start_R1) - 1, len(tokens)
    offsets = ((tokens.row_start_R1, len(tokens.token_N)), (tokens.example_start_E1, rows))
    per_row = (tokens.scored_R, tokens.continuation_R, tokens.chars_R, tokens.bytes_R)
    good = (
        all(len(x) > 1 and x[0] == 0 and x[-1] == end and (x[:-1] < x[1:]).all() for x, end in offsets)
        and len(tokens.example_start_E1) == examples + 1
        and all(len(x) == rows and (x >= 0).all() for x in per_row)
        and (tokens.scored_R <= tokens.lengths_R).all()
        and (tokens.continuation_R <= tokens.lengths_R).all()
        and (tokens.token_N >= 0).all()
        and ((tokens.gold_E >= 0) & (tokens.gold_E < np.diff(tokens.example_start_E1))).all()
        and len(tokens.classes) == 1
    )
    if not good:
        raise DataError(f"{entry / _FILE}: its offsets and spans do not fit together.")
    return tokens
