"""A replica of the native engine, run from the command line as a process of its own."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from weightwire.cli.bars import Bars
from weightwire.cli.children import Child, Event
from weightwire.cli.outcome import Outcome
from weightwire.config import Settings
from weightwire.errors import WeightwireError

MODULE = "weightwire.engines.native"
START_S = 120.0
"""What processes may take to start and to construct a model, beyond the bounds of the load itself."""

ASK_S = 600.0


@dataclass(frozen=True, slots=True)
class Answer:
    """To one question.

    Attributes:
        text: up to its end, without special tokens.
        tokens: all that were generated.
    """

    text: str
    tokens: tuple[int, ...]


class ReplicaProcess(Child):
    """One replica and its ranks. A context manager, as ``Child``.

    Args:
        name: in messages and tables.
        options: fields of the engine's ``ReplicaOptions``.
        environ: variables on top of this process's.
        log: where all ranks log.
        bars: shows how far each rank is.
    """

    def __init__(
        self, name: str, options: Mapping[str, Any], *, environ: Mapping[str, str], log: Path | None, bars: Bars
    ) -> None:
        self._began = time.monotonic()
        self._bars = bars
        for rank in range(int(options.get("tp", 1)) * int(options.get("pp", 1))):
            bars.show(f"rank {rank}", _label(rank, "starting"), 0, 0, "bytes")
        super().__init__(name, [MODULE, json.dumps(dict(options))], log=log, environ=environ, heard=self._moved)

    def ready(self, found: Settings) -> Outcome:
        """Wait until all ranks have loaded.

        Raises:
            WeightwireError: they cannot; the reason of the first that said so.
        """
        event = self.expect("ready", START_S + found.load_timeout + found.wait_for_loading)
        return Outcome(self.name, tuple(event["ranks"]), time.monotonic() - self._began)

    def ask(self, questions: Sequence[str], tokens: int, *, whole: bool = False) -> list[Answer]:
        """The greedy answer to each question.

        Args:
            questions: as a user would type them; each is put into the model's chat template.
            tokens: at most; exactly so many with ``whole``.
            whole: go on behind the end of the answer.

        Raises:
            WeightwireError: a question is too long, the directory has no tokenizer, or a rank ended.
        """
        self.tell({"do": "ask", "questions": list(questions), "tokens": tokens, "all": whole})
        event = self.expect("answers", ASK_S)
        return [Answer(each["text"], tuple(each["tokens"])) for each in event["answers"]]

    def _moved(self, event: Event) -> None:
        rank, phase = int(event["rank"]), str(event["phase"])
        self._bars.show(f"rank {rank}", _label(rank, phase), event["done"], event["total"], event["unit"])


def _label(rank: int, phase: str) -> str:
    return f"rank {rank:<2} {phase:<16}"  # of one width, so that the bars do not jump


class Logs:
    """A new directory for the logs of child processes, kept only where something fails. A context manager.

    An error that leaves it carries the directory's name in its remedy.

    Args:
        prefix: of its name.
    """

    def __init__(self, prefix: str) -> None:
        self.directory = Path(tempfile.mkdtemp(prefix=prefix))

    def file(self, name: str) -> Path:
        """Where the process ``name`` logs."""
        return self.directory / f"{name}.log"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        told = any(path.stat().st_size for path in self.directory.glob("*.log"))
        if not told or not isinstance(error, WeightwireError):
            shutil.rmtree(self.directory, ignore_errors=True)
            return
        hint = f"logs are in {self.directory}"
        raise type(error)(error.problem, f"{error.remedy} ({hint})" if error.remedy else hint) from error


@contextlib.contextmanager
def sigterm_interrupts() -> Iterator[None]:
    """Inside, SIGTERM is what Ctrl-C is: everything that was started is ended in order. Main thread only."""

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
