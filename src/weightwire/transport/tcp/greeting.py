"""Both sides of the greeting: who holds the secret, and for which lease of which incarnation."""

from __future__ import annotations

from collections import deque

from weightwire import auth
from weightwire.errors import AuthError
from weightwire.transport.tcp import frames
from weightwire.transport.tcp.stream import Stream

PURPOSE = "tcp"


def greet_server(stream: Stream, secret: auth.Secret, lease: bytes, incarnation: bytes, deadline: float) -> None:
    """The client's side.

    Raises:
        AuthError: the server does not hold our secret (nothing of ours was proved to it then), or refuses us.
        OverdueError: no answer by ``deadline``.
        OSError: the server ended the connection.
    """
    nonce = auth.nonce()
    _say(stream, frames.encode_hello(frames.Hello(lease, nonce)))
    challenge = stream.receive_exactly(frames.CHALLENGE_BYTES, deadline)
    server_nonce, proof = frames.decode_challenge(challenge)
    binding = lease + incarnation
    if not auth.equal(proof, secret.prove("server", PURPOSE, binding, nonce, server_nonce)):
        raise AuthError("the source does not hold our secret, or is not the one that was meant", "give both one secret")
    _say(stream, secret.prove("client", PURPOSE, binding, nonce, server_nonce))
    if not frames.decode_verdict(stream.receive_exactly(frames.VERDICT_BYTES, deadline)):
        raise AuthError("the source refused us", "give both sides the same secret")


def greet_client(stream: Stream, secret: auth.Secret, incarnation: bytes, deadline: float) -> bytes | None:
    """The server's side: the client's lease, or None for one that was refused (and told no reason).

    Raises:
        ProtocolError: the client does not speak our protocol.
        OverdueError: the client was not done by ``deadline``.
        OSError: the client ended the connection.
    """
    hello = frames.decode_hello(stream.receive_exactly(frames.HELLO_BYTES, deadline))
    nonce = auth.nonce()
    binding = hello.lease + incarnation
    _say(stream, frames.encode_challenge(nonce, secret.prove("server", PURPOSE, binding, hello.nonce, nonce)))
    proof = bytes(stream.receive_exactly(auth.PROOF_BYTES, deadline))
    welcome = auth.equal(proof, secret.prove("client", PURPOSE, binding, hello.nonce, nonce))
    _say(stream, frames.encode_verdict(welcome=welcome))
    return hello.lease if welcome else None


def _say(stream: Stream, data: bytes) -> None:
    stream.send(deque([memoryview(data)]))
