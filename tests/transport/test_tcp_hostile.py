"""The tcp backend against peers that hold the secret and break the protocol, and against those that do not hold it."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator

import numpy as np
import pytest
from transport.peers import LEASE, MIB, OTHER_SECRET, SECRET, Gate, joined, pattern, soon, space, thread

from weightwire import auth
from weightwire.errors import AuthError, ConfigError, PeerLost, PeerStalled, ProtocolError
from weightwire.transport.tcp import TcpSettings, TcpTransport, frames
from weightwire.transport.tcp.frames import Endpoint, Hello, Request
from weightwire.transport.tcp.greeting import greet_client, greet_server
from weightwire.transport.tcp.stream import Stream
from weightwire.types import Span

INCARNATION = b"i" * 16


def stream_of(connected: socket.socket) -> Stream:
    return Stream(connected, dead_host_s=5, send_s=5)


# --- a hostile source ---------------------------------------------------------------------------------------------


@contextlib.contextmanager
def hostile_source(talk: Callable[[Stream], None]) -> Iterator[bytes]:
    """A listening socket that lets ``talk`` do what it likes with one client; yields its endpoint."""
    listening = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        accepted, _ = listening.accept()
        stream = stream_of(accepted)
        try:
            talk(stream)
            stream.receive_exactly(1 << 20, soon(5))  # until the client has gone
        except OSError:
            pass  # as it must
        finally:
            stream.close()

    with listening, thread(serve):
        yield Endpoint(("127.0.0.1",), listening.getsockname()[1], INCARNATION).encode()


def answering(answer: bytes) -> Callable[[Stream], None]:
    """Greets well, takes one request and answers it with ``answer``."""

    def talk(stream: Stream) -> None:
        assert greet_client(stream, SECRET, INCARNATION, soon()) == LEASE
        stream.receive_exactly(frames.REQUEST_BYTES, soon())
        stream.send(deque([memoryview(answer)]))

    return talk


def head(status: int, sequence: int, nbytes: int) -> bytes:
    return struct.pack(">III", status, sequence, nbytes)


@pytest.mark.parametrize(
    "answer",
    [
        head(0, 0, 99) + b"x" * 99,
        head(0, 0, 101) + b"x" * 101,
        head(0, 0, 0xFFFFFFFF) + b"x" * 4096,
        head(0, 1, 100) + b"x" * 100,
        head(7, 0, 100) + b"x" * 100,
        head(1, 0, 100) + b"x" * 100,
        b"\xff" * 4096,
    ],
    ids=["short", "long", "huge", "sequence", "status", "refusal with bytes", "garbage"],
)
def test_h39_a_wrong_answer_is_refused_and_writes_nothing(answer: bytes) -> None:
    transport = TcpTransport(SECRET)
    memory, parts = space(np.zeros(200, dtype=np.uint8), 3)
    into = transport.register(memory)
    with hostile_source(answering(answer)) as endpoint:
        connection = transport.connect(endpoint, LEASE, soon())
        read = connection.read(Span(50, 100), into)
        with pytest.raises(ProtocolError):
            read.wait(soon())
        with pytest.raises(PeerLost):
            connection.read(Span(0, 10), into)
        transport.close()
    assert not joined(parts).any()


def test_h39_bytes_beyond_what_was_asked_for_go_nowhere() -> None:
    transport = TcpTransport(SECRET)
    memory, parts = space(np.zeros(200, dtype=np.uint8), 3)
    into = transport.register(memory)
    with hostile_source(answering(head(0, 0, 100) + b"x" * 5000)) as endpoint:
        connection = transport.connect(endpoint, LEASE, soon())
        connection.read(Span(50, 100), into).wait(soon())
        with pytest.raises((ProtocolError, PeerLost)):
            connection.read(Span(0, 10), into).wait(soon())
        transport.close()
    assert joined(parts).tolist() == [0] * 50 + [ord("x")] * 100 + [0] * 50


def test_h39_a_source_that_trickles_cannot_stretch_the_deadline() -> None:
    def talk(stream: Stream) -> None:
        answering(head(0, 0, 1000))(stream)
        for _ in range(1000):
            stream.send(deque([memoryview(b"x")]))
            time.sleep(0.01)

    transport = TcpTransport(SECRET)
    into = transport.register(space(np.zeros(1000, dtype=np.uint8))[0])
    with hostile_source(talk) as endpoint:
        connection = transport.connect(endpoint, LEASE, soon())
        began = time.monotonic()
        with pytest.raises(PeerStalled):
            connection.read(Span(0, 1000), into).wait(soon(0.3))
        assert time.monotonic() - began < 5.0  # all of it takes ten seconds
        transport.close()


@pytest.mark.parametrize("challenge", [b"", b"\0" * 64, b"\0" * 10], ids=["ends", "wrong proof", "half a proof"])
def test_h49_a_source_without_the_secret_learns_nothing_and_gets_no_read(challenge: bytes) -> None:
    heard: list[bytes] = []

    def talk(stream: Stream) -> None:
        heard.append(bytes(stream.receive_exactly(frames.HELLO_BYTES, soon())))
        stream.send(deque([memoryview(challenge)]))
        if len(challenge) < 64:
            raise ConnectionError
        heard.append(bytes(stream.receive_exactly(1, soon(2))))

    with hostile_source(talk) as endpoint, pytest.raises((AuthError, PeerLost)):
        TcpTransport(SECRET).connect(endpoint, LEASE, soon())
    assert len(heard) == 1  # the hello, and no proof of ours


def test_a_source_that_accepts_and_says_nothing_is_bounded() -> None:
    with hostile_source(lambda _: None) as endpoint:
        began = time.monotonic()
        with pytest.raises(PeerStalled):
            TcpTransport(SECRET).connect(endpoint, LEASE, soon(0.3))
        assert time.monotonic() - began < 5.0


# --- hostile clients ----------------------------------------------------------------------------------------------


GREETING_S = 1.0
IDLE_S = 2.0


class Source:
    """A healthy source with quick bounds, that an honest reader keeps on a busy machine, too."""

    def __init__(self, port: int = 0) -> None:
        self.gate = Gate()
        settings = TcpSettings(greeting_s=GREETING_S, greetings=4, sessions=20, idle_s=IDLE_S)
        self.transport = TcpTransport(SECRET, self.gate, port=port, settings=settings)
        self.memory, self.parts = space(pattern(32 * MIB), 3)
        self.registration = self.gate.registration = self.transport.register(self.memory)
        self.endpoint = self.transport.describe(self.registration, LEASE)
        self.where = Endpoint.decode(self.endpoint)

    def dial(self) -> socket.socket:
        return socket.create_connection((self.where.hosts[0], self.where.port), timeout=5)

    def greeted(self) -> Stream:
        stream = stream_of(self.dial())
        greet_server(stream, SECRET, LEASE, self.where.incarnation, soon())
        return stream

    def assert_healthy(self) -> None:
        reader = TcpTransport(SECRET)
        memory, parts = space(np.zeros(1000, dtype=np.uint8))
        reader.connect(self.endpoint, LEASE, soon()).read(Span(0, 1000), reader.register(memory)).wait(soon())
        assert np.array_equal(joined(parts), pattern(1000))
        reader.close()


@pytest.fixture
def source() -> Iterator[Source]:
    made = Source()
    yield made
    made.transport.close()


def drained(client: socket.socket) -> bytes:
    """All that comes before the end of the stream, which must come within 10 s."""
    client.settimeout(10)
    received = b""
    try:
        while some := client.recv(65536):
            received += some
    except ConnectionResetError:
        pass
    return received


@pytest.mark.parametrize(
    "hello",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\nUser-Agent: curl/8.0 (padding)\r\n\r\n",
        b"\0" * frames.HELLO_BYTES,
        frames.MAGIC + b"\0\x02" + b"\0" * 60,
        b"\xff" * 100_000,
    ],
    ids=["http", "zeros", "version", "long"],
)
def test_h39_a_garbage_hello_is_answered_with_nothing(source: Source, hello: bytes) -> None:
    with source.dial() as client:
        client.sendall(hello)
        assert drained(client) == b""
    source.assert_healthy()


def test_h39_a_slow_greeting_is_ended_in_bounded_time(source: Source) -> None:
    began = time.monotonic()
    with source.dial() as client:
        for byte in frames.encode_hello(Hello(LEASE, auth.nonce())):
            try:
                client.sendall(bytes([byte]))
            except OSError:
                break
            time.sleep(10 * GREETING_S / frames.HELLO_BYTES)
        assert drained(client) == b""
    assert time.monotonic() - began < 5 * GREETING_S  # half of what all of it takes
    source.assert_healthy()


def test_h39_a_flood_of_silent_clients_does_not_lock_an_honest_one_out(source: Source) -> None:
    clients = [source.dial() for _ in range(100)]
    source.assert_healthy()
    for client in clients:
        client.close()


@pytest.mark.parametrize(
    "request_bytes",
    [
        struct.pack(">IIQI", 2, 0, 0, 10),
        struct.pack(">IIQI", 1, 0, 0, frames.MAX_READ_BYTES + 1),
        struct.pack(">IIQI", 1, 0, 0, 0xFFFFFFFF),
        b"\xff" * frames.REQUEST_BYTES,
    ],
    ids=["operation", "too long", "huge", "garbage"],
)
def test_h39_a_request_outside_the_protocol_ends_the_client(source: Source, request_bytes: bytes) -> None:
    stream = source.greeted()
    stream.send(deque([memoryview(request_bytes)]))
    with pytest.raises(OSError, match=r"ended|reset"):
        stream.receive_exactly(1, soon())
    stream.close()
    assert source.gate.asked == []
    source.assert_healthy()


@pytest.mark.parametrize("span", [Span(32 * MIB, 1), Span(32 * MIB - 5, 6), Span(2**63, 100), Span(2**64 - 1, 1)])
def test_h39_a_request_outside_the_memory_is_refused_even_by_a_careless_gate(source: Source, span: Span) -> None:
    class Careless(Gate):
        def admit(self, lease: bytes, span: Span) -> object:  # type: ignore[override]
            del lease, span
            return source.registration

    source.gate.admit = Careless().admit  # type: ignore[assignment,method-assign]
    stream = source.greeted()
    stream.send(deque([memoryview(frames.encode_request(Request(9, span)))]))
    answer = stream.receive_exactly(frames.ANSWER_BYTES, soon())
    assert struct.unpack(">III", answer) == (frames.Status.REFUSED, 9, 0)
    stream.close()


def test_h49_a_client_without_the_secret_gets_a_refusal_and_not_a_byte_more(source: Source) -> None:
    with source.dial() as client:
        client.sendall(frames.encode_hello(Hello(LEASE, auth.nonce())))
        client.sendall(b"\x11" * auth.PROOF_BYTES + frames.encode_request(Request(0, Span(0, 1000))) * 3)
        answer = drained(client)
    assert answer[frames.CHALLENGE_BYTES :] in (frames.encode_verdict(welcome=False), b"")
    assert source.gate.asked == []
    source.assert_healthy()


def test_h49_a_proof_is_good_for_one_connection_lease_and_side_only(source: Source) -> None:
    with source.dial() as client:
        nonce = auth.nonce()
        client.sendall(frames.encode_hello(Hello(LEASE, nonce)))
        server_nonce, server_proof = frames.decode_challenge(client.recv(frames.CHALLENGE_BYTES, socket.MSG_WAITALL))
        client.sendall(server_proof)  # reflected
        assert drained(client) == frames.encode_verdict(welcome=False)
    proof = SECRET.prove("client", "tcp", LEASE + source.where.incarnation, nonce, server_nonce)
    with source.dial() as client:
        client.sendall(frames.encode_hello(Hello(LEASE, nonce)) + proof)  # replayed
        assert drained(client)[frames.CHALLENGE_BYTES :] == frames.encode_verdict(welcome=False)


def test_h49_an_error_tells_a_stranger_nothing(source: Source) -> None:
    with pytest.raises(AuthError) as caught:
        TcpTransport(OTHER_SECRET).connect(source.endpoint, LEASE, soon())
    text = str(caught.value)
    assert "\n" not in text
    for secret in (LEASE.hex(), source.where.incarnation.hex(), "a secret that", "one secret for all"):
        assert secret not in text


def test_h28_an_endpoint_of_another_incarnation_is_refused(source: Source) -> None:
    stale = Endpoint(source.where.hosts, source.where.port, INCARNATION).encode()
    with pytest.raises(AuthError):
        TcpTransport(SECRET).connect(stale, LEASE, soon())


def test_a_silent_client_is_let_go(source: Source) -> None:
    began = time.monotonic()
    stream = source.greeted()
    with pytest.raises(OSError, match=r"ended|reset"):
        stream.receive_exactly(1, soon(20))
    assert IDLE_S / 2 < time.monotonic() - began < 10
    stream.close()


def test_h29_a_reader_that_takes_nothing_cannot_hold_the_memory(source: Source) -> None:
    stream = source.greeted()
    stream.send(deque([memoryview(frames.encode_request(Request(0, Span(0, 32 * MIB))))]))
    stream.receive_exactly(frames.ANSWER_BYTES, soon())  # sending has begun, and stops where the buffers are full
    began = time.monotonic()
    source.transport.deregister(source.registration, soon(0.3))
    assert 0.25 < time.monotonic() - began < 5
    for part in source.parts:
        part[:] = 0xEE
    landed = bytearray()
    with contextlib.suppress(OSError):
        while True:
            landed += stream.receive_exactly(4096, soon())
    stream.close()
    assert len(landed) < 32 * MIB
    assert np.array_equal(np.frombuffer(landed, dtype=np.uint8), pattern(len(landed)))


def test_a_request_that_was_admitted_just_before_the_withdrawal_is_refused(source: Source) -> None:
    source.gate.pause = threading.Event()
    stream = source.greeted()
    stream.send(deque([memoryview(frames.encode_request(Request(0, Span(0, 10))))]))
    while not source.gate.asked:
        time.sleep(0.005)
    source.transport.deregister(source.registration, soon())
    source.gate.pause.set()
    answer = stream.receive_exactly(frames.ANSWER_BYTES, soon())
    assert struct.unpack(">III", answer) == (frames.Status.MOVED, 0, 0)
    stream.close()


# --- endpoints and addresses --------------------------------------------------------------------------------------


def test_h50_a_taken_port_is_an_error_that_names_it(source: Source) -> None:
    with pytest.raises(ConfigError, match=str(source.where.port)):
        TcpTransport(SECRET, Gate(), port=source.where.port)
    with pytest.raises(ConfigError, match=str(source.where.port)):
        TcpTransport(SECRET, Gate(), host="0.0.0.0", port=source.where.port, advertise=["127.0.0.1"])


def test_a_given_port_can_be_had_again_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    for _ in range(2):
        source = Source(port)
        stream = source.greeted()
        source.transport.close()  # the side that closes first keeps the port in TIME_WAIT
        stream.close()


def test_h44_an_address_that_readers_cannot_reach_is_refused_at_once() -> None:
    with pytest.raises(ConfigError, match=r"0\.0\.0\.0"):
        TcpTransport(SECRET, Gate(), host="0.0.0.0")
    with pytest.raises(ConfigError, match=r"no\.such\.host\.invalid"):
        TcpTransport(SECRET, Gate(), advertise=["no.such.host.invalid"])
    with pytest.raises(ConfigError, match=r"192\.0\.2\.1"):
        TcpTransport(SECRET, Gate(), host="192.0.2.1")


def test_h44_an_endpoint_that_cannot_be_reached_is_bounded_and_named() -> None:
    endpoint = Endpoint(("192.0.2.1", "127.0.0.1"), 9, INCARNATION).encode()
    began = time.monotonic()
    with pytest.raises((PeerLost, PeerStalled), match=r"192\.0\.2\.1:9.*127\.0\.0\.1:9"):
        TcpTransport(SECRET).connect(endpoint, LEASE, soon(0.6))
    assert time.monotonic() - began < 6  # the kernel alone gives up after minutes


def test_h44_the_next_address_is_tried(source: Source) -> None:
    several = Endpoint(("127.255.255.254", "192.0.2.1", "127.0.0.1"), source.where.port, source.where.incarnation)
    connection = TcpTransport(SECRET).connect(several.encode(), LEASE, soon(3))
    assert connection.peer.startswith("127.0.0.1:")
    connection.fence(soon())


GOOD = {"v": 1, "hosts": ["10.0.0.1", "::1"], "port": 1234, "incarnation": "ab" * 16}


@pytest.mark.parametrize(
    "change",
    [
        {"v": 2},
        {"v": True},
        {"hosts": []},
        {"hosts": ["10.0.0.1"] * 9},
        {"hosts": ["localhost"]},
        {"hosts": ["fe80::1%eth0"]},
        {"hosts": [16843009]},
        {"hosts": "10.0.0.1"},
        {"port": 0},
        {"port": 65536},
        {"port": "80"},
        {"port": 80.0},
        {"incarnation": "ab" * 15},
        {"incarnation": "AB" * 16},
        {"incarnation": None},
        {"more": 1},
    ],
)
def test_h39_an_endpoint_is_checked_field_by_field(change: dict[str, object]) -> None:
    assert Endpoint.decode(json.dumps(GOOD).encode()).encode() == json.dumps(GOOD, separators=(",", ":")).encode()
    with pytest.raises(ProtocolError):
        Endpoint.decode(json.dumps(GOOD | change).encode())
    with pytest.raises(ProtocolError):
        Endpoint.decode(json.dumps(GOOD).encode() + b" " * 5000)


def test_a_transport_that_only_reads_listens_nowhere_and_describes_nothing() -> None:
    transport = TcpTransport(SECRET)
    registration = transport.register(space(pattern(10))[0])
    with pytest.raises(ConfigError):
        transport.describe(registration, LEASE)
    transport.close()
