"""What the tests of the metadata server run in processes of their own."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import Any

from wire_samples import SECRET, rank

from weightwire.errors import WeightwireError
from weightwire.metadata.client import MetadataClient
from weightwire.metadata.decision import Group, TorchDecisions, Vote
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import ServerSettings, serve
from weightwire.types import Json
from weightwire.wire.messages import PublicationRecord, PublicationState, Withdrawal

FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["torch.distributed", "weightwire.metadata.server.app", "weightwire.metadata.client"])
START_S = 60.0


class Child:
    """A process and the pipe to it; killed at the end whatever happened."""

    def __init__(self, target: Callable[..., None], *args: Any) -> None:
        self.pipe, theirs = FORKS.Pipe()
        self.process = FORKS.Process(target=target, args=(theirs, *args), daemon=True)
        self.process.start()
        theirs.close()

    def hear(self, timeout: float = START_S) -> Any:
        """The next thing that it says."""
        assert self.pipe.poll(timeout), f"nothing from {self.process.name} in {timeout} s"
        return self.pipe.recv()

    def tell(self, *what: Any) -> Any:
        """Give an order and hear what came of it."""
        self.pipe.send(what)
        return self.hear()

    def signal(self, number: signal.Signals) -> None:
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def kill(self) -> None:
        self.process.kill()
        self.process.join(10)


@contextlib.contextmanager
def child(target: Callable[..., None], *args: Any) -> Iterator[Child]:
    made = Child(target, *args)
    try:
        yield made
    finally:
        made.kill()
        made.pipe.close()


# The server -----------------------------------------------------------------------------------------------------------


def serve_main(pipe: Connection, port: int, ttl: float, warming: float | None) -> None:
    settings = ServerSettings(secret=SECRET, port=port, times=Times(ttl_s=ttl, warming_s=warming), grace_s=1.0)
    try:
        asyncio.run(serve(settings, started=lambda server: pipe.send(server.port)))
        pipe.send("stopped")
    except WeightwireError as error:
        pipe.send(f"{type(error).__name__}: {error}")


# A source -------------------------------------------------------------------------------------------------------------


class SampleOwner:
    """One publication of a process that keeps it."""

    def __init__(self, record: PublicationRecord) -> None:
        self.record: PublicationRecord | None = record
        self.rechecked: list[int] = []
        self.healthy = True
        self._lock = threading.Lock()

    def current(self) -> PublicationRecord | None:
        return self.record

    def recheck(self, leaf: int) -> bool:
        self.rechecked.append(leaf)
        return self.healthy

    def change(self, **changes: Any) -> None:
        with self._lock:
            assert self.record is not None
            self.record = dataclasses.replace(self.record, sequence=self.record.sequence + 1, **changes)


def source_main(pipe: Connection, url: str, life: str) -> None:
    """Both ranks of replica ``life``; obeys orders until its pipe closes."""
    client = MetadataClient(url, SECRET, timeout=2)
    owners = [SampleOwner(rank(number, life)) for number in (0, 1)]
    for owner in owners:
        client.keeper.add(owner)
    pipe.send(client.keeper.connected.wait(20))
    while True:
        try:
            order, *rest = pipe.recv()
        except EOFError:
            return
        pipe.send(_ORDERS[order](client, owners, *rest))


def _withdraw(client: MetadataClient, owners: list[SampleOwner]) -> str:
    said = "told"
    for owner in owners:
        record, owner.record = owner.record, None
        assert record is not None
        message = Withdrawal(
            shard_key=record.shard_key,
            incarnation=record.incarnation,
            generation=record.generation + 1,
            sequence=record.sequence + 1,
        )
        try:
            client.withdraw(message, timeout=1)
        except WeightwireError as error:
            said = type(error).__name__
    return said


def _pause(client: MetadataClient, owners: list[SampleOwner]) -> str:
    for owner in owners:
        owner.change(state=PublicationState.PAUSED, generation=2)
    client.keeper.poke()
    return "paused"


def _read(client: MetadataClient, owners: list[SampleOwner]) -> str:
    """News that only beats carry: whoever sees it knows that the stream keeps the lease."""
    for owner in owners:
        owner.change(active_reads=1)
    client.keeper.poke()
    return "read"


def _sicken(_client: MetadataClient, owners: list[SampleOwner]) -> str:
    for owner in owners:
        owner.healthy = False
    return "sick"


def _rechecked(_client: MetadataClient, owners: list[SampleOwner]) -> list[int]:
    return [leaf for owner in owners for leaf in owner.rechecked]


_ORDERS: dict[str, Callable[..., Any]] = {
    "withdraw": _withdraw,
    "pause": _pause,
    "read": _read,
    "sicken": _sicken,
    "rechecked": _rechecked,
}


# A rank that decides --------------------------------------------------------------------------------------------------


def store_main(pipe: Connection) -> None:
    """The ranks' store, in a process that outlives them."""
    store = torch_store(0, is_master=True)
    pipe.send(store.port)
    with contextlib.suppress(EOFError):
        pipe.recv()


def torch_store(port: int, *, is_master: bool = False) -> Any:
    from torch import distributed

    make: Any = distributed.TCPStore  # type: ignore[attr-defined]
    return make("127.0.0.1", port, is_master=is_master, wait_for_workers=False, timeout=timedelta(seconds=20))


def rank_main(pipe: Connection, port: int, epoch: str, number: int, size: int, plan: dict[str, Any]) -> None:
    """Goes through three steps; at ``plan["step"]`` it does ``plan["how"]``. Says how each step ended."""
    group = Group(TorchDecisions(torch_store(port)), number, size, epoch, 30.0)
    pipe.send("up")
    pipe.recv()
    seen: list[Json] = []
    for step in range(3):
        mine = Vote(ok=True, value=number)
        if plan["step"] == step:
            mine = _misbehave(plan, mine)
        began = time.monotonic()
        verdict = group.vote(f"step-{step}", mine, plan["patience"] if step == plan["at"] else None)
        seen.append([verdict.ok, verdict.reason, list(verdict.silent), time.monotonic() - began])
        if not verdict.ok:
            break
    pipe.send(seen)


def _misbehave(plan: dict[str, Any], mine: Vote) -> Vote:
    if plan["how"] == "hangs":
        time.sleep(3600)
    if plan["how"] == "dies":
        os.kill(os.getpid(), signal.SIGKILL)
    if plan["how"] == "late":
        time.sleep(plan["late"])
    return Vote(ok=False, reason="its disk is on fire") if plan["how"] == "fails" else mine
