"""A publication that is filled from a disk, as its followers see it through its peer endpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from vision import Encoder, identity

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.errors import GenerationMoved, PeerLost, ProtocolError
from weightwire.loaders.member import Member
from weightwire.manifest.availability import Availability
from weightwire.manifest.catalogue import Catalogue, catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.leafset import mask_of
from weightwire.manifest.provisional import Provisional
from weightwire.manifest.records import Manifest, weights_id
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.source.described import Claim, Holding
from weightwire.source.filling import MAX_LEAVES, News
from weightwire.source.from_disk import offered_by
from weightwire.source.publication import Publication
from weightwire.target.following import outcome
from weightwire.target.session import contact, learn
from weightwire.types import Coordinates
from weightwire.wire.messages import FindShard, LeafRange, OpenRead, ProgressUpdate, PublicationState
from weightwire.wire.peer_client import PeerClient

LABEL = Coordinates().label()


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Member]:
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    times = Times(ttl_s=1.5, warming_s=0.0)
    with (
        EmbeddedServer(ServerSettings(secret=load_secret(secret), times=times)) as server,
        Member(
            Settings(url=server.url, secret_file=secret, transports=("tcp",), stall_timeout=1.0, load_timeout=20.0)
        ) as running,
    ):
        yield running


class Read:
    """A shard of which leaves become final by a word of the test."""

    def __init__(self, member: Member, life: str = "life") -> None:
        self.member = member
        self.described: Catalogue = catalogue(Encoder(8, 1))
        layout = self.described.layout
        self.manifest = Manifest(layout=layout, digests=digest_leaves(self.described.memory, layout.leaves))
        self.provisional, self.available = Provisional(layout), Availability(len(layout.leaves))
        claim = Claim(identity=identity(), coordinates=Coordinates(), world_size=1, replica_incarnation=life)
        self.publication: Publication = member.node.announce(claim)
        offered_by(self.publication)(self.described.memory, self.provisional, self.available)
        self.find = FindShard(shard_key=claim.shard_key, weights_id="", following=life)

    def final(self, first: int, count: int) -> None:
        self.provisional.tell(first, self.manifest.digests[16 * first : 16 * (first + count)])
        self.available.add(mask_of(range(first, first + count)))

    def publish(self) -> str:
        together = weights_id({LABEL: self.manifest.content_id})
        self.publication.hold(Holding(manifest=self.manifest, memory=self.described.memory, weights_id=together))
        self.publication.offer()
        return together

    def client(self) -> PeerClient:
        until = time.monotonic() + 20
        while not (found := self.member.metadata.find_shard(self.find).candidates):
            assert time.monotonic() < until
            time.sleep(0.05)
        return contact(self.member.reader, found[0])

    def ask(self, layout_digest: str, content_id: str = "") -> OpenRead:
        return OpenRead(
            shard_key=self.find.shard_key,
            incarnation=self.member.incarnation,
            content_id=content_id,
            reader="reader",
            reader_host="host",
            transports=("tcp",),
            layout_digest=layout_digest,
        )


def test_followers_are_told_each_leaf_with_its_digest_and_the_ids_in_the_end(member: Member) -> None:
    read = Read(member)
    client = read.client()
    header, offered = client.manifest(read.find.shard_key)
    assert (header.content_id, header.weights_id) == ("", "")
    outline = offered.under(read.manifest.layout, provisional=True)
    assert outline is not None
    assert outline.provisional
    grant = client.open_read(read.ask(outline.layout.digest))
    told, leaves = Provisional(outline.layout), len(outline.layout.leaves)
    updates = client.progress(grant.lease)
    read.final(2, 2)
    for update in updates:
        learn(told, update, "the source")
        if told.known == 0b1100:
            break
    read.final(0, leaves)
    together = read.publish()  # the same generation, the same lease
    for update in updates:
        learn(told, update, "the source")
        if update.complete:
            break
    assert told.manifest() == read.manifest
    status = client.status(read.find.shard_key)
    assert (status.content_id, status.weights_id) == (read.manifest.content_id, together)
    late = client.open_read(read.ask(outline.layout.digest))  # one that comes now is told the same
    again = Provisional(outline.layout)
    learn(again, next(iter(client.progress(late.lease))), "the source")
    assert again.complete
    assert read.publication.state is PublicationState.READY
    client.close()


def test_nobody_reads_what_has_no_ids_without_naming_its_layout(member: Member) -> None:
    read = Read(member)
    client = read.client()
    for refused in (read.ask(""), read.ask("", read.manifest.content_id), read.ask("0" * 64)):
        with pytest.raises(GenerationMoved, match="other weights"):
            client.open_read(refused)
    client.close()


def test_bytes_that_are_not_what_was_told_end_what_was_offered(member: Member) -> None:
    read = Read(member)
    client = read.client()
    grant = client.open_read(read.ask(read.manifest.layout.digest))
    read.final(0, len(read.manifest.layout.leaves))
    next(read.described.tensors[name] for name in read.described.parameters).view(-1)[0] += 1
    changed = Manifest(
        layout=read.manifest.layout, digests=digest_leaves(read.described.memory, read.manifest.layout.leaves)
    )
    read.manifest = changed
    read.publish()
    with pytest.raises(GenerationMoved, match="may have withdrawn"):
        list(client.progress(grant.lease))
    (view,) = member.metadata.sources()
    assert (view.record.content_id, view.record.following) == (changed.content_id, "")
    client.close()


def test_a_followers_bytes_count_once_the_source_says_what_they_are(member: Member) -> None:
    read = Read(member)
    read.final(0, len(read.manifest.layout.leaves))
    known = member.metadata.find_shard(read.find).candidates
    together: list[str] = []
    began = time.monotonic()
    threading.Timer(0.5, lambda: together.append(read.publish())).start()
    found = outcome(member.reader, read.find, known, read.manifest, began + 20)
    assert [found] == together
    assert time.monotonic() - began > 0.4
    other = Manifest(layout=read.manifest.layout, digests=bytes(len(read.manifest.digests)))
    with pytest.raises(ProtocolError, match="but told the digests of"):
        outcome(member.reader, read.find, known, other, began + 10)


def test_a_source_that_withdraws_before_it_says_what_it_was_is_lost(member: Member) -> None:
    read = Read(member)
    read.client().close()
    known = member.metadata.find_shard(read.find).candidates
    read.publication.withdraw(0.0)
    with pytest.raises(PeerLost, match="gone before it said what it had read"):
        outcome(member.reader, read.find, known, read.manifest, time.monotonic() + 20)


@pytest.mark.parametrize(
    ("ranges", "digests"),
    [
        ((LeafRange(0, 2),), bytes(16)),
        ((LeafRange(0, 1),), bytes(32)),
        ((), bytes(16)),
        ((LeafRange(10**6, 1),), bytes(16)),
        ((LeafRange(0, 1), LeafRange(0, 1)), bytes(15) + b"a" + bytes(16)),
    ],
)
def test_a_peer_that_tells_nonsense_is_refused(ranges: tuple[LeafRange, ...], digests: bytes) -> None:
    told = Provisional(catalogue(Encoder(8, 1)).layout)
    with pytest.raises(ProtocolError):
        learn(told, ProgressUpdate(version=1, generation=1, ranges=ranges, digests=digests), "a peer")


def test_what_one_update_tells_is_bounded() -> None:
    news = News(Availability(3 * MAX_LEAVES, (1 << 3 * MAX_LEAVES) - 1), 0)
    updates = [news.next(1) for _ in range(3)]
    assert [sum(each.count for each in update.ranges) for update in updates] == [MAX_LEAVES] * 3
    assert [update.complete for update in updates] == [False, False, True]
