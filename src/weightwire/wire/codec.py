"""Messages to protobuf and back, field by field, every bound checked on the way in.

The dataclasses of ``messages`` and the messages of ``proto/`` have the same field names; one plan per class, made from
its type hints, serves both directions, so no field can be forgotten in one of them. A text or repeated field without
an entry in ``bounds`` cannot be decoded at all: a new field must be given its bound.
"""

from __future__ import annotations

import dataclasses
import enum
import functools
import re
import types
import typing
from collections.abc import Callable
from typing import Any, TypeVar

from google.protobuf.message import Message

from weightwire.errors import ConfigError, ProtocolError
from weightwire.wire import bounds
from weightwire.wire.generated import common_pb2, metadata_pb2, peer_pb2

Value = TypeVar("Value")
Encoded = TypeVar("Encoded", bound=Message)

_INT64 = 2**63 - 1
_SIGNED = {"ordinal": -(2**63), "leaf": -1}
_REALS = {"fraction": 1.0, "ttl_s": 86_400.0, "wait_s": bounds.MAX_WAIT_S, "rate": bounds.MAX_RATE}
_MAX_REAL = 1e12

Convert = Callable[[Any], Any]


@dataclasses.dataclass(frozen=True, slots=True)
class _Field:
    name: str
    repeated: bool
    optional: bool
    nested: type | None
    check: Convert
    """From what protobuf holds to what the dataclass holds; raises ProtocolError."""


def encode(value: object, kind: type[Encoded]) -> Encoded:
    """The protobuf message of one of our dataclasses.

    Args:
        value: an instance of a dataclass in ``messages`` (not one that holds mappings).
        kind: the generated class with the same fields.

    Raises:
        ProtocolError: a number that does not fit its field.
    """
    message = kind()
    try:
        _fill(message, value)
    except (ValueError, TypeError) as error:
        raise ProtocolError(f"{type(value).__name__} cannot be encoded: {error}") from error
    return message


def decode(kind: type[Value], message: Message) -> Value:
    """One of our dataclasses from an untrusted message.

    Raises:
        ProtocolError: a field is out of its bounds; the message names it.
    """
    fields = {}
    hashable: Any = kind
    for field in _plan(hashable):
        fields[field.name] = _read(field, message)
    try:
        return kind(**fields)
    except ConfigError as error:  # coordinates check themselves
        raise ProtocolError(f"{kind.__name__}: {error.problem}") from error


def _fill(message: Any, value: object) -> None:
    kind: Any = type(value)
    for field in _plan(kind):
        item = getattr(value, field.name)
        if field.repeated:
            _fill_repeated(getattr(message, field.name), field, item)
        elif field.nested:
            target = getattr(message, field.name)
            target.SetInParent()
            _fill(target, item)
        elif not (field.optional and item is None):
            setattr(message, field.name, _plain(item, message, field.name))


def _fill_repeated(target: Any, field: _Field, items: tuple[object, ...]) -> None:
    if field.nested:
        for item in items:
            _fill(target.add(), item)
    else:
        target.extend(items)


def _plain(item: object, message: Any, name: str) -> object:
    if isinstance(item, enum.Enum):
        kind = message.DESCRIPTOR.fields_by_name[name].enum_type
        return kind.values_by_name[_prefix(type(item)) + item.name].number
    return item


def _read(field: _Field, message: Any) -> object:
    if field.repeated:
        items = getattr(message, field.name)
        bounds.count(len(items), bounds.COUNTS[field.name], field.name)
        return tuple(field.check(item) for item in items)
    if field.optional and not message.HasField(field.name):
        return None
    return field.check(getattr(message, field.name))


@functools.cache
def _plan(kind: type) -> tuple[_Field, ...]:
    hints = typing.get_type_hints(kind)
    return tuple(_field(item.name, hints[item.name]) for item in dataclasses.fields(kind))


def _field(name: str, hint: Any) -> _Field:
    repeated = typing.get_origin(hint) is tuple
    if repeated:
        hint = typing.get_args(hint)[0]
    optional = isinstance(hint, types.UnionType)
    if optional:
        hint = next(kind for kind in typing.get_args(hint) if kind is not type(None))
    nested: type | None = hint if isinstance(hint, type) and dataclasses.is_dataclass(hint) else None
    return _Field(name, repeated, optional, nested, _checker(name, hint, nested))


def _checker(name: str, hint: Any, nested: type | None) -> Convert:
    if nested is not None:
        return functools.partial(decode, nested)
    if issubclass(hint, enum.Enum):
        return functools.partial(_enum, hint)
    scalars: dict[type, Callable[[], Convert]] = {
        bool: lambda: bool,
        str: lambda: functools.partial(bounds.text, limit=bounds.TEXTS[name], what=name),
        bytes: lambda: functools.partial(_bytes, name, bounds.BYTES[name]),
        int: lambda: functools.partial(_int, name, _SIGNED.get(name, 0)),
        float: lambda: functools.partial(bounds.real, high=_REALS.get(name, _MAX_REAL), what=name),
    }
    return scalars[hint]()


def _bytes(name: str, limit: int, value: bytes) -> bytes:
    bounds.count(len(value), limit, f"the length of {name}")
    return value


def _int(name: str, low: int, value: int) -> int:
    if not low <= value <= _INT64:
        raise ProtocolError(f"{name} is {value}, outside {low}..{_INT64}")
    return value


def _enum(kind: type[enum.Enum], number: int) -> enum.Enum:
    try:
        return _members(kind)[number]
    except KeyError:
        raise ProtocolError(f"{number} is no {kind.__name__}", "run one version of weightwire everywhere") from None


@functools.cache
def _members(kind: type[enum.Enum]) -> dict[int, enum.Enum]:
    for module in (common_pb2, metadata_pb2, peer_pb2):
        found = module.DESCRIPTOR.enum_types_by_name.get(kind.__name__)
        if found is not None:
            names = found.values_by_name
            return {names[_prefix(kind) + member.name].number: member for member in kind}
    raise TypeError(f"{kind.__name__} is in no proto file")


@functools.cache
def _prefix(kind: type[enum.Enum]) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", kind.__name__).upper() + "_"
