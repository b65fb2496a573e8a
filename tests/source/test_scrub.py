"""What a source offers is digested again, slowly, for as long as it offers it, and at no other time."""

from __future__ import annotations

import ctypes
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from vision import Encoder, identity

from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.errors import GenerationMoved, ProtocolError, PublishError
from weightwire.loaders.member import Member
from weightwire.manifest.address import AddressSpace, Columns
from weightwire.manifest.catalogue import Catalogue, catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.manifest.records import Entry, Layout, Manifest
from weightwire.metadata.decision import Group
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.source.described import Claim, Holding
from weightwire.source.publication import Publication
from weightwire.source.publish import publish_shard
from weightwire.source.scrub import Pace, Rounds, Scrub, tensors_of
from weightwire.types import Coordinates, Span, TensorClass
from weightwire.wire.messages import OpenRead, PublicationState

MIB = 1 << 20
AT_ONCE = Pace(rate=1e12, share=1.0, pass_s=0.0, idle_s=0.001)
PAUSES = 40


# ---- which leaf, and when


def test_every_leaf_has_its_turn_and_so_has_every_publication() -> None:
    rounds, leaves = Rounds(), {"a": 3, "b": 2}
    taken = [rounds.take(leaves) for _ in range(10)]
    assert taken == [("a", 0), ("a", 1), ("a", 2), ("b", 0), ("b", 1)] * 2


def test_one_that_is_not_offered_for_a_while_keeps_its_place() -> None:
    rounds = Rounds()
    assert [rounds.take({"a": 3, "b": 2}) for _ in range(2)] == [("a", 0), ("a", 1)]
    assert [rounds.take({"a": 0, "b": 2}) for _ in range(3)] == [("b", 0), ("b", 1), ("b", 0)]
    assert [rounds.take({"a": 3, "b": 2}) for _ in range(2)] == [("a", 2), ("b", 1)]


def test_one_that_ended_is_forgotten_and_one_that_shrank_stays_inside() -> None:
    rounds = Rounds()
    assert [rounds.take({"a": 9}) for _ in range(6)][-1] == ("a", 5)
    assert rounds.take({"a": 2}) == ("a", 0)
    assert rounds.take({"b": 1}) == ("b", 0)
    assert rounds.take({"a": 2}) == ("a", 0)
    assert rounds.take({}) is None
    assert rounds.take({"a": 0}) is None


@dataclass
class Cheap:
    """Offers one entry of ``nbytes``; its leaves cost what ``costs`` says, on a clock of its own."""

    nbytes: int
    costs: float = 0.0
    cpu: float = 0.0
    checked: list[int] = field(default_factory=list)

    @functools.cached_property
    def offered(self) -> Layout:
        entry = Entry(
            name="w", dtype="uint8", shape=(self.nbytes,), order=(0,), kind=TensorClass.WEIGHT, nbytes=self.nbytes
        )
        return Layout(entries=(entry,))

    def recheck(self, leaf: int) -> bool:
        self.checked.append(leaf)
        self.cpu += self.costs
        return True

    def a_pass(self) -> float:
        """Seconds that one pass of the scrub lasts, at the pace that is shipped."""
        scrub = Scrub(publications=lambda: {"only": self}, cpu=lambda: self.cpu)
        seconds = sum(scrub.step() for _ in self.offered.leaves)
        assert self.checked == list(range(len(self.offered.leaves)))
        return seconds


def test_a_pass_takes_as_long_as_the_rate_says_and_never_less_than_the_least() -> None:
    assert Cheap(5 * MIB).a_pass() == pytest.approx(Pace().pass_s)
    assert Cheap(2000 * MIB, costs=1e-4).a_pass() == pytest.approx(2000 * MIB / Pace().rate)


def test_leaves_that_are_dear_come_so_rarely_that_one_percent_of_a_core_is_kept() -> None:
    dear = Cheap(2000 * MIB, costs=0.01)
    lasts = dear.a_pass() + dear.cpu
    assert dear.cpu / lasts == pytest.approx(0.01)


def test_where_nothing_is_offered_it_looks_again_later() -> None:
    assert Scrub(publications=dict).step() == Pace().idle_s


def test_a_leaf_is_named_by_the_tensors_in_it() -> None:
    sizes = {"big": 2 * MIB, "a": 8, "b": 0, "c": 8, "d": 8, "e": 8}
    layout = Layout(
        entries=tuple(
            Entry(name=name, dtype="uint8", shape=(size,), order=(0,), kind=TensorClass.WEIGHT, nbytes=size)
            for name, size in sizes.items()
        )
    )
    assert [tensors_of(layout, leaf) for leaf in range(3)] == ["big", "big", "a, c, d and 1 more"]


