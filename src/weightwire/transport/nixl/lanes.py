"""Which UCX transports really carry an agent's reads, as UCX itself says.

UCX prints one table for each way of reading that it chooses (``UCX_PROTO_INFO``), headed by the agent's name::

    | <agent> inter-node cfg#1                                        |
    | remote memory read by ucp_get*(multi) into host memory from host |
    | Range  | Description | Config                                    |
    | 0..inf | zero-copy   | rc_mlx5/mlx5_0:1                          |

("into cuda/GPU0 from cuda/GPU0", without "memory", where it knows the device.) It prints to a log of the whole process,
which we direct into memory of our own before the first agent is made. Where something else loaded UCX first, or
``UCX_LOG_FILE`` or ``UCX_PROTO_INFO`` is set by the user, there is nothing to read and the answer is "unknown".

Nothing here touches the environment: agents are made in threads, and C code that reads the environment meanwhile (torch
does, while a model is constructed) would crash.
"""

from __future__ import annotations

import ctypes
import logging
import os
import re
import threading
from collections.abc import Callable
from pathlib import Path

_log = logging.getLogger(__name__)

MAX_LOG_BYTES = 4 * 1024 * 1024
"""Of one look at the log, the last so many bytes are read."""

_LINE = re.compile(r"^\[[\d.]+\] +\[[^\]]*\] *(?P<text>.*)$")
_HEAD = re.compile(r"\| (?P<agent>\S+) (self|intra-node|inter-node) cfg#\d+")
_ROW = re.compile(r"\| +(?P<range>\S+) +\|(?P<how>[^|]*)\|(?P<lanes>[^|]*)\|")
_LANE = re.compile(r"\b(?P<transport>[a-z][a-z0-9_]*)/[\w.:-]+")
_TABLE = re.compile(r"^[|+]")
_WAY = re.compile(r"\| remote memory read by ucp_get\*\S* into (?P<to>\S+)(?: memory)? from (?P<source>\S+)")

DEFAULTS = {"CUDA_IPC_ENABLE_GET_ZCOPY": "on"}
"""Settings of UCX for our agents, by names without ``UCX_``, where the user's environment says nothing.

Left to itself UCX reads from another process's device memory only where it sees NVLink; elsewhere, also between
processes on one device, it has the source copy to host memory and send it over TCP, a hundred times slower.
A UCX without CUDA does not know that setting, and says nothing of it.
"""

TABLES = {"PROTO_INFO": "*ucp_get*"}
"""The setting that makes UCX print the tables."""

_MAPS = Path("/proc/self/maps")

NOT_NETWORKS = frozenset(
    ("self", "sm", "shm", "mm", "posix", "sysv", "xpmem", "knem", "cma", "cuda", "cuda_copy", "cuda_ipc", "gdr_copy")
)
"""Names in ``UCX_TLS`` of what stays on a host."""

Way = tuple[str, str]
"""Kinds of memory, to and from: ``("cuda", "cpu")`` reads host memory of the peer into a device of ours."""


def tcp_is_asked_for() -> bool:
    """Whether ``UCX_TLS`` names ``tcp``: the only consent to TCP under UCX.

    It is slow (a quarter of what the tcp transport reaches), and dangerous to the source: the UCX 1.23 of NIXL 1.5.1
    may *abort* a process while it answers a reader that goes away ("Fatal: unexpected error: Endpoint timeout",
    "Assertion `0' failed"): 4 times with 52 readers that were killed in mid-read, and mostly if the source was stopped
    meanwhile. Nothing on its side prevents that; a fence of ours lets the answers under way arrive first, if they come
    soon.
    """
    return "tcp" in _asked_for()


def tcp_is_the_only_network() -> bool:
    """Whether ``UCX_TLS`` names ``tcp``, and besides only what stays on a host."""
    asked = _asked_for()
    return "tcp" in asked and asked <= {"tcp", *NOT_NETWORKS}


