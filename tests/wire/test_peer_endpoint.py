from __future__ import annotations

import itertools
import socket
import threading
import time
from collections.abc import Callable, Iterator
from threading import Timer

import pytest
from wire_samples import SECRET, SamplePeer, header

from weightwire.errors import (
    ConfigError,
    GenerationMoved,
    PeerLost,
    PeerStalled,
    TransferError,
    WeightwireError,
)
from weightwire.manifest.offered import Offered
from weightwire.wire.listen import numeric
from weightwire.wire.messages import OpenRead
from weightwire.wire.peer_client import PeerClient
from weightwire.wire.peer_service import PeerServer


@pytest.fixture
def peer() -> SamplePeer:
    return SamplePeer()


@pytest.fixture
def server(peer: SamplePeer) -> Iterator[PeerServer]:
    made = PeerServer(peer, SECRET, workers=8)
    yield made
    peer.silent.set()
    made.stop(0)


@pytest.fixture
def client(server: PeerServer) -> Iterator[PeerClient]:
    made = PeerClient(f"127.0.0.1:{server.port}", "life-0", SECRET)
    yield made
    made.close()


def ask(content_id: str, incarnation: str = "life-0") -> OpenRead:
    return OpenRead(
        shard_key="shard-0",
        incarnation=incarnation,
        content_id=content_id,
        reader="reader",
        reader_host="host",
        transports=("tcp", "inproc"),
    )


def test_all_calls_of_a_reader(client: PeerClient, peer: SamplePeer) -> None:
    assert client.status("shard-0").content_id == peer.shown.content_id
    assert client.manifest("shard-0") == (header(peer.shown), Offered.of(peer.shown))
    grant = client.open_read(ask(peer.shown.content_id))
    assert (grant.generation, sorted(grant.endpoints)) == (3, ["inproc", "tcp"])
    updates = list(client.progress(grant.lease))
    assert [update.version for update in updates] == [1, 2, 3, 4]
    assert updates[-1].complete
    assert [update.version for update in client.progress(grant.lease, since=2)] == [3, 4]
    client.close_read(grant.lease)
    assert peer.closed == [b"lease"]
    assert client.self_check("shard-0", 1)
    assert not client.self_check("shard-0", 13)


def test_errors_of_the_source_arrive_as_they_were_raised(client: PeerClient) -> None:
    with pytest.raises(GenerationMoved, match="not published here; ask for another source"):
        client.status("shard-9")
    with pytest.raises(GenerationMoved, match="other weights"):
        client.open_read(ask("another content"))


def test_h28_another_incarnation_at_the_same_address_is_refused_for_every_call(
    server: PeerServer, peer: SamplePeer
) -> None:
    stale = PeerClient(f"127.0.0.1:{server.port}", "an earlier life", SECRET)
    calls: list[Callable[[], object]] = [
        lambda: stale.status("shard-0"),
        lambda: stale.manifest("shard-0"),
        lambda: stale.open_read(ask(peer.shown.content_id, "an earlier life")),
        lambda: list(stale.progress(b"lease")),
        lambda: stale.close_read(b"lease"),
        lambda: stale.self_check("shard-0", 1),
    ]
    for call in calls:
        with pytest.raises(PeerLost, match="an earlier life is gone"):
            call()
    stale.close()
    assert peer.closed == []


def test_h28_a_restarted_peer_on_the_same_port_is_not_the_old_one(client: PeerClient, server: PeerServer) -> None:
    client.status("shard-0")
    server.stop(0)
    second = PeerServer(SamplePeer(incarnation="life-1"), SECRET, port=server.port)
    try:
        until = time.monotonic() + 10
        while True:  # the first calls may still find the port closed
            with pytest.raises(PeerLost) as caught:
                client.status("shard-0")
            if "life-0 is gone" in str(caught.value) or time.monotonic() > until:
                break
            time.sleep(0.05)
        assert "life-0 is gone" in str(caught.value)
    finally:
        second.stop(0)


