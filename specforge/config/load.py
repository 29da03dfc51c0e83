"""From defaults, a YAML file and `key=value` words to one frozen RunConfig, and back to YAML."""

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError  # type: ignore[import-untyped]

from specforge import files
from specforge.config.document import read_document
from specforge.config.methods import registered
from specforge.config.schema import RunConfig
from specforge.errors import ConfigError


def load_config(path: str | Path | None, overrides: Sequence[str] = ()) -> RunConfig:
    """Merge defaults < file < overrides (`section.key=value`).

    Raises:
        ConfigError: the file is missing, or a key is unknown, of the wrong type, or left without a value.
    """
    for word in overrides:
        if "=" not in word:
            raise ConfigError(f"override {word!r}: must have the form section.key=value; for example train.steps=100.")
    text = read_document(Path(path)) if path is not None else ""
    try:
        given = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist(list(overrides)))
        name = OmegaConf.select(given, "method.name", default="eagle3")
        schema = OmegaConf.structured(RunConfig)
        OmegaConf.set_readonly(schema.method, False)
        schema.method.options = OmegaConf.structured(registered(str(name)).options)
        merged = OmegaConf.merge(schema, given)
        return cast(RunConfig, OmegaConf.to_object(merged))
    except OmegaConfBaseException as error:
        key = getattr(error, "full_key", None)
        reason = str(error).splitlines()[0]
        place = f"in {path} or on the command line" if path is not None else "on the command line"
        raise ConfigError(f"configuration key {key or '?'}: {reason} Correct it {place}.") from error
    except (YAMLError, ValueError, TypeError, AttributeError, RecursionError) as error:  # of a value that YAML or OmegaConf cannot make
        raise ConfigError(
            f"configuration {path or list(overrides)}: {files.shown(error)}; correct the file or the command line."
        ) from error


def to_dict(config: RunConfig) -> dict[str, Any]:
    """The configuration as plain dictionaries, lists and scalars."""
    return dataclasses.asdict(config)


def dump_config(config: RunConfig) -> str:
    """The whole configuration as YAML that `load_config` reads back."""
    return OmegaConf.to_yaml(cast(DictConfig, OmegaConf.create(_lists(to_dict(config)))))


def _lists(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _lists(item) for key, item in value.items()}
    return [_lists(item) for item in value] if isinstance(value, list | tuple) else value
