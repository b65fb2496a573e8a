"""Processes that the command line starts because it must not import what they run: events from them, commands to them.

Every line of a child's standard output is one JSON object with a field ``event``; what it logs goes to a file. A child
is the head of a process group of its own, so that Ctrl-C reaches this process alone, and so that nothing of it is ever
left behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, NoReturn, Self

from weightwire import errors
from weightwire.errors import ProtocolError, RankLost, WeightwireError

STOP_S = 20.0
"""What a child gets to end gracefully: more than its own bound for that."""

KILL_S = 10.0
MAX_LINE = 4 << 20

Event = dict[str, Any]


class Child:
    """One process, running from construction until ``stop``. A context manager.

    Args:
        name: in messages.
        command: behind ``python -m``.
        log: where its standard error goes; this process's own where left out.
        environ: variables on top of this process's.
        heard: called with every event, from a thread of this object's.
    """

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        *,
        log: Path | None = None,
        environ: Mapping[str, str] | None = None,
        heard: Callable[[Event], None] = lambda _: None,
    ) -> None:
        self.name = name
        self.log = log
        self._heard = heard
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        with contextlib.ExitStack() as files:
            errors_to = files.enter_context(log.open("ab")) if log else None
            self.process = subprocess.Popen(
                [sys.executable, "-m", *command],
                env={**os.environ, **(environ or {})},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors_to,
                text=True,
                start_new_session=True,
            )
        self._thread = threading.Thread(target=self._listen, name=f"weightwire-{name}", daemon=True)
        self._thread.start()

    def expect(self, wanted: str, timeout: float) -> Event:
        """The next event of that kind.

        Raises:
            WeightwireError: what ended the child, in its own words; or it ended, or said nothing of the kind in time.
        """
        until = time.monotonic() + timeout
        while True:
            try:
                event = self._events.get(timeout=max(0.0, until - time.monotonic()))
            except queue.Empty:
                raise RankLost(f"{self.name} did not get ready within {timeout:g} s", "see its log") from None
            if event["event"] == "failed":
                raise error_of(event)
            if event["event"] == wanted:
                return event

    def attend(self) -> NoReturn:
        """Stay until the child ends.

        Raises:
            WeightwireError: what ended it.
        """
        while True:
            event = self._events.get()
            if event["event"] == "failed":
                raise error_of(event)

    def tell(self, command: Mapping[str, Any]) -> None:
        """Send one command.

        Raises:
            WeightwireError: the child has ended; what ended it.
        """
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            self.expect("failed", KILL_S)

    def end(self) -> None:
        """Have it end; returns at once."""
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(ProcessLookupError):
            self.process.send_signal(signal.SIGTERM)

    def stop(self) -> None:
        """Have it end, wait a bounded time, and leave nothing of it behind. Idempotent."""
        self.end()
        try:
            self.process.wait(STOP_S)
        except subprocess.TimeoutExpired:
            pass
        finally:  # also where this very wait is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait(KILL_S)
        self._thread.join(KILL_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def _listen(self) -> None:
        assert self.process.stdout is not None
        with self.process.stdout as lines:
            while line := lines.readline(MAX_LINE):
                self._hear(_event(line))
        code = self.process.wait()
        problem = f"{self.name} ended with {ending(code)}"
        self._hear({"event": "failed", "kind": "RankLost", "problem": problem, "remedy": "see its log"})

    def _hear(self, event: Event) -> None:
        if event["event"] in ("progress", "step"):
            self._heard(event)
        else:
            self._events.put(event)


def _event(line: str) -> Event:
    try:
        value = json.loads(line)
        if isinstance(value, dict):
            return {"event": "", **value}
    except ValueError:
        pass
    problem = ProtocolError(f"not an event: {line[:80]!r}", "a library must have printed it: see the log")
    return {"event": "failed", "kind": "ProtocolError", "problem": problem.problem, "remedy": problem.remedy}


def error_of(event: Event) -> WeightwireError:
    """The error that a ``failed`` event tells of; of the root class where its kind is not known here."""
    kind = getattr(errors, str(event.get("kind")), None)
    if not (isinstance(kind, type) and issubclass(kind, WeightwireError)):
        kind = WeightwireError
    return kind(str(event.get("problem")), str(event.get("remedy", "")))


def ending(code: int) -> str:
    """A process's exit code in words."""
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
