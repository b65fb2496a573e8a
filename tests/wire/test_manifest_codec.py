from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from typing import Any

import pytest
from wire_samples import SECRET, SamplePeer, header, manifest

from weightwire.errors import ManifestMismatch, ProtocolError
from weightwire.manifest.offered import Offered
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
    head, found = collect_manifest(parts())
    assert (head, found.manifest, found) == (header(shown), shown, Offered.of(shown))


def provisional(**changes: Any) -> list[Part]:
    shown = dataclasses.replace(manifest(), digests=b"")
    ids = {"content_id": "", "derived_id": "", "weights_id": ""}
    return list(manifest_parts(header(manifest(), **(ids | changes)), shown))


def test_a_provisional_manifest_arrives_without_ids_and_without_digests() -> None:
    head, found = collect_manifest(provisional())
    assert head.content_id == ""
    same = found.under(manifest().layout, provisional=True)
    assert same is not None
    assert same.provisional
    with pytest.raises(ProtocolError, match="0 digest bytes"):
        found.under(manifest().layout)


@pytest.mark.parametrize("field", ["content_id", "derived_id", "weights_id"])
def test_a_manifest_without_digests_cannot_name_ids(field: str) -> None:
    with pytest.raises(ProtocolError, match=r"without digests names ids|does not give the content id"):
        collect_manifest(provisional(**{field: "some"}))


def test_large_manifests_come_in_bounded_parts() -> None:
    sent = parts(20_000)
    assert len(sent) > 4
    assert max(part.ByteSize() for part in sent) <= bounds.PART_BYTES + 1024
    assert collect_manifest(sent)[1].manifest == manifest(20_000)


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
    assert found.manifest.content_id == shown.content_id
    assert found.manifest.layout.entries == shown.layout.entries
    assert sum(len(entry.name) + 24 for entry in shown.layout.entries) > bounds.MAX_MESSAGE_BYTES  # at the very least
    assert seconds < 60


def test_what_both_sides_say_in_the_same_words_is_never_taken_apart() -> None:
    ours, found = manifest(), collect_manifest(parts())[1]
    planned = found.plan(ours.layout)
    assert planned.layout is planned.manifest.layout is ours.layout
    assert (planned.manifest, planned.copies) == (ours, ())
    assert "manifest" not in vars(found)


@pytest.mark.parametrize(
    "fields",
    [{"state": {"layers.0": {"alpha": 1.0}}}, {"absent": ("bias.a",)}, {"entries": manifest().layout.entries[1:]}],
)
def test_what_is_said_otherwise_is_compared_name_by_name(fields: dict[str, Any]) -> None:
    found = collect_manifest(parts())[1]
    ours = dataclasses.replace(manifest().layout, **fields)
    assert found.under(ours) is None
    with pytest.raises(ManifestMismatch):
        found.plan(ours)


def test_state_of_equal_value_and_another_type_differs() -> None:
    shown = dataclasses.replace(manifest(), layout=dataclasses.replace(manifest().layout, state={"m": {"on": True}}))
    found = collect_manifest(manifest_parts(header(shown), shown))[1]
    with pytest.raises(ManifestMismatch, match="state of m: on"):
        found.plan(dataclasses.replace(shown.layout, state={"m": {"on": 1}}))


Change = Callable[[Any], None]


def told(change: Change | None = None, shardings: Change | None = None, raw: bytes = b"") -> list[Part]:
    """A manifest whose ids are right and whose texts are not: rows of weights or shardings changed, or all replaced."""
    offered = Offered.of(manifest())
    text = offered.text
    rows, declared = json.loads(text.weights), json.loads(text.shardings)
    for edit, what in ((change, rows), (shardings, declared)):
        if edit is not None:
            edit(what)
    weights, apart = (json.dumps(what, separators=(",", ":")).encode() for what in (rows, declared))
    changed = dataclasses.replace(text, weights=raw or weights, shardings=apart)
    sent = parts()
    content_id, _ = dataclasses.replace(offered, text=changed).ids
    sent[0].header.content_id = content_id
    for name, data in (("weights", changed.weights), ("shardings", changed.shardings)):
        setattr(next(part for part in sent if part.WhichOneof("part") == name), name, data)
        setattr(sent[0].header, f"{name}_bytes", len(data))
    return sent


