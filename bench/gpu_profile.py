"""Where the time of a load goes: calls, seconds summed over threads, and when the first began and the last ended."""

from __future__ import annotations

import contextlib
import functools
import gc
import importlib
import time
from collections.abc import Callable, Iterator
from typing import Any

WATCHED = (
    ("weightwire.source.publish", "", ("digest_leaves",)),
    ("weightwire.source.publication", "Publication", ("_register",)),
    ("weightwire.manifest.catalogue", "Catalogue", ("check_mirrors", "bind")),
    ("weightwire.manifest.device_kernel", "", ("kernel_on",)),
    ("weightwire.target.receiver", "Receiver", ("find", "_agree", "_pull", "_release", "_finish")),
    ("weightwire.target.session", "PeerSession", ("__init__", "connect", "close")),
    ("weightwire.target.verification", "Verification", ("prepare", "check", "compare")),
    ("weightwire.target.pull", "_Lane", ("_fill", "_finish_first", "_check", "settle")),
    ("weightwire.target.pull", "_PeerPull", ("_fence", "stop")),
    ("weightwire.manifest.device_digest", "SpanDigests", ("__init__", "of", "_by_kernel")),
    ("weightwire.manifest.device_digest", "", ("_combined",)),
    ("weightwire.transport.nixl.agent", "Agent", ("__init__", "register", "add_peer", "post", "destroy")),
    ("weightwire.transport.nixl.connection", "NixlConnection", ("open", "read", "drive")),
    ("weightwire.transport.tcp.connection", "TcpConnection", ("read", "receive_until", "_receive")),
    ("weightwire.transport.landing", "Staging", ("take",)),
    ("weightwire.transport.landing", "Landing", ("settle",)),
    ("weightwire.transport.device", "", ("allocations",)),
)

Rows = dict[str, list[float]]


@contextlib.contextmanager
def watched() -> Iterator[Rows]:
    """Inside the block, every call of what is watched is timed."""
    rows: Rows = {}
    undo: list[tuple[Any, str, Any]] = []
    began = time.monotonic()
    for module, owner, names in WATCHED:
        with contextlib.suppress(ImportError):
            place = importlib.import_module(module)
            target = getattr(place, owner) if owner else place
            for name in names:
                if hasattr(target, name):
                    undo.append((target, name, getattr(target, name)))
                    label = f"{owner or module.rpartition('.')[2]}.{name}"
                    setattr(target, name, _timed(getattr(target, name), label, rows, began))
    collections = _collections(rows, began)
    gc.callbacks.append(collections)
    try:
        yield rows
    finally:
        gc.callbacks.remove(collections)
        for target, name, original in undo:
            setattr(target, name, original)


def _collections(rows: Rows, zero: float) -> Callable[[str, dict[str, int]], None]:
    """Python's own garbage collections, which stop everything, by generation."""
    started = [0.0]

    def note(phase: str, about: dict[str, int]) -> None:
        now = time.monotonic()
        if phase == "start":
            started[0] = now
            return
        row = rows.setdefault(f"garbage collection {about['generation']}", [0, 0.0, started[0] - zero, 0.0])
        row[:] = [row[0] + 1, row[1] + now - started[0], row[2], now - zero]

    return note


def _timed(function: Callable[..., Any], label: str, rows: Rows, zero: float) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        began = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            ended = time.monotonic()
            row = rows.setdefault(label, [0, 0.0, began - zero, 0.0])
            row[:] = [row[0] + 1, row[1] + ended - began, min(row[2], began - zero), ended - zero]

    return call