class Lanes:
    """What the tables of a log say; fed with its text in order, pure."""

    def __init__(self) -> None:
        self._agent = ""
        self._reads = False
        self._used: dict[str, dict[Way, tuple[str, ...]]] = {}
        self._way: Way = ("", "")

    def feed(self, text: str) -> list[str]:
        """Take whole lines; gives back those that belong to no table (UCX's warnings)."""
        others = []
        for line in text.splitlines():
            match = _LINE.match(line)
            body = match["text"].strip() if match else line.strip()
            if _TABLE.match(body):
                self._take(body)
            elif body:
                others.append(body)
        return others

    def transports(self, agent: str) -> dict[Way, tuple[str, ...]]:
        """UCX transports that reads of ``agent`` use, for each way seen, such as ``("cma",)``."""
        return {way: tuple(sorted(set(lanes))) for way, lanes in self._used.get(agent, {}).items()}

    def _take(self, body: str) -> None:
        head, way, row = _HEAD.match(body), _WAY.match(body), _ROW.match(body)
        if head:
            self._agent, self._reads = head["agent"], False
        elif way:
            self._reads, self._way = True, (_kind(way["to"]), _kind(way["source"]))
            self._used.setdefault(self._agent, {})[self._way] = ()  # a later choice replaces an earlier one
        elif row and self._reads and ".." in row["range"]:
            ways = self._used[self._agent]
            ways[self._way] += tuple(match["transport"] for match in _LANE.finditer(row["lanes"]))


class UcxLog:
    """UCX's log of this process, kept in memory; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lanes = Lanes()
        self._file: int | None = None
        self._read = 0
        self._flush: Callable[[], object] = _no_flush
        self._opened = False

    def settings(self, libraries: Path) -> dict[str, str]:
        """UCX's settings for an agent that is made next, by names without ``UCX_``; the first call opens the log.

        Args:
            libraries: the folder that the package of NIXL in use brings UCX in.
        """
        with self._lock:
            if not self._opened:
                self._opened = True
                self._open(libraries)
            ours = DEFAULTS if self._file is None else {**DEFAULTS, **TABLES}
            return {name: value for name, value in ours.items() if f"UCX_{name}" not in os.environ}

    def transports(self, agent: str) -> dict[Way, tuple[str, ...]]:
        """See ``Lanes.transports``; looks at the log first, and passes UCX's warnings on to ours."""
        with self._lock:
            for line in self._lanes.feed(self._new_text()):
                _log.warning("UCX: %s", line)
            return self._lanes.transports(agent)

    def _open(self, libraries: Path) -> None:
        """Load UCX and give it a log of ours; it opens its log when it is loaded, so ours takes that one's place.

        A UCX without these functions, or loaded already, keeps its log.
        """
        if {"UCX_LOG_FILE", "UCX_PROTO_INFO"} & set(os.environ) or _is_loaded("libucs"):
            return
        path = next(iter(sorted(libraries.glob("libucs-*") or libraries.glob("libucs.*"))), None)
        if path is None:
            return
        try:
            library = ctypes.CDLL(str(path))
            put, close, open_, flush = (
                getattr(library, name)
                for name in ("ucs_global_opts_set_value", "ucs_log_cleanup", "ucs_log_init", "ucs_log_flush")
            )
        except (OSError, AttributeError):
            return
        put.restype, put.argtypes = ctypes.c_int, (ctypes.c_char_p, ctypes.c_char_p)
        close.restype = open_.restype = flush.restype = None
        file = os.memfd_create("ucx-log")
        if put(b"LOG_FILE", f"/proc/self/fd/{file}".encode()):
            os.close(file)
            return
        close()
        open_()
        self._file, self._flush = file, flush

    def _new_text(self) -> str:
        if self._file is None:
            return ""
        self._flush()
        end = os.fstat(self._file).st_size
        text = os.pread(self._file, MAX_LOG_BYTES, max(self._read, end - MAX_LOG_BYTES))
        whole = text[: text.rfind(b"\n") + 1]
        self._read = max(self._read, end - MAX_LOG_BYTES) + len(whole)
        return whole.decode(errors="replace").replace("\0", "")


def _asked_for() -> set[str]:
    value = os.environ.get("UCX_TLS", "").lower().strip()
    return set() if value.startswith("^") else {name.strip() for name in value.split(",")}


def _kind(name: str) -> str:
    kind = name.partition("/")[0]  # "cuda/GPU0"
    return "cpu" if kind == "host" else kind


def _no_flush() -> None:
    """UCX's own ``ucs_log_flush`` once there is a log: ``fflush(NULL)`` could wait for a stream being read."""


def _is_loaded(name: str) -> bool:
    """Whether a library is loaded whose file name begins with ``name``."""
    return any(Path(line.partition("/")[2]).name.startswith(name) for line in _MAPS.read_text().splitlines())
