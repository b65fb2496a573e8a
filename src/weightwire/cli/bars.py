"""Progress bars: the cli's implementation of ``observability.progress.Progress``."""

from __future__ import annotations

import threading
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, Task, TaskID, TextColumn, TimeElapsedColumn
from rich.text import Text

from weightwire.cli.listing import human_bytes


class _Amount(TextColumn):
    """``120.0 MB / 269.1 MB`` for bytes, counts for everything else; only what is done while the total is unknown."""

    def __init__(self) -> None:
        super().__init__("")

    def render(self, task: Task) -> Text:
        """The cell."""
        unit = str(task.fields.get("unit", ""))
        done = _amount(int(task.completed), unit)
        return Text(done if task.total is None else f"{done} / {_amount(int(task.total), unit)}")


def _amount(count: int, unit: str) -> str:
    return human_bytes(count) if unit == "bytes" and count else f"{count} {unit}"


class Bars:
    """One bar a phase, drawn on a terminal and nowhere else. A context manager, and a ``Progress`` callback.

    Thread-safe. Several ranks may share one, if each puts its label before the phase.

    Args:
        console: where to draw.
    """

    def __init__(self, console: Console) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), TimeElapsedColumn())
        self._progress = Progress(*columns, console=console, disable=not console.is_terminal)
        self._lock = threading.Lock()
        self._tasks: dict[str, TaskID] = {}

    def __enter__(self) -> Self:
        self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._progress.stop()

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        """See ``observability.progress.Progress``."""
        with self._lock:
            if phase not in self._tasks:
                self._tasks[phase] = self._progress.add_task(escape(phase), total=None, unit=unit)
            self._progress.update(self._tasks[phase], completed=done, total=total or None, unit=unit)

    def shown(self) -> dict[str, tuple[int, int]]:
        """Phase -> (done, total); total 0 while it is not known."""
        with self._lock:
            return {phase: self._state(task) for phase, task in self._tasks.items()}

    def _state(self, task: TaskID) -> tuple[int, int]:
        found = next(each for each in self._progress.tasks if each.id == task)
        return int(found.completed), int(found.total or 0)
