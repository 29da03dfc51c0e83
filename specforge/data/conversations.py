"""Rows of a data set: conversations, preformatted text or tokens, each under an id of its own."""

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from specforge.errors import DataError

ROLES = ("system", "developer", "user", "assistant", "tool")
_CONTENTS = ("conversations", "text", "input_ids")
_CORRECT = "correct the row or remove it"

Message = dict[str, Any]
Tools = list[Any]
"""Descriptions of tools, each a JSON object that is handed to the template as it is."""


@dataclass(frozen=True)
class Row:
    """One row with exactly one kind of content: `messages`, `text` or `input_ids` with `loss_mask`; the others are None.

    `domain` groups the numbers of an evaluation and is "" where the row names none. `text` already has the chat template applied.
    """

    id: str
    domain: str = ""
    messages: list[Message] | None = None
    tools: Tools | None = None
    text: str | None = None
    input_ids: list[int] | None = None
    loss_mask: list[int] | None = None
    place: str = field(default="", compare=False)
    """Where it was read, as `file:line`."""

    @property
    def name(self) -> str:
        """What a message calls it."""
        return f"{self.place}: Row {self.id!r}" if self.place else f"Row {self.id!r}"


def read_rows(path: str | Path) -> list[Row]:
    """The rows of a JSONL file (or, by its suffix, a `.parquet` file) in file order.

    A row without `id` gets one from a hash of its content. Raises DataError with `file:line:` (Parquet: the row's number from
    1 on) for a row that breaks a rule, and for ids that occur twice, a missing file or an empty one.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file; data.train_path and data.eval_path name one JSONL or Parquet file.")
    records = _parquet_records(path) if path.suffix == ".parquet" else _json_records(path)
    rows: list[Row] = []
    line_of_id: dict[str, int] = {}
    for number, record in records:
        try:
            row = replace(parse_row(record), place=f"{path}:{number}")
        except DataError as error:
            raise DataError(f"{path}:{number}: {error}") from None
        if row.id in line_of_id:
            raise DataError(
                f"{path}:{number}: id={row.id!r} is already taken by line {line_of_id[row.id]}; "
                "ids must be unique (rows of equal content and no id share one): remove one of the two or give it another id."
            )
        line_of_id[row.id] = number
        rows.append(row)
    if not rows:
        raise DataError(f"{path}: holds no rows; give a file with at least one conversation.")
    return rows


def parse_row(record: object) -> Row:
    """One record as a Row. Raises DataError, without a place, naming the key and the rule that it breaks."""
    if not isinstance(record, dict):
        raise DataError(f"a row must be an object with keys, not {type(record).__name__}.")
    record = {key: value for key, value in record.items() if value is not None}
    present = [key for key in _CONTENTS if key in record]
    if present == ["conversations", "input_ids"]:  # the very tokens that a target answered with, beside what they say
        present = ["input_ids"]
    if len(present) != 1:
        hint = "; `messages` is called conversations here" if not present and "messages" in record else ""
        raise DataError(f"keys {sorted(record)}: a row holds exactly one of {', '.join(_CONTENTS)}; it has {len(present)} of them{hint}.")
    row_id, domain = _id_of(record), record.get("domain", "")
    _require(isinstance(domain, str), "domain", domain, "must be a string")
    if present == ["conversations"]:
        return Row(row_id, domain, messages=_messages(record["conversations"]), tools=_tools(record.get("tools")))
    if present == ["text"]:
        _require(isinstance(record["text"], str) and record["text"] != "", "text", record["text"], "must be a string that is not empty")
        return Row(row_id, domain, text=record["text"])
    ids, mask = record["input_ids"], record.get("loss_mask", [])
    _require(_whole_numbers(ids) and min(ids, default=-1) >= 0, "input_ids", ids, "must be a list of token ids, at least one")
    _require(isinstance(mask, list) and all(value in (0, 1) for value in mask), "loss_mask", mask, "must be a list of 0 and 1")
    _require(len(ids) == len(mask), "loss_mask", f"[{len(mask)} values]", f"must be as long as input_ids ({len(ids)})")
    return Row(row_id, domain, input_ids=ids, loss_mask=[int(value) for value in mask])


def split_rows(rows: Sequence[Row], fraction: float) -> tuple[list[Row], list[Row]]:
    """(training, held-out) rows: held out are those whose id hashes below `fraction`, whatever the order or the other rows.

    Raises DataError if one side stays empty, which small files make likely.
    """
    train = [row for row in rows if _uniform(row.id) >= fraction]
    heldout = [row for row in rows if _uniform(row.id) < fraction]
    if not train or not heldout:
        raise DataError(
            f"data.eval_fraction={fraction} leaves {len(train)} rows to train on and {len(heldout)} to evaluate on; "
            "change it, add rows, or name held-out rows with data.eval_path."
        )
    return train, heldout


def prompt_of(row: Row) -> list[Message]:
    """What the target is asked so that it answers again: the messages up to, and without, a closing assistant turn.

    A conversation that ends with another role is a prompt as it stands. Raises DataError for rows that are not conversations.
    """
    if row.messages is None:
        raise DataError(f"{row.name} is no conversation: only rows with `conversations` can be answered again by the target.")
    prompt = row.messages[:-1] if row.messages[-1]["role"] == "assistant" else row.messages
    if not prompt:
        raise DataError(f"{row.name} holds an assistant turn only: nothing is asked; begin it with a user turn.")
    return prompt


def _json_records(path: Path) -> Iterator[tuple[int, object]]:
    with path.open("rb") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except ValueError as error:
                way_out = "it looks like UTF-16, so save the file as UTF-8" if b"\0" in line else "every line holds one object"
                raise DataError(f"{path}:{number}: not a line of JSON in UTF-8 ({error}); {way_out}.") from None


def _parquet_records(path: Path) -> Iterator[tuple[int, object]]:
    try:
        with pq.ParquetFile(path) as file:
            records = (record for batch in file.iter_batches() for record in batch.to_pylist())
            for number, record in enumerate(records, start=1):
                yield number, _without_nulls(record)
    except (pa.ArrowException, OSError) as error:
        raise DataError(f"{path}: not a readable Parquet file ({error}); write it again or give JSONL.") from None


def _without_nulls(value: Any) -> Any:
    """Columns of structs give every row every key; those that a row did not have come back as null and are left out."""
    if isinstance(value, dict):
        return {key: _without_nulls(item) for key, item in value.items() if item is not None}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value


def _id_of(record: dict[str, Any]) -> str:
    if "id" not in record:
        content = json.dumps(record, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(content.encode("utf-8", "surrogatepass")).hexdigest()[:16]
    given = record["id"]
    _require(isinstance(given, str | int) and not isinstance(given, bool) and given != "", "id", given, "must be a string or whole number")
    return str(given)


def _messages(conversation: Any) -> list[Message]:
    _require(isinstance(conversation, list) and len(conversation) > 0, "conversations", conversation, "must be a list of at least one turn")
    return [_message(turn, number) for number, turn in enumerate(conversation)]


def _message(turn: Any, number: int) -> Message:
    key = f"conversations[{number}]"
    _require(isinstance(turn, dict), key, turn, "must be an object with role and content")
    message = {name: value for name, value in turn.items() if value is not None}
    role, content = message.get("role"), message.get("content")
    sharegpt = "give role and content instead of from and value, user for human and assistant for gpt"
    _require(role in ROLES, f"{key}.role", role, f"must be one of {', '.join(ROLES)}", sharegpt if "from" in message else _CORRECT)
    called = role == "assistant" and bool(message.get("tool_calls"))
    in_parts = "join the texts of its parts into one"
    _require(
        isinstance(content, str) or (content is None and called),
        f"{key}.content", content, "must be a string", in_parts if isinstance(content, list) else _CORRECT,
    )  # fmt: skip
    return message


def _tools(tools: Any) -> Tools | None:
    valid = tools is None or (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools))
    _require(valid, "tools", tools, "must be a list of tool descriptions (objects)")
    return tools or None


def _whole_numbers(values: object) -> bool:
    return isinstance(values, list) and all(isinstance(value, int) and not isinstance(value, bool) for value in values)


def _require(condition: bool, key: str, value: object, rule: str, way_out: str = _CORRECT) -> None:
    if not condition:
        shown = repr(value)
        raise DataError(f"{key}={shown if len(shown) <= 80 else shown[:77] + '...'}: {rule}; {way_out}.")


def _uniform(row_id: str) -> float:
    """A number in [0, 1) that depends on the id alone."""
    return int.from_bytes(hashlib.sha256(row_id.encode("utf-8", "surrogatepass")).digest()[:8], "big") / 2**64
