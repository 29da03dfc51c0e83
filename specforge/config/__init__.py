"""Torch-free configuration: sections, the registry of methods, loading and dumping."""

from specforge.config.levers import Levers
from specforge.config.load import KEYS_HELP, dump_config, load_config, load_ranking_config, load_task, to_dict
from specforge.config.ranking import RankingConfig
from specforge.config.schema import EvalConfig, RunConfig

__all__ = [
    "KEYS_HELP",
    "EvalConfig",
    "Levers",
    "RankingConfig",
    "RunConfig",
    "dump_config",
    "load_config",
    "load_ranking_config",
    "load_task",
    "to_dict",
]
