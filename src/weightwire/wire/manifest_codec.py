"""Manifests and read grants as streams of bounded parts.

Nothing is allocated from a number that a peer names: what is kept is what arrived, and what arrives is counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, TypeVar

from weightwire.errors import ProtocolError
from weightwire.manifest.collection import no_collection
from weightwire.manifest.plan import validate_manifest
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest, View
from weightwire.types import Coordinates, Json, Role, Stage, TensorClass
from weightwire.wire import bounds, codec
from weightwire.wire.generated import peer_pb2
from weightwire.wire.messages import ManifestHeader, ReadGrant
from weightwire.wire.sharding_codec import read_sharding, sharding_message

Item = TypeVar("Item")

_KINDS = {
    peer_pb2.TENSOR_CLASS_WEIGHT: TensorClass.WEIGHT,
    peer_pb2.TENSOR_CLASS_DERIVED: TensorClass.DERIVED,
}
_NUMBERS = {kind: number for number, kind in _KINDS.items()}


# --------------------------------------------------------------------------------------------------------------------
# Writing


def manifest_parts(header: ManifestHeader, manifest: Manifest) -> Iterator[peer_pb2.ManifestPart]:
    """The stream of ``GetManifest``, header first.

    Raises:
        ProtocolError: one entry or one module's state is too large for a message.
    """
    layout = manifest.layout
    yield peer_pb2.ManifestPart(header=_header(header, manifest))
    for entries in _batches(map(_entry, layout.entries)):
        yield peer_pb2.ManifestPart(entries=peer_pb2.Entries(entries=entries))
    states = (
        peer_pb2.ModuleState(module=module, state=bounds.dump_json(dict(state), f"the state of {module}"))
        for module, state in layout.state.items()
    )
    for batch in _batches(states):
        yield peer_pb2.ManifestPart(states=peer_pb2.States(states=batch))
    for names in _batches(layout.absent, len):
        yield peer_pb2.ManifestPart(absent=peer_pb2.Names(names=names))
    for part in _slices(manifest.digests):
        yield peer_pb2.ManifestPart(digests=part)


def _header(header: ManifestHeader, manifest: Manifest) -> peer_pb2.ManifestHeader:
    message = codec.encode(_Common.of(header), peer_pb2.ManifestHeader)
    message.build_facts = bounds.dump_json(dict(header.build_facts), "the build facts")
    message.entries = len(manifest.layout.entries)
    message.states = len(manifest.layout.state)
    message.absent = len(manifest.layout.absent)
    message.digest_bytes = len(manifest.digests)
    return message


def _entry(entry: Entry) -> peer_pb2.Entry:
    views = [
        peer_pb2.View(name=v.name, dtype=v.dtype, shape=v.shape, stride=v.stride, offset=v.offset) for v in entry.views
    ]
    message = peer_pb2.Entry(
        name=entry.name,
        dtype=entry.dtype,
        shape=entry.shape,
        order=entry.order,
        kind=_NUMBERS[entry.kind],
        nbytes=entry.nbytes,
        aliases=entry.aliases,
        views=views,
    )
    if entry.sharding is not None:
        message.sharding.CopyFrom(sharding_message(entry.sharding))
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


def collect_manifest(parts: Iterable[peer_pb2.ManifestPart]) -> tuple[ManifestHeader, Manifest]:
    """A manifest from an untrusted stream.

    Raises:
        ProtocolError: anything out of bounds, out of order, missing, left over, or not giving the ids that the header
            names.
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
        self._want_entries = bounds.count(header.entries, bounds.MAX_ENTRIES, "entries")
        self._want_states = bounds.count(header.states, bounds.MAX_STATES, "states")
        self._want_absent = bounds.count(header.absent, bounds.MAX_NAMES, "absent names")
        self._want_digests = bounds.count(header.digest_bytes, bounds.MAX_LEAVES * DIGEST_BYTES, "digest bytes")
        self._entries: list[Entry] = []
        self._states: dict[str, dict[str, Json]] = {}
        self._absent: list[str] = []
        self._digests = bytearray()
        self._arrived = 0

    @no_collection()
    def take(self, part: peer_pb2.ManifestPart) -> None:
        """Add one part."""
        self._arrived += part.ByteSize()
        bounds.count(self._arrived, bounds.MAX_MANIFEST_BYTES, "the bytes of a manifest")
        kind = part.WhichOneof("part")
        if kind == "entries":
            bounds.count(len(self._entries) + len(part.entries.entries), self._want_entries, "entries")
            self._entries.extend(map(_read_entry, part.entries.entries))
        elif kind == "states":
            bounds.count(len(self._states) + len(part.states.states), self._want_states, "states")
            self._states.update(map(_read_state, part.states.states))
        elif kind == "absent":
            bounds.count(len(self._absent) + len(part.absent.names), self._want_absent, "absent names")
            self._absent.extend(bounds.text(name, bounds.MAX_NAME, "an absent name") for name in part.absent.names)
        elif kind == "digests":
            bounds.count(len(self._digests) + len(part.digests), self._want_digests, "digest bytes")
            self._digests += part.digests
        else:
            raise ProtocolError(f"a manifest holds an unexpected part {kind!r}")

    @no_collection()
    def finish(self) -> Manifest:
        """The manifest, once the stream ended."""
        have = (len(self._entries), len(self._states), len(self._absent), len(self._digests))
        want = (self._want_entries, self._want_states, self._want_absent, self._want_digests)
        if have != want:
            raise ProtocolError(f"a manifest ended early: entries, states, absent, digests are {have} of {want}")
        layout = Layout(entries=tuple(self._entries), state=self._states, absent=tuple(self._absent))
        manifest = Manifest(layout=layout, digests=bytes(self._digests))
        # counts leaves before any is made: their number follows from sizes that were named
        validate_manifest(manifest, provisional=not self.header.content_id)
        if manifest.provisional:
            if self.header.content_id or self.header.derived_id or self.header.weights_id:
                raise ProtocolError("a manifest without digests names ids")
            return manifest
        if (manifest.content_id, manifest.derived_id) != (self.header.content_id, self.header.derived_id):
            raise ProtocolError("a manifest does not give the content id that its header names")
        return manifest


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


