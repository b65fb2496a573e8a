"""The processes of ``bench/fanout.py``: metadata server, source, replicas, and the two ends of a bare stream."""

from __future__ import annotations

import hashlib
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import Line
from torch import nn

import weightwire
from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.identity.identity import module_identity
from weightwire.loaders.module import Published
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.observability.metrics import SERVED, process_metrics
from weightwire.target.report import LoadReport

MIB = 1 << 20
TENSORS = 24
SEED = 20261126
STEP = 20
"""A replica says how far it is this many times."""
PIECE = 1 * MIB
IDENTITY = module_identity("bench/fanout", "Weights", "bfloat16", revision="r1")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What all processes of one run are told.

    Attributes:
        url: of the metadata server.
        secret_file: the shared secret.
        nbytes: of the model.
        mode: ``relay`` (serves what it has while it receives), ``tree`` (serves once it is complete) or ``star``
            (does not serve).
        max_readers: of every source and relay; 0 for no bound.
        max_rate: of the source alone; 0 for no bound.
    """

    url: str
    secret_file: str
    nbytes: int
    mode: str
    max_readers: int = 0
    max_rate: float = 0.0

    def settings(self, max_rate: float = 0.0) -> Settings:
        return Settings(
            url=self.url,
            secret_file=Path(self.secret_file),
            transports=("tcp",),
            load_timeout=300.0,
            wait_for_loading=300.0,
            max_rate=max_rate,
            max_readers=self.max_readers,
        )


class Weights(nn.Module):
    """``nbytes`` in tensors of equal size; random, or such as no load may leave behind."""

    def __init__(self, nbytes: int, seed: int | None) -> None:
        super().__init__()
        size = nbytes // TENSORS
        chance = np.random.Generator(np.random.SFC64(seed))
        for at in range(TENSORS):
            filled = np.full(size, 0xA5, np.uint8) if seed is None else np.frombuffer(chance.bytes(size), np.uint8)
            bits = torch.from_numpy(filled.copy()).view(torch.bfloat16)
            self.register_parameter(f"w{at}", nn.Parameter(bits, requires_grad=False))

    def digest(self) -> str:
        """Of all bytes, by an algorithm that has nothing to do with ours."""
        found = hashlib.sha256()
        for parameter in self.parameters():
            found.update(parameter.detach().view(torch.uint8).numpy())
        return found.hexdigest()


def metadata(line: Line, address: str, secret_file: str) -> None:
    """A metadata server, until the line ends."""
    settings = ServerSettings(
        secret=load_secret(Path(secret_file)), host=address, times=Times(ttl_s=5.0, warming_s=0.0)
    )
    with EmbeddedServer(settings) as server:
        line.say("ready", url=server.url)
        line.hear()


def source(line: Line, plan: Plan) -> None:
    """Publishes random weights until the line ends; answers ``served`` with the bytes that it was asked for."""
    torch.set_num_threads(1)
    module = Weights(plan.nbytes, SEED)
    with weightwire.publish(module, IDENTITY, settings=plan.settings(plan.max_rate)) as published:
        line.say("ready", content_id=published.report.content_id, digest=module.digest())
        while line.hear() is not None:
            line.say("served", nbytes=_served())
        os._exit(0)


def replica(line: Line, plan: Plan) -> None:
    """One load, begun at the instant that the line says; then serves until the line ends."""
    torch.set_num_threads(1)
    module = Weights(plan.nbytes, None)
    line.say("constructed")
    told = line.hear()
    assert told is not None
    time.sleep(max(0.0, told["at"] - time.monotonic()))
    began = time.monotonic()
    report, published = RECEIVE[plan.mode](module, plan, _progress(line))
    ready = time.monotonic()
    line.say("loaded", began=began, ready=ready, **_told(report))
    line.say("checked", digest=module.digest())
    line.hear()
    del published
    os._exit(0)


def _star(module: nn.Module, plan: Plan, progress: Any) -> tuple[LoadReport, None]:
    return weightwire.receive(module, IDENTITY, settings=plan.settings(), progress=progress), None


def _tree(module: nn.Module, plan: Plan, progress: Any) -> tuple[LoadReport, Published]:
    settings = plan.settings()
    report = weightwire.receive(module, IDENTITY, settings=settings, progress=progress)
    return report, weightwire.publish(module, IDENTITY, settings=settings, received=report)


def _relay(module: nn.Module, plan: Plan, progress: Any) -> tuple[LoadReport, Published]:
    published = weightwire.relay(module, IDENTITY, settings=plan.settings(), progress=progress)
    assert published.received is not None
    return published.received, published


RECEIVE: dict[str, Callable[[nn.Module, Plan, Any], tuple[LoadReport, Published | None]]] = {
    "relay": _relay,
    "star": _star,
    "tree": _tree,
}


def _told(report: LoadReport) -> dict[str, Any]:
    shares = sorted((share.nbytes for share in report.shares), reverse=True)
    return {
        "content_id": report.content_id,
        "nbytes": report.nbytes,
        "shares": shares,
        "retries": report.retries,
        "duplicated": report.duplicated,
        "seconds": {name: round(seconds, 3) for name, seconds in report.seconds.items()},
        "warnings": report.warnings,
    }


def _progress(line: Line) -> Callable[[str, int, int, str], None]:
    told = 0

    def progress(phase: str, done: int, total: int, unit: str) -> None:
        nonlocal told
        del unit
        if phase == "transfer" and done * STEP // total > told:
            told = done * STEP // total
            line.say("progress", fraction=done / total, at=time.monotonic())

    return progress


def _served() -> int:
    labels = {"transport": "tcp", "direction": SERVED}
    return int(process_metrics().registry.get_sample_value("weightwire_bytes_total", labels) or 0)


# --- a bare stream --------------------------------------------------------------------------------------------------


def bare_sender(line: Line, address: str, nbytes: int) -> None:
    memory = memoryview(bytearray(os.urandom(PIECE)) * (nbytes // PIECE))
    with socket.create_server((address, 0)) as listening:
        line.say("ready", port=listening.getsockname()[1])
        accepted, _ = listening.accept()
        accepted.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        accepted.sendall(memory)
        accepted.shutdown(socket.SHUT_WR)
        line.hear()


def bare_receiver(line: Line, address: str, port: int, nbytes: int) -> None:
    memory = memoryview(bytearray(nbytes))
    with socket.create_connection((address, port)) as connected:
        began, done = time.monotonic(), 0
        while done < nbytes:
            done += connected.recv_into(memory[done:], 0, socket.MSG_WAITALL)
        line.say("done", seconds=time.monotonic() - began)
