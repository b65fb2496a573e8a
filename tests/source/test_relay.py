"""A publication that is filled while it is read: what it serves, and how it goes on once it is complete."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from vision import Encoder, identity

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.errors import GenerationMoved, NotYet, PeerLost, PublishError, TransferError
from weightwire.loaders.member import Member
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.availability import Availability
from weightwire.manifest.catalogue import catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.leafset import mask_of
from weightwire.manifest.records import Layout, Manifest
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.source.described import Claim, Holding
from weightwire.source.publication import Publication
from weightwire.source.scrub import Pace
from weightwire.target.session import PeerSession
from weightwire.transport.base import Connection
from weightwire.types import Coordinates, Span
from weightwire.wire.messages import Candidate, OpenRead, PublicationState, ReadGrant

S = PublicationState


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Member]:
    """This process over ``tcp``, with a server of its own."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    settings = ServerSettings(secret=load_secret(secret), times=Times(ttl_s=3.0, warming_s=0.0))
    with (
        EmbeddedServer(settings) as server,
        Member(Settings(url=server.url, secret_file=secret, transports=("tcp",))) as running,
    ):
        yield running


class Filling:
    """A model that is being received: its bytes are there, of which nobody is told until ``arrive``."""

    def __init__(self, member: Member) -> None:
        self.member = member
        self.model = Encoder(8, 1)
        what = catalogue(self.model, classes={"steps": "derived"})
        self.layout: Layout = what.layout
        self.memory: AddressSpace = what.memory
        self.manifest = Manifest(layout=what.layout, digests=digest_leaves(what.memory, what.layout.leaves))
        self.available = Availability(len(what.layout.leaves))
        self.publication: Publication = member.node.announce(
            Claim(identity=identity(), coordinates=Coordinates(), world_size=1, replica_incarnation="life")
        )
        self.holding = Holding(manifest=self.manifest, memory=what.memory, weights_id="b" * 64)
        self.into = self.publication.relay(self.holding, self.available)

    def arrive(self, *leaves: int) -> None:
        self.available.add(mask_of(leaves or range(len(self.layout.leaves))))

    def open(self) -> ReadGrant:
        return self.member.node.open_read(
            OpenRead(
                shard_key=self.publication.claim.shard_key,
                incarnation=self.member.incarnation,
                content_id=self.manifest.content_id,
                reader="reader",
                reader_host="host",
                transports=tuple(self.member.node.transports),
            )
        )

    def connect(self, grant: ReadGrant) -> Connection:
        ((name, transport),) = self.member.reader.transports.items()
        return transport.connect(grant.endpoints[name], grant.lease, time.monotonic() + 10)

    def read(self, connection: Connection, span: Span) -> bytes:
        """``span`` as a reader gets it."""
        mine = torch.zeros(self.layout.nbytes, dtype=torch.uint8)
        space = _space(mine)
        (transport,) = self.member.reader.transports.values()
        registration = transport.register(space)
        connection.read(span, registration).wait(time.monotonic() + 10)
        return bytes(mine[span.offset : span.end].tolist())


def _space(tensor: torch.Tensor) -> AddressSpace:
    from weightwire.manifest.address import Region, Segment

    size = tensor.numel()
    return AddressSpace(
        [Segment(0, tensor.data_ptr(), size, "cpu")], [Region(tensor.data_ptr(), size, "cpu")], [tensor]
    )


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.fixture
def filling(member: Member) -> Filling:
    return Filling(member)


def test_h38_a_leaf_that_is_not_there_yet_is_refused_and_may_be_asked_for_again(filling: Filling) -> None:
    connection = filling.connect(filling.open())
    first, second = (filling.layout.leaves[at].span for at in (0, 1))
    with pytest.raises(NotYet, match="not have these bytes yet"):
        filling.read(connection, first)
    filling.arrive(0)
    served = filling.read(connection, first)
    with pytest.raises(NotYet):
        filling.read(connection, second)
    with pytest.raises(NotYet):
        filling.read(connection, Span(0, second.end))
    filling.arrive()
    assert filling.read(connection, Span(0, second.end))[: first.nbytes] == served
    assert filling.publication.relayed == first.nbytes


def test_readers_are_told_what_is_there_and_when_it_is_over(filling: Filling) -> None:
    grant = filling.open()
    updates = filling.member.node.progress(grant.lease, 0)
    assert next(updates).ranges == ()
    filling.arrive(1, 2)
    told = [next(updates) for _ in range(2)]
    assert [(r.first, r.count) for update in told for r in update.ranges] == [(1, 2)]
    filling.arrive()
    assert any(next(updates).complete for _ in range(2))
    filling.publication.withdraw(0.0)
    with pytest.raises(GenerationMoved):
        list(updates)