def test_h50_a_taken_port_is_an_error(server: PeerServer) -> None:
    for host in ("127.0.0.1", "localhost", "0.0.0.0"):
        with pytest.raises(ConfigError, match=f"{server.port}: the port is taken"):
            PeerServer(SamplePeer(), SECRET, host, server.port)


def test_h50_a_port_taken_by_a_plain_socket_is_an_error() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)  # even one that would share
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(ConfigError, match="the port is taken"):
            PeerServer(SamplePeer(), SECRET, port=taken.getsockname()[1])


def test_addresses_that_make_no_sense_are_errors() -> None:
    with pytest.raises(ConfigError, match="70000 is outside"):
        PeerServer(SamplePeer(), SECRET, port=70000)
    with pytest.raises(ConfigError, match="cannot resolve"):
        PeerServer(SamplePeer(), SECRET, "no such host.invalid")
    with pytest.raises(ConfigError, match="not this machine's"):
        PeerServer(SamplePeer(), SECRET, "192.0.2.1")
    assert numeric("::1", 5) == "[::1]:5"


def test_nobody_at_the_address_is_peer_lost_at_once() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        client = PeerClient(f"127.0.0.1:{unused.getsockname()[1]}", "life-0", SECRET)
        began = time.monotonic()
        with pytest.raises(PeerLost, match="cannot be reached"):
            client.status("shard-0")
        client.close()
    assert time.monotonic() - began < 5


def test_a_peer_that_accepts_and_says_nothing_is_stalled_within_the_bound() -> None:
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        client = PeerClient(f"127.0.0.1:{mute.getsockname()[1]}", "life-0", SECRET)
        began = time.monotonic()
        with pytest.raises((PeerStalled, PeerLost)):
            client.status("shard-0", timeout=0.5)
        client.close()
    assert time.monotonic() - began < 3


def test_a_progress_stream_that_falls_silent_is_stalled(client: PeerClient) -> None:
    began = time.monotonic()
    stream = client.progress(b"silent", stall_s=2.0)
    assert [update.version for update in itertools.islice(stream, 3)] == [1, 2, 3]
    with pytest.raises(PeerStalled):
        next(stream)
    assert time.monotonic() - began < 10


def watching() -> list[threading.Thread]:
    return [each for each in threading.enumerate() if each.name == "weightwire-stall" or isinstance(each, Timer)]


def test_one_thread_watches_over_a_progress_stream_and_ends_with_it(client: PeerClient) -> None:
    before = set(watching())
    stream = client.progress(b"endless", stall_s=3.0)
    ours = set[threading.Thread]()
    for _ in range(8):
        next(stream)
        ours |= set(watching()) - before
    assert len(ours) == 1
    stream.close()  # type: ignore[attr-defined]
    (thread,) = ours
    thread.join(20)
    assert not thread.is_alive()


def test_a_reader_that_is_busy_itself_does_not_hold_the_source_for_stalled(client: PeerClient) -> None:
    stream = client.progress(b"endless", stall_s=1.5)
    next(stream)
    time.sleep(2.0)
    assert next(stream).generation == 3


def test_the_source_learns_that_a_reader_has_gone(client: PeerClient, peer: SamplePeer) -> None:
    stream = client.progress(b"endless")
    next(stream)
    assert not peer.progress_ended.is_set()
    stream.close()  # type: ignore[attr-defined]
    assert peer.progress_ended.wait(5)


def test_progress_streams_leave_room_for_other_calls(client: PeerClient) -> None:
    streams = [client.progress(b"endless") for _ in range(4)]
    for stream in streams:
        next(stream)
    with pytest.raises(TransferError, match="as many readers as it has threads for"):
        next(client.progress(b"endless"))
    assert client.status("shard-0").generation == 3
    for stream in streams:
        stream.close()  # type: ignore[attr-defined]
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            next(client.progress(b"endless"))
            break
        except WeightwireError:
            time.sleep(0.05)
    else:
        pytest.fail("the places of readers that left were never free again")
