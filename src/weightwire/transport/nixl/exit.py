"""Leaving a process that made a NIXL agent, with the exit code that was meant.

The C++ libraries under NIXL 1.5.1 may crash while the C library runs exit handlers, long after the interpreter decided
on an exit code; the process then ends with 139 whatever it did. Two guards stand against that, and ``install`` (called
with the first agent, so in every process that has one) sets up both:

* a Python ``atexit`` callback waits for threads that are making or ending an agent (``at_work``), and closes the
  transports while everything they need is still there. A daemon thread that comes back from C++ into an interpreter
  that is gone is ended by force, and the libraries abort the process at that;
* a C exit handler, registered last and hence run first, flushes C streams and ends the process with the status that
  was meant: exceptions, ``SystemExit`` and plain returns alike, without anybody's cooperation.

What else was to run as a C exit handler (static destructors of libraries) is skipped in such a process.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import logging
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from typing import NoReturn, Protocol

from weightwire.errors import PeerLost, WeightwireError

_log = logging.getLogger(__name__)


class Closable(Protocol):
    """Something that ``close`` ends, bounded and idempotent."""

    def close(self) -> None:
        """End it."""
        ...


_open: weakref.WeakSet[Closable] = weakref.WeakSet()
_lock = threading.Lock()
_installed = False

WORK_S = 5.0
"""How long an exit waits for threads ``at_work``."""

_idle = threading.Condition()
_working = 0
_leaving = False


@contextlib.contextmanager
def at_work() -> Iterator[None]:
    """In the block this thread makes or ends an agent: an exit waits for it.

    Raises:
        PeerLost: the process is leaving already.
    """
    global _working  # noqa: PLW0603  # a process has one exit
    with _idle:
        if _leaving:
            raise PeerLost("this process is leaving", "connect before it ends")
        _working += 1
    try:
        yield
    finally:
        with _idle:
            _working -= 1
            _idle.notify_all()


def close_at_exit(transport: Closable) -> None:
    """Close ``transport`` when the process leaves, unless it is gone by then."""
    with _lock:
        _open.add(transport)


def install() -> None:
    """Set up both guards; idempotent. Legal once NIXL is loaded: only then our handler runs first."""
    global _installed  # noqa: PLW0603  # a process has one exit
    with _lock:
        if _installed:
            return
        _installed = True
    atexit.register(_close_all)
    _end_before_c_handlers()


def close_all() -> None:
    """Close every transport that is still open; a failure is logged, not raised."""
    with _lock:
        transports = list(_open)
    for transport in transports:
        try:
            transport.close()
        except WeightwireError as error:
            _log.warning("at exit: %s", error)


def _close_all() -> None:
    global _leaving  # noqa: PLW0603  # a process has one exit
    with _idle:
        _leaving = True
        if not _idle.wait_for(lambda: not _working, WORK_S):
            _log.warning("at exit: a NIXL agent has been in the making for %.0f s; this may end in a crash", WORK_S)
    close_all()


def leave(code: int) -> NoReturn:
    """End the process now with ``code``: close transports, flush logs and streams, run no exit handlers.

    Args:
        code: exit status, 0 to 255.
    """
    close_all()
    logging.shutdown()
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # a closed or broken pipe does not change how we leave
            stream.flush()
    os._exit(code)


def _end_before_c_handlers() -> None:
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "on_exit"):  # glibc only, like the wheels of nixl
        _log.warning("the C library has no on_exit: exit codes of this process may be those of a crash in NIXL")
        return
    # Run in the reverse order: first flush the C streams, then leave with the status that exit() was given.
    address = {name: ctypes.cast(libc[name], ctypes.c_void_p) for name in ("_exit", "fflush")}
    libc.on_exit(address["_exit"], None)
    libc["__cxa_atexit"](address["fflush"], None, None)