# ---- a process that serves


@pytest.fixture
def member(tmp_path: Path) -> Iterator[Member]:
    """This process as a source that scrubs without rest, with a server of its own."""
    secret = tmp_path / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    times = Times(ttl_s=1.5, warming_s=0.0)
    with (
        EmbeddedServer(ServerSettings(secret=load_secret(secret), times=times)) as server,
        Member(Settings(url=server.url, secret_file=secret, transports=("tcp",))) as running,
    ):
        running.node.scrub.pace = AT_ONCE
        yield running


class Counter:
    """The scrub's clock, which counts its steps."""

    def __init__(self, member: Member) -> None:
        self.calls = 0
        member.node.scrub.cpu = self

    def __call__(self) -> float:
        self.calls += 1
        return 0.0

    def passes(self, described: Catalogue, count: int) -> None:
        """Wait until so many more passes are over."""
        goal = self.calls + 2 * count * (len(described.layout.leaves) + 1)
        until(lambda: self.calls >= goal)


def until(holds: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def announced(member: Member) -> Publication:
    return member.node.announce(
        Claim(identity=identity(), coordinates=Coordinates(), world_size=1, replica_incarnation="life")
    )


def described(model: Encoder) -> Catalogue:
    return catalogue(model, classes={"steps": "derived"})


def published(member: Member, model: Encoder, *, hold: bool = False) -> tuple[Publication, Catalogue]:
    publication, what = announced(member), described(model)
    publish_shard(publication, what, Group.solo(), hold=hold)
    return publication, what


@torch.no_grad()
def changed_in_place(model: Encoder, name: str) -> None:
    """As a reload does that copies into what is there."""
    tensor = model.get_parameter(name) if name in dict(model.named_parameters()) else model.get_buffer(name)
    tensor.view(-1)[-1] += 1


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("big.weight", "(big.weight)"),
        ("conv.weight", "(conv.weight, head.bias, head.weight and "),
        ("norm.running_mean", "(conv.weight, head.bias, head.weight and "),
        ("steps", "(steps)"),
    ],
    ids=["large", "small", "buffer", "derived"],
)
def test_h29_bytes_that_changed_in_place_are_found_and_withdrawn(
    member: Member, caplog: pytest.LogCaptureFixture, name: str, shown: str
) -> None:
    model = Encoder(8, 1)
    publication, _ = published(member, model)
    until(lambda: [view.record.state for view in member.metadata.sources()] == [PublicationState.READY])
    content = publication.manifest()[1].content_id
    request = OpenRead(
        shard_key=publication.claim.shard_key,
        incarnation=member.incarnation,
        content_id=content,
        reader="reader",
        reader_host="host",
        transports=("tcp",),
    )
    lease = publication.open_read(request).lease
    with caplog.at_level(logging.ERROR):
        changed_in_place(model, name)
        until(lambda: publication.over)
        until(lambda: not member.metadata.sources() and bool(caplog.records))  # told and logged by two threads
    (line,) = [record.getMessage() for record in caplog.records]
    assert "is no longer what was published" in line
    assert shown in line
    with pytest.raises(GenerationMoved):
        publication.open_read(request)
    until(lambda: lease not in publication.leases)
    again, _ = published(member, model)
    assert again.state is PublicationState.READY
    assert (again.manifest()[1].content_id == content) == (name == "steps")


def test_h49_bytes_that_were_overwritten_from_outside_are_found(
    member: Member, caplog: pytest.LogCaptureFixture
) -> None:
    publication, what = published(member, Encoder(8, 1))
    segment = next(segment for segment in what.memory.segments if segment.nbytes > MIB)
    with caplog.at_level(logging.ERROR):
        ctypes.memset(segment.address + MIB + 17, 0x5A, 1)
        until(lambda: publication.over and not member.metadata.sources() and bool(caplog.records))
    assert "leaf 1 (big.weight) is no longer what was published" in caplog.text


def test_h29_bytes_that_stay_are_never_withdrawn(member: Member) -> None:
    counter = Counter(member)
    publication, what = published(member, Encoder(8, 1))
    counter.passes(what, 20)
    assert publication.state is PublicationState.READY
    assert [view.record.generation for view in member.metadata.sources()] == [1]


def test_h29_bytes_may_change_while_it_is_paused(member: Member) -> None:
    """Also while a leaf is being digested at the moment of the pause: that result does not count."""
    model, counter = Encoder(8, 1), Counter(member)
    publication, what = published(member, model)
    counter.passes(what, 1)
    for _ in range(PAUSES):
        time.sleep(0.003)
        publication.pause()
        model.big.weight.data.neg_()
        time.sleep(0.002)
        model.big.weight.data.neg_()
        publication.resume()
        assert publication.state is PublicationState.READY
    assert publication.generation == 1 + PAUSES


