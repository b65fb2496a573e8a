"""Where a worker stands in its replica, and the store in which a replica's workers decide together."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from datetime import timedelta

from torch._C._distributed_c10d import PrefixStore, TCPStore  # re-exported elsewhere, but not to type checkers
from torch.distributed import distributed_c10d
from vllm.config import VllmConfig
from vllm.distributed.parallel_state import get_pp_group, get_tp_group, get_world_group
from vllm.utils.network_utils import get_ip

from weightwire.errors import ConfigError, RankLost
from weightwire.metadata.decision import Group, TorchDecisions
from weightwire.types import Coordinates

STORE_S = 60.0
"""Seconds that a worker waits for another one's store: workers start within moments of each other."""

_stores: dict[str, TCPStore] = {}
_attempts: dict[str, itertools.count[int]] = {}


@dataclass(frozen=True, slots=True)
class Place:
    """One worker among the workers of its replica (of one data-parallel engine).

    Attributes:
        coordinates: along every axis.
        rank: in the replica.
        size: of the replica.
        replica: index of the data-parallel engine.
    """

    coordinates: Coordinates
    rank: int
    size: int
    replica: int

    @classmethod
    def of(cls, config: VllmConfig) -> Place:
        """This worker's. Legal once vLLM's groups exist, as they do when a loader is called.

        Raises:
            ConfigError: a parallel layout that is not carried; names it.
        """
        tp, pp, parallel = get_tp_group(), get_pp_group(), config.parallel_config
        experts = bool(parallel.enable_expert_parallel)
        refused = {
            "data parallelism with experts spread over it": experts and parallel.data_parallel_size > 1,
            "prefill context parallelism": getattr(parallel, "prefill_context_parallel_size", 1) > 1,
            "expert load balancing (EPLB)": bool(parallel.enable_eplb),
        }
        for name, asked in refused.items():
            if asked:
                raise ConfigError(f"{name} is not carried yet", "turn it off, or use another load format")
        coordinates = Coordinates(
            tp_rank=tp.rank_in_group,
            tp_size=tp.world_size,
            pp_rank=pp.rank_in_group,
            pp_size=pp.world_size,
            ep_rank=tp.rank_in_group if experts else 0,
            ep_size=tp.world_size if experts else 1,
        )
        rank = pp.rank_in_group * tp.world_size + tp.rank_in_group
        return cls(coordinates, rank, pp.world_size * tp.world_size, parallel.data_parallel_index)


def group(place: Place, what: str, vote_s: float) -> Group:
    """The replica's workers for one more load of ``what`` (each load is an epoch of its own).

    Args:
        place: this worker's.
        what: names the kind of load.
        vote_s: seconds to wait for the others at one step.

    No collective of the engine is used: one that timed out would poison the engine's groups (hazard H67).

    Raises:
        RankLost: another worker did not come.
    """
    epoch = f"{what}/{next(_attempts.setdefault(what, itertools.count()))}"
    if place.size == 1:
        return Group.solo()
    return Group(TorchDecisions(_store(place), vote_s), place.rank, place.size, epoch, vote_s)


def _store(place: Place) -> TCPStore:
    """A store of the replica's own. Its address goes through torch's rendezvous store, which all workers reach."""
    key = f"replica {place.replica}"
    if key in _stores:
        return _stores[key]
    rendezvous = PrefixStore("weightwire", distributed_c10d._get_default_store())  # noqa: SLF001  (torch has no other)
    try:
        if place.rank == 0:
            store = TCPStore(get_ip(), 0, is_master=True, wait_for_workers=False)
            rendezvous.set(key, f"{get_ip()} {store.port}")
        else:
            rendezvous.wait([key], timedelta(seconds=STORE_S))
            host, port = rendezvous.get(key).decode().split()
            store = TCPStore(host, int(port), timeout=timedelta(seconds=STORE_S))
    except RuntimeError as error:  # what torch's stores raise for everything; DistStoreError is one
        problem = f"worker {place.rank} cannot reach the workers' decision store"
        raise RankLost(problem, "see worker 0's log; start the replica again") from error
    _stores[key] = store
    assert get_world_group().world_size >= place.size
    return store
