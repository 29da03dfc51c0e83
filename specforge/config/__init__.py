"""Torch-free configuration: sections, the registry of methods, loading and dumping."""

from specforge.config.load import dump_config, load_config, to_dict
from specforge.config.schema import EvalConfig, RunConfig

__all__ = ["EvalConfig", "RunConfig", "dump_config", "load_config", "to_dict"]
