"""Child processes of the comparison, and what they all share: memory, messages, facts about the machine.

A child prints one JSON object when it is ready, and one for each line that it gets on standard input. It may say
``{"error": "..."}`` at any time: its ways are then reported with that reason.
"""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

HERE = Path(__file__).resolve().parent
MIB = 1 << 20
ANSWER_S = 120.0
SENTINEL = 0xEE

Array = npt.NDArray[np.uint8]


class Broken(Exception):
    """A child ended, hung, or said why it cannot go on."""


class Child:
    """``python bench/peers/<script> <arguments>``; stopped with SIGSTOP while ``turn`` is off.

    Args:
        script: a file beside this one.
        arguments: of its command line.
        environ: on top of this process's.
        prefix: in front of the command, such as ``ip netns exec NAME``.
    """

    def __init__(
        self, script: str, *arguments: object, environ: Mapping[str, str] | None = None, prefix: tuple[str, ...] = ()
    ) -> None:
        quiet = {
            "OMP_NUM_THREADS": "1",
            "NUMPY_MADVISE_HUGEPAGE": "0",
            "NIXL_LOG_LEVEL": "WARN",
            "GLOG_minloglevel": "3",
            "MC_LOG_LEVEL": "ERROR",
        }
        self.name = script
        self.process = subprocess.Popen(
            [*prefix, sys.executable, str(HERE / script), *map(str, arguments)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=None if os.environ.get("BENCH_VERBOSE") else subprocess.DEVNULL,
            text=True,
            env={**os.environ, **quiet, "BENCH_STARTED": repr(time.time()), **(environ or {})},
        )
        self.ready = self._answer()

    def ask(self, **command: object) -> dict[str, Any]:
        """Send one command; its answer."""
        self.send(**command)
        return self.answer()

    def send(self, **command: object) -> None:
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(command) + "\n")
            self.process.stdin.flush()
        except OSError:
            raise Broken(f"{self.name} has ended") from None

    def answer(self) -> dict[str, Any]:
        return self._answer()

    def cpu_s(self) -> float:
        """Processor seconds so far, all threads; in steps of a scheduler's tick."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def turn(self, *, on: bool) -> None:
        """NIXL's default progress thread takes a core whatever it does, so whoever is not in turn is stopped."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT if on else signal.SIGSTOP)

    def end(self) -> None:
        self.turn(on=True)
        self.process.kill()
        self.process.wait()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        watchdog = threading.Timer(ANSWER_S, self.process.kill)
        watchdog.start()
        try:
            while line := self.process.stdout.readline():
                if line.startswith("{"):  # libraries print what they like
                    said: dict[str, Any] = json.loads(line)
                    if "error" in said:
                        raise Broken(said["error"])
                    return said
        finally:
            watchdog.cancel()
        raise Broken(f"{self.name} ended with {self.process.wait()} or said nothing for {ANSWER_S:.0f} s")


def tell(**said: object) -> None:
    """In a child: answer."""
    print(json.dumps(said), flush=True)


def obey(act: Callable[[dict[str, Any]], Mapping[str, object]]) -> None:
    """In a child: carry out commands until there are no more, then end without running exit handlers."""
    for line in sys.stdin:
        try:
            tell(**act(json.loads(line)))
        except Exception as error:  # noqa: BLE001  (a process's edge: the comparison goes on without this way)
            tell(error=reason(error))
            break
    os._exit(0)


def reason(error: BaseException) -> str:
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:160]


def value_of(at: int) -> int:
    """What every byte of tensor ``at`` is, at a source."""
    return at * 7 % 200 + 1


def dirty(parts: list[Array]) -> None:
    """Before a transfer: the first and last byte of each tensor are such that one which was not written is found."""
    for part in parts:
        part[0] = part[-1] = SENTINEL


def check(parts: list[Array]) -> None:
    """After it."""
    for at, part in enumerate(parts):
        assert part[0] == part[-1] == part[len(part) // 2] == value_of(at), f"tensor {at} did not arrive"


def touched(nbytes: int, count: int) -> list[Array]:
    """``count`` allocations, together ``nbytes``, every page touched."""
    return [np.full(nbytes // count, value_of(at), dtype=np.uint8) for at in range(count)]


def machine() -> dict[str, object]:
    cpu = next((line for line in Path("/proc/cpuinfo").read_text().splitlines() if line.startswith("model name")), ":")
    memory = int(Path("/proc/meminfo").read_text().split()[1]) >> 20
    huge = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    return {
        "cpu": cpu.partition(":")[2].strip(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": memory,
        "kernel": platform.release(),
        "python": platform.python_version(),
        "huge_pages": huge[huge.find("[") + 1 : huge.find("]")],
        "load": os.getloadavg()[0],
    }
