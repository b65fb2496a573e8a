"""A module that a program fills from its own disk: followed meanwhile, published in the end, or nothing of it."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from loaders.conftest import Child
from loaders.test_module import poisoned
from loaders.tower import IDENTITY, Tower, digest, read, write
from vision import Encoder, identity

import weightwire
from weightwire import errors
from weightwire.config import OnMiss, Settings
from weightwire.errors import LoadError, NoSourceError, PublishError, TransferError, WeightwireError
from weightwire.loaders import reading
from weightwire.manifest.catalogue import Catalogue
from weightwire.metadata.decision import MemoryDecisions
from weightwire.metadata.server.app import EmbeddedServer
from weightwire.source.from_disk import FromDisk, Offer

Start = Callable[..., list[Child]]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return write(tmp_path / "tower.safetensors")


@pytest.fixture
def start(server: EmbeddedServer, secret_file: Path, file: Path) -> Iterator[Start]:
    """Starts processes of ``fill_tower.py`` in these roles, and ends them. Told to, they begin at once."""
    with ExitStack() as stack:

        def begin(*roles: str) -> list[Child]:
            children = [Child("fill_tower.py", [server.url, str(file), role], secret_file, "tcp") for role in roles]
            for child in children:
                stack.callback(child.kill)
            assert [child.line() for child in children] == [["up"]] * len(roles)
            return children

        yield begin


def nobody_serves_it(settings: Settings) -> None:
    with pytest.raises(NoSourceError, match="nobody serves this model"):
        weightwire.receive(Tower(), IDENTITY, settings=settings)


def test_h25_others_follow_a_program_that_reads_its_disk(start: Start, settings: Settings) -> None:
    reader, follower = start("fill", "relay")
    reader.tell("begin")
    assert reader.line() == ["half"]
    follower.tell("begin")
    assert follower.line() == ["moved"]  # of the half that is there: the reader waits for our word
    module, patient, moved = Tower(), replace(settings, stall_timeout=30.0), threading.Event()

    def progress(phase: str, done: int, total: int, unit: str) -> None:  # noqa: ARG001  (the protocol's)
        if phase == "transfer" and done:
            moved.set()

    with ThreadPoolExecutor(1) as pool:
        received = pool.submit(weightwire.receive, module, IDENTITY, settings=patient, progress=progress)
        assert moved.wait(20)
        reader.tell("go on")
        said, weights_id, whole = reader.line()
        assert said == "ready"
        assert follower.line() == ["ready", weights_id, whole, "peer"]
        report = received.result(30)
    assert report.followed
    assert report.verified
    assert (report.weights_id, digest(module)) == (weights_id, whole)
    assert reader.finish() == 0
    late = Tower()  # from the one that followed
    assert weightwire.receive(late, IDENTITY, settings=settings).weights_id == weights_id
    assert digest(late) == whole


def test_h25_of_programs_that_start_together_one_reads(start: Start) -> None:
    children = start(*["relay-or-read"] * 3)
    for child in children:
        child.tell("begin")
    lines: list[list[list[str]]] = []
    for child in children:
        said = [child.line()]
        while said[-1][0] not in ("ready", "raised"):
            said.append(child.line())
        lines.append(said)
    assert sorted(said[0][0] for said in lines) == ["moved", "moved", "reading"], lines
    assert sorted(said[-1][3] for said in lines) == ["disk", "peer", "peer"], lines
    assert len({tuple(said[-1][:3]) for said in lines}) == 1, lines


class Together(MemoryDecisions):
    """Of a program of one rank. It goes on with what it was answered once all programs have asked, or after a while."""

    def __init__(self, asked: threading.Barrier) -> None:
        super().__init__()
        self.asked = asked

    def record(self, key: str, value: bytes) -> bytes:
        if key.endswith("/choice"):
            with contextlib.suppress(threading.BrokenBarrierError):
                self.asked.wait(2.0)
        return super().record(key, value)


def test_h25_of_programs_of_which_none_has_begun_when_all_ask_the_first_reads(settings: Settings, file: Path) -> None:
    asked, reads = threading.Barrier(3), list[int]()

    def fill(number: int) -> weightwire.Published:
        def from_disk(disk: weightwire.Filling) -> None:
            reads.append(number)
            read(file, module, disk, lambda _: None)

        module, group = Tower(), weightwire.ranks(Together(asked), 0, 1)
        return weightwire.relay(module, IDENTITY, disk=from_disk, settings=settings, group=group)

    with ThreadPoolExecutor(3) as pool, ExitStack() as stack:
        filled = [stack.enter_context(each) for each in pool.map(fill, range(3))]
        assert len({each.report.weights_id for each in filled}) == 1
    assert len(reads) == 1


@pytest.mark.parametrize(
    ("word", "raised"),
    [
        ("fail", "raised OSError the disk is on fire"),
        ("again", "raised PublishError layers.0.weight was written after it was final"),
    ],
)
def test_where_a_program_fails_its_followers_get_an_error_and_nothing_is_served(
    word: str, raised: str, start: Start, settings: Settings
) -> None:
    reader, follower, other = start("fill", "relay", "relay-or-read")
    reader.tell("begin")
    assert reader.line() == ["half"]
    follower.tell("begin")
    other.tell("begin")
    assert [follower.line(), other.line()] == [["moved"], ["moved"]]
    reader.tell(word)
    assert " ".join(reader.line()).startswith(raised)
    began = time.monotonic()
    said, kind, *_ = follower.line()
    assert said == "raised"
    assert issubclass(getattr(errors, kind), TransferError)
    assert other.line() == ["reading"]  # it has a disk of its own
    _, _, whole, source = other.line()
    assert time.monotonic() - began < 20
    assert source == "disk"
    module = Tower()
    report = weightwire.receive(module, IDENTITY, settings=settings)
    assert digest(module) == whole
    assert len(report.shares) == 1  # from the one that read all of it
    assert other.finish() == 0
    nobody_serves_it(settings)


def test_what_becomes_of_a_filling_is_what_publish_would_have_made_of_it(settings: Settings) -> None:
    told: list[tuple[int, int]] = []

    def progress(phase: str, done: int, total: int, unit: str) -> None:
        if (phase, unit) == ("read checkpoint", "bytes"):
            told.append((done, total))

    want = Encoder(8, seed=1)
    with weightwire.publish(want, identity(), settings=settings) as plain:
        expected = plain.report
    module = poisoned()
    state = module.state_dict()
    with weightwire.filling(module, identity(), settings=settings, progress=progress) as disk:
        with pytest.raises(PublishError, match="nothing is published while"):
            _ = disk.published
        for name, tensor in want.state_dict().items():
            state[name].copy_(tensor)
            if name != "head.weight":  # the tie is written again, under its other name
                disk.final([name, "no such tensor"])
    with disk.published as published:
        assert published.report.weights_id == expected.weights_id
        assert "digest" in published.report.seconds
        report = weightwire.receive(poisoned(), identity(), settings=settings)
        assert (report.content_id, report.followed) == (expected.content_id, "")
    assert told == sorted(told)
    assert told[-1] == (expected.nbytes, expected.nbytes)


def test_a_tie_that_is_written_under_its_other_name_after_it_was_final_is_refused(settings: Settings) -> None:
    module = poisoned()

    def twice() -> None:
        with weightwire.filling(module, identity(), settings=settings) as disk, torch.no_grad():
            disk.final("head.weight")
            module.tied.weight.fill_(1)

    with pytest.raises(PublishError, match=r"head\.weight was written after it was final"):
        twice()


def test_where_it_cannot_be_followed_it_is_published_in_the_end(
    settings: Settings, file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(_described: Catalogue, _offer: Offer) -> FromDisk:
        raise PublishError("device memory cannot be followed while it is filled", "")

    monkeypatch.setattr(reading, "FromDisk", refuse)
    module, late = Tower(), Tower()
    with ThreadPoolExecutor(1) as pool:
        with weightwire.filling(module, IDENTITY, settings=settings) as disk:
            assert not disk.followed
            received = pool.submit(weightwire.receive, late, IDENTITY, settings=settings)
            read(file, module, disk, lambda _: time.sleep(0.1))
            assert not received.done()
        with disk.published:
            assert not received.result(30).followed
    assert digest(late) == digest(module)


def test_a_rank_whose_disk_fails_keeps_the_others_from_publishing(settings: Settings, file: Path) -> None:
    decisions = MemoryDecisions()
    wanted = weightwire.module_identity("tests/tower", "Tower", "float32", revision="r1", tp_size=2)

    def fill(rank: int) -> None:
        where = weightwire.Coordinates(tp_rank=rank, tp_size=2)
        group, module = weightwire.ranks(decisions, rank, 2, vote_s=20.0), Tower()
        with weightwire.filling(module, wanted, settings=settings, coordinates=where, group=group) as disk:
            if rank:
                raise OSError("the disk is on fire")
            read(file, module, disk, lambda _: None)

    began = time.monotonic()
    with ThreadPoolExecutor(2) as pool:
        first, second = [pool.submit(fill, rank) for rank in range(2)]
        with pytest.raises(PublishError, match="not all ranks can publish: rank 1: OSError"):
            first.result(30)
        with pytest.raises(OSError, match="on fire"):
            second.result(30)
    assert time.monotonic() - began < 15


def test_ranks_that_find_nobody_read_together(settings: Settings, file: Path) -> None:
    decisions = MemoryDecisions()
    wanted = weightwire.module_identity("tests/tower", "Tower", "float32", revision="r1", tp_size=2)

    def fill(rank: int) -> weightwire.Published:
        where = weightwire.Coordinates(tp_rank=rank, tp_size=2)
        group, module = weightwire.ranks(decisions, rank, 2, vote_s=20.0), Tower()
        return weightwire.relay(
            module,
            wanted,
            disk=lambda disk: read(file, module, disk, lambda _: None),
            settings=settings,
            coordinates=where,
            group=group,
        )

    with ThreadPoolExecutor(2) as pool, ExitStack() as stack:
        both = [stack.enter_context(each) for each in pool.map(fill, range(2))]
        assert len({each.report.weights_id for each in both}) == 1
        for each in both:
            assert each.received is not None
            assert each.received.source == "disk"
            assert [(step.way, step.outcome) for step in each.received.steps] == [("peer", "failed"), ("disk", "ok")]
            assert each.received.weights_id == each.report.weights_id


def test_the_disk_is_not_read_where_a_miss_is_an_error(settings: Settings) -> None:
    def never(_disk: weightwire.Filling) -> None:
        raise AssertionError("it was read")

    with pytest.raises(LoadError, match="on_miss is fail"):
        weightwire.relay(Tower(), IDENTITY, disk=never, settings=replace(settings, on_miss=OnMiss.FAIL))
    nobody_serves_it(settings)


def test_what_the_disk_raises_is_raised_and_nothing_is_served(settings: Settings) -> None:
    def fails(disk: weightwire.Filling) -> None:
        disk.final(["layers.0.weight"])
        raise OSError("the disk is on fire")

    with pytest.raises(OSError, match="on fire") as caught:
        weightwire.relay(Tower(), IDENTITY, disk=fails, settings=settings)
    assert isinstance(caught.value.__context__, WeightwireError)  # why it was read at all
    assert not any(thread.name == "weightwire-filling" for thread in threading.enumerate())
    nobody_serves_it(settings)


def test_nothing_is_announced_before_the_block_begins(settings: Settings) -> None:
    weightwire.filling(Tower(), IDENTITY, settings=settings)
    nobody_serves_it(settings)
