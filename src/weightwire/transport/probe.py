"""Try a transport out for real, between two processes of this host: ``python -m weightwire.transport.probe NAME``.

Prints one line of JSON: :class:`Finding`. It runs in processes of its own because a broken driver may end the process
that touches it, because NIXL cannot be unloaded, and because the command line loads no torch.
"""

from __future__ import annotations

import base64
import dataclasses
import json
import os
import secrets
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import IO, Any

import numpy as np

from weightwire.auth import Secret
from weightwire.errors import ConfigError, TransferError, WeightwireError
from weightwire.manifest.address import AddressSpace, Region, Segment
from weightwire.transport.base import ReadGate, Registration, Transport
from weightwire.types import Span

NBYTES = 64 << 20
"""What is read: enough for a figure, little enough for a laptop."""

BOUND_S = 30.0
_LEASE = bytes(range(16))
_SEED = 20260701


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """What came of a probe.

    Attributes:
        ok: the bytes were read and are right (``cuda``: there is a device).
        detail: one line: what was found, or why it does not work.
        path: what carried the bytes (``Connection.path``).
        gbps: bytes per nanosecond of the second read; the first one pays for page faults and connections.
    """

    ok: bool
    detail: str
    path: str = ""
    gbps: float = 0.0


class _Gate:
    """Lets the one lease of the probe read everything."""

    def __init__(self) -> None:
        self.registration: Registration | None = None

    def admit(self, lease: bytes, span: Span) -> Registration:  # noqa: ARG002  (the whole memory may be read)
        if lease != _LEASE or self.registration is None:
            raise TransferError("not the probe's lease")
        return self.registration


def _make(name: str, secret: Secret, gate: ReadGate | None) -> Transport:
    if name == "tcp":
        from weightwire.transport.tcp import TcpTransport  # noqa: PLC0415  (only what is probed is imported)

        return TcpTransport(secret, gate)
    if name != "nixl":
        raise ConfigError(f"no transport is called {name!r}", "use tcp or nixl")
    from weightwire.transport.nixl import NixlTransport  # noqa: PLC0415  (may not be installed: that is a finding)

    return NixlTransport(secret, gate)


def _memory(values: np.ndarray[Any, np.dtype[np.uint8]]) -> AddressSpace:
    address = int(values.ctypes.data)
    segment = Segment(0, address, values.nbytes, "cpu")
    return AddressSpace([segment], [Region(address, values.nbytes, "cpu")], values)


def _expected() -> np.ndarray[Any, np.dtype[np.uint8]]:
    return np.random.default_rng(_SEED).integers(0, 256, NBYTES, dtype=np.uint8)


def serve(name: str) -> None:
    """The source: tell the endpoint on standard output, then serve until standard input ends."""
    gate = _Gate()
    transport = _make(name, Secret(sys.stdin.readline().strip().encode()), gate)
    gate.registration = transport.register(_memory(_expected()))
    endpoint = transport.describe(gate.registration, _LEASE)
    print(base64.b64encode(endpoint).decode(), flush=True)  # noqa: T201  (this is what the parent reads)
    sys.stdin.read()


def read(name: str) -> Finding:
    """The target: start a source, read from it twice, compare."""
    deadline = time.monotonic() + BOUND_S
    word = secrets.token_hex(16)
    transport = _make(name, Secret(word.encode()), None)  # first: where it is not installed, that is what is said
    command = [sys.executable, "-m", __spec__.name, name, "serve"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as source:
        try:
            assert source.stdin is not None
            assert source.stdout is not None
            source.stdin.write(word + "\n")
            source.stdin.flush()
            return _read_from(transport, _endpoint(source, source.stdout), deadline)
        finally:
            source.kill()


def _endpoint(source: subprocess.Popen[str], stdout: IO[str]) -> bytes:
    line = stdout.readline()  # bounded: whoever runs the probe ends it, and the source with it
    if not line:
        raise TransferError(f"the source side ended with {ending(source.wait(BOUND_S))}", "see its lines above")
    return base64.b64decode(line)


def _read_from(transport: Transport, endpoint: bytes, deadline: float) -> Finding:
    values = np.zeros(NBYTES, dtype=np.uint8)
    registration = transport.register(_memory(values))
    connection = transport.connect(endpoint, _LEASE, deadline)
    seconds = 0.0
    for _ in range(2):
        values[:] = 0
        began = time.perf_counter()
        connection.read(Span(0, NBYTES), registration).wait(deadline)
        seconds = time.perf_counter() - began
    path = connection.path
    connection.fence(deadline)
    if not np.array_equal(values, _expected()):
        return Finding(ok=False, detail="bytes arrived wrong", path=path)
    gbps = NBYTES / seconds / 1e9
    return Finding(ok=True, detail=f"{NBYTES >> 20} MiB read and compared, {gbps:.1f} GB/s", path=path, gbps=gbps)


def cuda() -> Finding:
    """Whether torch sees CUDA devices."""
    import torch  # noqa: PLC0415  (only this probe needs it)

    if torch.version.cuda is None:
        return Finding(ok=False, detail=f"torch {torch.__version__} is built without CUDA")
    if not torch.cuda.is_available():
        return Finding(ok=False, detail=f"torch {torch.__version__} finds no CUDA device or driver")
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    return Finding(ok=True, detail=", ".join(names))


def ending(code: int) -> str:
    """A process's exit code in words."""
    return f"signal {-code}" if code < 0 else f"exit code {code}"


def find(name: str) -> Finding:
    """Probe ``tcp``, ``nixl`` or ``cuda``; what does not work is a finding, not an error."""
    try:
        return cuda() if name == "cuda" else read(name)
    except ImportError as error:
        return Finding(ok=False, detail=f"not installed: {error}")
    except WeightwireError as error:
        return Finding(ok=False, detail=str(error))
    except OSError as error:
        return Finding(ok=False, detail=f"{type(error).__name__}: {error}")


def main(arguments: list[str]) -> None:
    """Entry point; leaves by ``os._exit``, because interpreter exit crashes where NIXL was loaded."""
    name, side = arguments[0], arguments[1] if len(arguments) > 1 else "read"
    if side == "serve":
        serve(name)
    else:
        print(json.dumps(dataclasses.asdict(find(name))), flush=True)  # noqa: T201  (this is the result)
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(sys.argv[1:])
