"""A NIXL agent, typed and with our errors; the only module that touches the package ``nixl``.

It stands on NIXL's bindings rather than on ``nixl_agent``, which fixes the progress thread's delay at 0: such a thread
spins and takes a whole core from the process that serves. Nothing of NIXL's own (de)serialisation, which is pickle, is
used. An agent is not thread-safe: whoever holds it sees to it that one thread uses it at a time.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import importlib
import threading
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from weightwire.errors import ConfigError, PeerLost, ProtocolError, TransferError, WeightwireError
from weightwire.manifest.address import Region
from weightwire.transport.nixl import exit as process_exit
from weightwire.transport.nixl.endpoint import device_number
from weightwire.transport.nixl.lanes import UcxLog, Way
from weightwire.transport.nixl.pieces import Piece

BACKEND = "UCX"

PROGRESS_DELAY_US = 1000
"""Longest sleep of a serving agent's progress thread; it wakes for events. At 0 it spins; at 1000 it idles at 4 % of
a core and serves as fast (``bench/nixl.py``)."""

Pairs = Sequence[tuple[int, int]] | np.ndarray[Any, np.dtype[np.int64]]
"""Addresses and sizes."""

_ucx_log = UcxLog()
_making = threading.Lock()
"""Agents are made one at a time: the first one decides where UCX's log goes."""


@functools.cache
def bindings() -> Any:
    """NIXL's bindings, imported on first use.

    Raises:
        ConfigError: the package is not installed, or its libraries cannot be loaded.
    """
    try:
        return importlib.import_module("nixl._api").nixlBind
    except ModuleNotFoundError as error:
        raise ConfigError("nixl is not installed", "pip install weightwire[nixl]") from error
    except ImportError as error:
        raise ConfigError(f"nixl cannot be loaded: {error}", "reinstall weightwire[nixl]") from error


@functools.cache
def _errors() -> tuple[type[Exception], ...]:
    found = vars(bindings()).values()
    return tuple(kind for kind in found if isinstance(kind, type) and issubclass(kind, Exception))


