"""Manifests and read grants as streams of bounded parts.

Nothing is allocated from a number that a peer names: what is kept is what arrived, and what arrives is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from weightwire.errors import ProtocolError
from weightwire.manifest.collection import no_collection
from weightwire.manifest.offered import Offered
from weightwire.manifest.records import DIGEST_BYTES, Manifest
from weightwire.manifest.state import check
from weightwire.manifest.text import Text, head
from weightwire.types import Coordinates, Json, Role, Stage
from weightwire.wire import bounds, codec
from weightwire.wire.generated import peer_pb2
from weightwire.wire.messages import ManifestHeader, ReadGrant

Item = TypeVar("Item")

_TEXTS = {
    "weights": "weights_bytes",
    "derived": "derived_bytes",
    "shardings": "shardings_bytes",
    "digests": "digest_bytes",
}
"""What comes as bytes, and the field of the header that says how many."""

# --------------------------------------------------------------------------------------------------------------------
# Writing


def manifest_parts(header: ManifestHeader, manifest: Manifest) -> Iterator[peer_pb2.ManifestPart]:
    """The stream of ``GetManifest``, header first.

    Raises:
        ProtocolError: one module's state is too large for a message.
    """
    layout = manifest.layout
    yield peer_pb2.ManifestPart(header=_header(header, manifest))
    states = (
        peer_pb2.ModuleState(module=module, state=bounds.dump_json(dict(state), f"the state of {module}"))
        for module, state in layout.state.items()
    )
    for batch in _batches(states):
        yield peer_pb2.ManifestPart(states=peer_pb2.States(states=batch))
    for names in _batches(layout.absent, len):
        yield peer_pb2.ManifestPart(absent=peer_pb2.Names(names=names))
    for name, data in _texts(manifest).items():
        for piece in _slices(data):
            part = peer_pb2.ManifestPart()
            setattr(part, name, piece)
            yield part


def _texts(manifest: Manifest) -> dict[str, bytes]:
    """By name of the part."""
    text = manifest.layout.text
    named = zip(_TEXTS, (text.weights, text.derived, text.shardings, manifest.digests), strict=True)
    return dict(named)


def _header(header: ManifestHeader, manifest: Manifest) -> peer_pb2.ManifestHeader:
    message = codec.encode(_Common.of(header), peer_pb2.ManifestHeader)
    message.build_facts = bounds.dump_json(dict(header.build_facts), "the build facts")
    message.states = len(manifest.layout.state)
    message.absent = len(manifest.layout.absent)
    message.weight_leaves = manifest.layout.weight_leaves
    for name, data in _texts(manifest).items():
        setattr(message, _TEXTS[name], len(data))
    return message


def _byte_size(message: Any) -> int:
    return int(message.ByteSize())


def _batches(items: Iterable[Item], size: Callable[[Item], int] = _byte_size) -> Iterator[list[Item]]:
    batch: list[Item] = []
    total = 0
    for item in items:
        nbytes = size(item) + 8
        if nbytes > bounds.MAX_MESSAGE_BYTES - bounds.PART_BYTES:
            raise ProtocolError(f"one item of the manifest has {nbytes} bytes, too many for a message")
        if batch and total + nbytes > bounds.PART_BYTES:
            yield batch
            batch, total = [], 0
        batch.append(item)
        total += nbytes
    if batch:
        yield batch


def _slices(data: bytes) -> Iterator[bytes]:
    for start in range(0, len(data), bounds.PART_BYTES):
        yield data[start : start + bounds.PART_BYTES]


# --------------------------------------------------------------------------------------------------------------------
# Reading


def collect_manifest(parts: Iterable[peer_pb2.ManifestPart]) -> tuple[ManifestHeader, Offered]:
    """What an untrusted stream offers, checked against the ids that its header names; see ``Offered`` for the rest.

    Raises:
        ProtocolError: anything out of bounds, out of order, missing, left over, or not giving those ids.
    """
    stream = iter(parts)
    first = next(stream, None)
    if first is None or first.WhichOneof("part") != "header":
        raise ProtocolError("a manifest does not begin with its header")
    collector = _Collector(first.header)
    for part in stream:
        collector.take(part)
    return collector.header, collector.finish()


class _Collector:
    """What has arrived of one manifest; never holds more than the header's (bounded) counts allow."""

    def __init__(self, header: peer_pb2.ManifestHeader) -> None:
        self.header = _read_header(header)
        self._want_states = bounds.count(header.states, bounds.MAX_STATES, "states")
        self._want_absent = bounds.count(header.absent, bounds.MAX_NAMES, "absent names")
        self._weight_leaves = bounds.count(header.weight_leaves, bounds.MAX_LEAVES, "weight leaves")
        bounds.count(header.digest_bytes, bounds.MAX_LEAVES * DIGEST_BYTES, "digest bytes")
        self._want = {
            name: bounds.count(getattr(header, field), bounds.MAX_MANIFEST_BYTES, field)
            for name, field in _TEXTS.items()
        }
        self._texts = {name: bytearray() for name in _TEXTS}
        self._states: dict[str, dict[str, Json]] = {}
        self._absent: list[str] = []
        self._arrived = 0

    @no_collection()
    def take(self, part: peer_pb2.ManifestPart) -> None:
        """Add one part."""
        self._arrived += part.ByteSize()
        bounds.count(self._arrived, bounds.MAX_MANIFEST_BYTES, "the bytes of a manifest")
        kind = part.WhichOneof("part")
        if kind in self._texts:
            data, text = getattr(part, kind), self._texts[kind]
            bounds.count(len(text) + len(data), self._want[kind], f"the bytes of {kind}")
            text += data
        elif kind == "states":
            bounds.count(len(self._states) + len(part.states.states), self._want_states, "states")
            self._states.update(map(_read_state, part.states.states))
        elif kind == "absent":
            bounds.count(len(self._absent) + len(part.absent.names), self._want_absent, "absent names")
            self._absent.extend(bounds.text(name, bounds.MAX_NAME, "an absent name") for name in part.absent.names)
        else:
            raise ProtocolError(f"a manifest holds an unexpected part {kind!r}")

    def finish(self) -> Offered:
        """What is offered, once the stream ended."""
        have = (len(self._states), len(self._absent), {name: len(text) for name, text in self._texts.items()})
        want = (self._want_states, self._want_absent, self._want)
        if have != want:
            raise ProtocolError(f"a manifest ended early: states, absent, texts are {have} of {want}")
        check(self._states)
        weights, derived, shardings, digests = map(bytes, self._texts.values())
        offered = Offered(
            text=Text(head(self._states, self._absent), weights, derived, shardings),
            state=self._states,
            absent=tuple(self._absent),
            weight_leaves=self._weight_leaves,
            digests=digests,
        )
        self._check_ids(offered)
        return offered

    def _check_ids(self, offered: Offered) -> None:
        header = self.header
        if not offered.digests and not header.content_id:
            if header.derived_id or header.weights_id:
                raise ProtocolError("a manifest without digests names ids")
        elif offered.ids != (header.content_id, header.derived_id):
            raise ProtocolError("a manifest does not give the content id that its header names")


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class _Common:
    """The fields of a manifest header that the common codec can carry."""

    shard_key: str
    incarnation: str
    generation: int
    content_id: str
    derived_id: str
    weights_id: str
    stage: Stage
    role: Role
    coordinates: Coordinates
    revision: str
    ordinal: int

    @classmethod
    def of(cls, header: ManifestHeader) -> _Common:
        return cls(**{field.name: getattr(header, field.name) for field in dataclasses.fields(cls)})


