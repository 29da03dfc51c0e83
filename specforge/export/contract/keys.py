"""Keys of a configuration, asked for by their rule."""

from itertools import pairwise
from typing import Any

from specforge.errors import ExportError

_LARGEST = 2**31


class Keys:
    """An object of `config.json`. Asking for a key that is missing, or not what it must be, raises ExportError."""

    def __init__(self, values: Any, where: str) -> None:
        if not isinstance(values, dict):
            raise ExportError(f"{where}: must be an object; export again.")
        self.values, self.where = values, where

    def wrong(self, key: str, rule: str) -> ExportError:
        found = f"{key}={self.values[key]!r}" if key in self.values else f"{key} is missing"
        return ExportError(f"{self.where}: {found[:160]}; {rule}.")

    def inner(self, key: str, why: str) -> "Keys":
        if not isinstance(self.values.get(key), dict):
            raise self.wrong(key, why)
        return Keys(self.values[key], f"{self.where}: {key}")

    def count(self, key: str, least: int = 1, most: int = _LARGEST) -> int:
        value = self.values.get(key)
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise self.wrong(key, f"must be a whole number from {least} to {most}")
        return value

    def number(self, key: str) -> float:
        value = self.values.get(key)
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 < value < 1e30:
            raise self.wrong(key, "must be a positive number")
        return float(value)

    def flag(self, key: str, why: str) -> bool:
        value = self.values.get(key)
        if not isinstance(value, bool):
            raise self.wrong(key, f"must be said, true or false: {why}")
        return value

    def exactly(self, key: str, wanted: Any, why: str) -> None:
        if key not in self.values or self.values[key] != wanted or type(self.values[key]) is not type(wanted):
            raise self.wrong(key, f"must be {wanted!r}: {why}")

    def ids(self, key: str, why: str) -> tuple[int, ...]:
        value = self.values.get(key)
        if not isinstance(value, list) or not value or not all(isinstance(each, int) and not isinstance(each, bool) for each in value):
            raise self.wrong(key, f"must be a list of layer numbers: {why}")
        if any(low >= high for low, high in pairwise(value)):
            raise self.wrong(key, "must ascend: engines put captured layers beside each other from low to high")
        return tuple(value)
