"""What a bench measures: one piece of work, done by the same numbers in several ways.

A lever is a way. Its reference is the plain form, and every other choice must give what the reference gives. A key of the problem, such as
a number of tokens, says what is computed: results are compared within one problem only.
"""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from specforge.errors import ConfigError

Outputs = Mapping[str, torch.Tensor]
Quality = Mapping[str, float]
Number = int | float | str


@dataclass(frozen=True)
class Lever:
    choices: tuple[str, ...]
    """Empty: any whole number from 0 on."""
    reference: str
    default: str
    """What is used unless it is set."""


@dataclass(frozen=True)
class Configuration:
    """All levers and the whole problem, by name."""

    levers: Mapping[str, str]
    problem: Mapping[str, Number]

    def __str__(self) -> str:
        return " ".join(f"{key}={value}" for key, value in {**self.problem, **self.levers}.items())


@dataclass(frozen=True)
class Work:
    """A configuration, built and ready."""

    run: Callable[[], Outputs]
    """The whole path that is timed; what it returns is compared. It may be called any number of times."""
    quality: Callable[[Outputs], Quality] = lambda outputs: {}
    """How good the outputs are, by name; never timed."""


class Case(ABC):
    """
    Args:
        problem: each key with its default, whose type it keeps.
    """

    def __init__(self, name: str, levers: Mapping[str, Lever], problem: Mapping[str, Number]) -> None:
        self.name, self.levers, self.problem = name, levers, problem

    @abstractmethod
    def prepare(self, configuration: Configuration, device: torch.device) -> Work:
        """Same problem, same inputs and weights, whatever the levers."""

    def tolerance(self, configuration: Configuration) -> float:
        """Largest difference to the reference's outputs, relative to the largest of them, that rounding explains."""
        return 1e-5

    def digest(self, configuration: Configuration) -> str:
        """16 hexadecimal digits of the levers alone, equal in every problem."""
        return hashlib.sha256(json.dumps(dict(configuration.levers), sort_keys=True).encode()).hexdigest()[:16]

    def lacking(self, lever: str, choice: str, configuration: Configuration, device: torch.device) -> str | None:
        """What keeps the lever from being set so on this device, if anything does."""
        return None

    def at_reference(self, configuration: Configuration) -> Configuration:
        return Configuration({name: lever.reference for name, lever in self.levers.items()}, configuration.problem)

    def checked(self, levers: Mapping[str, str], problem: Mapping[str, str]) -> Configuration:
        """What was given, in the order of the case; defaults where nothing was.

        Raises:
            ConfigError: the case has no such key, or the key no such value.
        """
        for key in (*levers, *problem):
            if key not in self.levers and key not in self.problem:
                raise ConfigError(f"{key}: case {self.name!r} has no such key; its levers are {self._words()}.")
        return Configuration(
            {name: self._choice(name, levers.get(name, lever.default)) for name, lever in self.levers.items()},
            {name: _as(type(default), name, problem.get(name, str(default))) for name, default in self.problem.items()},
        )

    def _choice(self, name: str, choice: str) -> str:
        choices = self.levers[name].choices
        if choice in choices or (not choices and choice.isdecimal()):
            return choice
        raise ConfigError(f"{name}={choice!r}: must be {'one of ' + ', '.join(choices) if choices else 'a whole number from 0 on'}.")

    def _words(self) -> str:
        problem = f", and its problem {', '.join(self.problem)}" if self.problem else ""
        return (", ".join(self.levers) or "none") + problem


def available(case: Case, asked: Configuration, device: torch.device, strict: bool) -> tuple[Configuration, list[str]]:
    """What the device can do in place of what was asked for: a lever that it lacks is set to its default, or to its reference.

    Returns:
        The configuration, and a sentence for each lever that fell back.

    Raises:
        ConfigError: a lever is not available, and `strict` forbids to fall back.
    """
    levers, reasons = dict(asked.levers), []
    for name, choice in asked.levers.items():
        lacking = case.lacking(name, choice, asked, device)
        if lacking is None:
            continue
        own = case.levers[name]
        instead = own.default if choice != own.default and case.lacking(name, own.default, asked, device) is None else own.reference
        if strict:
            raise ConfigError(f"{name}={choice!r}: {lacking}; use {name}={instead}, or leave out --strict, which forbids to fall back.")
        levers[name] = instead
        reasons.append(f"{name}={instead} stands in for {choice}: {lacking}.")
    return Configuration(levers, asked.problem), reasons


def largest_difference(found: Outputs, expected: Outputs) -> float:
    """Over all outputs, relative to the largest number of each expected one; infinite where shapes or names are other ones, or a number
    that is not finite stands alone."""
    if found.keys() != expected.keys() or any(found[name].shape != expected[name].shape for name in expected):
        return float("inf")
    return max((_difference(found[name], expected[name]) for name in expected), default=0.0)


def _difference(found: torch.Tensor, expected: torch.Tensor) -> float:
    if not expected.numel():
        return 0.0
    found, expected = (x.detach().to("cpu", torch.float64) for x in (found, expected))
    apart = torch.where(found == expected, 0.0, (found - expected).abs()).nan_to_num(nan=float("inf"), posinf=float("inf"))
    largest = expected.abs().nan_to_num(nan=0.0, posinf=0.0).max().clamp_min(torch.finfo(torch.float32).tiny)
    return float(apart.max() / largest)


def _as(kind: type[Any], name: str, text: str) -> Number:
    try:
        value: Number = kind(text)
        return value
    except ValueError as error:
        raise ConfigError(f"{name}={text!r}: must be {'a whole number' if kind is int else 'a number'}.") from error
