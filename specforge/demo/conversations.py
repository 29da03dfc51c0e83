"""Short conversations about Python sources, in four domains, made from the documents of one split.

`complete`: the rest of a function. `docstring`: the summary line of a function. `prose`: the rest of a paragraph of
documentation. `literal`: a list or dictionary from the sources, transformed by a stated rule.
"""

import ast
import hashlib
import json
import random
import re
import textwrap
import warnings
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from specforge.demo.corpus import Document, Split, documents

DOMAINS = ("complete", "docstring", "prose", "literal")
_PROMPT_CHARS = 420
_ANSWER_CHARS = 150

_ASK = {
    "complete": ("Complete this function.", "Write the rest of this function.", "Finish the function:"),
    "docstring": (
        "Write a one-line docstring for this function.",
        "Summarise this function in one sentence.",
        "What does this function do?",
    ),
    "prose": ("Continue this documentation.", "Complete the paragraph.", "Finish this text:"),
}

Exchange = tuple[str, str]
"""What the user asks and what is answered."""


@lru_cache(maxsize=64)
def _nodes(document: Document) -> tuple[ast.AST, ...]:
    """All of the document's syntax tree, breadth first; empty if this Python cannot read it."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        try:
            return tuple(ast.walk(ast.parse(document.text)))
        except (SyntaxError, ValueError):
            return ()


def _functions(document: Document) -> Iterator[tuple[str, ast.FunctionDef]]:
    """Source (dedented) and tree of the document's functions."""
    lines = document.text.splitlines()
    for node in _nodes(document):
        if isinstance(node, ast.FunctionDef) and node.end_lineno is not None and node.end_lineno - node.lineno < 40:
            yield textwrap.dedent("\n".join(lines[node.lineno - 1 : node.end_lineno])), node


def _complete(document: Document, choice: random.Random) -> Iterator[Exchange]:
    for source, node in _functions(document):
        lines = source.splitlines()
        if len(lines) < 3:
            continue
        body_start = node.body[0].lineno - node.lineno
        cut = choice.randrange(max(body_start, 1), len(lines))
        head, answer = "\n".join(lines[:cut]), "\n".join(lines[cut:]).rstrip()
        if 20 <= len(answer) <= _ANSWER_CHARS and 30 <= len(head) <= _PROMPT_CHARS:
            yield f"{choice.choice(_ASK['complete'])}\n```python\n{head}\n```", f"```python\n{answer}\n```"


def _docstring(document: Document, choice: random.Random) -> Iterator[Exchange]:
    for source, node in _functions(document):
        text = ast.get_docstring(node)
        if not text or len(node.body) < 2:
            continue
        summary = " ".join(text.split("\n\n")[0].split())
        lines = source.splitlines()
        first, last = node.body[0].lineno - node.lineno, (node.body[0].end_lineno or 0) - node.lineno
        bare = "\n".join(lines[:first] + lines[last + 1 :])
        if 15 <= len(summary) <= _ANSWER_CHARS and 30 <= len(bare) <= _PROMPT_CHARS:
            yield f"{choice.choice(_ASK['docstring'])}\n```python\n{bare}\n```", summary