def test_h29_new_bytes_are_scrubbed_against_their_own_manifest(member: Member) -> None:
    model, counter = Encoder(8, 1), Counter(member)
    publication, what = published(member, model)
    publication.pause()
    with pytest.raises(GenerationMoved):
        member.node.self_check(publication.claim.shard_key, 0)
    changed_in_place(model, "big.weight")
    digests = digest_leaves(what.memory, what.layout.leaves)
    publication.resume(Manifest(layout=what.layout, digests=digests), "b" * 64)
    counter.passes(what, 3)
    assert publication.state is PublicationState.READY
    changed_in_place(model, "big.weight")
    until(lambda: publication.over)


def test_h29_what_is_held_is_left_alone_and_scrubbed_once_it_is_offered(member: Member) -> None:
    model, counter = Encoder(8, 1), Counter(member)
    publication, _ = published(member, model, hold=True)
    changed_in_place(model, "big.weight")
    time.sleep(1.5)
    assert publication.state is PublicationState.HELD
    assert counter.calls == 0
    publication.offer()
    until(lambda: publication.over)


def pause_twice(publication: Publication) -> None:
    publication.pause()
    publication.pause()


class Sluggish(AddressSpace):
    """Memory whose every digest waits for ``go`` first."""

    def __init__(self, memory: AddressSpace) -> None:
        super().__init__(memory.segments, memory.regions, memory.owners)
        self.go, self.waiting, self.asked = threading.Event(), threading.Event(), 0

    def columns(self, span: Span) -> Columns:
        self.asked += 1
        self.waiting.set()
        assert self.go.wait(20)
        return super().columns(span)


@pytest.mark.parametrize("end", [Publication.pause, Publication.withdraw])
def test_h29_memory_is_given_back_only_when_no_leaf_of_it_is_being_digested(
    member: Member, end: Callable[[Publication], None]
) -> None:
    model = Encoder(8, 1)
    publication, what = announced(member), described(model)
    manifest = Manifest(layout=what.layout, digests=digest_leaves(what.memory, what.layout.leaves))
    memory = Sluggish(what.memory)
    publication.hold(Holding(manifest=manifest, memory=memory, weights_id="b" * 64))
    publication.offer()
    assert memory.waiting.wait(20)
    ending = threading.Thread(target=end, args=(publication,))
    ending.start()
    ending.join(0.5)
    assert ending.is_alive()
    assert not publication.state.readable
    model.big.weight.data.neg_()
    memory.go.set()
    ending.join(20)
    assert not ending.is_alive()
    assert publication.over == (end is Publication.withdraw), "what was digested after the end does not count"
    asked = memory.asked
    time.sleep(0.5)
    assert memory.asked == asked, "scrubbed although nobody may read it"


def test_h54_a_report_and_the_scrub_end_it_in_the_same_way(member: Member) -> None:
    member.node.scrub.pace = Pace(pass_s=1e6)  # leaves it to the report
    model = Encoder(8, 1)
    publication, what = published(member, model)
    key = publication.claim.shard_key
    assert all(member.node.self_check(key, leaf) for leaf in range(len(what.layout.leaves)))
    with pytest.raises(ProtocolError):
        member.node.self_check(key, len(what.layout.leaves))
    changed_in_place(model, "big.weight")
    assert not member.node.self_check(key, 4)
    assert publication.over, "not one more read lease after the answer"
    with pytest.raises(GenerationMoved):
        member.node.self_check(key, 4)
    until(lambda: not member.metadata.sources())


def test_h29_an_engine_that_pauses_what_withdrew_itself_is_told_and_does_not_wait(member: Member) -> None:
    model = Encoder(8, 1)
    publication, _ = published(member, model)
    changed_in_place(model, "big.weight")
    until(lambda: publication.over)
    done = threading.Thread(target=pause_twice, args=(publication,), daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive(), "pause() waits for readers that can never come"
    publication.withdraw()
    with pytest.raises(PublishError, match="withdrawn shard cannot be resumed"):
        publication.resume()


def test_pausing_twice_is_pausing_once(member: Member) -> None:
    publication, _ = published(member, Encoder(8, 1))
    done = threading.Thread(target=pause_twice, args=(publication,), daemon=True)
    done.start()
    done.join(10)
    assert not done.is_alive()
    publication.resume()
    assert publication.state is PublicationState.READY
