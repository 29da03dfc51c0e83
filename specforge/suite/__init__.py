"""Scoring a language model on an in-context-learning suite (CORE: Li et al. 2024, arXiv 2406.11794)."""
