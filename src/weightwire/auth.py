"""The shared secret, and proofs that both sides hold it without sending it.

The exchange, the same for gRPC and for the data plane: the client sends a fresh nonce; the server answers with its own
nonce and ``prove("server", …)`` over both; the client checks that and sends ``prove("client", …)``. Both then hold
the same session key. ``purpose`` and ``binding`` keep a proof from being used on another channel, endpoint or lease.

An active attacker on the path can still alter what follows on a connection without TLS: run it on a trusted network.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import stat
from pathlib import Path

from weightwire.errors import AuthError

NONCE_BYTES = 32
PROOF_BYTES = 32
MIN_SECRET_BYTES = 16
MAX_SECRET_BYTES = 4096


class Secret:
    """The shared secret of a deployment; its text never appears in a repr, a log or a message."""

    __slots__ = ("_key",)

    def __init__(self, key: bytes) -> None:
        if not MIN_SECRET_BYTES <= len(key) <= MAX_SECRET_BYTES:
            raise AuthError(
                f"the shared secret has {len(key)} bytes", f"use {MIN_SECRET_BYTES} to {MAX_SECRET_BYTES} bytes"
            )
        self._key = key

    def __repr__(self) -> str:
        return "Secret(…)"

    def prove(self, side: str, purpose: str, binding: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
        """32 bytes that only a holder of the secret can make.

        Args:
            side: ``client`` or ``server``: a proof cannot be reflected.
            purpose: the channel, such as ``grpc`` or ``tcp``.
            binding: what the proof is for (endpoint, incarnation, lease).
            client_nonce: fresh, ``NONCE_BYTES``.
            server_nonce: fresh, ``NONCE_BYTES``.
        """
        parts = (b"weightwire.v1", side.encode(), purpose.encode(), binding, client_nonce, server_nonce)
        message = b"".join(len(part).to_bytes(4, "big") + part for part in parts)
        return hmac.new(self._key, message, hashlib.sha256).digest()

    def session_key(self, purpose: str, binding: bytes, client_nonce: bytes, server_nonce: bytes) -> bytes:
        """A key that both sides derive once both proofs were checked."""
        return self.prove("session", purpose, binding, client_nonce, server_nonce)


def nonce() -> bytes:
    """A fresh nonce."""
    return secrets.token_bytes(NONCE_BYTES)


def equal(left: bytes, right: bytes) -> bool:
    """Compare proofs in constant time."""
    return hmac.compare_digest(left, right)


def default_secret_path() -> Path:
    """Where the same user's processes on one machine find each other's secret."""
    base = os.environ.get("XDG_STATE_HOME") or str(Path.home() / ".local" / "state")
    return Path(base) / "weightwire" / "secret"


def load_secret(path: Path | None = None) -> Secret:
    """Read the secret, or make it on first use (mode 0600, atomically) where it is the default one.

    Args:
        path: a file with the secret (surrounding white space is not part of it); ``None`` for the user's own.

    Raises:
        AuthError: the file is missing (only a default one is made), unreadable, empty, or readable by others.
    """
    if path is None:
        path = default_secret_path()
        _create(path)
    try:
        mode = path.stat().st_mode
        text = path.read_bytes()[: MAX_SECRET_BYTES + 2].strip()
    except OSError as error:
        raise AuthError(f"cannot read the secret file {path}: {error.strerror}", "check its path and owner") from error
    if stat.S_IMODE(mode) & 0o077:
        raise AuthError(f"the secret file {path} can be read by other users", f"run: chmod 600 {path}")
    return Secret(text)


def _create(path: Path) -> None:
    if path.exists():
        return
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    draft = path.with_name(f".{path.name}.{os.getpid()}.{secrets.token_hex(4)}")
    descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    with os.fdopen(descriptor, "w") as file:
        file.write(secrets.token_hex(32) + "\n")
    try:
        os.link(draft, path)  # the first of several processes wins; the others use its file
    except FileExistsError:
        pass
    finally:
        draft.unlink()
