"""A replica as one process for whoever cannot import torch (the command line): events out, commands in.

    python -m weightwire.engines.native OPTIONS-JSON

Starts the ranks, passes on their events (with ``rank`` added), and their commands. Exit code 0 after ``stop`` or the
end of the commands; 1 after an error, told as a ``failed`` event.
"""

from __future__ import annotations

import signal
import sys
import threading

from weightwire.engines.native.events import emit, error_fields, read
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.replica import Event, Replica
from weightwire.errors import WeightwireError
from weightwire.types import Json

LOAD_S = 3600.0


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    signal.signal(signal.SIGTERM, _stop)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        options = ReplicaOptions.from_json(given[0] if given else "")
        with Replica(options, heard=_pass_on) as replica:
            events: list[Json] = list(replica.loaded(LOAD_S))
            emit("ready", ranks=events)
            _serve(replica)
    except WeightwireError as error:
        emit("failed", rank=-1, **error_fields(error))
        return 1
    except (KeyboardInterrupt, SystemExit):
        return 0
    return 0


def _serve(replica: Replica) -> None:
    for command in read(sys.stdin):
        match command:
            case {"do": "generate", "prompts": list(prompts), "tokens": int(count)}:
                answers: list[Json] = [list(row) for row in replica.generate(prompts, count)]  # type: ignore[arg-type]
                emit("tokens", tokens=answers)
            case {"do": "stop"}:
                return
            case _:
                emit("refused", problem=f"unknown command {str(command)[:80]}", remedy="generate or stop")


def _pass_on(event: Event) -> None:
    if event["event"] == "progress":
        emit(**event)  # type: ignore[arg-type]


def _stop(*_: object) -> None:
    if threading.current_thread() is threading.main_thread():
        raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
