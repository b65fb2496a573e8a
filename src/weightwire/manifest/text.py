"""A layout as text: what is hashed into ids, and what travels. One layout has one text, so equal texts say the same.

Two ends of a load that hold equal texts need take nothing apart; ``read`` is for when they differ.
"""

from __future__ import annotations

import hashlib
import json
import operator
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from weightwire.errors import ProtocolError
from weightwire.manifest.boxes import Box
from weightwire.manifest.collection import no_collection
from weightwire.manifest.records import FORMAT, Entry, Layout, View, canonical
from weightwire.manifest.sharding import MAX_PIECES, MAX_SIZE, VERSION, Piece, Sharding, opaque
from weightwire.types import Json, State, TensorClass

MAX_ENTRIES = 1_000_000
MAX_DIMENSIONS = 32
MAX_NAMES_PER_ENTRY = 65_536
"""Aliases, and views, of one tensor."""
MAX_LISTS = 8 << 20
"""Counted before anything is made of a text: of all that it can hold, an empty list grows most."""
MAX_REASON = 1024

_ENTRY = operator.attrgetter("name", "dtype", "shape", "order", "nbytes", "aliases", "views")
_VIEW = operator.attrgetter("name", "dtype", "shape", "stride", "offset")
_encode = json.JSONEncoder(separators=(",", ":"), check_circular=False, default=_VIEW).encode
"""As ``canonical``, of entries and views as they are."""


@dataclass(frozen=True, slots=True)
class Text:
    """Canonical JSON, ASCII.

    Attributes:
        head: format, declared state and absent names.
        weights: a row for each entry of class weight: name, dtype, shape, order, bytes, aliases, views.
        derived: likewise.
        shardings: what is declared, by number of the entry; in no id.
    """

    head: bytes
    weights: bytes
    derived: bytes
    shardings: bytes

    def content_id(self, digests: bytes) -> str:
        """64 hex digits, with the digests of the weight leaves."""
        return _hash(self.head, self.weights, digests)

    def derived_id(self, digests: bytes) -> str:
        """64 hex digits, with the digests of the derived leaves."""
        return _hash(_DERIVED_HEAD, self.derived, digests)


@no_collection()
def write(layout: Layout) -> Text:
    """The text of ``layout``."""
    weights, derived = (
        [entry for entry in layout.entries if entry.kind is kind] for kind in (TensorClass.WEIGHT, TensorClass.DERIVED)
    )
    return Text(
        head=head(layout.state, layout.absent),
        weights=_rows(weights),
        derived=_rows(derived),
        shardings=canonical([_sharding(at, one) for at, one in enumerate((*weights, *derived)) if one.sharding]),
    )


def head(state: State, absent: Iterable[str]) -> bytes:
    """``Text.head``: state decides what kernels compute with the weights."""
    told: dict[str, Json] = {"state": {path: dict(values) for path, values in state.items()}, "absent": list(absent)}
    return canonical({"format": FORMAT, "kind": TensorClass.WEIGHT.value, **told})


_DERIVED_HEAD = canonical({"format": FORMAT, "kind": TensorClass.DERIVED.value})


def _rows(entries: Iterable[Entry]) -> bytes:
    return _encode(list(map(_ENTRY, entries))).encode()


def _hash(*parts: bytes) -> str:
    hasher = hashlib.sha256()
    for part in parts:
        hasher.update(part)
    return hasher.hexdigest()


def _sharding(at: int, entry: Entry) -> Json:
    found = entry.sharding
    assert found is not None
    pieces: list[Json] = [
        [each.part, list(each.shape), list(each.box.offset), list(each.box.size), list(each.at)]
        for each in found.pieces
    ]
    padding: list[Json] = [[list(box.offset), list(box.size)] for box in found.padding]
    return [at, VERSION, pieces, padding, found.opaque]


# --------------------------------------------------------------------------------------------------------------------
# Reading


