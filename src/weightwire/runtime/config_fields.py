"""Typed reads from a decoded ``config.json``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weightwire.errors import CheckpointError


class Fields:
    """Typed reads from one decoded ``config.json``; every failure names the file and the field."""

    def __init__(self, raw: Mapping[str, Any], path: Path) -> None:
        self._raw = raw
        self.path = path

    def fail(self, field: str, why: str) -> CheckpointError:
        """What to raise where ``field`` is not what it must be."""
        return CheckpointError(f"{self.path}: {field} {why}", "use the config.json of a complete checkpoint")

    def get(self, field: str) -> Any:
        """The value as it is, ``None`` where there is none."""
        return self._raw.get(field)

    def whole(self, field: str, default: int | None = None, *, least: int = 1) -> int:
        """A whole number of at least ``least``."""
        value = self._raw.get(field)
        if value is None:
            value = default
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            wanted = "positive whole number" if least else "whole number from 0 up"
            raise self.fail(field, f"is {value!r}, not a {wanted}")
        return value

    def number(self, field: str, default: float | None = None) -> float:
        """A positive number."""
        value = self._raw.get(field)
        if value is None:
            value = default
        if not isinstance(value, int | float) or isinstance(value, bool) or not value > 0:
            raise self.fail(field, f"is {value!r}, not a positive number")
        return float(value)

    def flag(self, field: str, *, default: bool = False) -> bool:
        """True or false."""
        value = self._raw.get(field)
        if value is None:
            value = default
        if not isinstance(value, bool):
            raise self.fail(field, f"is {value!r}, not true or false")
        return value

    def layers(self, field: str) -> tuple[int, ...]:
        """A list of layer numbers, empty where there is none."""
        value = self._raw.get(field) or []
        if not isinstance(value, list) or not all(type(one) is int and one >= 0 for one in value):
            raise self.fail(field, f"is {value!r}, not a list of layer numbers")
        return tuple(value)
