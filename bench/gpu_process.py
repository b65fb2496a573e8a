"""The processes of ``bench/gpu.py``, driven over their standard input and output; every wait has a bound."""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
ANSWER_S = 150.0


class Lost(Exception):
    """A process gave no answer."""


class Failed(Exception):
    """What a process was asked to do did not work; it can be asked for other things."""


class Clock:
    """How long there is for the step that runs; the whole run ends in time, too."""

    def __init__(self, seconds: float) -> None:
        self.began = time.monotonic()
        self.end = self.began + seconds
        self._step_end = self.end

    def begin_step(self, seconds: float) -> None:
        self._step_end = min(time.monotonic() + seconds, self.end)

    @property
    def left(self) -> float:
        return self._step_end - time.monotonic()


class Process:
    def __init__(self, device: str, environment: dict[str, str], log: Path, clock: Clock) -> None:
        self.device = device
        self._clock = clock
        with log.open("a") as file:
            self._child = subprocess.Popen(
                [sys.executable, str(HERE / "gpu_worker.py"), device],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=file,
                env=environment,
                text=True,
            )
        self.pid = self._child.pid

    def order(self, do: str, **arguments: Any) -> None:
        assert self._child.stdin is not None
        self._child.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
        self._child.stdin.flush()
        self._doing = do

    def answer(self) -> dict[str, Any]:
        """Of what was ordered.

        Raises:
            Lost: none came in time, or the process has ended.
            Failed: it says that it failed.
        """
        assert self._child.stdout is not None
        bound = max(0.0, min(ANSWER_S, self._clock.left))
        if not select.select([self._child.stdout], [], [], bound)[0]:
            self.end()
            raise Lost(f"{self.device}: no answer to {self._doing!r} within {bound:.0f} s")
        line = self._child.stdout.readline()
        if not line:
            raise Lost(f"{self.device}: ended with {self._child.wait(10)} in {self._doing!r}")
        found: dict[str, Any] = json.loads(line)
        if "failed" in found:
            raise Failed(f"{self._doing}: {found['failed']}")
        return found

    def __call__(self, do: str, **arguments: Any) -> dict[str, Any]:
        self.order(do, **arguments)
        return self.answer()

    def end(self) -> None:
        self._child.kill()
        try:
            self._child.wait(10)
        except subprocess.TimeoutExpired:
            print(f"# process {self.pid} on {self.device} does not end", flush=True)


def answers(processes: Sequence[Process]) -> list[dict[str, Any]]:
    """Everybody's answer, in order; only then what failed is raised, so that no answer is left unread."""
    found: list[dict[str, Any]] = []
    failed: list[Failed] = []
    for process in processes:
        try:
            found.append(process.answer())
        except Failed as error:
            failed.append(error)
    if failed:
        raise failed[0]
    return found


def environment(pairs: Sequence[str]) -> dict[str, str]:
    """Ours without settings of the library, with state of its own; all else is passed on, above all what keeps NVLink
    multicast off."""
    cleared = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTWIRE_")}
    given = dict(pair.split("=", 1) for pair in pairs)
    home = tempfile.mkdtemp(prefix="gpu-bench-state-")
    own = {"XDG_STATE_HOME": home, "NIXL_LOG_LEVEL": "WARN", "PYTHONUNBUFFERED": "1"}
    return cleared | own | given


def said(*command: str) -> str:
    """What a short command prints; why not, if it does not."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"none ({type(error).__name__})"
    return (done.stdout + done.stderr).strip()
