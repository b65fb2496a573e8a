"""H70: a process that made an agent ends with the exit code that was meant, even if its C exit handlers crash."""

from __future__ import annotations

import json

import pytest
from transport.test_nixl import run

pytest.importorskip("nixl", reason="the package nixl is not installed")
pytestmark = pytest.mark.nixl

CRASH = """
import ctypes, logging, sys
libc = ctypes.CDLL(None)
libc.on_exit(ctypes.cast(libc.abort, ctypes.c_void_p), None)  # what NIXL's libraries did: crash after the decision
print("said", end="")
"""

AGENT = """
from transport.peers import *
from transport import nixl_backends
transport = nixl_backends.nixl(Gate())
registration = transport.register(space(pattern(1000))[0])
"""

CONNECTED = """
other = nixl_backends.nixl(None)
connection = other.connect(transport.describe(registration, LEASE), LEASE, soon())
"""

CONNECTING = """
import threading
endpoint = transport.describe(registration, LEASE)
other = nixl_backends.nixl(None)
other.close()
begun = threading.Event()
def connect():
    said = ""
    while "leaving" not in said:  # it makes an agent each time, and then sees that the transport is closed
        try:
            other.connect(endpoint, LEASE, soon())
        except PeerLost as error:
            said = str(error)
        begun.set()
from weightwire.errors import PeerLost
threading.Thread(target=connect, daemon=True).start()
begun.wait(20)
"""

ENDS = {
    "": 0,
    "sys.exit(1)": 1,
    CONNECTED + "raise SystemExit(3)": 3,
    CONNECTING + "sys.exit(4)": 4,
    "sys.exit('a message')": 1,
    "raise ValueError('not caught')": 1,
    "from weightwire.transport.nixl.exit import leave; leave(3)": 3,
    "import threading; threading.Thread(target=lambda: sys.exit(1)).start(); sys.exit(3)": 3,
}

FORK = """
import json, os, sys
from transport import nixl_backends  # importing takes long: once, and no agent before the forks
from weightwire.transport.nixl.agent import bindings
bindings()
pids = []
for end in ENDS:
    pid = os.fork()
    if pid == 0:
        exec(CRASH + AGENT + end)
        sys.exit()
    pids.append(pid)
print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]))
"""


def test_h70_the_planted_crash_is_real() -> None:
    done = run(["-c", CRASH + "sys.exit(3)"], 30)
    assert done.returncode == -6


def test_h70_the_exit_code_is_the_one_that_was_meant() -> None:
    """Each process is still serving when it ends, one is reading too; and what it said is not lost."""
    script = f"CRASH, AGENT, ENDS = {CRASH!r}, {AGENT!r}, {list(ENDS)!r}\n{FORK}"
    done = run(["-c", script], 100)
    lines = done.stdout.splitlines()
    assert lines, done.stderr
    assert dict(zip(ENDS, json.loads(lines[-1].removeprefix("said" * len(ENDS))), strict=True)) == ENDS, done.stderr
    assert done.stdout.count("said") == len(ENDS)
    assert done.stderr.count("ValueError: not caught") == 1