def _read_header(message: peer_pb2.ManifestHeader) -> ManifestHeader:
    common = codec.decode(_Common, message)
    fields = {field.name: getattr(common, field.name) for field in dataclasses.fields(common)}
    return ManifestHeader(**fields, build_facts=bounds.parse_json(message.build_facts, "the build facts"))


def _read_state(message: peer_pb2.ModuleState) -> tuple[str, dict[str, Json]]:
    module = bounds.text(message.module, bounds.MAX_NAME, "a module's path")
    return module, bounds.parse_json(message.state, f"the state of {module}")


# --------------------------------------------------------------------------------------------------------------------
# Read grants


def grant_parts(grant: ReadGrant) -> Iterator[peer_pb2.GrantPart]:
    """The stream of ``OpenRead``."""
    heads = [peer_pb2.EndpointHead(transport=name, nbytes=len(data)) for name, data in grant.endpoints.items()]
    head = peer_pb2.Grant(lease=grant.lease, generation=grant.generation, ttl_s=grant.ttl_s, endpoints=heads)
    head.rate = grant.rate
    yield peer_pb2.GrantPart(grant=head)
    for data in grant.endpoints.values():
        for part in _slices(data):
            yield peer_pb2.GrantPart(endpoint=part)


def collect_grant(parts: Iterable[peer_pb2.GrantPart]) -> ReadGrant:
    """A read grant from an untrusted stream; ``ProtocolError`` where it is out of bounds or incomplete."""
    stream = iter(parts)
    first = next(stream, None)
    if first is None or first.WhichOneof("part") != "grant":
        raise ProtocolError("a read grant does not begin with its head")
    head = first.grant
    bounds.count(len(head.lease), bounds.BYTES["lease"], "the length of the lease")
    bounds.count(len(head.endpoints), bounds.MAX_TRANSPORTS, "endpoints")
    sizes = {}
    for item in head.endpoints:
        name = bounds.text(item.transport, bounds.TEXTS["transport"], "a transport's name")
        sizes[name] = bounds.count(item.nbytes, bounds.MAX_ENDPOINT_BYTES, f"the endpoint bytes of {name}")
    if len(sizes) != len(head.endpoints):
        raise ProtocolError("a read grant names a transport twice")
    return ReadGrant(
        lease=head.lease,
        generation=bounds.count(head.generation, 2**63 - 1, "generation"),
        ttl_s=bounds.real(head.ttl_s, 86_400.0, "ttl_s"),
        endpoints=_endpoints(stream, sizes),
        rate=bounds.real(head.rate, bounds.MAX_RATE, "rate"),
    )


def _endpoints(stream: Iterator[peer_pb2.GrantPart], sizes: Mapping[str, int]) -> dict[str, bytes]:
    total = sum(sizes.values())
    arrived = bytearray()
    for part in stream:
        if part.WhichOneof("part") != "endpoint":
            raise ProtocolError("a read grant holds an unexpected part")
        bounds.count(len(arrived) + len(part.endpoint), total, "endpoint bytes")
        arrived += part.endpoint
    if len(arrived) != total:
        raise ProtocolError(f"a read grant ended early: {len(arrived)} of {total} endpoint bytes")
    found, at = {}, 0
    for name, nbytes in sizes.items():
        found[name] = bytes(arrived[at : at + nbytes])
        at += nbytes
    return found