def _prose(document: Document, choice: random.Random) -> Iterator[Exchange]:
    for node in _nodes(document):
        if not isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef):
            continue
        for paragraph in (ast.get_docstring(node) or "").split("\n\n"):
            words = paragraph.split()
            text = " ".join(words)
            if (
                not 100 <= len(text) <= _PROMPT_CHARS + _ANSWER_CHARS
                or re.search(r">>>|::|[|=]{3}|:param|\.\. ", text)
                or not text[0].isupper()
            ):
                continue
            ends = [i + 1 for i, word in enumerate(words) if word.endswith((".", "?", "!"))]
            cut = choice.randrange(len(words) // 3, max(2 * len(words) // 3, len(words) // 3 + 1))
            end = next((e for e in ends if e >= cut + 4), None)
            if end is None:
                continue
            answer = " ".join(words[cut:end])
            if 25 <= len(answer) <= _ANSWER_CHARS:
                yield f"{choice.choice(_ASK['prose'])}\n{' '.join(words[:cut])}", answer


def _quoted(value: Any) -> str:
    return json.dumps(value)


RULES: dict[str, tuple[type, Callable[[Any], str]]] = {
    "Reverse this list.": (list, lambda items: repr(items[::-1])),
    "Sort this list.": (list, lambda items: repr(sorted(items))),
    "Turn this list into a tuple.": (list, lambda items: repr(tuple(items))),
    "Write this list as JSON.": (list, _quoted),
    "Write every string of this list in capitals.": (
        list,
        lambda items: repr([item.upper() if isinstance(item, str) else item for item in items]),
    ),
    "Give the first and the last item.": (list, lambda items: f"{items[0]!r} and {items[-1]!r}"),
    "How many items are in this list?": (list, lambda items: f"There are {len(items)} items."),
    "Number the items of this list.": (list, lambda items: "\n".join(f"{i}. {item}" for i, item in enumerate(items, 1))),
    "List the keys of this dictionary.": (dict, lambda table: repr(list(table))),
    "List the values of this dictionary.": (dict, lambda table: repr(list(table.values()))),
    "Swap keys and values.": (dict, lambda table: repr({value: key for key, value in table.items()})),
    "Write this dictionary as JSON.": (dict, _quoted),
}


def _literal(document: Document, choice: random.Random) -> Iterator[Exchange]:
    for node in _nodes(document):
        if not isinstance(node, ast.List | ast.Tuple | ast.Dict):
            continue
        try:
            value = ast.literal_eval(node)
        except (ValueError, TypeError, SyntaxError):
            continue
        value = list(value) if isinstance(value, tuple) else value
        flat = value if isinstance(value, list) else [*value, *value.values()]
        kinds = {type(item) for item in flat}
        if not 2 <= len(value) <= 8 or len(kinds) > 1 + isinstance(value, dict) or not kinds <= {str, int} or len(set(map(str, flat))) < 2:
            continue
        rule = choice.choice([text for text, (kind, _) in RULES.items() if kind is type(value)])
        shown, answer = repr(value), RULES[rule][1](value)
        if 8 <= len(shown) <= 140 and len(answer) <= _ANSWER_CHARS:
            yield f"{rule}\n{shown}", answer


_MAKERS: dict[str, Callable[[Document, random.Random], Iterator[Exchange]]] = {
    "complete": _complete, "docstring": _docstring, "prose": _prose, "literal": _literal,
}  # fmt: skip


def conversations(split: Split, limit: int | None = None, per_document: int = 6) -> Iterator[dict[str, Any]]:
    """Rows `{"id", "domain", "package", "conversations"}`, the domains in turn, no prompt twice.

    Args:
        limit: stop after so many rows.
        per_document: at most so many rows of one domain from one document.
    """
    seen: set[str] = set()
    streams = {domain: _rows(split, domain, per_document, seen) for domain in DOMAINS}
    given = 0
    while streams and (limit is None or given < limit):
        for domain in [*streams]:
            row = next(streams[domain], None)
            if row is None:
                del streams[domain]
            elif limit is None or given < limit:
                given += 1
                yield row


def _rows(split: Split, domain: str, per_document: int, seen: set[str]) -> Iterator[dict[str, Any]]:
    for document in documents(split):
        choice = random.Random(f"{domain}/{document.name}")
        exchanges = list(_MAKERS[domain](document, choice))
        choice.shuffle(exchanges)
        taken = 0
        for ask, answer in exchanges:
            if ask in seen or not (ask + answer).isascii():  # escapes in literals can be halves of characters, which no file may hold
                continue
            seen.add(ask)
            taken += 1
            name = hashlib.sha256(f"{document.name}\0{ask}".encode()).hexdigest()[:12]
            turns = [{"role": "user", "content": ask}, {"role": "assistant", "content": answer}]
            yield {"id": f"{domain}-{name}", "domain": domain, "package": document.package, "conversations": turns}
            if taken == per_document:
                break
