from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from wire_samples import SECRET, SamplePeer, header, manifest

from weightwire.errors import ProtocolError
from weightwire.wire import bounds
from weightwire.wire.generated import peer_pb2
from weightwire.wire.manifest_codec import collect_grant, collect_manifest, grant_parts, manifest_parts
from weightwire.wire.messages import ReadGrant
from weightwire.wire.peer_client import PeerClient
from weightwire.wire.peer_service import PeerServer

Part = peer_pb2.ManifestPart


def parts(entries: int = 5, **changes: Any) -> list[Part]:
    shown = manifest(entries)
    sent = manifest_parts(header(shown, **changes), shown)
    return [Part.FromString(part.SerializeToString()) for part in sent]


def test_a_manifest_arrives_as_it_was_sent() -> None:
    shown = manifest()
    assert collect_manifest(parts()) == (header(shown), shown)


def provisional(**changes: Any) -> list[Part]:
    shown = dataclasses.replace(manifest(), digests=b"")
    ids = {"content_id": "", "derived_id": "", "weights_id": ""}
    return list(manifest_parts(header(manifest(), **(ids | changes)), shown))


def test_a_provisional_manifest_arrives_without_ids_and_without_digests() -> None:
    head, found = collect_manifest(provisional())
    assert (head.content_id, found.provisional, found.layout) == ("", True, manifest().layout)


@pytest.mark.parametrize("field", ["content_id", "derived_id", "weights_id"])
def test_a_manifest_without_digests_cannot_name_ids(field: str) -> None:
    with pytest.raises(ProtocolError, match=r"without digests names ids|0 digest bytes"):
        collect_manifest(provisional(**{field: "some"}))


def test_large_manifests_come_in_bounded_parts() -> None:
    sent = parts(20_000)
    assert len(sent) > 4
    assert max(part.ByteSize() for part in sent) <= bounds.PART_BYTES + 1024
    assert collect_manifest(sent)[1] == manifest(20_000)


def test_h51_a_manifest_of_100000_tensors_passes_over_grpc() -> None:
    shown = manifest(100_000)
    server = PeerServer(SamplePeer(shown), SECRET)
    client = PeerClient(f"127.0.0.1:{server.port}", "life-0", SECRET)
    try:
        began = time.monotonic()
        found = client.manifest("shard-0", timeout=60)[1]
        seconds = time.monotonic() - began
    finally:
        client.close()
        server.stop(0)
    assert found.content_id == shown.content_id
    assert found.layout.entries == shown.layout.entries
    assert sum(len(entry.name) + 24 for entry in shown.layout.entries) > bounds.MAX_MESSAGE_BYTES  # at the very least
    assert seconds < 60


def test_a_sharding_of_another_version_is_opaque_and_refuses_nothing_else() -> None:
    sent = parts()
    entry_of(sent).sharding.version = 2
    (found,) = [entry for entry in collect_manifest(sent)[1].layout.entries if entry.views]
    assert found.sharding is not None
    assert "version 2" in found.sharding.opaque
    entry_of(sent).ClearField("sharding")  # a peer that knows nothing of it
    assert collect_manifest(sent)[1].content_id == manifest().content_id


Edit = Callable[[list[Part]], Iterable[Part]]


def entry_of(sent: list[Part]) -> Any:
    entries = next(part for part in sent if part.WhichOneof("part") == "entries").entries.entries
    return next(entry for entry in entries if entry.views)


def edited(change: Callable[[Any], None]) -> Edit:
    def edit(sent: list[Part]) -> list[Part]:
        change(entry_of(sent))
        return sent

    return edit


def headed(**changes: Any) -> Edit:
    def edit(sent: list[Part]) -> list[Part]:
        for name, value in changes.items():
            setattr(sent[0].header, name, value)
        return sent

    return edit