@contextlib.contextmanager
def _translated(kind: type[WeightwireError], problem: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except _errors() as error:
        raise kind(f"{problem} ({error})", remedy) from error


class Agent:
    """One NIXL agent with the UCX backend.

    Args:
        name: never used before, at most 31 characters (UCX cuts longer ones, and then cannot say what it uses).
        serves: it has a progress thread, so that software transports are served without our doing.

    Raises:
        ConfigError: ``nixl`` is not installed.
        TransferError: UCX finds nothing to work with.
    """

    def __init__(self, name: str, *, serves: bool) -> None:
        self.name = name
        self._bound = bindings()
        config = self._bound.nixlAgentConfig()
        config.useProgThread = serves
        config.pthrDelay = PROGRESS_DELAY_US
        config.useListenThread = False
        config.captureTelemetry = False
        config.syncMode = self._bound.NIXL_THREAD_SYNC_NONE
        package = Path(self._bound.__file__).parent
        with _making, _translated(TransferError, "NIXL cannot start UCX", "check UCX_TLS"):
            settings = _ucx_log.settings(package.parent / f"{package.name}.libs")
            wanted = {"engine_config": ",".join(f"{name}={value}" for name, value in settings.items())}
            self._agent = self._bound.nixlAgent(name, config)
            self._backends = [self._agent.createBackend(BACKEND, wanted)]
        self._registered: list[Any] = []
        self._posted: set[int] = set()
        process_exit.install()

    def register(self, regions: Sequence[Region]) -> None:
        """Register whole allocations until ``destroy``.

        Raises:
            TransferError: NIXL cannot use one of them; names the device.
        """
        for device in sorted({region.device for region in regions}):
            here = [region for region in regions if region.device == device]
            rows = np.array([[each.address for each in here], [each.nbytes for each in here]], dtype=np.int64).T
            remedy = "use another transport" if device == "cpu" else "is UCX built with CUDA, and the device visible?"
            with _translated(TransferError, f"NIXL cannot register {len(rows)} regions on {device}", remedy):
                listed = self._bound.nixlRegDList(self._kind(device), _rows(rows, device))
                self._agent.registerMem(listed, self._backends)
            self._registered.append(listed)

    def metadata(self) -> bytes:
        """What a reader's agent needs: our addresses and the keys of all that is registered (also for *writing*)."""
        with _translated(TransferError, "NIXL gives no metadata", "register the memory again"):
            return bytes(self._agent.getLocalMD())

    def add_peer(self, metadata: bytes, name: str) -> None:
        """Make a peer known; its name must be the one that it is said to have.

        Raises:
            PeerLost: UCX cannot reach it.
            ProtocolError: not what a NIXL of this version makes, or another name.
        """
        with _translated(ProtocolError, "a peer's NIXL metadata is refused", "run one version of nixl everywhere"):
            try:
                found = self._agent.loadRemoteMD(metadata)
            except self._bound.nixlBackendError as error:
                raise PeerLost("UCX cannot reach a peer", "is it running, and is there a network to it?") from error
        if _text(found) != name:
            raise ProtocolError("a peer's NIXL metadata is that of another agent", "do not use this peer")

    def post(self, piece: Piece, peer: str) -> int:
        """Start reading ``piece``; its handle, for ``done`` and ``release``. May block until the bytes are in place.

        Raises:
            PeerLost: the connection broke.
            ProtocolError: the peer's memory is not registered where the endpoint says.
        """
        ours = self._xfer(piece.local, piece.rows[:, (0, 2)])
        theirs = self._xfer(piece.remote, piece.rows[:, (1, 2)])
        read = self._bound.NIXL_READ
        with _translated(ProtocolError, "NIXL refuses a read", "do not use this peer"):
            handle = int(self._agent.createXferReq(read, ours, theirs, peer, b"", self._backends))
        self._posted.add(handle)
        with _translated(PeerLost, "the NIXL peer is gone", "read from another peer"):
            self._check(self._agent.postXferReq(handle, b""))
        return handle

    def done(self, handle: int) -> bool:
        """Whether the bytes are in place; drives the progress of an agent that does not serve.

        Raises:
            PeerLost: the connection broke.
        """
        with _translated(PeerLost, "the NIXL peer is gone", "read from another peer"):
            return self._check(self._agent.getXferStatus(handle))

    def release(self, handle: int) -> None:
        """Give a finished transfer's handle back."""
        self._posted.discard(handle)
        with contextlib.suppress(*_errors()):  # freed with the agent then
            self._agent.releaseXferReq(handle)

    def transports(self) -> dict[Way, tuple[str, ...]]:
        """UCX transports that its reads use, such as ``("cma",)``, for each way; see ``lanes``."""
        return _ucx_log.transports(self.name)

    def destroy(self) -> None:
        """End the agent; once this returns nothing of it is left, and no peer writes through it. Call it once.

        Raises:
            TransferError: something still refers to it (a bug): it is not gone.
        """
        for handle in list(self._posted):
            self.release(handle)
        gone = weakref.ref(self._agent)
        del self._agent
        self._registered.clear()
        if gone() is not None:
            raise TransferError(f"NIXL agent {self.name} is still referred to", "report this as a bug")

    def progress(self) -> None:
        """Do what there is to do for readers, of an agent without a thread of NIXL's; returns when there is nothing.

        Raises:
            TransferError: the library failed.
        """
        with _translated(TransferError, "NIXL does not go on", "register the memory again"):
            self._agent.getNotifs({})  # nobody sends us any: it is the one call that drives an agent without transfers

    def park(self) -> None:
        """Leave the agent as it is, never freed, also not at exit: for one that it is not safe to destroy.

        Nobody may drive it any more. Memory that RDMA reaches stays readable. Call it once, instead of ``destroy``.
        """
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(self._agent))
        del self._agent

    def _kind(self, device: str) -> Any:
        return self._bound.DRAM_SEG if device == "cpu" else self._bound.VRAM_SEG

    def _xfer(self, device: str, rows: Pairs) -> Any:
        return self._bound.nixlXferDList(self._kind(device), _rows(rows, device))

    def _check(self, status: Any) -> bool:
        if status == self._bound.NIXL_SUCCESS:
            return True
        if status == self._bound.NIXL_IN_PROG:
            return False
        raise PeerLost(f"the NIXL peer is gone ({status})", "read from another peer")


def _rows(rows: Pairs, device: str) -> np.ndarray[Any, np.dtype[np.uint64]]:
    table = np.empty((len(rows), 3), dtype=np.uint64)
    table[:, :2] = rows
    table[:, 2] = max(device_number(device), 0)
    return table


def _text(name: bytes | str) -> str:
    return name.decode(errors="replace") if isinstance(name, bytes) else name
