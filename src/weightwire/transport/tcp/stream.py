"""A connected socket whose every wait is bounded and that another thread can cut.

The socket stays in blocking mode with kernel time-outs: one ``recvmsg``/``sendmsg`` then moves megabytes without coming
back to Python. (Without ``MSG_WAITALL`` four streams on 16 cores ran at 7.8 GB/s instead of 12.)
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import struct
import threading
import time
from collections import deque

from weightwire.manifest.host_digest import ArrivingDigests
from weightwire.manifest.host_library import Came
from weightwire.transport.memory import consume

SLICE_S = 1.0
"""Longest that one system call waits; deadlines are looked at in between."""

BUFFERS = 1024
"""Most buffers handed to one system call: the kernel's limit. Fewer cost up to a tenth where tensors are small."""


LOCAL_BUFFER = 256 * 1024
"""Bytes of a socket's own buffer, each way, to a peer on this machine: what is sent is received before it has left the
cache (two streams of bare sockets ran at 9.0 GB/s instead of 7.1). Over a network the kernel's tuning is kept."""


ENDED = "the other side ended the connection"


class OverdueError(Exception):
    """Our own bound was reached; the connection may still be whole (unlike the kernel's ``TimeoutError``)."""


class Stream:
    """Owns ``connected``. One thread sends and one receives; ``cut`` may be called from any.

    Args:
        connected: a connected TCP socket.
        dead_host_s: after how long a silent host is given up.
        send_s: longest that one send waits without moving a byte.
    """

    def __init__(self, connected: socket.socket, *, dead_host_s: float, send_s: float) -> None:
        self._socket = connected
        self._closing = threading.Lock()
        self._closed = False
        self._receive_ms = 0
        connected.settimeout(None)
        _tune(connected, dead_host_s)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDTIMEO, _timeval(math.ceil(send_s * 1000)))

    def receive(self, buffers: list[memoryview], deadline: float) -> int:
        """Receive into ``buffers``, in order, and say how many bytes came; 0 if none came within ``SLICE_S``.

        Raises:
            OverdueError: ``deadline`` is over.
            OSError: the connection ended, was cut, or broke.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise OverdueError
        self._limit(min(left, SLICE_S))
        try:
            nbytes = self._socket.recvmsg_into(buffers, 0, socket.MSG_WAITALL)[0]
        except BlockingIOError:
            return 0
        if nbytes == 0:
            raise ConnectionResetError(ENDED)
        return nbytes

    def receive_digested(self, arriving: ArrivingDigests, deadline: float) -> int:
        """The same for leaves that are hashed on their way, into their memory; how many bytes came.

        Raises:
            OverdueError: ``deadline`` is over.
            OSError: the connection ended, was cut, or broke; some bytes may have come.
        """
        left = deadline - time.monotonic()
        if left <= 0:
            raise OverdueError
        self._limit(min(left, SLICE_S))
        before = arriving.received
        came = arriving.receive(self._socket.fileno(), min(left, SLICE_S))
        if came == Came.ENDED:
            raise ConnectionResetError(ENDED)
        if came > 0:
            raise OSError(came, os.strerror(came))
        return arriving.received - before

    def receive_exactly(self, nbytes: int, deadline: float) -> bytearray:
        """Exactly ``nbytes`` (small, and chosen by us) bytes.

        Raises:
            OverdueError: they did not all come by ``deadline``.
            OSError: the connection ended, was cut, or broke.
        """
        data = bytearray(nbytes)
        rest = memoryview(data)
        while rest:
            rest = rest[self.receive([rest], deadline) :]
        return data

    def send(self, buffers: deque[memoryview]) -> None:
        """Send all of ``buffers``, straight from where they lie; empties the deque.

        Raises:
            OverdueError: the other side took nothing for ``send_s``.
            OSError: the connection ended, was cut, or broke.
        """
        while buffers:
            try:
                sent = self._socket.sendmsg(itertools.islice(buffers, BUFFERS))
            except BlockingIOError:
                raise OverdueError("the other side takes no bytes") from None
            consume(buffers, sent)

    def cut(self) -> None:
        """End the connection both ways, now: calls that wait in other threads return. Idempotent."""
        with self._closing:
            if not self._closed:
                try:
                    self._socket.shutdown(socket.SHUT_RDWR)
                except OSError:
                    return  # the other side was faster

    def close(self) -> None:
        """Cut, and give the socket back. Only when no other thread is inside a call. Idempotent."""
        self.cut()
        with self._closing:
            self._closed = True
            self._socket.close()

    def _limit(self, seconds: float) -> None:
        milliseconds = max(1, math.ceil(seconds * 1000))
        if milliseconds != self._receive_ms:
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, _timeval(milliseconds))
            self._receive_ms = milliseconds


def _timeval(milliseconds: int) -> bytes:
    return struct.pack("ll", milliseconds // 1000, milliseconds % 1000 * 1000)


def _tune(connected: socket.socket, dead_host_s: float) -> None:
    """No delay for small requests; a dead host is noticed within about ``dead_host_s``, sending or not.

    Buffer sizes stay with the kernel's autotuning but on one machine: set by hand they would be a cap.
    """
    if connected.getsockname()[0] == connected.getpeername()[0]:
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, LOCAL_BUFFER)
        connected.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, LOCAL_BUFFER)
    probe_s = max(1, math.ceil(dead_host_s / 4))
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, probe_s)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, probe_s)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
    connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, math.ceil(dead_host_s * 1000))
