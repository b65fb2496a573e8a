"""The processes of ``bench/soak.py``: sources, targets, and the commands that hurt them."""

from __future__ import annotations

import ctypes
import hashlib
import os
import random
import socket
import threading
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from processes import Line
from soak_plan import Round, SourcePlan, TargetPlan
from torch import nn

import weightwire
from weightwire.auth import load_secret
from weightwire.config import Settings
from weightwire.errors import WeightwireError
from weightwire.identity.identity import Identity, module_identity
from weightwire.loaders import member
from weightwire.loaders.module import Published
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.target.report import LoadReport
from weightwire.transport.faults import Corrupt, Cut, Delay, Drop, Fault, FaultPlan, FaultyTransport
from weightwire.transport.opening import Opened, open_transports

STALL_S = 2.0
LOAD_S = 20.0
WAIT_S = 5.0
TENSORS = 17
FLIPS = 64
STEPS = 20

FAULTS: Mapping[str, Fault] = {"corrupt": Corrupt(3), "cut": Cut(), "drop": Drop(), "delay": Delay(0.3)}


class Weights(nn.Module):
    """Parameters of unequal sizes, a buffer that travels, and one that is computed."""

    def __init__(self, nbytes: int, seed: int | None) -> None:
        super().__init__()
        weight = nbytes // (TENSORS * (TENSORS + 1) // 2)
        chance = np.random.Generator(np.random.SFC64(seed))
        for at in range(TENSORS):
            self.register_parameter(
                f"w{at}", nn.Parameter(_filled(chance, weight * (at + 1), seed), requires_grad=False)
            )
        self.register_buffer("statistics", _filled(chance, 4321, seed))
        self.register_buffer("computed", torch.arange(30_000), persistent=False)

    def views(self) -> list[np.ndarray[Any, np.dtype[np.uint8]]]:
        return [tensor.detach().view(torch.uint8).numpy() for tensor in (*self.parameters(), *self.buffers())]

    def digest(self) -> str:
        found = hashlib.sha256()
        for view in self.views():
            found.update(view)
        return found.hexdigest()


def _filled(chance: np.random.Generator, size: int, seed: int | None) -> torch.Tensor:
    filled = np.full(size, 0xA5, np.uint8) if seed is None else np.frombuffer(chance.bytes(size), np.uint8)
    return torch.from_numpy(filled.copy())


def identity(seed: int, number: int) -> Identity:
    """Rounds do not meet."""
    return module_identity(f"bench/soak/{seed}/{number}", "Weights", "uint8", revision="r1")


def metadata(line: Line, secret_file: str) -> None:
    """A metadata server, until the line ends."""
    settings = ServerSettings(secret=load_secret(Path(secret_file)), times=Times(ttl_s=3.0, warming_s=0.0))
    with EmbeddedServer(settings) as server:
        line.say("ready", url=server.url)
        line.hear()


class Process:
    """What sources and targets have in common: settings, and commands while they work."""

    def __init__(self, line: Line, url: str, secret_file: str, seed: int, round_: Round) -> None:
        torch.set_num_threads(1)
        self.line = line
        self.round = round_
        self.identity = identity(seed, round_.number)
        self.settings = Settings(
            url=url,
            secret_file=Path(secret_file),
            transports=round_.transports,
            stall_timeout=STALL_S,
            load_timeout=LOAD_S,
            wait_for_loading=WAIT_S,
        )
        self.module: Weights | None = None
        self.published: Published | None = None

    def obey(self) -> None:
        """Carry out commands until the line ends."""
        while (told := self.line.hear()) is not None:
            getattr(self, f"do_{told['event']}")(told)

    def do_digest(self, _told: Mapping[str, Any]) -> None:
        assert self.module is not None
        self.line.say("digest", digest=self.module.digest())

    def do_poke(self, told: Mapping[str, Any]) -> None:
        assert self.module is not None
        chance, views = random.Random(told["seed"]), self.module.views()[:TENSORS]
        for _ in range(FLIPS):
            view = chance.choice(views)
            view[chance.randrange(len(view))] ^= 1 << chance.randrange(8)

    def do_cut(self, _told: Mapping[str, Any]) -> None:
        cut_connections()

    def do_cap(self, told: Mapping[str, Any]) -> None:
        if self.published is not None:
            self.published._member.node.caps.max_rate = told["rate"]  # noqa: SLF001  (no way to change it is offered)

    def do_pause(self, told: Mapping[str, Any]) -> None:
        if self.published is not None:
            self.published.pause()
            time.sleep(told["seconds"])
            self.published.resume()

    def do_withdraw(self, _told: Mapping[str, Any]) -> None:
        """As before an update of the weights; and the update."""
        if self.published is not None:
            self.published.withdraw()
            self.published = None
            assert self.module is not None
            for view in self.module.views():
                view[:] = 0x5A


