"""The declared sharding of one tensor, to protobuf and back. Bounds only: ``manifest.plan`` checks the rest."""

from __future__ import annotations

from collections.abc import Sequence

from weightwire.errors import ProtocolError
from weightwire.manifest.boxes import Box
from weightwire.manifest.sharding import MAX_PIECES, VERSION, Piece, Sharding, opaque
from weightwire.wire import bounds
from weightwire.wire.generated import peer_pb2


def sharding_message(sharding: Sharding) -> peer_pb2.Sharding:
    """For the wire."""
    return peer_pb2.Sharding(
        version=VERSION,
        pieces=[
            peer_pb2.Piece(
                part=piece.part, shape=piece.shape, offset=piece.box.offset, size=piece.box.size, at=piece.at
            )
            for piece in sharding.pieces
        ],
        padding=[peer_pb2.Padding(offset=box.offset, size=box.size) for box in sharding.padding],
        opaque=sharding.opaque,
    )


def read_sharding(message: peer_pb2.Sharding) -> Sharding:
    """From an untrusted peer; one of another version is opaque, which refuses resharding and nothing else.

    Raises:
        ProtocolError: it is out of bounds.
    """
    if message.version != VERSION:
        return opaque(f"its sharding is declared in version {message.version}, not {VERSION}")
    if max(len(message.pieces), len(message.padding)) > MAX_PIECES:
        raise ProtocolError(f"a tensor has more than {MAX_PIECES} pieces")
    return Sharding(
        pieces=tuple(map(_read_piece, message.pieces)),
        padding=tuple(_box(padding.offset, padding.size) for padding in message.padding),
        opaque=bounds.text(message.opaque, bounds.TEXTS["reason"], "a sharding's reason"),
    )


def _read_piece(message: peer_pb2.Piece) -> Piece:
    if max(len(message.shape), len(message.at)) > bounds.MAX_DIMENSIONS:
        raise ProtocolError(f"a piece has more than {bounds.MAX_DIMENSIONS} dimensions")
    part = bounds.text(message.part, bounds.MAX_NAME, "a part's name")
    return Piece(part, tuple(message.shape), _box(message.offset, message.size), tuple(message.at))


def _box(offset: Sequence[int], size: Sequence[int]) -> Box:
    if max(len(offset), len(size)) > bounds.MAX_DIMENSIONS:
        raise ProtocolError(f"a piece has more than {bounds.MAX_DIMENSIONS} dimensions")
    return Box(tuple(offset), tuple(size))
