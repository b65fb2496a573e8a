"""A plugin of vLLM that makes weightwire misbehave in a worker, as the variable ``VLLM_TEST_FAULTS`` says.

Everything that it does not name is the real thing. It is put on the path by ``vllm_replicas.write_site``.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vllm_plants import PLANTS

VARIABLE = "VLLM_TEST_FAULTS"
FOREVER = 3600.0


@dataclass(frozen=True, kw_only=True)
class Faults:
    """What goes wrong, and where.

    Attributes:
        rank: the tensor-parallel rank that it goes wrong on; -1 for all.
        steps: some of ``find``, ``construct``, ``fill`` and ``publish``; ``swap`` in a refresh.
        kind: what happens when such a step begins: ``fail`` (as its own causes do), ``crash`` (an error that
            nobody foresaw), ``die``, ``freeze`` (the thread), ``stop`` (the process) or ``late``.
        failures: after so many a step works; 0 for never.
        late_s: how late.
        margin_s: how much longer than the leader the other ranks wait for its choice.
        read_s: how much longer each read from a peer takes.
        gate, gate_after: after so many reads each waits until this file is there.
        corrupt_after: reads from a peer after which all that arrives is changed; -1 for never.
        warm_up_s: how much longer the engine warms up.
        plants: names in ``vllm_plants.PLANTS``.
        plain_linear: linear weights are not packed, so that processed weights are tensors on a CPU too.
    """

    rank: int = -1
    steps: tuple[str, ...] = ()
    kind: str = ""
    failures: int = 0
    late_s: float = 0.0
    margin_s: float = 3.0
    read_s: float = 0.0
    gate: str = ""
    gate_after: int = 0
    corrupt_after: int = -1
    warm_up_s: float = 0.0
    plants: tuple[str, ...] = ()
    plain_linear: bool = False


def register() -> None:
    """The entry point: called in every process of vLLM, acts in workers when they begin to load."""
    if VARIABLE not in os.environ:
        return
    from vllm.v1.worker.cpu_worker import CPUWorker

    real = CPUWorker.load_model
    if hasattr(real, "__wrapped__"):
        return

    @functools.wraps(real)
    def load_model(worker: Any, *args: Any, **kwargs: Any) -> Any:
        install(Faults(**json.loads(os.environ[VARIABLE])), worker)
        return real(worker, *args, **kwargs)

    CPUWorker.load_model = load_model


def install(faults: Faults, worker: Any) -> None:
    """Put the faults of this rank in place."""
    from vllm.distributed.parallel_state import get_tp_group

    from weightwire.target import discover

    _put(discover, "MARGIN_S", lambda _real: faults.margin_s)
    if faults.rank not in (-1, get_tp_group().rank_in_group):
        return
    if faults.plain_linear:
        import vllm._custom_ops

        _put(vllm._custom_ops, "_supports_onednn", lambda _real: False)
    if faults.warm_up_s:
        _put(worker, "compile_or_warm_up_model", lambda real: _after(real, lambda: time.sleep(faults.warm_up_s)))
    if faults.read_s or faults.gate or faults.corrupt_after >= 0:
        _bad_reads(faults)
    for plant in faults.plants:
        PLANTS[plant]()
    for step in faults.steps:
        _at_step(faults, step)


def _bad_reads(faults: Faults) -> None:
    from weightwire.loaders import member
    from weightwire.transport.faults import Corrupt, Delay, Fault, FaultPlan, FaultyTransport
    from weightwire.transport.opening import Opened

    class Plan(FaultPlan):
        reads = 0

        def decide(self, _connection: int, _read: int) -> Fault | None:
            Plan.reads += 1
            while faults.gate and faults.gate_after < Plan.reads and not Path(faults.gate).exists():
                time.sleep(0.05)
            if 0 <= faults.corrupt_after < Plan.reads:
                return Corrupt()
            return Delay(faults.read_s) if faults.read_s else None

    def opening(real: Callable[..., Opened]) -> Callable[..., Opened]:
        def open_transports(settings: Any, secret: Any, gates: Any, *args: Any) -> Opened:
            opened = real(settings, secret, gates, *args)
            if gates is None:  # those that read
                opened.transports = {name: FaultyTransport(each, Plan()) for name, each in opened.transports.items()}
            return opened

        return open_transports

    _put(member, "open_transports", opening)


def _at_step(faults: Faults, step: str) -> None:
    from weightwire.engines.vllm import reload
    from weightwire.engines.vllm.load import Load
    from weightwire.engines.vllm.loader import PreshardedLoader
    from weightwire.errors import CatalogueError, PeerLost
    from weightwire.target import discover
    from weightwire.target.receiver import Receiver
    from weightwire.target.session import PeerSession

    lost, indescribable = PeerLost("made to fail", "a test did it"), CatalogueError("made to fail", "a test did it")
    places: dict[str, tuple[Any, str, tuple[Any, str, Exception]]] = {
        "find": (Receiver, "find", (discover, "fetch_manifest", lost)),
        "construct": (PreshardedLoader, "create_model", (PreshardedLoader, "create_model", MemoryError("made to"))),
        "fill": (Receiver, "fill", (PeerSession, "__init__", lost)),
        "publish": (Load, "publish_raw", (Load, "describe", indescribable)),
        "swap": (reload, "swap", (reload, "swap", MemoryError("made to"))),
    }
    owner, name, (cause, method, error) = places[step]
    if faults.kind == "fail":
        _put(cause, method, lambda real: _failing(real, error, faults.failures, step))
    else:
        calls = itertools.count(1)
        _put(owner, name, lambda real: _after(real, lambda: _go_wrong(faults, step, next(calls))))


def _go_wrong(faults: Faults, step: str, call: int) -> None:
    if 0 < faults.failures < call:
        return
    _say(f"fault: {faults.kind} at {step}")
    match faults.kind:
        case "crash":
            raise RuntimeError("made to crash")
        case "die":
            os.kill(os.getpid(), signal.SIGKILL)
        case "stop":
            os.kill(os.getpid(), signal.SIGSTOP)
        case "freeze":
            time.sleep(FOREVER)
        case "late":
            time.sleep(faults.late_s)


def _failing(real: Callable[..., Any], error: Exception, failures: int, step: str) -> Callable[..., Any]:
    calls = itertools.count(1)

    def failing(*args: Any, **kwargs: Any) -> Any:
        if failures and next(calls) > failures:
            return real(*args, **kwargs)
        _say(f"fault: fail at {step}")
        raise error

    return failing


def _after(real: Callable[..., Any], what: Callable[[], None]) -> Callable[..., Any]:
    @functools.wraps(real)
    def later(*args: Any, **kwargs: Any) -> Any:
        what()
        return real(*args, **kwargs)

    return later


def _put(owner: Any, name: str, make: Callable[[Any], Any]) -> None:
    assert hasattr(owner, name), f"{owner} has no {name} any more"
    setattr(owner, name, make(getattr(owner, name)))


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
