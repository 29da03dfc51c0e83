"""What the target says about the data: its hidden states and choices, stored, shared between processes, or fresh from the target."""

from specforge.features.loader import FeatureDataLoader
from specforge.features.memory import ConsumedError, MemoryFeatureStore
from specforge.features.online import OnlineFeatureStore
from specforge.features.shared import SharedDirFeatureStore
from specforge.features.source import FeatureStore
from specforge.features.store import LocalFeatureStore
from specforge.features.uri import open_store

__all__ = [
    "FeatureDataLoader",
    "FeatureStore",
    "LocalFeatureStore",
    "SharedDirFeatureStore",
    "OnlineFeatureStore",
    "MemoryFeatureStore",
    "ConsumedError",
    "open_store",
]
