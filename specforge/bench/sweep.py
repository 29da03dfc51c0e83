"""Which configurations a command asks for: what is set holds for all of them, sweeps go over one another."""

from collections.abc import Mapping, Sequence
from itertools import product

from specforge.bench.case import Case, Configuration
from specforge.errors import ConfigError


def configurations(case: Case, levers: Sequence[str], sweeps: Sequence[str]) -> list[Configuration]:
    """The product of the sweeps, the last one varying fastest, each once.

    Args:
        levers: `name=choice`.
        sweeps: `levers.name=choice,choice`, or `key=value,value` of a lever or of the problem.

    Raises:
        ConfigError: a key is given twice or the case does not know it, or it has no such value.
    """
    axes: dict[str, list[str]] = {}
    for words, flag in ((levers, "--lever"), (sweeps, "--sweep")):
        for word in words:
            key, values = _axis(word, flag)
            if key in axes:
                raise ConfigError(f"{flag} {word}: {key} is set already; name each key once.")
            if flag == "--lever" and (len(values) > 1 or key not in case.levers):
                raise ConfigError(
                    f"{flag} {word}: must set one of {', '.join(case.levers)}; use --sweep for more values, or for the problem."
                )
            axes[key] = values
    found = [_configuration(case, dict(zip(axes, values, strict=True))) for values in product(*axes.values())]
    return list({str(each): each for each in found}.values())


def with_references(case: Case, asked: Sequence[Configuration]) -> list[Configuration]:
    """Before the configurations of each problem its reference, which is not repeated."""
    found: dict[str, Configuration] = {}
    for each in asked:
        reference = case.at_reference(each)
        found.setdefault(str(reference), reference)
        found.setdefault(str(each), each)
    return list(found.values())


def _axis(word: str, flag: str) -> tuple[str, list[str]]:
    key, equals, values = word.partition("=")
    if not equals or not values:
        raise ConfigError(f"{flag} {word}: must be key=value.")
    return key.removeprefix("levers."), values.split(",")


def _configuration(case: Case, given: Mapping[str, str]) -> Configuration:
    levers = {key: value for key, value in given.items() if key in case.levers}
    return case.checked(levers, {key: value for key, value in given.items() if key not in levers})
