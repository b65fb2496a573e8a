"""The ranks of one replica: how a process learns which one it is, and how they sum and gather (gloo, host memory)."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import Any, Protocol, cast

import torch

# torch.distributed re-exports these, but not in a way that a type checker accepts
from torch._C._distributed_c10d import (
    BroadcastOptions,
    HashStore,
    PrefixStore,
    ProcessGroupGloo,
    Store,
    TCPStore,
    Work,
)

from weightwire.errors import ConfigError, RankLost
from weightwire.runtime.mapping import TpCoordinates

logger = logging.getLogger(__name__)

DEFAULT_TIMEOUT_S = 120.0
_LOOPBACK = "127.0.0.1"

# launcher -> (rank, world size, local rank); the first one that is set wins, and all that are set must agree
_LAUNCHERS = {
    "torchrun": ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
    "mpirun": ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE", "OMPI_COMM_WORLD_LOCAL_RANK"),
    "pmi": ("PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID"),
}


@dataclass(frozen=True)
class RankEnvironment:
    """What a launcher told this process: its rank, and where the ranks' store is.

    ``store_is_served``: the launcher serves the store itself (torchrun's agent does), so rank 0 must not.
    ``attempt`` counts restarts of one launch, so that a restarted replica never reads its predecessor's keys.
    """

    rank: int
    world_size: int
    local_rank: int
    host: str = _LOOPBACK
    port: int = 0
    store_is_served: bool = False
    attempt: int = 0


def _whole(environ: Mapping[str, str], name: str) -> int | None:
    text = environ.get(name)
    if text is None:
        return None
    if not text.isascii() or not text.isdigit():
        raise ConfigError(f"environment variable {name} is {text!r}", "it must be a whole number")
    return int(text)


def _read_launcher(environ: Mapping[str, str], names: tuple[str, str, str]) -> tuple[int, int, int] | None:
    rank, size = _whole(environ, names[0]), _whole(environ, names[1])
    if rank is None and size is None:
        return None
    if rank is None or size is None:
        missing = names[0] if rank is None else names[1]
        raise ConfigError(f"environment variable {missing} is missing", f"{names[0]} and {names[1]} go together")
    if not 0 <= rank < size:
        raise ConfigError(f"{names[0]}={rank} is not below {names[1]}={size}", "start the ranks with one launcher")
    local = _whole(environ, names[2])
    return rank, size, rank if local is None else local


def discover_rank(environ: Mapping[str, str] | None = None) -> RankEnvironment:
    """Read this process's rank from what torchrun, mpirun or a PMI launcher exported; rank 0 of 1 where none did.

    Several ranks need ``MASTER_ADDR`` (default: this host) and ``MASTER_PORT``.

    Raises:
        ConfigError: half of a pair is missing, a value is not a number, two launchers contradict each other, or the
            port is missing. Never guessed: a wrong rank loads a wrong shard.
    """
    environ = os.environ if environ is None else environ
    found = {name: _read_launcher(environ, names) for name, names in _LAUNCHERS.items()}
    told = {name: value for name, value in found.items() if value is not None}
    if len({value[:2] for value in told.values()}) > 1:
        raise ConfigError(f"the launchers {' and '.join(told)} name different ranks", "start with one launcher only")
    rank, size, local = next(iter(told.values()), (0, 1, 0))
    if size == 1:
        return RankEnvironment(rank, size, local)
    port = _whole(environ, "MASTER_PORT")
    if port is None or not 0 < port < 65536:
        raise ConfigError(
            f"MASTER_PORT is {port!r} for {size} ranks", "export MASTER_PORT (mpirun: -x MASTER_PORT=29500)"
        )
    served = environ.get("TORCHELASTIC_USE_AGENT_STORE", "False")
    if served not in ("True", "False"):
        raise ConfigError(f"TORCHELASTIC_USE_AGENT_STORE is {served!r}", "it must be True or False")
    attempt = _whole(environ, "TORCHELASTIC_RESTART_COUNT") or 0
    host = environ.get("MASTER_ADDR", _LOOPBACK)
    return RankEnvironment(rank, size, local, host, port, served == "True", attempt)


def serve_store(host: str = _LOOPBACK, timeout_s: float = DEFAULT_TIMEOUT_S) -> TCPStore:
    """A store for a launcher that starts ranks itself: served here, on a port that the system chooses (``.port``).

    Give the ranks ``MASTER_ADDR``, ``MASTER_PORT`` and ``TORCHELASTIC_USE_AGENT_STORE=True``. Lives while referenced.
    """
    return TCPStore(host, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


class _Collectives(Protocol):
    """The part of gloo's process group used here; torch's stubs leave it out."""

    def allgather(self, outputs: list[list[torch.Tensor]], inputs: list[torch.Tensor]) -> Work: ...
    def broadcast(self, tensors: list[torch.Tensor], options: BroadcastOptions) -> Work: ...
    def send(self, tensors: list[torch.Tensor], to: int, tag: int) -> Work: ...
    def recv(self, tensors: list[torch.Tensor], source: int, tag: int) -> Work: ...


def _gloo(store: Store, coordinates: TpCoordinates, host: str, bound: timedelta) -> _Collectives:
    gloo: Any = ProcessGroupGloo
    if host not in (_LOOPBACK, "localhost"):
        return cast("_Collectives", gloo(store, coordinates.rank, coordinates.size, bound))
    # ranks of one host talk over loopback, whatever its own name resolves to
    options = gloo._Options()  # noqa: SLF001 - the only way to choose gloo's interface
    options._devices = [gloo.create_device(hostname=_LOOPBACK)]  # noqa: SLF001 - as above
    options._timeout = bound  # noqa: SLF001 - as above
    return cast("_Collectives", gloo(store, coordinates.rank, coordinates.size, options))


_Join = Callable[[Store, TpCoordinates], _Collectives]
"""Meets the ranks that have the same store, as one of them."""


class TpGroup(AbstractContextManager["TpGroup"]):
    """The ranks of one replica, or those of them along one axis (``part``): tensors, or the stages of a pipeline.

    One rank alone has no process group and never communicates.

    ``store`` is a key/value store that all ranks of the group reach (write-once decisions belong there, not into
    collectives); for one rank alone it lives in this process. Collectives have a bound each; after one has failed
    the group is of no further use.
    """

    def __init__(
        self, coordinates: TpCoordinates, store: Store, backend: _Collectives | None, join: _Join | None = None
    ) -> None:
        self.coordinates = coordinates
        self.store = store
        self._backend = backend
        self._join = join
        self._parts: dict[str, TpGroup] = {}

    @classmethod
    def single(cls) -> TpGroup:
        """The group of a replica with one rank."""
        return cls(TpCoordinates(size=1, rank=0), HashStore(), None)

    @classmethod
    def offline(cls, coordinates: TpCoordinates) -> TpGroup:
        """One rank by itself: enough to build and fill its part of a model, not to run it (collectives raise)."""
        return cls(coordinates, HashStore(), None)

    @classmethod
    def connect(cls, env: RankEnvironment, timeout_s: float = DEFAULT_TIMEOUT_S) -> TpGroup:
        """Meet the other ranks at ``env.host:env.port``; every wait, here and in collectives, ends after ``timeout_s``.

        Raises:
            RankLost: a rank, or the store, did not answer in time.
        """
        if env.world_size == 1:
            return cls.single()
        bound = timedelta(seconds=timeout_s)
        serves = env.rank == 0 and not env.store_is_served
        try:
            tcp = TCPStore(env.host, env.port, is_master=serves, timeout=bound, wait_for_workers=False)
            store = PrefixStore(f"weightwire/{env.attempt}", tcp)
            everybody = TpCoordinates(size=env.world_size, rank=env.rank)

            def join(prefix: Store, coordinates: TpCoordinates) -> _Collectives:
                return _gloo(prefix, coordinates, env.host, bound)

            backend = join(PrefixStore("gloo", store), everybody)
        except RuntimeError as error:
            raise RankLost(
                f"rank {env.rank} of {env.world_size} did not meet the others at {env.host}:{env.port} "
                f"within {timeout_s:g} s",
                "see that every rank was started and that the address is reachable",
            ) from error
        logger.debug("rank %d of %d joined at %s:%d", env.rank, env.world_size, env.host, env.port)
        return cls(everybody, store, backend, join)

    def part(self, name: str, coordinates: TpCoordinates) -> TpGroup:
        """Those of these ranks that call the part ``name``, as one of them; the same object for the same name.

        Every rank of a part asks for it, and all ranks ask for their parts in one order. Closed with the whole.

        Raises:
            RankLost: a rank of the part did not come in time.
        """
        if coordinates == self.coordinates:
            return self
        if name not in self._parts:
            try:
                backend = None
                if self._join is not None and coordinates.size > 1:
                    backend = self._join(PrefixStore(f"gloo/{name}", self.store), coordinates)
            except RuntimeError as error:
                raise RankLost(
                    f"rank {self.rank} of {self.size} did not meet the others of {name}", "see that every rank runs"
                ) from error
            self._parts[name] = TpGroup(coordinates, PrefixStore(name, self.store), backend)
        return self._parts[name]

    @property
    def rank(self) -> int:
        """This process's rank in the group."""
        return self.coordinates.rank

    @property
    def size(self) -> int:
        """Number of ranks in the group."""
        return self.coordinates.size

    def all_reduce(self, tensor: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in ``tensor``'s shape and dtype; the same bytes on every rank.

        Gathered and then added in rank order, half precision in float32: the order of additions, and so the result,
        depends on nothing but the ranks' values.
        """
        if self.size == 1:
            return tensor
        total, *others = (
            part.to(torch.float32) if part.is_floating_point() else part for part in self.all_gather(tensor)
        )
        for other in others:
            total += other
        return total.to(tensor.dtype)

    def all_gather(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """Every rank's ``tensor`` (one shape, one dtype), in rank order."""
        if self.size == 1:
            return [tensor]
        mine = tensor.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        self._finish(lambda backend: backend.allgather([parts], [mine]))
        return parts

    def broadcast(self, tensor: torch.Tensor, src: int = 0) -> torch.Tensor:
        """Rank ``src``'s ``tensor``, written into everyone's ``tensor`` (contiguous), which is returned."""
        if self.size > 1:
            options = BroadcastOptions()
            options.rootRank = src
            self._finish(lambda backend: backend.broadcast([tensor], options))
        return tensor

    def send(self, tensor: torch.Tensor, to: int) -> None:
        """Give ``tensor`` to rank ``to``, which receives it; returns when it may change."""
        contiguous = tensor.contiguous()
        self._finish(lambda backend: backend.send([contiguous], to, 0))

    def receive(self, into: torch.Tensor, source: int) -> torch.Tensor:
        """What rank ``source`` sends, written to ``into`` (contiguous, of the same shape and dtype), returned."""
        self._finish(lambda backend: backend.recv([into], source, 0))
        return into

    def _finish(self, start: Callable[[_Collectives], Work]) -> None:
        if self._backend is None:
            raise RankLost(f"rank {self.rank} of {self.size} is not connected to the others", "connect the group first")
        try:
            start(self._backend).wait()
        except RuntimeError as error:
            raise RankLost(
                f"rank {self.rank} of {self.size} lost the others in a collective operation",
                "see which rank ended first; the replica must be started again",
            ) from error

    def close(self) -> None:
        """Leave the group, and its parts. Idempotent."""
        for part in self._parts.values():
            part.close()
        self._backend = self._join = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
