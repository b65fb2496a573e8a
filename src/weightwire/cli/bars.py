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
        if task.total is None:
            return Text(_amount(int(task.completed), unit) if task.completed else "")
        return Text(f"{_amount(int(task.completed), unit)} / {_amount(int(task.total), unit)}")


def _amount(count: int, unit: str) -> str:
    return human_bytes(count) if unit == "bytes" and count else f"{count} {unit}"


class Bars:
    """Bars drawn on a terminal and nowhere else. A context manager, and a ``Progress`` callback: one bar a phase.

    Thread-safe.

    Args:
        console: where to draw.
        transient: leave nothing behind.
    """

    def __init__(self, console: Console, *, transient: bool = False) -> None:
        columns = (TextColumn("{task.description}"), BarColumn(), _Amount(), TimeElapsedColumn())
        self._progress = Progress(
            *columns, console=console, disable=not console.is_terminal, transient=transient, redirect_stdout=False
        )
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
        self.show(phase, phase, done, total, unit)

    def show(self, bar: str, label: str, done: int, total: int, unit: str) -> None:
        """Move ``bar``, which is added where it is new; ``label`` is what is written beside it now.

        It pulses until a ``total`` is known.
        """
        with self._lock:
            if bar not in self._tasks:
                self._tasks[bar] = self._progress.add_task(escape(label), total=None, unit=unit)
            task = self._tasks[bar]
            self._progress.update(task, description=escape(label), completed=done, total=total or None, unit=unit)

    def shown(self) -> dict[str, tuple[int, int]]:
        """Bar -> (done, total); total 0 while it is not known."""
        with self._lock:
            return {bar: self._state(task) for bar, task in self._tasks.items()}

    def _state(self, task: TaskID) -> tuple[int, int]:
        found = next(each for each in self._progress.tasks if each.id == task)
        return int(found.completed), int(found.total or 0)
