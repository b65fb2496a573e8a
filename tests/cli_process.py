"""The ``weightwire`` command in a process of its own, as a user runs it."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

SRC = Path(__file__).resolve().parents[1] / "src"
COMMAND = [sys.executable, "-m", "weightwire.cli"]


@dataclass(frozen=True)
class Done:
    """What a command left behind."""

    code: int
    out: str
    err: str
    seconds: float


def environment(state: Path, variables: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment without settings of ours, with the user's state under ``state``."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith("WEIGHTWIRE_")}
    return kept | {"XDG_STATE_HOME": str(state), "PYTHONPATH": str(SRC), "COLUMNS": "200"} | dict(variables or {})


def weightwire(state: Path, *arguments: str, bound: float = 60.0, variables: Mapping[str, str] | None = None) -> Done:
    """Run one command to its end, which must come within ``bound`` seconds."""
    began = time.monotonic()
    done = subprocess.run(
        [*COMMAND, *arguments],
        env=environment(state, variables),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=bound,
        check=False,
    )
    return Done(done.returncode, done.stdout, done.stderr, time.monotonic() - began)


def assert_one_line_error(done: Done, *parts: str, code: int = 1) -> None:
    """Exit code, nothing on standard output, one line on standard error that has all ``parts`` and no traceback."""
    assert done.code == code, done
    assert done.out == ""
    lines = done.err.splitlines()
    assert len(lines) == 1, done.err
    assert lines[0].startswith("weightwire: ")
    for part in parts:
        assert part in lines[0]
