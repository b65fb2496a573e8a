"""Sessions over the shared secret, without gRPC: the challenge, and a signature for every call.

The server keeps nothing for a stranger: what it hands out with the challenge is a token, sealed with a key of its own
process, and only the first call with a right signature makes a session. Sessions are bounded and expire; each call has
a counter of its own, and a window over the last ones refuses what was seen before.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import struct
import threading
import time
from collections import OrderedDict
from collections.abc import Callable

from weightwire.auth import NONCE_BYTES, PROOF_BYTES, Secret, equal, nonce
from weightwire.errors import AuthError, ProtocolError

PURPOSE = "grpc"
MAX_SESSIONS = 8192
CONFIRM_S = 30.0
"""A challenge that was not used by then is worth nothing."""
SESSION_S = 3600.0
"""A session that was not used for so long is over; the client makes another."""
WINDOW = 1024
"""How far calls may overtake each other."""

_TOKEN = struct.Struct(f">d{NONCE_BYTES}s{NONCE_BYTES}s")
_SEAL_BYTES = 32
MAX_COUNTER = 2**63


def sign(key: bytes, method: str, counter: int) -> bytes:
    """The signature of one call."""
    return hmac.new(key, counter.to_bytes(8, "big") + method.encode(), hashlib.sha256).digest()


class _Session:
    __slots__ = ("highest", "key", "seen", "used_at")

    def __init__(self, key: bytes, now: float) -> None:
        self.key = key
        self.used_at = now
        self.highest = 0
        self.seen = 0
        """Bit n: counter ``highest - n`` was used."""

    def fresh(self, counter: int) -> bool:
        """Use up ``counter``; False if it was used before or is too old to know."""
        if counter > self.highest:
            self.seen = ((self.seen << min(counter - self.highest, WINDOW)) | 1) & ((1 << WINDOW) - 1)
            self.highest = counter
            return True
        behind = self.highest - counter
        if behind >= WINDOW or self.seen >> behind & 1:
            return False
        self.seen |= 1 << behind
        return True


class Gatekeeper:
    """The server's side. Thread safe.

    Args:
        secret: the shared secret.
        binding: what kind of endpoint this is: a proof for one kind is none for another.
        clock: seconds, monotonic.
        max_sessions: live sessions; beyond, the one that was idle longest ends (its client makes another).
    """

    def __init__(
        self,
        secret: Secret,
        binding: bytes,
        *,
        clock: Callable[[], float] = time.monotonic,
        max_sessions: int = MAX_SESSIONS,
    ) -> None:
        self._secret = secret
        self._binding = binding
        self._clock = clock
        self._max = max_sessions
        self._seal_key = secrets.token_bytes(32)
        self._sessions: OrderedDict[bytes, _Session] = OrderedDict()
        self._lock = threading.Lock()

    def challenge(self, client_nonce: bytes) -> tuple[bytes, bytes, bytes]:
        """Server nonce, server proof and session token for a client's nonce.

        Raises:
            ProtocolError: a nonce of the wrong length.
        """
        if len(client_nonce) != NONCE_BYTES:
            raise ProtocolError(f"a nonce has {NONCE_BYTES} bytes")
        server_nonce = nonce()
        proof = self._secret.prove("server", PURPOSE, self._binding, client_nonce, server_nonce)
        body = _TOKEN.pack(self._clock(), client_nonce, server_nonce)
        return server_nonce, proof, body + self._seal(body)

    def admit(self, token: bytes, method: str, counter: int, signature: bytes) -> bool:
        """Whether a call comes from a holder of the secret, and for the first time."""
        body, seal = token[: _TOKEN.size], token[_TOKEN.size :]
        if len(body) != _TOKEN.size or not equal(seal, self._seal(body)) or not 0 < counter < MAX_COUNTER:
            return False
        made_at, client_nonce, server_nonce = _TOKEN.unpack(body)
        key = self._secret.session_key(PURPOSE, self._binding, client_nonce, server_nonce)
        if not equal(signature, sign(key, method, counter)):
            return False
        with self._lock:
            session = self._session(server_nonce, key, made_at)
            return session is not None and session.fresh(counter)

    def __len__(self) -> int:
        return len(self._sessions)

    def _session(self, name: bytes, key: bytes, made_at: float) -> _Session | None:
        now = self._clock()
        while self._sessions and now - next(iter(self._sessions.values())).used_at > SESSION_S:
            self._sessions.popitem(last=False)
        session = self._sessions.get(name)
        if session is None:
            if now - made_at > CONFIRM_S:  # its session has ended, and with it the memory of what was used
                return None
            session = self._sessions[name] = _Session(key, now)
            if len(self._sessions) > self._max:
                self._sessions.popitem(last=False)
        session.used_at = now
        self._sessions.move_to_end(name)
        return session

    def _seal(self, body: bytes) -> bytes:
        return hmac.new(self._seal_key, body, hashlib.sha256).digest()[:_SEAL_BYTES]


class Credentials:
    """The client's side of one session, once the server has proved itself. Thread safe."""

    def __init__(self, token: bytes, key: bytes) -> None:
        self._token = token
        self._key = key
        self._counter = 0
        self._lock = threading.Lock()

    @classmethod
    def check(
        cls, secret: Secret, binding: bytes, client_nonce: bytes, answer: tuple[bytes, bytes, bytes]
    ) -> Credentials:
        """From the server's answer (server nonce, proof, token) to our challenge.

        Raises:
            AuthError: the server does not hold our secret; nothing more may be sent to it.
        """
        server_nonce, proof, token = answer
        right = secret.prove("server", PURPOSE, binding, client_nonce, server_nonce)
        if len(server_nonce) != NONCE_BYTES or len(proof) != PROOF_BYTES or not equal(proof, right):
            raise AuthError("the server does not hold our shared secret", "give both sides the same secret file")
        if len(token) > 512:
            raise AuthError("the server's session token is too long", "check that weightwire listens there")
        return cls(token, secret.session_key(PURPOSE, binding, client_nonce, server_nonce))

    def next(self, method: str) -> tuple[bytes, int, bytes]:
        """Token, counter and signature for one call; each is good once."""
        with self._lock:
            self._counter += 1
            counter = self._counter
        return self._token, counter, sign(self._key, method, counter)
