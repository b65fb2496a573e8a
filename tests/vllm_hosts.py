"""Two hosts and the metadata server's, on one machine, for tests: network namespaces with cables, and no way out.

A replica on such a host has processes, shared memory and an ``/etc/hosts`` of its own too (``enter``), so that nothing
but the cables joins it to a replica on the other. Makes namespaces, so it needs root and ``ip``.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_processes import END_S, environment

VARIABLE = "VLLM_TEST_HOST"
NETWORK, FAST = "10.77.0", "10.78.0"
"""All hosts are in the one; replicas' hosts have cables of the other, too."""
SWITCH, LINK, FAST_LINK = "switch", "eth0", "fast0"
LISTENING = "0A"
"""In ``/proc/net/tcp``."""
CLONE_NEWNS, CLONE_NEWIPC, CLONE_NEWPID, CLONE_NEWNET = 0x20000, 0x8000000, 0x20000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000


@dataclass(frozen=True, kw_only=True)
class Host:
    """One of the hosts.

    Attributes:
        name: of its network namespace.
        number: the last part of its addresses.
        files: its own directory, with its copy of the secret.
    """

    name: str
    number: int
    files: Path

    @property
    def address(self) -> str:
        """In the network of all."""
        return f"{NETWORK}.{self.number}"

    @property
    def fast(self) -> str:
        """In the network of the replicas' hosts."""
        return f"{FAST}.{self.number}"

    @property
    def secret(self) -> dict[str, str]:
        """Where this host has it."""
        return {"WEIGHTWIRE_SECRET_FILE": str(self.files / "secret")}

    @property
    def environment(self) -> dict[str, str]:
        """Of a replica that shall run here."""
        return {**self.secret, VARIABLE: f"{self.name} {self.files}", "VLLM_HOST_IP": self.address}

    def command(self, *command: str) -> tuple[str, ...]:
        """``command``, to be run here."""
        return ("ip", "netns", "exec", self.name, *command)

    def weightwire(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """The ``weightwire`` command, run here."""
        command = self.command(sys.executable, "-m", "weightwire.cli", *arguments)
        env = environment({**self.secret, "COLUMNS": "200"})
        return subprocess.run(command, env=env, capture_output=True, text=True, timeout=END_S, check=False)

    def received(self, link: str) -> int:
        """Bytes that came in over one of its links so far."""
        (found,) = json.loads(_ip("-n", self.name, "-s", "-j", "link", "show", link))
        return int(found["stats64"]["rx"]["bytes"])

    def listening(self, address: str) -> int:
        """How many ports are open at one of its addresses."""
        place = socket.inet_aton(address)[::-1].hex().upper()
        tables = self.command("cat", "/proc/net/tcp", "/proc/net/tcp6")  # in the second one as a mapped address
        shown = subprocess.run(tables, capture_output=True, text=True, timeout=END_S, check=True).stdout
        rows = [line.split() for line in shown.splitlines()]
        return sum(row[1].partition(":")[0].endswith(place) and row[3] == LISTENING for row in rows)

    def unplug(self, link: str) -> None:
        """No bit comes or goes any more, and nobody is told."""
        _ip("-n", self.name, "link", "set", link, "down")

    def plug(self, link: str) -> None:
        """Undo ``unplug``."""
        _ip("-n", self.name, "link", "set", link, "up")


def why_not() -> str:
    """Why there can be no hosts here; empty where there can."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return "network namespaces want root, and the command ip"
    probe = f"ww-{os.getpid()}-probe"
    try:
        _ip("netns", "add", probe)
        _ip("netns", "delete", probe)
    except subprocess.CalledProcessError as error:
        return f"no network namespaces here: {error.stderr.strip()}"
    return ""


@contextlib.contextmanager
def hosts(files: Path, secret: str, count: int = 2) -> Iterator[tuple[Host, list[Host]]]:
    """The metadata server's host, which is the switch too, and ``count`` hosts for replicas (two have fast links)."""
    every = [Host(name=f"ww-{os.getpid()}-{at}", number=at + 1, files=files / f"host-{at}") for at in range(count + 1)]
    with contextlib.ExitStack() as made:
        for host in every:
            _ip("netns", "add", host.name)
            made.callback(_ip, "netns", "delete", host.name)
            _furnish(host, secret, every)
            _ip("-n", host.name, "link", "set", "lo", "up")
        server, *others = every
        _ip("-n", server.name, "link", "add", SWITCH, "type", "bridge")
        _up(server, SWITCH, server.address)
        for host in others:
            port = f"port{host.number}"
            _cable((host, LINK), (server, port))
            _ip("-n", server.name, "link", "set", port, "master", SWITCH, "up")
            _up(host, LINK, host.address)
        one, other, *_ = others
        _cable((one, FAST_LINK), (other, FAST_LINK))
        for host in (one, other):
            _up(host, FAST_LINK, host.fast)
        yield server, others


def enter(where: str) -> None:
    """Become a process of the host that ``Host.environment`` names. Returns in a child, with a table of its own.

    For a process with one thread. The one that called it waits, and ends as its child does.
    """
    name, _, files = where.partition(" ")
    with Path("/run/netns", name).open("rb") as namespace:
        _checked("setns", namespace.fileno(), CLONE_NEWNET)
    _checked("unshare", CLONE_NEWNS | CLONE_NEWIPC | CLONE_NEWPID)
    child = os.fork()
    if child:
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code < 0:
            signal.signal(-code, signal.SIG_DFL) if -code != signal.SIGKILL else None
            os.kill(os.getpid(), -code)
        os._exit(code)
    _checked("mount", b"none", b"/", None, MS_REC | MS_PRIVATE, None)
    _checked("mount", b"proc", b"/proc", b"proc", 0, None)
    _checked("mount", b"tmpfs", b"/dev/shm", b"tmpfs", 0, None)
    _checked("mount", str(Path(files, "hosts")).encode(), b"/etc/hosts", None, MS_BIND, None)


def _furnish(host: Host, secret: str, every: list[Host]) -> None:
    host.files.mkdir()
    (host.files / "secret").touch(mode=0o600)
    (host.files / "secret").write_text(secret)
    own = os.uname().nodename
    lines = ["127.0.0.1 localhost", f"{host.address} {own}", *(f"{each.address} {each.name}" for each in every)]
    (host.files / "hosts").write_text("\n".join(lines) + "\n")


def _cable(one: tuple[Host, str], other: tuple[Host, str]) -> None:
    (here, link), (there, end) = one, other
    _ip("link", "add", link, "netns", here.name, "type", "veth", "peer", "name", end, "netns", there.name)


def _up(host: Host, link: str, address: str) -> None:
    _ip("-n", host.name, "address", "add", f"{address}/24", "dev", link)
    _ip("-n", host.name, "link", "set", link, "up")


def _ip(*arguments: str) -> str:
    return subprocess.run(("ip", *arguments), capture_output=True, text=True, timeout=END_S, check=True).stdout


def _checked(call: str, *arguments: Any) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, call)(*arguments):
        problem = ctypes.get_errno()
        raise OSError(problem, f"{call}: {os.strerror(problem)}")
