from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from wire_samples import OTHER_SECRET, SECRET, SamplePeer

from weightwire.auth import NONCE_BYTES, PROOF_BYTES, nonce
from weightwire.errors import AuthError
from weightwire.wire import auth_grpc, sessions
from weightwire.wire.generated import auth_pb2, peer_pb2
from weightwire.wire.methods import AUTH, METADATA, PEER
from weightwire.wire.peer_client import PeerClient
from weightwire.wire.peer_service import PeerServer
from weightwire.wire.sessions import CONFIRM_S, SESSION_S, WINDOW, Credentials, Gatekeeper
from weightwire.wire.status import Callee

PEER_BINDING = Callee.PEER.value.encode()
METHOD = PEER["Status"].path


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> Clock:
    return Clock()


def credentials(keeper: Gatekeeper) -> Credentials:
    ours = nonce()
    return Credentials.check(SECRET, PEER_BINDING, ours, keeper.challenge(ours))


def test_each_signature_is_good_once_and_in_any_order(clock: Clock) -> None:
    keeper = Gatekeeper(SECRET, PEER_BINDING, clock=clock)
    session = credentials(keeper)
    calls = [session.next(METHOD) for _ in range(5)]
    assert [keeper.admit(calls[n][0], METHOD, calls[n][1], calls[n][2]) for n in (3, 0, 4, 1, 2)] == [True] * 5
    assert [keeper.admit(token, METHOD, counter, mac) for token, counter, mac in calls] == [False] * 5


def test_a_signature_far_behind_is_refused(clock: Clock) -> None:
    keeper = Gatekeeper(SECRET, PEER_BINDING, clock=clock)
    session = credentials(keeper)
    calls = [session.next(METHOD) for _ in range(WINDOW + 2)]
    assert keeper.admit(calls[-1][0], METHOD, calls[-1][1], calls[-1][2])
    assert not keeper.admit(calls[0][0], METHOD, calls[0][1], calls[0][2])
    assert keeper.admit(calls[2][0], METHOD, calls[2][1], calls[2][2])


def test_a_signature_is_bound_to_method_counter_endpoint_kind_and_process(clock: Clock) -> None:
    keeper = Gatekeeper(SECRET, PEER_BINDING, clock=clock)
    token, counter, mac = credentials(keeper).next(METHOD)
    assert not keeper.admit(token, PEER["OpenRead"].path, counter, mac)
    assert not keeper.admit(token, METHOD, counter + 1, mac)
    assert not keeper.admit(token, METHOD, 0, mac)
    assert not keeper.admit(token[:-1], METHOD, counter, mac)
    assert not keeper.admit(b"", METHOD, counter, mac)
    assert not keeper.admit(bytes([token[0] ^ 1]) + token[1:], METHOD, counter, mac)
    for other in (Gatekeeper(SECRET, b"metadata server", clock=clock), Gatekeeper(SECRET, PEER_BINDING, clock=clock)):
        assert not other.admit(token, METHOD, counter, mac)
    assert keeper.admit(token, METHOD, counter, mac)


def test_sessions_and_challenges_expire(clock: Clock) -> None:
    keeper = Gatekeeper(SECRET, PEER_BINDING, clock=clock)
    unused, used = credentials(keeper), credentials(keeper)
    token, counter, mac = used.next(METHOD)
    assert keeper.admit(token, METHOD, counter, mac)
    clock.now += CONFIRM_S + 1
    token, counter, mac = unused.next(METHOD)
    assert not keeper.admit(token, METHOD, counter, mac)
    token, counter, mac = used.next(METHOD)
    assert keeper.admit(token, METHOD, counter, mac)
    clock.now += SESSION_S + 1
    token, counter, mac = used.next(METHOD)
    assert not keeper.admit(token, METHOD, counter, mac)


def test_strangers_take_no_memory_and_holders_a_bounded_one(clock: Clock) -> None:
    keeper = Gatekeeper(SECRET, PEER_BINDING, clock=clock, max_sessions=4)
    for _ in range(100):
        keeper.challenge(nonce())
        assert not keeper.admit(b"x" * 104, METHOD, 1, b"y" * 32)
    assert len(keeper) == 0
    many = [credentials(keeper) for _ in range(10)]
    clock.now += 1
    for session in many:
        token, counter, mac = session.next(METHOD)
        assert keeper.admit(token, METHOD, counter, mac)
    assert len(keeper) == 4
    clock.now += CONFIRM_S
    token, counter, mac = many[0].next(METHOD)  # pushed out, and too late to begin again
    assert not keeper.admit(token, METHOD, counter, mac)


def test_the_server_must_prove_itself() -> None:
    ours = nonce()
    server_nonce, proof, token = Gatekeeper(OTHER_SECRET, PEER_BINDING).challenge(ours)
    with pytest.raises(AuthError, match="does not hold"):
        Credentials.check(SECRET, PEER_BINDING, ours, (server_nonce, proof, token))
    server_nonce, proof, token = Gatekeeper(SECRET, PEER_BINDING).challenge(nonce())  # another client's proof
    with pytest.raises(AuthError, match="does not hold"):
        Credentials.check(SECRET, PEER_BINDING, ours, (server_nonce, proof, token))


@pytest.fixture
def server() -> Iterator[PeerServer]:
    made = PeerServer(SamplePeer(), SECRET)
    yield made
    made.stop(0)


