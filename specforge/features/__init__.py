"""What the target says about the data: its hidden states and choices, captured once and kept in checked stores."""

from specforge.features.store import LocalFeatureStore

__all__ = ["LocalFeatureStore"]
