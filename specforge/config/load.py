"""From defaults, a YAML file and `key=value` words to one frozen configuration, and back to YAML."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from specforge import files
from specforge.config.document import read_document
from specforge.config.methods import registered
from specforge.config.mistake import describe_mistake
from specforge.config.ranking import RankingConfig
from specforge.config.schema import RunConfig
from specforge.errors import ConfigError

KEYS_HELP = (
    "settings that win over the file, for example train.steps=100; every key stands with its default and meaning in "
    "specforge/config/schema.py, those of method.options in methods.py beside it"
)


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Merge defaults < file < overrides (`section.key=value`) for the training of a draft.

    Raises:
        ConfigError: the file is missing, or a key is unknown, of the wrong type, or left without a value.
    """
    return cast(RunConfig, _load(path, overrides, _draft_schema))


def load_ranking_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RankingConfig:
    """The same for the training of a ranking model."""
    return cast(RankingConfig, _load(path, overrides, lambda given: OmegaConf.structured(RankingConfig)))


def load_task(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig | RankingConfig:
    """The same for what the file is about: its key `task`, and without one a draft."""

    def schema(given: Any) -> Any:
        task = OmegaConf.select(given, "task", default="")
        if task not in ("", "ranking"):
            raise ConfigError(f"task={task!r}: there is no such task; write `task: ranking`, or leave it out to train a draft.")
        return OmegaConf.structured(RankingConfig) if task else _draft_schema(given)

    return cast("RunConfig | RankingConfig", _load(path, overrides, schema))


def _draft_schema(given: Any) -> Any:
    name = OmegaConf.select(given, "method.name", default="eagle3")
    schema = OmegaConf.structured(RunConfig)
    OmegaConf.set_readonly(schema.method, False)
    schema.method.options = OmegaConf.structured(registered(str(name)).options)
    return schema


def _load(path: str | Path | None, overrides: Sequence[str], schema: Callable[[Any], Any]) -> Any:
    """
    Args:
        schema: from what was given to the defaults that it is merged into.
    """
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"override {word!r}: must have the form section.key=value; for example train.steps=100.")
    words = [f"{word}''" if word.endswith("=") and word.count("=") == 1 else word for word in overrides]  # YAML reads nothing as null
    text = read_document(Path(path)) if path is not None else ""
    try:
        given = cast(DictConfig, OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(words)))
        defaults = schema(given)
    except (OmegaConfBaseException, YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:  # no value can be made
        raise ConfigError(
            f"configuration {path or list(overrides)}: {files.shown(error)}; correct the file or the command line."
        ) from error

    def place(key: str) -> str:
        named = any(f"{word.partition('=')[0]}.".startswith(f"{key}.") for word in overrides)
        return "on the command line" if named or path is None else f"in {path}"

    try:
        return OmegaConf.to_object(OmegaConf.merge(defaults, given))
    except MissingMandatoryValue as error:
        key = error.full_key
        raise ConfigError(f"{key}: must be given; write it into {path or 'a file'}, or {key}=VALUE on the command line.") from error
    except (OmegaConfBaseException, ValueError, TypeError, AttributeError, RecursionError) as error:
        reason = describe_mistake(defaults, given, place) or f"configuration {path or list(overrides)}: {files.shown(error)}; correct it."
        raise ConfigError(reason) from error


def to_dict(config: RunConfig | RankingConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def dump_config(config: RunConfig | RankingConfig) -> str:
    """The whole configuration as YAML that `load_task` reads back."""
    return OmegaConf.to_yaml(cast(DictConfig, OmegaConf.create(_lists(to_dict(config)))))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