HOSTILE: dict[str, Edit] = {
    "nothing at all": lambda _: [],
    "no header": lambda sent: sent[1:],
    "two headers": lambda sent: [sent[0], *sent],
    "cut short": lambda sent: sent[:-1],
    "an empty part": lambda sent: [*sent, Part()],
    "entries twice": lambda sent: [*sent, sent[1]],
    "more digests than announced": lambda sent: [*sent, Part(digests=b"x")],
    "a huge count": headed(entries=2**32 - 1),
    "a huge digest": headed(digest_bytes=2**62),
    "another content id": headed(content_id="0" * 64),
    "another derived id": headed(derived_id="0" * 64),
    "build facts that are no object": headed(build_facts=b"[1]"),
    "build facts that are no JSON": headed(build_facts=b"{nope"),
    "build facts with NaN": headed(build_facts=b'{"a":NaN}'),
    "deeply nested build facts": headed(build_facts=b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
    "a tensor that claims 2**62 bytes": edited(lambda entry: setattr(entry, "nbytes", 2**62)),
    "a tensor that claims 4 TiB": edited(lambda entry: setattr(entry, "nbytes", 2**42)),
    "a size that is not its shape's": edited(lambda entry: setattr(entry, "nbytes", 25)),
    "a shape that overflows": edited(lambda entry: entry.shape.extend([2**40, 2**40])),
    "too many dimensions": edited(lambda entry: entry.shape.extend([1] * 100)),
    "an order that is none": edited(lambda entry: entry.order.__setitem__(0, 7)),
    "an unknown dtype": edited(lambda entry: setattr(entry, "dtype", "float7")),
    "a runtime tensor": edited(lambda entry: setattr(entry, "kind", 0)),
    "a name that is too long": edited(lambda entry: setattr(entry, "name", "n" * 5000)),
    "a name with a line break": edited(lambda entry: setattr(entry, "name", "a\nb")),
    "a name twice": edited(lambda entry: entry.aliases.append("rope.cache")),
    "a piece outside the whole tensor": edited(lambda entry: entry.sharding.pieces[0].offset.__setitem__(0, 2**40)),
    "a piece outside its tensor": edited(lambda entry: entry.sharding.pieces[0].at.__setitem__(0, 2)),
    "a piece of too few dimensions": edited(lambda entry: entry.sharding.pieces[0].size.pop()),
    "a piece of too many dimensions": edited(lambda entry: entry.sharding.pieces[0].shape.extend([1] * 100)),
    "a part that no piece covers": edited(lambda entry: entry.sharding.padding.pop()),
    "too many pieces": edited(lambda entry: entry.sharding.pieces.extend(entry.sharding.pieces[:1] * 100)),
    "a part's name with a line break": edited(lambda entry: setattr(entry.sharding.pieces[0], "part", "a\nb")),
    "an opaque sharding with pieces": edited(lambda entry: setattr(entry.sharding, "opaque", "swizzled")),
    "a view outside its tensor": edited(lambda entry: setattr(entry.views[0], "offset", 2**40)),
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifests_are_protocol_errors(edit: Edit) -> None:
    with pytest.raises(ProtocolError):
        collect_manifest(edit(parts()))


def test_an_item_that_fits_no_message_is_refused_when_sent() -> None:
    shown = manifest()
    entry = shown.layout.entries[0]
    entry = dataclasses.replace(entry, aliases=tuple(f"{number:01000d}" for number in range(5000)))
    large = dataclasses.replace(shown, layout=dataclasses.replace(shown.layout, entries=(entry,)))
    with pytest.raises(ProtocolError, match="too many for a message"):
        list(manifest_parts(header(shown), large))


def test_a_grant_of_tens_of_megabytes_arrives_in_parts() -> None:
    grant = ReadGrant(
        lease=b"lease",
        generation=4,
        ttl_s=30,
        endpoints={"nixl": b"n" * 20_000_000, "tcp": b"", "inproc": b"i"},
        rate=2.5e8,
    )
    sent = list(grant_parts(grant))
    assert max(part.ByteSize() for part in sent) <= bounds.PART_BYTES + 1024
    assert collect_grant(sent) == grant
    assert list(collect_grant(sent).endpoints) == ["nixl", "tcp", "inproc"]


def test_hostile_grants_are_protocol_errors() -> None:
    sent = list(grant_parts(ReadGrant(lease=b"l", generation=1, ttl_s=1, endpoints={"tcp": b"abc"})))
    huge = peer_pb2.GrantPart()
    huge.grant.endpoints.add(transport="tcp", nbytes=2**40)
    twice = peer_pb2.GrantPart()
    twice.grant.endpoints.add(transport="tcp", nbytes=1)
    twice.grant.endpoints.add(transport="tcp", nbytes=1)
    rates = [peer_pb2.GrantPart(grant=peer_pb2.Grant(rate=rate)) for rate in (-1.0, float("nan"), float("inf"), 1e16)]
    for rate in rates:
        with pytest.raises(ProtocolError, match="rate is"):
            collect_grant([rate])
    for bad in (
        [],
        sent[1:],
        sent[:1],
        [*sent, sent[1]],
        [*sent, sent[0]],
        [huge],
        [twice],
    ):
        with pytest.raises(ProtocolError):
            collect_grant(bad)
