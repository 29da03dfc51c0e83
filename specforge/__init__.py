"""specforge: train, evaluate and ship the draft models of speculative decoding."""

__version__ = "0.1.0"
