from __future__ import annotations

import signal
import socket
import time
from collections.abc import Callable, Iterator

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from metadata_process import Child, SampleOwner, child, serve_main, source_main
from wire_samples import OTHER_SECRET, SECRET, rank

from weightwire.errors import AuthError, ConfigError, MetadataError, MetadataUnreachable
from weightwire.metadata.client import MetadataClient
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.wire.messages import FindReplicas, FindShard
from weightwire.wire.messages import PublicationState as S
from weightwire.wire.reports import FailureKind, PeerFailure

TTL = 3.0
SLOW_TTL = 60.0
SOON_S = 20.0
"""What a busy machine may take for what needs no time."""


def embedded(port: int = 0, ttl: float = TTL, warming: float | None = 0.0) -> EmbeddedServer:
    return EmbeddedServer(
        ServerSettings(secret=SECRET, port=port, times=Times(ttl_s=ttl, warming_s=warming), grace_s=0.2)
    )


@pytest.fixture
def server() -> Iterator[EmbeddedServer]:
    with embedded() as made:
        yield made


@pytest.fixture
def client(server: EmbeddedServer) -> Iterator[MetadataClient]:
    with MetadataClient(server.url, SECRET) as made:
        yield made


def until(condition: Callable[[], bool], seconds: float) -> float:
    """Seconds that it took."""
    began = time.monotonic()
    while not _holds(condition):
        assert time.monotonic() - began < seconds, "waited in vain"
        time.sleep(0.02)
    return time.monotonic() - began


def _holds(condition: Callable[[], bool]) -> bool:
    try:
        return condition()
    except MetadataUnreachable:  # busy, or it has only just started
        return False


def states(client: MetadataClient) -> dict[str, tuple[S, bool]]:
    return {view.record.incarnation: (view.record.state, view.suspect) for view in client.sources()}


def kept(client: MetadataClient, incarnation: str) -> bool:
    return any(view.record.active_reads for view in client.sources() if view.record.incarnation == incarnation)


def shard(client: MetadataClient, number: int = 0) -> list[str]:
    query = FindShard(shard_key=f"shard-{number}", weights_id="weights")
    return [candidate.record.incarnation for candidate in client.find_shard(query).candidates]


def find(client: MetadataClient) -> list[str]:
    """Replicas that are offered, best first."""
    listing = client.find_replicas(FindReplicas(replica_keys=("replica",)))
    return [offer.replica_incarnation for group in listing.groups for offer in group.replicas]


def test_h34_a_killed_source_is_suspect_at_once_and_gone_after_the_ttl() -> None:
    ttl = 3 * TTL  # a busy machine may take a while to kill
    with (
        embedded(ttl=ttl) as server,
        MetadataClient(server.url, SECRET) as client,
        child(source_main, client.url, "alive") as alive,
        child(source_main, client.url, "doomed") as doomed,
    ):
        assert alive.hear()
        assert doomed.hear()
        until(lambda: find(client) == ["alive", "doomed"], SOON_S)
        assert doomed.tell("read") == "read"
        until(lambda: kept(client, "doomed-0"), SOON_S)  # killed before its first beat, only the TTL would tell
        doomed.kill()
        until(lambda: states(client)["doomed-0"] == (S.READY, True), ttl)  # not just gone: that would be a KeyError
        assert shard(client) == ["alive-0", "doomed-0"]
        until(lambda: "doomed-0" not in states(client), ttl * 3)
        assert find(client) == ["alive"]


def test_h34_a_frozen_source_is_gone_after_the_ttl_and_comes_back_when_it_continues(client: MetadataClient) -> None:
    with child(source_main, client.url, "frozen") as frozen:
        assert frozen.hear()
        until(lambda: find(client) == ["frozen"], SOON_S)
        frozen.signal(signal.SIGSTOP)
        until(lambda: find(client) == [], TTL * 4)
        frozen.signal(signal.SIGCONT)
        until(lambda: find(client) == ["frozen"], SOON_S)


def test_h33_a_restarted_server_is_healed_by_its_sources_alone() -> None:
    with child(serve_main, 0, TTL, 0.0) as first:
        port = first.hear()
        url = f"127.0.0.1:{port}"
        with child(source_main, url, "a") as a, child(source_main, url, "b") as b:
            assert a.hear()
            assert b.hear()
            with MetadataClient(url, SECRET) as client:
                until(lambda: find(client) == ["a", "b"], SOON_S)
                first.kill()
                with pytest.raises(MetadataUnreachable):
                    client.sources()
            assert b.tell("withdraw") == "MetadataUnreachable"
            with child(serve_main, port, TTL, None) as second, MetadataClient(url, SECRET) as client:
                assert second.hear() == port
                until(lambda: find(client) == ["a"], SOON_S)
                warming = client.find_replicas(FindReplicas(replica_keys=("replica",))).warming_s
                assert 0 < warming <= TTL  # hazard H68: another one may still be on its way
                time.sleep(TTL)
                assert "b" not in find(client)  # it was withdrawn while nobody listened, and stays so
                until(lambda: find(client) == ["a"], SOON_S)


def test_h33_an_unreachable_server_is_one_bounded_error() -> None:
    with socket.socket() as mute:  # accepts and never answers
        mute.bind(("127.0.0.1", 0))
        mute.listen()
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with MetadataClient(address, SECRET, timeout=0.5) as client:
            for call in (client.sources, lambda: client.publish(rank(0, "a")), lambda: find(client)):
                began = time.monotonic()
                with pytest.raises(MetadataUnreachable, match=address):
                    call()
                assert time.monotonic() - began < 5


