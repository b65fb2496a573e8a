"""Hosts on one switch, for benchmarks: network namespaces that have no names, each behind a link of a given rate.

A namespace without a name lives as long as a process in it or a descriptor of it, and the links between namespaces end
with them. So there is nothing to remove, and nothing stays behind however a benchmark ends, SIGKILL included
(``processes.Child`` dies with the process that started it).
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path

CLONE_NEWNET = 0x40000000
COUNTERS = Path("/proc/thread-self/net/dev")
BURST = "256kb"
LATENCY = "50ms"
MAX_HOSTS = 200

_LIBC = ctypes.CDLL(None, use_errno=True)


class Unable(Exception):
    """This machine cannot have namespaces; the message is one line."""


class Switch:
    """``hosts`` namespaces, each with one link to a bridge in a namespace of its own (*the hub*, an endpoint too).

    Args:
        hosts: how many; host ``n`` has the address ``address(n)``, the hub that of ``address(-1)``.
        mbit: megabits a second of each link, in each direction.

    Raises:
        Unable: no root, no iproute2, or a kernel without what it takes.
    """

    def __init__(self, hosts: int, mbit: float) -> None:
        assert 0 < hosts <= MAX_HOSTS
        _check()
        self.hosts = hosts
        self._home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        self._hub = self._namespace()
        self._of = [self._namespace() for _ in range(hosts)]
        shape = f"tbf rate {mbit}mbit burst {BURST} latency {LATENCY}"
        self._wire(shape)

    def address(self, host: int) -> str:
        return f"10.213.0.{host + 2}"

    @contextlib.contextmanager
    def inside(self, host: int) -> Iterator[None]:
        """This thread, and processes that it starts, are on ``host`` (-1: the hub) meanwhile."""
        _setns(self._fd(host))
        try:
            yield
        finally:
            _setns(self._home)

    def enter(self, host: int) -> None:
        """This process is on ``host`` from now on. For a fresh child."""
        _setns(self._fd(host))

    def carried(self) -> list[tuple[int, int]]:
        """For each host: bytes that its link has carried from it, and to it, so far."""
        found = {}
        with self.inside(-1):
            for line in COUNTERS.read_text().splitlines()[2:]:
                name, _, numbers = line.partition(":")
                fields = numbers.split()
                found[name.strip()] = int(fields[0]), int(fields[8])
        return [found[f"p{host}"] for host in range(self.hosts)]

    def close(self) -> None:
        for fd in (self._hub, *self._of, self._home):
            os.close(fd)

    def _fd(self, host: int) -> int:
        return self._hub if host < 0 else self._of[host]

    def _namespace(self) -> int:
        if _LIBC.unshare(CLONE_NEWNET):
            raise Unable(f"this system refuses network namespaces ({os.strerror(ctypes.get_errno())})")
        try:
            return os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        finally:
            _setns(self._home)

    def _wire(self, shape: str) -> None:
        ports = range(self.hosts)
        with self.inside(-1):
            lines = ["link set lo up", "link add name bridge type bridge", f"addr add {self.address(-1)}/24 dev bridge"]
            for port, fd in zip(ports, self._of, strict=True):
                lines.append(f"link add name p{port} type veth peer name eth0 netns /proc/self/fd/{fd}")
                lines.append(f"link set dev p{port} master bridge up")
            _batch("ip", [*lines, "link set dev bridge up"], self._of)
            _batch("tc", [f"qdisc add dev p{port} root {shape}" for port in ports])
        for port in ports:
            with self.inside(port):
                address = f"addr add {self.address(port)}/24 dev eth0"
                _batch("ip", ["link set lo up", address, "link set eth0 up"])
                _batch("tc", [f"qdisc add dev eth0 root {shape}"])


def _check() -> None:
    if missing := [name for name in ("ip", "tc") if shutil.which(name) is None]:
        raise Unable(f"{' and '.join(missing)} not found; install iproute2")
    if os.geteuid() != 0:
        raise Unable("only root may make network namespaces; run it as root")


def _setns(fd: int) -> None:
    if _LIBC.setns(fd, CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), "setns failed")


def _batch(tool: str, lines: Sequence[str], fds: Sequence[int] = ()) -> None:
    """``lines`` in one run of ``ip`` or ``tc``, in the namespace of this thread."""
    text = "".join(f"{line}\n" for line in lines)
    done = subprocess.run([tool, "-batch", "-"], input=text, text=True, capture_output=True, pass_fds=fds, check=False)
    if done.returncode:
        raise Unable(f"{tool} failed: {' '.join(done.stderr.split())}")
