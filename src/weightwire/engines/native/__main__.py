"""A replica as one process for whoever cannot import torch (the command line): events out, commands in.

    python -m weightwire.engines.native OPTIONS-JSON

Starts the ranks and passes on their progress (with ``rank`` added). Then:

* ``ready`` with what every rank told about its load, once all of them can answer;
* for ``{"do": "ask", "questions": [...], "tokens": n, "all": false}`` an event ``answers``: for each question its
  prompt's tokens, the greedy continuation and its text. With ``all`` it goes on behind the end token;
* for ``{"do": "stop"}``, or the end of the commands, also before ``ready``: a graceful end, exit code 0;
* ``failed`` when anything ends it earlier, a rank that dies while serving too: exit code 1.
"""

from __future__ import annotations

import queue
import signal
import sys
import threading
import time
from pathlib import Path

from weightwire.config import Settings
from weightwire.engines.native.chat import Chat
from weightwire.engines.native.events import Event, emit, error_fields, error_of, read
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.replica import Replica
from weightwire.errors import ProtocolError, WeightwireError
from weightwire.observability.logging import setup_logging
from weightwire.types import Json

LOAD_S = 3600.0


class Launcher:
    """One replica from start to end."""

    def __init__(self, options: ReplicaOptions) -> None:
        self.options = options
        self._inbox: queue.SimpleQueue[Event | None] = queue.SimpleQueue()
        self._ready = False
        self._chat: Chat | None = None

    def run(self) -> None:
        """Load, answer commands, end.

        Raises:
            WeightwireError: a rank could not go on, or a command makes no sense.
        """
        with Replica(self.options, heard=self._hear) as replica:
            threading.Thread(target=self._listen, name="weightwire-commands", daemon=True).start()
            events: list[Json] = list(replica.loaded(LOAD_S))
            self._ready = True
            emit("ready", ranks=events)
            while (item := self._inbox.get()) is not None:
                if "event" in item:
                    raise error_of(item)
                if not self._obey(replica, item):
                    return

    def _obey(self, replica: Replica, command: Event) -> bool:
        match command:
            case {"do": "ask", "questions": list(questions), "tokens": int(count), "all": bool(whole)}:
                self._answer(replica, [str(question) for question in questions], count, whole=whole)
            case {"do": "stop"}:
                return False
            case _:
                raise ProtocolError(f"unknown command {str(command)[:80]}", "ask or stop")
        return True

    def _answer(self, replica: Replica, questions: list[str], count: int, *, whole: bool) -> None:
        self._chat = chat = self._chat or Chat(Path(self.options.model))
        prompts = [chat.encode(question) for question in questions]
        began = time.monotonic()
        found = replica.generate(prompts, count, ends=() if whole else sorted(chat.ends))
        answers: list[Json] = [
            {"prompt": list(prompt), "tokens": list(tokens), "text": chat.decode(tokens)}
            for prompt, tokens in zip(prompts, found, strict=True)
        ]
        emit("answers", answers=answers, seconds=round(time.monotonic() - began, 4))

    def _hear(self, event: Event) -> None:
        """From the threads that listen to the ranks."""
        if event["event"] == "progress":
            emit(**event)  # type: ignore[arg-type]
        elif self._ready and event["event"] in ("failed", "ended"):
            self._inbox.put(event)

    def _listen(self) -> None:
        try:
            for command in read(sys.stdin):
                self._inbox.put({key: value for key, value in command.items() if key != "event"})
        except ProtocolError as error:
            self._inbox.put({"event": "failed", **error_fields(error)})
            return
        self._inbox.put(None)
        if not self._ready:  # whoever started this is gone, or lost patience: nobody would hear that it is loaded
            signal.pthread_kill(_main_thread(), signal.SIGTERM)


def main(arguments: list[str] | None = None) -> int:
    """Entry point."""
    signal.signal(signal.SIGTERM, _stop)
    given = sys.argv[1:] if arguments is None else arguments
    try:
        setup_logging(Settings.from_env().log_level, rank="launcher")
        Launcher(ReplicaOptions.from_json(given[0] if given else "")).run()
    except WeightwireError as error:
        emit("failed", rank=-1, **error_fields(error))
        return 1
    except (KeyboardInterrupt, SystemExit):
        return 0
    return 0


def _main_thread() -> int:
    ident = threading.main_thread().ident
    assert ident is not None
    return ident


def _stop(*_: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the end has begun, and it is bounded
    raise SystemExit(0)


if __name__ == "__main__":
    sys.exit(main())