def _read_entry(message: peer_pb2.Entry) -> Entry:
    """Bounds of what is allocated here; what the numbers mean is for ``validate_manifest``, which sees them all."""
    kind = _KINDS.get(message.kind)
    if kind is None:
        raise ProtocolError(f"tensor class {message.kind} does not travel")
    if max(len(message.shape), len(message.order)) > bounds.MAX_DIMENSIONS:
        raise ProtocolError(f"a tensor has more than {bounds.MAX_DIMENSIONS} dimensions")
    if max(len(message.aliases), len(message.views)) > bounds.MAX_NAMES_PER_ENTRY:
        raise ProtocolError(f"a tensor has more than {bounds.MAX_NAMES_PER_ENTRY} aliases or views")
    return Entry(
        name=bounds.text(message.name, bounds.MAX_NAME, "a tensor name"),
        dtype=bounds.text(message.dtype, 64, "a dtype"),
        shape=tuple(message.shape),
        order=tuple(message.order),
        kind=kind,
        nbytes=message.nbytes,
        aliases=tuple(bounds.text(alias, bounds.MAX_NAME, "an alias") for alias in message.aliases),
        views=tuple(map(_read_view, message.views)),
        sharding=read_sharding(message.sharding) if message.HasField("sharding") else None,
    )


def _read_view(message: peer_pb2.View) -> View:
    if max(len(message.shape), len(message.stride)) > bounds.MAX_DIMENSIONS:
        raise ProtocolError(f"a view has more than {bounds.MAX_DIMENSIONS} dimensions")
    return View(
        name=bounds.text(message.name, bounds.MAX_NAME, "a view's name"),
        dtype=bounds.text(message.dtype, 64, "a dtype"),
        shape=tuple(message.shape),
        stride=tuple(message.stride),
        offset=message.offset,
    )


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
