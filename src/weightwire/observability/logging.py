"""Log lines that survive: whole lines, written at once, marked with who wrote them.

Libraries only ever call ``logging.getLogger(__name__)``. The process that owns ``main`` calls :func:`setup_logging`
once; nobody types a rank into a message.
"""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import TextIO

ROOT = "weightwire"

_ESCAPES = {code: f"\\x{code:02x}" for code in (*range(32), 127)} | {9: "\t", 10: "\\n", 13: "\\r"}


class _Bound(logging.Filter):
    """Puts the writer's name on every record that passes."""

    def __init__(self, who: str) -> None:
        super().__init__()
        self.who = who

    def filter(self, record: logging.LogRecord) -> bool:
        record.who = self.who
        return True


class _Line(logging.Formatter):
    """One record, one line; a traceback, where there is one, follows on lines that carry the same mark."""

    def format(self, record: logging.LogRecord) -> str:
        clock = time.strftime("%H:%M:%S", time.localtime(record.created))
        mark = f"{clock}.{int(record.msecs):03d} {record.levelname[0]} {getattr(record, 'who', '')}{record.name}:"
        # What a peer sent must not be able to forge a line of ours, nor to drive the terminal.
        lines = [record.getMessage().translate(_ESCAPES)]
        if record.exc_info:
            lines += [line.translate(_ESCAPES) for line in self.formatException(record.exc_info).splitlines()]
        return "\n".join(f"{mark} {line}" for line in lines)


class _WholeLines(logging.StreamHandler[TextIO]):
    """Hands each record to the kernel in one write: nothing is lost on SIGKILL, and ranks sharing a pipe do not mix."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            data = (self.format(record) + "\n").encode("utf-8", "backslashreplace")
            self.stream.flush()  # what was printed before stays before
            _write_all(self.stream.fileno(), data)
        except Exception:  # noqa: BLE001  (the contract of logging handlers: a bad line never ends the work it tells of)
            self.handleError(record)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def setup_logging(
    level: str = "INFO", *, rank: str = "", incarnation: str = "", stream: TextIO | None = None
) -> logging.Handler:
    """Write this process's log lines to ``stream``, each in one write; replaces what an earlier call set up.

    Args:
        level: of ``weightwire`` loggers, a name of ``config.LOG_LEVELS``; other libraries are heard from WARNING on.
        rank: this rank's label, such as ``tp1/3``; stands in every line.
        incarnation: this process life's id; its first 8 characters stand in every line.
        stream: a stream with a file descriptor; standard error where it is left out.

    Returns:
        The handler, which ``logging.getLogger().removeHandler`` takes back.
    """
    handler = _WholeLines(sys.stderr if stream is None else stream)
    who = " ".join(part for part in (rank, incarnation[:8]) if part)
    handler.addFilter(_Bound(f"[{who}] " if who else ""))
    handler.setFormatter(_Line())
    root = logging.getLogger()
    for old in [each for each in root.handlers if isinstance(each, _WholeLines)]:
        root.removeHandler(old)
    root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger(ROOT).setLevel(level)
    return handler
