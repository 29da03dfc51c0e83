"""Progress of a loop: a bar on a terminal, a line every few seconds in a log file, nothing on ranks other than 0."""

import sys
import time
from collections.abc import Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

from tqdm import tqdm

if TYPE_CHECKING:
    from specforge.distributed import World


class Progress(Protocol):
    """What a loop may do with its progress; also a context manager that closes it."""

    def update(self, n: int = 1) -> object: ...

    def set_postfix(self, numbers: Mapping[str, float | str]) -> None: ...

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None: ...


def progress(total: int | None, initial: int = 0, description: str = "", world: "World | None" = None) -> Progress:
    """Show how far a loop of `total` rounds is, `initial` of which were done before; `total` None: unknown."""
    if world is not None and not world.is_main:
        return tqdm(disable=True)
    if sys.stderr.isatty():
        return tqdm(total=total, initial=initial, desc=description, dynamic_ncols=True)
    return LineProgress(total, initial, description)


class LineProgress:
    """Plain lines on stderr, at most one in `every_s` seconds, and one at the end unless the loop was shorter than that."""

    def __init__(self, total: int | None, initial: int = 0, description: str = "", every_s: float = 10.0) -> None:
        self._total, self._initial, self._description, self._every_s = total, initial, description, every_s
        self._done, self._shown, self._postfix = initial, initial, ""
        self._begun_s = self._shown_s = time.monotonic()

    def update(self, n: int = 1) -> None:
        self._done += n
        if time.monotonic() - self._shown_s >= self._every_s:
            self._show()

    def set_postfix(self, numbers: Mapping[str, float | str]) -> None:
        self._postfix = "  ".join(f"{name} {value if isinstance(value, str) else f'{value:.4g}'}" for name, value in numbers.items())

    def close(self) -> None:
        if self._done > self._shown and time.monotonic() - self._begun_s >= self._every_s:
            self._show()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def _show(self) -> None:
        now_s = time.monotonic()
        elapsed_s = now_s - self._begun_s
        a_second = (self._done - self._initial) / max(elapsed_s, 1e-9)
        words = [self._description, str(self._done) if self._total is None else f"{self._done}/{self._total}", f"{a_second:.3g}/s"]
        if self._total is not None and a_second > 0:
            words.append(f"{tqdm.format_interval((self._total - self._done) / a_second)} left")
        print("  ".join(word for word in [*words, self._postfix] if word), file=sys.stderr, flush=True)
        self._shown, self._shown_s = self._done, now_s
