"""``relay``: a module is filled from a peer, passed on meanwhile, and published; and what happens where that fails."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Protocol

import pytest
import torch
from loaders.test_module import assert_same, poisoned
from vision import Encoder, identity

import weightwire
from weightwire.config import Settings
from weightwire.errors import (
    DecisionError,
    DigestMismatch,
    GenerationMoved,
    NoSourceError,
    PeerLost,
    PublishError,
)
from weightwire.loaders import module as verbs
from weightwire.loaders.member import Member
from weightwire.loaders.relay import PublicationRelay
from weightwire.manifest.address import AddressSpace
from weightwire.manifest.availability import Availability
from weightwire.manifest.catalogue import Catalogue, catalogue
from weightwire.manifest.digest import digest_leaves
from weightwire.metadata.decision import Group, MemoryDecisions, Vote
from weightwire.source.described import Claim
from weightwire.target.offer import Offer, Want
from weightwire.target.receiver import Receiver
from weightwire.target.relaying import Relay
from weightwire.transport.base import Registration
from weightwire.types import Coordinates, Span
from weightwire.wire.messages import OpenRead


class ChildProcess(Protocol):
    def line(self) -> list[str]: ...
    def kill(self) -> None: ...


Publish = Callable[..., ChildProcess]


def test_modules_that_relay_fill_each_other_and_go_on_without_their_source(
    publish: Publish, settings: Settings
) -> None:
    source = publish(seed=1)
    source.line()
    modules = [poisoned() for _ in range(3)]
    with ThreadPoolExecutor(3) as pool:
        filled = list(pool.map(lambda module: weightwire.relay(module, identity(), settings=settings), modules))
    source.kill()
    for module, published in zip(modules, filled, strict=True):
        assert_same(module, Encoder(8, seed=1))
        assert published.received is not None
        assert published.received.verified
        assert published.report.published
        assert published.report.weights_id == published.received.weights_id
    late = poisoned()
    weightwire.receive(late, identity(), settings=settings)
    assert_same(late, Encoder(8, seed=1))
    for published in filled:
        published.withdraw()
    with pytest.raises((NoSourceError, PeerLost)):  # the killed one may still be listed
        weightwire.receive(poisoned(), identity(), settings=settings)


def test_where_nobody_serves_it_nothing_is_announced(settings: Settings) -> None:
    with pytest.raises(NoSourceError):
        weightwire.relay(poisoned(), identity(), settings=settings)
    with pytest.raises(NoSourceError, match="nobody serves this model"):
        weightwire.receive(poisoned(), identity(), settings=settings)


class Watching:
    """A relay that notes what is in the memory when it is ended."""

    def __init__(self, module: Encoder, *, broken: bool = False) -> None:
        self.module = module
        self.broken = broken
        self.began = False
        self.ended: list[torch.Tensor] = []

    def begin(self, offer: Offer, memory: AddressSpace, available: Availability) -> Mapping[str, Registration]:
        assert offer.manifest.layout.nbytes == memory.span.nbytes
        self.began, self.available = True, available
        return {}

    def end(self) -> None:
        self.ended.append(self.module.get_buffer("steps").clone())


def fill(settings: Settings, module: Encoder, relay: Relay, *, other_rank: Vote) -> None:
    """As one of two ranks, the other of which received what ``other_rank`` says."""
    with Member(settings, serves=False) as member:
        fill_as(member, module, relay, other_rank=other_rank)


def fill_as(member: Member, module: Encoder, relay: Relay, *, other_rank: Vote) -> None:
    """``fill``, as the process ``member``."""
    store = MemoryDecisions()
    other = Group(store, 1, 2, "0", 20.0)
    want = Want(stages={identity().stage: identity()}, coordinates=Coordinates())
    group = Group(store, 0, 2, "0", 20.0)
    receiver = Receiver(reader=member.reader, want=want, group=group, relay=relay)
    receiver.find()
    threading.Thread(target=other.vote, args=("plan", Vote(ok=True)), daemon=True).start()
    threading.Thread(target=other.vote, args=("received", other_rank), daemon=True).start()
    receiver.fill(catalogue(module))


def test_h38_a_relay_ends_before_its_memory_is_put_back(publish: Publish, settings: Settings) -> None:
    publish(seed=3).line()
    module = poisoned()
    relay, before = Watching(module), module.get_buffer("steps").clone()
    with pytest.raises(DecisionError, match="out of luck"):
        fill(settings, module, relay, other_rank=Vote(ok=False, reason="out of luck"))
    assert relay.began
    assert relay.available.complete
    (when_ended,) = relay.ended
    assert torch.equal(when_ended, torch.arange(7) * 3), "it was put back under the relay's readers"
    assert torch.equal(module.get_buffer("steps"), before)


def test_h31_a_load_whose_bytes_changed_while_they_were_passed_on_fails(publish: Publish, settings: Settings) -> None:
    publish(seed=3).line()
    module = poisoned()
    relay, before = Watching(module, broken=True), module.get_buffer("steps").clone()
    with pytest.raises(DigestMismatch, match="changed in memory"):
        fill(settings, module, relay, other_rank=Vote(ok=True, value=["", ""]))
    (when_ended,) = relay.ended
    assert torch.equal(when_ended, torch.arange(7) * 3), "it was put back under the relay's readers"
    assert torch.equal(module.get_buffer("steps"), before)


class ReadFrom(PublicationRelay):
    """A relay that somebody reads from, and that notes who may read at the moment when it has ended."""

    def __init__(self, member: Member) -> None:
        claim = Claim(identity=identity(), coordinates=Coordinates(), world_size=1, replica_incarnation="life")
        self.passed_on = member.node.announce(claim)
        self.admitted: list[bool] = []
        self.told: list[int] = []
        super().__init__(lambda _: self.passed_on, lambda: self.told.append(self.passed_on.generation))

    def begin(self, offer: Offer, memory: AddressSpace, available: Availability) -> Mapping[str, Registration]:
        registered = super().begin(offer, memory, available)
        self.request = OpenRead(
            shard_key=self.passed_on.claim.shard_key,
            incarnation=self.passed_on._home.incarnation,
            content_id=offer.manifest.content_id,
            reader="reader",
            reader_host="host",
            transports=tuple(registered),
        )
        self.lease = self.passed_on.open_read(self.request).lease
        return registered

    def end(self) -> None:
        self.admitted.append(self.admits())
        super().end()
        self.admitted.append(self.admits())

    def admits(self) -> bool:
        """Whether who has a lease may read."""
        try:
            self.passed_on.admit(self.lease, Span(0, 1), "tcp")
        except GenerationMoved:
            return False
        return True


def test_h29_once_a_relay_has_ended_nobody_reads_its_memory(publish: Publish, settings: Settings) -> None:
    """Whoever fills the memory then need not know of it: what comes next may write at once."""
    publish(seed=3).line()
    with Member(settings) as member:
        relay = ReadFrom(member)
        with pytest.raises(DecisionError, match="out of luck"):
            fill_as(member, poisoned(), relay, other_rank=Vote(ok=False, reason="out of luck"))
        assert relay.admitted == [True, False]
        assert relay.told == [2], "the server hears of it again only after the generation has moved"
        with pytest.raises(GenerationMoved):
            relay.passed_on.open_read(relay.request)
        assert relay.passed_on.served == []
        member.node.announce(relay.passed_on.claim)


CLASSES = {"steps": "derived"}


@pytest.fixture
def disagreeing(settings: Settings) -> Iterator[tuple[list[weightwire.Published], Encoder]]:
    """Two sources whose derived tensors differ. The one that is asked first no longer holds its own; the other one."""
    modules = [Encoder(8, seed=1) for _ in range(2)]
    modules[1].get_buffer("steps").fill_(5)
    with ExitStack() as stack:
        sources = [
            stack.enter_context(weightwire.publish(each, identity(), settings=settings, classes=CLASSES))
            for each in modules
        ]
        first = min((0, 1), key=lambda at: sources[at]._member.incarnation)
        modules[first].get_buffer("steps").fill_(9)
        yield sources, modules[1 - first]


def test_h31_what_was_received_is_described_with_the_derived_tensors_that_came(
    disagreeing: tuple[list[weightwire.Published], Encoder], settings: Settings
) -> None:
    _, good = disagreeing
    module = poisoned()
    report = weightwire.receive(module, identity(), settings=settings, classes=CLASSES)
    assert sum(share.bad_leaves for share in report.shares) == 1
    assert_same(module, good)
    assert report.manifest is not None
    held = catalogue(module, classes=CLASSES)
    assert report.manifest.digests == digest_leaves(held.memory, held.layout.leaves)


def test_h31_what_was_passed_on_until_derived_tensors_came_from_another_peer_is_published_anew(
    disagreeing: tuple[list[weightwire.Published], Encoder], settings: Settings
) -> None:
    sources, good = disagreeing
    with weightwire.relay(poisoned(), identity(), settings=settings, classes=CLASSES) as passed_on:
        assert passed_on.received is not None
        assert sum(share.bad_leaves for share in passed_on.received.shares) == 1
        assert passed_on.report.published
        for source in sources:
            source.withdraw()
        late = poisoned()
        weightwire.receive(late, identity(), settings=settings, classes=CLASSES)
        assert_same(late, good)


def test_h69_what_was_found_changed_after_it_was_received_is_not_published_anew(
    publish: Publish, settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(seed=3).line()
    module = poisoned()
    fill = verbs._fill

    def filled(receiver: Receiver, describe: Callable[[], Catalogue]) -> Catalogue:
        described = fill(receiver, describe)
        assert isinstance(receiver.relay, PublicationRelay)
        passed_on = receiver.relay._relaying
        assert passed_on is not None
        assert passed_on.offered is not None
        with torch.no_grad():
            module.conv.weight.fill_(1)
        assert not all(passed_on.recheck(leaf) for leaf in range(len(passed_on.offered.leaves)))
        return described

    monkeypatch.setattr(verbs, "_fill", filled)
    with pytest.raises(PublishError):
        weightwire.relay(module, identity(), settings=settings)
