"""Stores by their address: `mem://NAME` within this process, `file://PATH` on a disk."""

from pathlib import Path

from specforge.errors import FeatureError
from specforge.features.memory import MemoryFeatureStore
from specforge.features.store import LocalFeatureStore

_NAMED: dict[str, MemoryFeatureStore] = {}


def offer(name: str, store: MemoryFeatureStore) -> str:
    """Make `store` known to this process; returns its address. An earlier one of that name is replaced."""
    _NAMED[name] = store
    return f"mem://{name}"


def open_store(uri: str) -> LocalFeatureStore | MemoryFeatureStore:
    """
    Raises:
        FeatureError: nothing is there, or the address has another form.
    """
    scheme, _, rest = uri.partition("://")
    if scheme == "mem" and rest in _NAMED:
        return _NAMED[rest]
    if scheme == "file":
        return LocalFeatureStore(Path(rest))
    offered = ", ".join(f"mem://{name}" for name in sorted(_NAMED)) or "no mem:// store is offered"
    raise FeatureError(f"feature store {uri!r}: must be file://PATH or an offered mem://NAME ({offered}).")