def test_it_is_announced_with_what_it_has(filling: Filling) -> None:
    filling.arrive(0, 1)
    record = filling.publication.current()
    assert record is not None
    assert (record.state, record.generation) == (S.RELAYING, 1)
    assert (record.content_id, record.nbytes) == (filling.manifest.content_id, filling.layout.nbytes)
    assert record.fraction == pytest.approx(2 / len(filling.layout.leaves))


def test_leases_and_connections_go_on_once_it_is_complete(filling: Filling) -> None:
    grant = filling.open()
    connection = filling.connect(grant)
    filling.arrive()
    before = filling.read(connection, filling.layout.leaves[0].span)
    registered = dict(filling.publication.memory.by_name)
    assert registered == filling.into
    with pytest.raises(PublishError):
        filling.publication.offer()
    filling.publication.hold(filling.holding)
    assert filling.publication.state is S.RELAYING, "the engine has not said a word"
    filling.publication.offer()
    assert (filling.publication.state, filling.publication.generation) == (S.READY, grant.generation)
    assert filling.publication.memory.by_name == registered
    assert filling.read(connection, filling.layout.leaves[0].span) == before
    assert grant.lease in filling.publication.leases


def test_h29_a_relay_that_turns_out_to_hold_other_derived_bytes_moves_its_generation(filling: Filling) -> None:
    grant = filling.open()
    connection = filling.connect(grant)
    filling.arrive()
    threading.Timer(0.3, lambda: filling.publication.close_read(grant.lease)).start()
    with torch.no_grad():
        filling.model.get_buffer("steps").add_(1)
    other = Manifest(layout=filling.layout, digests=digest_leaves(filling.memory, filling.layout.leaves))
    assert other.content_id == filling.manifest.content_id
    filling.publication.hold(Holding(manifest=other, memory=filling.memory, weights_id="b" * 64))
    filling.publication.offer()
    assert (filling.publication.state, filling.publication.generation) == (S.READY, grant.generation + 1)
    with pytest.raises(TransferError):
        filling.read(connection, filling.layout.leaves[0].span)
    assert filling.publication.manifest()[1].derived_id == other.derived_id


def test_h29_a_session_that_is_closed_can_still_be_asked_whether_its_source_moved(filling: Filling) -> None:
    record = filling.publication.current()
    assert record is not None
    session = PeerSession(filling.member.reader, Candidate(record=record, reason=""), filling.manifest)
    assert not session.moved()
    session.close()
    assert not session.moved(), "it is blamed then"
    filling.publication.withdraw(0.0)
    assert session.moved(), "it is not"


def test_h38_nothing_can_be_read_after_it_was_withdrawn(filling: Filling) -> None:
    connection = filling.connect(filling.open())
    filling.arrive()
    filling.publication.withdraw(0.0)
    with pytest.raises((GenerationMoved, PeerLost)):
        filling.read(connection, filling.layout.leaves[0].span)
    assert filling.publication.generation == 2


def test_h69_what_is_not_there_yet_is_neither_scrubbed_nor_blamed(filling: Filling) -> None:
    filling.member.node.scrub.pace = Pace(rate=1e12, share=1.0, pass_s=0.0, idle_s=0.001)
    with torch.no_grad():
        filling.model.get_parameter("big.weight").zero_()  # as it is before it arrives
    with pytest.raises(GenerationMoved, match="not there yet"):
        filling.member.node.self_check(filling.publication.claim.shard_key, 0)
    time.sleep(0.5)
    assert filling.publication.state is S.RELAYING
    filling.arrive(0)
    until(lambda: filling.publication.over)


def test_h49_a_relay_that_was_read_one_sided_digests_itself_again_after_its_last_reader(filling: Filling) -> None:
    filling.member.node.scrub.pace = Pace(pass_s=1e6)  # leaves it to this
    ((_, transport),) = filling.member.node.transports.items()
    transport.GATE_SEES_READS = False  # type: ignore[attr-defined]
    leases = [filling.open().lease for _ in range(2)]
    filling.arrive()
    filling.publication.hold(filling.holding)
    filling.publication.offer()
    last = filling.layout.weight_leaves - 1
    with torch.no_grad():
        filling.model.get_parameter("conv.weight").view(-1)[0] += 1  # as a reader could
    filling.publication.close_read(leases[0])
    time.sleep(1.2)
    assert not filling.publication.over, f"leaf {last} was looked at while somebody could still write"
    filling.publication.close_read(leases[1])
    until(lambda: filling.publication.over)


def test_only_what_is_loading_becomes_a_relay(filling: Filling) -> None:
    with pytest.raises(PublishError, match="cannot become a relay"):
        filling.publication.relay(filling.holding, filling.available)
