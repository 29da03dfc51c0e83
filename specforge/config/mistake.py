"""The first setting that does not fit its schema, in a sentence with key, value, place, rule and way out."""

import dataclasses
import difflib
import typing
from collections.abc import Callable, Iterator
from typing import Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from specforge import files

_RULES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_LISTS = {int: "[1,2]", str: "[a,b]"}


def describe_mistake(schema: DictConfig, given: DictConfig, place: Callable[[str], str]) -> str | None:
    """
    Args:
        schema: the defaults, with the class of each section.
        given: what was asked for, sections as mappings.
        place: from a dotted key to where it was given.

    Returns:
        None where every setting fits by itself.
    """
    return next(_mistakes(schema, schema, OmegaConf.to_container(given), "", place), None)


def _mistakes(whole: DictConfig, section: DictConfig, given: Any, above: str, place: Callable[[str], str]) -> Iterator[str]:
    for name, value in given.items():
        key = f"{above}{name}"
        what = f"{key} without a value {place(key)}" if value is None else f"{key}={files.shown(value)} {place(key)}"
        if name not in _names(section):
            yield f"{what}: there is no such key; {_way_out(whole, section, above, str(name))}."
        elif _is_section(section, name) and isinstance(value, dict):
            yield from _mistakes(whole, section[name], value, f"{key}.", place)
        elif _is_section(section, name):
            yield f"{what}: is a section; write {key}.KEY=VALUE, where KEY is one of {', '.join(_names(section[name]))}."
        elif not _fits(section, name, value):
            yield f"{what}: must be {_rule(section, name)}; {_default(section, name)}."


def _way_out(whole: DictConfig, section: DictConfig, above: str, name: str) -> str:
    near = " or ".join(_near(whole, section, above, name))
    keys = f"{f'keys of {above[:-1]}' if above else 'sections and keys'} are {', '.join(_names(section))}"
    if not near:
        return keys
    return f"{near} may be meant" if above else f"{near} may be meant; {keys}"


def _near(whole: DictConfig, section: DictConfig, above: str, name: str) -> list[str]:
    """Keys that may be meant: of this section, or of the same name elsewhere, or else of a similar one."""
    keys = {key: key.split(".")[-1] for key in _dotted(whole, "")}
    near = [f"{above}{close}" for close in difflib.get_close_matches(name, _names(section), n=2)]
    near += [key for key, last in keys.items() if last == name]
    return near or [key for close in difflib.get_close_matches(name, keys.values(), n=1) for key, last in keys.items() if last == close]


def _dotted(section: DictConfig, above: str) -> Iterator[str]:
    for name in _names(section):
        yield f"{above}{name}"
        if _is_section(section, name):
            yield from _dotted(section[name], f"{above}{name}.")


def _names(section: DictConfig) -> list[str]:
    schema: Any = OmegaConf.get_type(section)
    return [field.name for field in dataclasses.fields(schema)]


def _is_section(section: DictConfig, name: str) -> bool:
    return dataclasses.is_dataclass(OmegaConf.get_type(section, name))


def _fits(section: DictConfig, name: str, value: Any) -> bool:
    try:
        OmegaConf.merge(OmegaConf.structured(OmegaConf.get_type(section)), {name: value})
    except (OmegaConfBaseException, TypeError):
        return False
    return True


def _rule(section: DictConfig, name: str) -> str:
    hint = typing.get_type_hints(OmegaConf.get_type(section))[name]
    if typing.get_origin(hint) is Literal:
        return f"one of {', '.join(typing.get_args(hint))}"
    if typing.get_origin(hint) is tuple:
        return f"a list such as {_LISTS[typing.get_args(hint)[0]]}"
    return _RULES[hint]


def _default(section: DictConfig, name: str) -> str:
    if OmegaConf.is_missing(section, name):
        return "it has no default"
    default = OmegaConf.to_container(section)[name]  # type: ignore[call-overload, index]
    return f"the default is {files.shown(list(default) if isinstance(default, tuple) else default)}"
