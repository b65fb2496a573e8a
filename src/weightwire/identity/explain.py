"""Why two identities do not match, field by field."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class FieldDifference:
    """One field that differs.

    Attributes:
        field: its name; ``extra[name]`` for a part of ``extra``.
        ours: value on our side, as text.
        theirs: value on the other side, as text.
        hashed: whether it decides the keys; the revision does not, and dp_size only where dp decides bytes.
    """

    field: str
    ours: str
    theirs: str
    hashed: bool

    def __str__(self) -> str:
        note = "" if self.hashed else " (not part of the key)"
        return f"{self.field}: {self.ours} here, {self.theirs} there{note}"


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any], unhashed: Collection[str]) -> list[FieldDifference]:
    """Every field that differs between two identities as plain values, in the order of the fields."""
    left, right = _flat(ours), _flat(theirs)
    return [
        FieldDifference(name, _text(left.get(name)), _text(right.get(name)), name not in unhashed)
        for name in dict.fromkeys([*left, *right])
        if left.get(name) != right.get(name)
    ]


def render(found: Iterable[FieldDifference]) -> str:
    """The differences, one a line; a sentence where there are none."""
    return "\n".join(map(str, found)) or "the identities are equal"


def _flat(fields: Mapping[str, Any]) -> dict[str, Any]:
    plain = {name: value for name, value in fields.items() if name != "extra"}
    return plain | {f"extra[{name}]": value for name, value in fields["extra"].items()}


def _text(value: Any) -> str:
    return "none" if value is None else "empty" if value == "" else str(value)