@pytest.fixture
def channel(server: PeerServer) -> Iterator[Any]:
    with grpc.insecure_channel(f"127.0.0.1:{server.port}") as made:
        yield made


def raw_call(channel: Any, path: str, metadata: Any = (), request: bytes = b"") -> tuple[Any, str, Any]:
    try:
        channel.unary_unary(path)(request, timeout=5, metadata=metadata)
    except grpc.RpcError as error:
        found: Any = error
        return found.code(), found.details(), tuple(found.trailing_metadata() or ())
    return grpc.StatusCode.OK, "", ()


def test_h49_nothing_answers_without_the_credential_and_refusals_are_all_alike(channel: Any) -> None:
    session = auth_grpc.challenge(channel, SECRET, PEER_BINDING, 5)
    good = auth_grpc.call_metadata(session, METHOD)
    request = peer_pb2.ShardRequest(shard_key="shard-0", incarnation="life-0").SerializeToString()
    assert raw_call(channel, METHOD, good, request)[0] is grpc.StatusCode.OK
    fresh = dict(auth_grpc.call_metadata(session, METHOD))
    attempts: dict[str, Any] = {
        "nothing": (),
        "replayed": good,
        "signed for another method": auth_grpc.call_metadata(session, PEER["OpenRead"].path),
        "no signature": tuple((k, v) for k, v in fresh.items() if k != auth_grpc.SIGNATURE_KEY),
        "wrong signature": tuple((fresh | {auth_grpc.SIGNATURE_KEY: b"\0" * 32}).items()),
        "no number": tuple((fresh | {auth_grpc.COUNTER_KEY: "-1"}).items()),
        "a huge number": tuple((fresh | {auth_grpc.COUNTER_KEY: "9" * 40}).items()),
        "another token": tuple((fresh | {auth_grpc.SESSION_KEY: b"\0" * 104}).items()),
    }
    seen = {name: raw_call(channel, METHOD, metadata, request) for name, metadata in attempts.items()}
    paths = [method.path for method in (*PEER.values(), *METADATA.values())]
    for path in [*paths, "/weightwire.v1.Peer/NoSuch", "/grpc.reflection.v1.ServerReflection/ServerReflectionInfo"]:
        seen[path] = raw_call(channel, path)
    assert set(seen.values()) == {(grpc.StatusCode.UNAUTHENTICATED, "unauthenticated", ())}


def test_h49_a_malformed_challenge_says_no_more(channel: Any) -> None:
    for ours in (b"", b"short", b"x" * 1000):
        request = auth_pb2.ChallengeRequest(client_nonce=ours).SerializeToString()
        answer = raw_call(channel, AUTH["Challenge"].path, (), request)
        assert answer == (grpc.StatusCode.UNAUTHENTICATED, "unauthenticated", ())


def test_health_is_open(channel: Any) -> None:
    stub = health_pb2_grpc.HealthStub(channel)
    answer = stub.Check(health_pb2.HealthCheckRequest(service="weightwire.v1.Peer"), timeout=5)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_h49_a_client_sends_nothing_but_its_nonce_to_a_server_that_cannot_prove_itself() -> None:
    seen: list[tuple[str, bytes, tuple[str, ...]]] = []

    generic_handler: Any = grpc.GenericRpcHandler

    class Impostor(generic_handler):  # type: ignore[misc]
        def service(self, details: Any) -> Any:
            def answer(request: bytes, _context: Any) -> bytes:
                keys = tuple(key for key, _ in details.invocation_metadata if key.startswith("weightwire"))
                seen.append((details.method, request, keys))
                fake = auth_pb2.ChallengeResponse(
                    server_nonce=b"n" * NONCE_BYTES, proof=b"p" * PROOF_BYTES, session=b"s" * 100
                )
                return fake.SerializeToString()

            return grpc.unary_unary_rpc_method_handler(answer)

    server = grpc.server(ThreadPoolExecutor(2), handlers=[Impostor()])
    port = server.add_insecure_port("127.0.0.1:0")
    server.start()
    client = PeerClient(f"127.0.0.1:{port}", "life-0", SECRET)
    try:
        with pytest.raises(AuthError, match="does not hold our shared secret"):
            client.status("shard-0")
    finally:
        client.close()
        server.stop(0).wait(5)
    assert [(method, keys) for method, _, keys in seen] == [(AUTH["Challenge"].path, ())]
    assert len(auth_pb2.ChallengeRequest.FromString(seen[0][1]).client_nonce) == NONCE_BYTES


def test_h49_a_client_with_another_secret_is_told_in_one_line(server: PeerServer) -> None:
    client = PeerClient(f"127.0.0.1:{server.port}", "life-0", OTHER_SECRET)
    with pytest.raises(AuthError) as caught:
        client.status("shard-0")
    client.close()
    assert "\n" not in str(caught.value)
    assert "0123456789" not in str(caught.value)


def test_a_client_makes_a_new_session_when_the_server_forgot_its_old_one(
    server: PeerServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = PeerClient(f"127.0.0.1:{server.port}", "life-0", SECRET)
    client.status("shard-0")
    monkeypatch.setattr(sessions, "SESSION_S", -1.0)  # every session has ended when the next call comes
    monkeypatch.setattr(sessions, "CONFIRM_S", -1.0)
    with pytest.raises(AuthError):
        client.status("shard-0")
    monkeypatch.undo()
    assert client.status("shard-0").generation == 3
    client.close()