def test_the_manifest_that_hostile_ones_are_made_from_is_good() -> None:
    assert collect_manifest(told())[1].manifest == manifest()


def test_a_sharding_of_another_version_is_opaque_and_refuses_nothing_else() -> None:
    found = collect_manifest(told(shardings=lambda rows: rows[0].__setitem__(1, 2)))[1].manifest
    (entry,) = [entry for entry in found.layout.entries if entry.views]
    assert entry.sharding is not None
    assert "version 2" in entry.sharding.opaque
    assert found.content_id == manifest().content_id
    bare = collect_manifest(told(shardings=lambda rows: rows.clear()))[1]
    assert bare.manifest.content_id == manifest().content_id
    assert bare.plan(manifest().layout).copies == ()  # declared on one side only


def row(change: Change) -> list[Part]:
    """Of the tensor with an alias and a view."""
    return told(lambda rows: change(next(each for each in rows if each[6])))


def field(at: int, value: Any) -> list[Part]:
    return row(lambda each: each.__setitem__(at, value))


def piece(change: Change) -> list[Part]:
    return told(shardings=lambda rows: change(rows[0][2][0]))


Edit = Callable[[list[Part]], Iterable[Part]]


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
    "states twice": lambda sent: [*sent, sent[1]],
    "more digests than announced": lambda sent: [*sent, Part(digests=b"x")],
    "a huge count": headed(states=2**32 - 1),
    "a huge text": headed(weights_bytes=2**40),
    "huge leaves": headed(weight_leaves=2**32 - 1),
    "digests split elsewhere": headed(weight_leaves=0),
    "a huge digest": headed(digest_bytes=2**62),
    "another content id": headed(content_id="0" * 64),
    "another derived id": headed(derived_id="0" * 64),
    "build facts that are no object": headed(build_facts=b"[1]"),
    "build facts that are no JSON": headed(build_facts=b"{nope"),
    "build facts with NaN": headed(build_facts=b'{"a":NaN}'),
    "deeply nested build facts": headed(build_facts=b'{"a":' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}


