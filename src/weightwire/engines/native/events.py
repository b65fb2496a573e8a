"""What a rank tells its launcher, and what it is asked: one JSON object a line, over standard output and input.

Standard error is for people (logs). A line that is no event is refused: nothing but ``emit`` writes to standard output.
"""

from __future__ import annotations

import json
import sys
import threading
from collections.abc import Iterator
from typing import IO

from weightwire import errors
from weightwire.errors import ProtocolError, WeightwireError
from weightwire.types import Json

MAX_LINE_BYTES = 4 << 20

Event = dict[str, Json]
"""What was said; ``event`` says of what kind it is."""

_writing = threading.Lock()


def emit(event: str, **fields: Json) -> None:
    """Tell the launcher; thread-safe, written at once."""
    line = json.dumps({"event": event, **fields}, separators=(",", ":"))
    with _writing:
        sys.stdout.write(line + "\n")
        sys.stdout.flush()


def error_fields(error: WeightwireError) -> dict[str, Json]:
    """An error as fields of an event."""
    return {"kind": type(error).__name__, "problem": error.problem, "remedy": error.remedy}


def error_of(event: Event) -> WeightwireError:
    """The error that ``error_fields`` told of; of the root class where its kind is not known here."""
    kind = getattr(errors, str(event.get("kind")), WeightwireError)
    if not (isinstance(kind, type) and issubclass(kind, WeightwireError)):
        kind = WeightwireError
    error: WeightwireError = kind(str(event.get("problem")), str(event.get("remedy", "")))
    return error


def read(stream: IO[str]) -> Iterator[Event]:
    """The objects on a stream until it ends.

    Raises:
        ProtocolError: a line that is too long, or no object.
    """
    while line := stream.readline(MAX_LINE_BYTES):
        try:
            value: Json = json.loads(line)
        except ValueError as error:
            raise ProtocolError(f"not an event: {line[:80]!r}", "ranks and launcher must be of one version") from error
        if not isinstance(value, dict):
            raise ProtocolError(f"not an event: {line[:80]!r}", "ranks and launcher must be of one version")
        yield value