def source(line: Line, url: str, secret_file: str, seed: int, round_: Round, mine: SourcePlan) -> None:
    """Publishes."""
    import dataclasses

    process = Process(line, url, secret_file, seed, round_)
    process.module = Weights(round_.nbytes, seed)
    settings = dataclasses.replace(process.settings, max_rate=mine.max_rate, max_readers=mine.max_readers)
    process.published = weightwire.publish(process.module, process.identity, settings=settings)
    line.say("ready")
    process.obey()


def target(line: Line, url: str, secret_file: str, seed: int, round_: Round, mine: TargetPlan) -> None:
    """Loads when it is told to, says what came of it, and then serves what it has."""
    process = Process(line, url, secret_file, seed, round_)
    process.module = Weights(round_.nbytes, None)
    if mine.read_fault:
        _misread(FaultPlan(rates=((mine.read_rate, FAULTS[mine.read_fault]),), seed=mine.seed))
    line.say("ready")
    line.hear()
    threading.Thread(target=_load, args=(process, mine), daemon=True).start()
    process.obey()


def _load(process: Process, mine: TargetPlan) -> None:
    time.sleep(mine.after_s)
    assert process.module is not None
    began = time.monotonic()
    try:
        report = _receive(process, mine)
    except WeightwireError as error:
        process.line.say("failed", error_type=type(error).__name__, problem=str(error))
        return
    except BaseException as error:  # noqa: BLE001  (what the soak looks for)
        traceback.print_exc()
        process.line.say("untyped", problem=f"{type(error).__name__}: {error}")
        return
    process.line.say(
        "loaded",
        digest=process.module.digest(),
        sound=report.verified and sum(share.nbytes for share in report.shares) == report.nbytes,
        seconds=time.monotonic() - began,
        peers=sum(share.nbytes > 0 for share in report.shares),
        retries=report.retries,
        duplicated=report.duplicated,
        bad_leaves=sum(share.bad_leaves for share in report.shares),
        warnings=report.warnings,
    )


def _receive(process: Process, mine: TargetPlan) -> LoadReport:
    assert process.module is not None
    progress = _progress(process.line)
    if not mine.relays:
        return weightwire.receive(process.module, process.identity, settings=process.settings, progress=progress)
    process.published = weightwire.relay(process.module, process.identity, settings=process.settings, progress=progress)
    assert process.published.received is not None
    return process.published.received


def _progress(line: Line) -> Callable[[str, int, int, str], None]:
    told = 0

    def progress(phase: str, done: int, total: int, unit: str) -> None:
        nonlocal told
        del unit
        if phase == "transfer" and done * STEPS // total > told:
            told = done * STEPS // total
            line.say("progress", fraction=done / total)

    return progress


def _misread(faults: FaultPlan) -> None:
    """What this process reads suffers ``faults``."""

    def open_faulty(*arguments: Any) -> Opened:
        opened = open_transports(*arguments)
        if arguments[2] is None:  # no gate: those that read
            opened.transports = {name: FaultyTransport(inner, faults) for name, inner in opened.transports.items()}
        return opened

    member.open_transports = open_faulty


def cut_connections() -> None:
    """Reset every TCP connection of this process: its peers see an RST, and it an end."""
    for each in list(Path("/proc/self/fd").iterdir()):
        try:
            copy = socket.socket(fileno=os.dup(int(each.name)))
        except OSError:  # no socket, or closed meanwhile
            continue
        with copy:
            if copy.family == socket.AF_INET and copy.type == socket.SOCK_STREAM and _connected(copy):
                _disconnect(copy.fileno())


def _connected(one: socket.socket) -> bool:
    try:
        one.getpeername()
    except OSError:
        return False
    return True


def _disconnect(fd: int) -> None:
    unspecified = bytes(16)  # a sockaddr of family AF_UNSPEC
    ctypes.CDLL(None).connect(fd, unspecified, len(unspecified))
