"""Evaluation: what a draft is worth, measured on features that are produced once and kept."""

from specforge.config.schema import EvalConfig
from specforge.eval.cache import EvalCache
from specforge.eval.evaluator import Evaluator

__all__ = ["EvalCache", "EvalConfig", "Evaluator"]
