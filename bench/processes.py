"""Processes of a benchmark that are forked from one which has imported everything, and talk with it in JSON lines.

The one that forks must have no threads, so it only ever watches: whatever uses the library is a child.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

PR_SET_PDEATHSIG = 1
QUIET_S = 60.0

_LIBC = ctypes.CDLL(None, use_errno=True)


class Failed(Exception):
    """A process of the benchmark could not do its part."""


class Line:
    """JSON objects over a socket, one a line. ``say`` may be called from any thread, ``hear`` from one."""

    def __init__(self, line: socket.socket) -> None:
        self.socket = line
        self._heard = b""

    def say(self, event: str, **fields: Any) -> None:
        with contextlib.suppress(BrokenPipeError):
            self.socket.sendall((json.dumps({"event": event} | fields) + "\n").encode())

    def hear(self, seconds: float | None = None) -> dict[str, Any] | None:
        """The next message; ``None`` at the end. ``TimeoutError`` if none is complete in time."""
        until = None if seconds is None else time.monotonic() + seconds
        while not self.waiting:
            self.socket.settimeout(None if until is None else max(0.001, until - time.monotonic()))
            try:
                piece = self.socket.recv(65536)
            except ConnectionResetError:
                return None
            if not piece:
                return None
            self._heard += piece
        text, _, self._heard = self._heard.partition(b"\n")
        found: dict[str, Any] = json.loads(text)
        return found

    @property
    def waiting(self) -> bool:
        """Whether a whole message is here already."""
        return b"\n" in self._heard


class Child:
    """A forked process which runs ``work(line, *arguments)``: ``line`` talks to us. It dies with us.

    What it says are JSON objects, one a line; ``{"error": …}`` from it raises here.

    Args:
        name: for messages.
        work: does all that it does.
        enter: called in it first, such as to go into a namespace.
    """

    def __init__(
        self, name: str, work: Callable[..., None], *arguments: Any, enter: Callable[[], None] = lambda: None
    ) -> None:
        self.name = name
        mine, theirs = socket.socketpair()
        sys.stdout.flush()
        self.pid = os.fork()
        if not self.pid:
            mine.close()
            _live(Line(theirs), enter, work, arguments)
        theirs.close()
        self.line = Line(mine)
        self.over = False

    def next(self, seconds: float = QUIET_S) -> dict[str, Any]:
        """Its next message.

        Raises:
            Failed: it reports an error, is gone, or says nothing for ``seconds``.
        """
        try:
            found = self.line.hear(seconds)
        except TimeoutError:
            raise Failed(f"{self.name} said nothing for {seconds:.0f} s") from None
        if found is None:
            raise Failed(f"{self.name} is gone")
        if "error" in found:
            raise Failed(f"{self.name}: {found['error']}")
        return found

    def expect(self, event: str, seconds: float = QUIET_S) -> dict[str, Any]:
        """Its next message of that name; others before it are dropped. Raises as ``next``."""
        while (found := self.next(seconds))["event"] != event:
            pass
        return found

    def kill(self) -> None:
        """SIGKILL; returns once it is gone. Idempotent."""
        if not self.over:
            self.over = True
            os.kill(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
            self.line.socket.close()


def talking(children: Sequence[Child], seconds: float) -> list[Child]:
    """Those of ``children`` that have something to say (or are gone) within ``seconds``."""
    if found := [child for child in children if child.line.waiting]:
        return found
    ready, _, _ = select.select([child.line.socket for child in children], [], [], seconds)
    return [child for child in children if child.line.socket in ready]


def _live(line: Line, enter: Callable[[], None], work: Callable[..., None], arguments: Sequence[Any]) -> NoReturn:
    code = 1
    try:
        _LIBC.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # whoever started it kills it
        enter()
        work(line, *arguments)
        code = 0
    except Exception as error:  # noqa: BLE001  (the edge of a process)
        traceback.print_exc()
        line.say("error", error=f"{type(error).__name__}: {error}")
    finally:
        os._exit(code)
