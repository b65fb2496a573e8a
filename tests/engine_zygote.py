"""Starts ranks quickly: a process that has imported everything, and forks one rank for each request.

    python engine_zygote.py serve SOCKET         the process that forks; prints a line when it is ready
    python -S -E engine_zygote.py SOCKET OPTIONS as a rank's command: its streams and environment become the rank's

Importing torch takes seconds, a fork takes none. The rank is a process of its own (its ``started`` event names it); the
process that asked for it lives as long, and ends as it did: with its exit code, or by its signal.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NoReturn

STREAMS = 3
MAX_REQUEST = 1 << 20


def ask(path: str, options: str) -> int:
    """Become the shadow of a new rank; its exit code."""
    request = json.dumps({"options": options, "environment": dict(os.environ)}).encode()
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(path)
        socket.send_fds(line, [len(request).to_bytes(4, "big")], range(STREAMS))
        line.sendall(request)
        for stream in range(STREAMS):
            os.close(stream)  # they are the rank's now
        status = int(line.recv(16) or "-9")
    if status < 0:
        signal.signal(-status, signal.SIG_DFL) if -status != signal.SIGKILL else None
        os.kill(os.getpid(), -status)
    return status


@dataclass
class Zygote:
    """One thread, so that forking is safe."""

    listening: socket.socket
    ranks: dict[int, socket.socket] = field(default_factory=dict)

    def run(self) -> tuple[str, dict[str, str]] | None:
        """Serve until standard input ends: None. In a new rank: its options and environment."""
        wake, woken = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(woken)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        while True:
            waiting: list[Any] = [0, wake, self.listening, *self.ranks.values()]
            ready, _, _ = select.select(waiting, [], [])
            if 0 in ready:
                return None
            if wake in ready:
                os.read(wake, 4096)
                self._reap()
            for pid, line in list(self.ranks.items()):
                if line in ready:  # whoever asked for it is gone
                    os.kill(pid, signal.SIGKILL)
                    line.close()
                    del self.ranks[pid]
            if self.listening in ready and (rank := self._fork()) is not None:
                signal.set_wakeup_fd(-1)
                signal.signal(signal.SIGCHLD, signal.SIG_DFL)
                os.close(wake)
                os.close(woken)
                return rank

    def end(self) -> None:
        """Kill what is left."""
        for pid in self.ranks:
            os.kill(pid, signal.SIGKILL)

    def _reap(self) -> None:
        while self.ranks:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)
            except ChildProcessError:
                return
            if not pid:
                return
            line = self.ranks.pop(pid, None)
            if line is not None:
                with contextlib.suppress(BrokenPipeError):  # its shadow was killed at the same moment
                    line.sendall(str(os.waitstatus_to_exitcode(status)).encode())
                line.close()

    def _fork(self) -> tuple[str, dict[str, str]] | None:
        line, _ = self.listening.accept()
        head, streams, _, _ = socket.recv_fds(line, 4, STREAMS)
        request = b""
        while len(request) < min(int.from_bytes(head, "big"), MAX_REQUEST):
            request += line.recv(65536)
        pid = os.fork()
        if pid:
            self.ranks[pid] = line
            for stream in streams:
                os.close(stream)
            return None
        for other in (line, self.listening, *self.ranks.values()):
            other.close()
        for place, stream in enumerate(streams):
            os.dup2(stream, place)
            os.close(stream)
        told = json.loads(request)
        return told["options"], told["environment"]


def serve(path: str) -> None:
    """Fork ranks until standard input ends. Does not return in a rank."""
    import engine_rank

    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(path)
        listening.listen(64)
        print("ready", flush=True)
        zygote = Zygote(listening)
        rank = zygote.run()
        if rank is None:
            zygote.end()
            return
    options, environment = rank
    os.environ.clear()
    os.environ.update(environment)
    _leave(_run(engine_rank.main, options))


def _run(main: Callable[[list[str]], int], options: str) -> int:
    try:
        return main([options])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else 1
    except BaseException:  # noqa: BLE001  # the process's edge: what the interpreter would do
        traceback.print_exc()
        return 1


def _leave(code: int) -> NoReturn:
    """Without the interpreter's end, which takes seconds after torch and says nothing here."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    if sys.argv[1] == "serve":
        serve(sys.argv[2])
    else:
        sys.exit(ask(sys.argv[1], sys.argv[2]))
