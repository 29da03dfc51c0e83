"""Draft architectures: networks without a loss."""
