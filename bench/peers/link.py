"""Two network namespaces joined by a link of a fixed rate; made and removed by whoever enters it. Needs root."""

from __future__ import annotations

import itertools
import os
import subprocess
from types import TracebackType
from typing import Self

_numbers = itertools.count()


class Link:
    """A veth pair between two namespaces, with ``tc tbf`` at both ends. A context manager.

    Args:
        rate: as ``tc`` takes it, such as ``1gbit``.

    Raises:
        OSError: no such tools, or no right to use them; says which command failed and why.
    """

    def __init__(self, rate: str) -> None:
        self.rate = rate
        self._name = f"ww{os.getpid() % 100000}{next(_numbers)}"
        self._ends = [f"{self._name}{end}" for end in "ab"]

    def address(self, end: int) -> str:
        return f"10.209.77.{end + 1}"

    def enter(self, end: int) -> tuple[str, ...]:
        """What goes in front of a command that is to run at that end."""
        return ("ip", "netns", "exec", self._ends[end])

    def __enter__(self) -> Self:
        try:
            self._make()
        except OSError:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def _make(self) -> None:
        here, there = self._ends
        for name in self._ends:
            _run("ip", "netns", "add", name)
        _run("ip", "link", "add", here, "netns", here, "type", "veth", "peer", "name", there, "netns", there)
        for end, name in enumerate(self._ends):
            inside = ("ip", "-n", name)
            _run(*inside, "addr", "add", f"{self.address(end)}/24", "dev", name)
            _run(*inside, "link", "set", "lo", "up")
            _run(*inside, "link", "set", name, "up")
            bucket = ("tbf", "rate", self.rate, "burst", "256kb", "latency", "50ms")
            _run("tc", "-n", name, "qdisc", "add", "dev", name, "root", *bucket)

    def _remove(self) -> None:
        for name in self._ends:
            subprocess.run(["ip", "netns", "del", name], check=False, capture_output=True)


def _run(*command: str) -> None:
    done = subprocess.run(command, check=False, capture_output=True, text=True)
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