@no_collection()
def read(text: Text) -> tuple[Entry, ...]:
    """The entries of a stranger's text. What their numbers and names mean is for ``plan.validate``, which comes next.

    Raises:
        ProtocolError: it is no such text, or one that would hash differently if it were written again.
    """
    shardings = dict(map(_read_sharding, _parse(text.shardings)))
    rows = [(TensorClass.WEIGHT, row) for row in _parse(text.weights)]
    rows += [(TensorClass.DERIVED, row) for row in _parse(text.derived)]
    if len(rows) > MAX_ENTRIES or not all(0 <= at < len(rows) for at in shardings):
        raise _wrong(f"has {len(rows)} tensors, or shardings of others")
    entries = tuple(_read_entry(row, kind, shardings.get(at)) for at, (kind, row) in enumerate(rows))
    weights = [entry for entry in entries if entry.kind is TensorClass.WEIGHT]
    if (_rows(weights), _rows(entries[len(weights) :])) != (text.weights, text.derived):
        raise _wrong("is not written canonically")
    return entries


def _parse(text: bytes) -> list[Any]:
    if text.count(b"[") > MAX_LISTS:
        raise _wrong("holds too many lists")
    try:
        rows = json.loads(text.decode("ascii"))
    except (ValueError, RecursionError) as error:
        raise _wrong("is not the text of a layout") from error
    if not isinstance(rows, list):
        raise _wrong("is not a list of rows")
    return rows


def _read_entry(row: Any, kind: TensorClass, sharding: Sharding | None) -> Entry:
    match row:
        case [str(name), str(dtype), list(shape), list(order), int(nbytes), list(aliases), list(views)]:
            _bounded(max(len(shape), len(order)), MAX_DIMENSIONS, "dimensions")
            _bounded(max(len(aliases), len(views)), MAX_NAMES_PER_ENTRY, "aliases or views")
            return Entry(
                name=name,
                dtype=dtype,
                shape=_numbers(shape),
                order=_numbers(order),
                kind=kind,
                nbytes=nbytes,
                aliases=_names(aliases),
                views=tuple(map(_read_view, views)),
                sharding=sharding,
            )
    raise _wrong("has a row that describes no tensor")


def _read_view(row: Any) -> View:
    match row:
        case [str(name), str(dtype), list(shape), list(stride), int(offset)]:
            _bounded(max(len(shape), len(stride)), MAX_DIMENSIONS, "dimensions")
            return View(name=name, dtype=dtype, shape=_numbers(shape), stride=_numbers(stride), offset=offset)
    raise _wrong("has a row that describes no view")


def _read_sharding(row: Any) -> tuple[int, Sharding]:
    """By number of the entry; one of another version is opaque, which refuses resharding and nothing else."""
    match row:
        case [int(at), int(version), *_] if version != VERSION:
            return at, opaque(f"its sharding is declared in version {version}, not {VERSION}")
        case [int(at), int(), list(pieces), list(padding), str(reason)]:
            _bounded(max(len(pieces), len(padding)), MAX_PIECES, "pieces")
            _bounded(len(reason), MAX_REASON, "characters of a reason")
            if reason.isprintable():
                return at, Sharding(tuple(map(_read_piece, pieces)), tuple(map(_read_box, padding)), reason)
    raise _wrong("has a row that describes no sharding")


def _read_piece(row: Any) -> Piece:
    match row:
        case [str(part), list(shape), list(offset), list(size), list(at)] if part.isprintable():
            return Piece(part, _numbers(shape), _read_box([offset, size]), _numbers(at))
    raise _wrong("has a row that describes no piece")


def _read_box(row: Any) -> Box:
    match row:
        case [list(offset), list(size)]:
            return Box(_numbers(offset), _numbers(size))
    raise _wrong("has a row that describes no box")


def _numbers(values: list[Any]) -> tuple[int, ...]:
    _bounded(len(values), MAX_DIMENSIONS, "dimensions")
    if not all(type(value) is int and 0 <= value <= MAX_SIZE for value in values):
        raise _wrong("has a shape of something else than sizes")
    return tuple(values)


def _names(values: list[Any]) -> tuple[str, ...]:
    if not all(isinstance(value, str) for value in values):
        raise _wrong("has a name that is no text")
    return tuple(values)


def _bounded(count: int, most: int, what: str) -> None:
    if count > most:
        raise _wrong(f"has a tensor with more than {most} {what}")


def _wrong(problem: str) -> ProtocolError:
    return ProtocolError(f"offered manifest {problem}", "the peer is broken or of another version; use another source")