def test_h33_a_source_that_starts_before_the_server_is_published_later() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
    with child(source_main, f"127.0.0.1:{port}", "early") as source:
        time.sleep(1.0)
        with embedded(port) as server, MetadataClient(server.url, SECRET) as client:
            until(lambda: find(client) == ["early"], SOON_S)
            assert source.hear()


def test_h68_a_withdrawn_source_stays_withdrawn_while_its_process_lives(client: MetadataClient) -> None:
    with child(source_main, client.url, "a") as source:
        assert source.hear()
        until(lambda: find(client) == ["a"], SOON_S)
        assert source.tell("withdraw") == "told"
        assert find(client) == []
        time.sleep(TTL)
        assert states(client) == {}
        with pytest.raises(MetadataError, match="was withdrawn"):
            client.publish(rank(0, "a"))


@pytest.fixture
def unhurried() -> Iterator[MetadataClient]:
    """Of a server that is content with a beat every 20 seconds."""
    with embedded(ttl=SLOW_TTL) as made, MetadataClient(made.url, SECRET) as found:
        yield found


def test_a_change_of_state_arrives_at_once(unhurried: MetadataClient) -> None:
    client = unhurried
    with child(source_main, client.url, "a") as source:
        assert source.hear()
        until(lambda: find(client) == ["a"], SOON_S)
        assert source.tell("pause") == "paused"
        until(lambda: states(client)["a-0"][0] is S.PAUSED, SLOW_TTL / 6)  # not at the next beat
        assert find(client) == []


def test_what_beats_do_not_carry_is_published_again(client: MetadataClient) -> None:
    owner = SampleOwner(rank(0, "a", state=S.LOADING, content_id="", weights_id="", fraction=0.1, bytes_done=100))
    client.keeper.add(owner)
    until(lambda: states(client) == {"a-0": (S.LOADING, False)}, SOON_S)
    owner.change(state=S.READY, content_id="content-0", weights_id="weights", fraction=1.0, bytes_done=1000)
    client.keeper.poke()
    until(lambda: states(client)["a-0"][0] is S.READY, SOON_S)
    view = client.sources()[0]
    assert (view.record.weights_id, view.record.bytes_done) == ("weights", 1000)
    owner.record = None
    client.keeper.poke()
    until(lambda: client.sources() == [], TTL * 4)  # no longer kept


def test_h54_a_reported_leaf_is_digested_again_by_its_source(client: MetadataClient) -> None:
    with child(source_main, client.url, "a") as source:
        assert source.hear()
        until(lambda: find(client) == ["a"], SOON_S)
        failure = PeerFailure(
            shard_key="shard-0",
            incarnation="a-0",
            generation=1,
            kind=FailureKind.MISMATCH,
            leaf=7,
            reporter="reader",
            reporter_host="host-1",
        )
        assert client.report(failure).counted
        until(lambda: source.tell("rechecked") == [7], SOON_S)
        until(lambda: client.sources()[0].reports == 0, SOON_S)  # it was right: the report is forgotten
        source.tell("sicken")
        assert client.report(failure).counted
        until(lambda: client.sources()[0].quarantined, SOON_S)
        assert shard(client) == []


def test_h49_every_rpc_demands_the_secret(server: EmbeddedServer) -> None:
    with MetadataClient(server.url, OTHER_SECRET) as stranger:
        for call in (stranger.sources, lambda: stranger.publish(rank(0, "a")), lambda: stranger.decide("k", b"v", 0)):
            with pytest.raises(AuthError, match="does not hold our shared secret"):
                call()


def test_h50_two_servers_never_share_a_port(server: EmbeddedServer) -> None:
    with pytest.raises(ConfigError, match=f"{server.port}: the port is taken"):
        embedded(server.port)
    with child(serve_main, server.port, TTL, 0.0) as second:
        assert str(server.port) in second.hear()
        second.process.join(10)


def health(port: int) -> object:
    with grpc.insecure_channel(f"127.0.0.1:{port}") as channel:
        request = health_pb2.HealthCheckRequest(service="weightwire.v1.Metadata")
        return health_pb2_grpc.HealthStub(channel).Check(request, timeout=5).status


def test_health_is_open_and_sigterm_ends_the_server_gracefully() -> None:
    with child(serve_main, 0, TTL, 0.0) as server:
        port = server.hear()
        assert health(port) == health_pb2.HealthCheckResponse.SERVING
        with MetadataClient(f"127.0.0.1:{port}", SECRET) as client:
            client.keeper.add(SampleOwner(rank(0, "a")))
            assert client.keeper.connected.wait(10)  # an open stream does not hold it up
            server.signal(signal.SIGTERM)
            assert server.hear(10) == "stopped"
            server.process.join(10)
        assert server.process.exitcode == 0


def test_decisions_are_written_once_and_waited_for(client: MetadataClient, server: EmbeddedServer) -> None:
    assert client.decide("k", None, 0.0) is None
    began = time.monotonic()
    assert client.decide("k", None, 0.3) is None
    assert 0.25 < time.monotonic() - began < 3
    assert client.decide("k", b"first", 0.0) == b"first"
    with MetadataClient(server.url, SECRET) as other:
        assert other.decide("k", b"second", 0.0) == b"first"
        assert other.decide("k", None, 5.0) == b"first"


def test_a_large_fleet_is_listed(client: MetadataClient) -> None:
    for number in range(100):
        client.publish(rank(0, f"life-{number}", identity="i" * 60_000))
    assert len(client.sources()) == 100
    assert client.sources("another model") == []


def test_children_do_not_outlive_the_tests() -> None:
    with child(serve_main, 0, TTL, 0.0) as made:
        assert isinstance(made, Child)
        made.hear()
    assert not made.process.is_alive()