@pytest.mark.parametrize("edit", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_manifests_are_protocol_errors(edit: Edit) -> None:
    with pytest.raises(ProtocolError):
        collect_manifest(edit(parts()))


TEXTS: dict[str, Callable[[], list[Part]]] = {
    "no JSON": lambda: told(raw=b"[nope"),
    "no ASCII": lambda: told(raw="[é]".encode()),
    "no list": lambda: told(raw=b"{}"),
    "no rows": lambda: told(raw=b"[1]"),
    "deeply nested": lambda: told(raw=b"[" * 100_000 + b"]" * 100_000),
    "spaces": lambda: told(raw=Offered.of(manifest()).text.weights + b" "),
    "a number written otherwise": lambda: told(raw=Offered.of(manifest()).text.weights.replace(b"24", b"24.0")),
    "rows in another order": lambda: told(lambda rows: rows.reverse()),
    "a row too long": lambda: row(lambda each: each.append(0)),
    "a tensor that claims 2**62 bytes": lambda: field(4, 2**62),
    "a tensor that claims 4 TiB": lambda: field(4, 2**42),
    "a number of 5,000 digits": lambda: told(raw=Offered.of(manifest()).text.weights.replace(b"24", b"9" * 5000)),
    "a size that is not its shape's": lambda: field(4, 25),
    "a size that is true": lambda: row(lambda each: each.__setitem__(4, each[4] == 24)),
    "a size that is text": lambda: field(4, "24"),
    "a shape that overflows": lambda: row(lambda each: each[2].extend([2**40, 2**40])),
    "a shape of text": lambda: row(lambda each: each[2].__setitem__(0, "2")),
    "a shape of lists": lambda: row(lambda each: each[2].__setitem__(0, [2])),
    "too many dimensions": lambda: row(lambda each: each[2].extend([1] * 100)),
    "too many aliases": lambda: field(5, [f"{at:09}" for at in range(70_000)]),
    "an order that is none": lambda: row(lambda each: each[3].__setitem__(0, 7)),
    "an unknown dtype": lambda: field(1, "float7"),
    "a dtype that is none": lambda: field(1, None),
    "a name that is a number": lambda: field(0, 7),
    "a name that is too long": lambda: field(0, "n" * 5000),
    "a name with a line break": lambda: field(0, "a\nb"),
    "half a character": lambda: field(0, "\ud800"),
    "a name twice": lambda: row(lambda each: each[5].append("rope.cache")),
    "an alias that is a list": lambda: field(5, [[]]),
    "a view outside its tensor": lambda: row(lambda each: each[6][0].__setitem__(4, 2**40)),
    "a view that is none": lambda: field(6, [[]]),
    "a sharding that is none": lambda: told(shardings=lambda rows: rows.append(7)),
    "a sharding of no tensor": lambda: told(shardings=lambda rows: rows[0].__setitem__(0, 99)),
    "a piece outside the whole tensor": lambda: piece(lambda each: each[2].__setitem__(0, 2**40)),
    "a piece outside its tensor": lambda: piece(lambda each: each[4].__setitem__(0, 2)),
    "a piece of too few dimensions": lambda: piece(lambda each: each[3].pop()),
    "a piece of too many dimensions": lambda: piece(lambda each: each[1].extend([1] * 100)),
    "a piece that is none": lambda: piece(lambda each: each.clear()),
    "a part that no piece covers": lambda: told(shardings=lambda rows: rows[0][3].pop()),
    "padding of text": lambda: told(shardings=lambda rows: rows[0][3][0].__setitem__(0, ["0", 0])),
    "padding that is none": lambda: told(shardings=lambda rows: rows[0][3].__setitem__(0, 7)),
    "too many pieces": lambda: told(shardings=lambda rows: rows[0][2].extend(rows[0][2][:1] * 100)),
    "a part's name with a line break": lambda: piece(lambda each: each.__setitem__(0, "a\nb")),
    "an opaque sharding with pieces": lambda: told(shardings=lambda rows: rows[0].__setitem__(4, "swizzled")),
    "a reason with a line break": lambda: told(shardings=lambda rows: rows[1].__setitem__(4, "a\nb")),
    "a reason without end": lambda: told(shardings=lambda rows: rows[1].__setitem__(4, "x" * 5000)),
}


@pytest.mark.parametrize("make", TEXTS.values(), ids=TEXTS.keys())
def test_h39_hostile_texts_are_protocol_errors_once_they_are_taken_apart(make: Callable[[], list[Part]]) -> None:
    sent = make()
    found = collect_manifest(sent)[1]  # its ids are right
    assert found.under(manifest().layout) is None
    for look in (lambda: found.manifest, lambda: found.plan(manifest().layout)):
        with pytest.raises(ProtocolError):
            look()


def test_h39_the_split_of_the_digests_is_the_tensors_own() -> None:
    shown = Offered.of(manifest())
    lying = dataclasses.replace(shown, weight_leaves=0)
    looks = (lambda: lying.manifest, lambda: lying.under(manifest().layout), lambda: lying.plan(manifest().layout))
    for look in looks:
        with pytest.raises(ProtocolError, match="0 leaves of weights"):
            look()


def test_a_tensor_of_very_many_names_arrives_in_bounded_parts() -> None:
    shown = manifest()
    entry = dataclasses.replace(shown.layout.entries[0], aliases=tuple(f"{number:01000d}" for number in range(5000)))
    layout = dataclasses.replace(shown.layout, entries=(entry, *shown.layout.entries[1:]))
    large = dataclasses.replace(shown, layout=layout)
    sent = list(manifest_parts(header(large), large))
    assert max(part.ByteSize() for part in sent) <= bounds.PART_BYTES + 1024
    assert collect_manifest(sent)[1].manifest == large


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
