"""One rank of a replica that ``stage_cost.py`` measures: it loads, tells what that cost, and serves."""

from __future__ import annotations

import gc
import io
import os
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from processes import Line
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightwire.config import ReplicaRole, Settings
from weightwire.engines.native.load import Load
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.rank import Rank
from weightwire.runtime.distributed import RankEnvironment, TpGroup, serve_store
from weightwire.source.snapshot import own_tensors, storages
from weightwire.types import Stage

SAMPLE_S = 0.002
LOAD_S = 300.0


class Anonymous(TorchDispatchMode):
    """Anonymous memory of this process beyond what it had at first, sampled from then on.

    A thread that samples may wait for a core while the peak comes and goes, so inside ``with`` the thread that entered
    also looks after each torch operation, when operands and result are there together.
    """

    def __init__(self) -> None:
        super().__init__()
        gc.collect()
        self._base = _anonymous()
        self.peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        found = operation(*args, **(kwargs or {}))
        self._look()
        return found

    def _sample(self) -> None:
        while True:
            self._look()
            time.sleep(SAMPLE_S)

    def _look(self) -> None:
        self.peak = max(self.peak, _anonymous() - self._base)


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    at = status.index("RssAnon:") + len("RssAnon:")
    return int(status[at : status.index("kB", at)]) * 1024


class _Nothing(TorchDispatchMode):
    def __torch_dispatch__(self, operation: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return operation(*args, **(kwargs or {}))


def prepare() -> None:
    """Before processes are forked: import what torch imports when operations are looked at (70 MiB)."""
    with _Nothing():
        torch.empty(1)
    gc.freeze()  # what a child collects is then its own


def store(line: Line) -> None:
    """Where the ranks of one replica meet, until the line ends."""
    served = serve_store()
    line.say("ready", port=served.port)
    line.hear()


def settings(url: str, secret_file: str, options: ReplicaOptions) -> Settings:
    """Of a rank that serves and never asks, or of one that takes what ``options`` name from a peer and keeps it."""
    return Settings(
        url=url,
        secret_file=Path(secret_file),
        transports=("tcp",),
        role=ReplicaRole.TARGET if options.load_format == "presharded" else ReplicaRole.SOURCE,
        stages=(Stage(options.publish_stage),),
        load_timeout=LOAD_S,
    )


def rank(line: Line, at: int, port: int, given: dict[str, Any], url: str, secret_file: str) -> None:
    """Rank ``at`` of the replica that ``given`` describes; loads, tells what that cost, and serves until killed."""
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()  # the rank's own events
    options = ReplicaOptions(**given)
    memory = Anonymous()
    place = RankEnvironment(at, options.world_size, at, port=port, store_is_served=True)
    this = Rank(options, settings(url, secret_file, options), TpGroup.connect(place))
    with memory:
        this.load()
    time.sleep(10 * SAMPLE_S)
    own = _bytes(this.target.model)
    told = {"own": own, "over": memory.peak - own, "origin": this.target.live.report.source}
    line.say("loaded", **told, **_held(this.target))
    line.hear()
    os._exit(0)


def _held(load: Load) -> dict[str, int]:
    """What copy-on-transform says, and what there is to it; zeros where raw bytes were not published."""
    snapshot, publication = load.hooks._snapshot, load.hooks.publication  # noqa: SLF001  (what is measured)
    if snapshot is None or publication is None:
        return dict.fromkeys(("held", "clone", "changed", "module"), 0)
    owners = publication._held_now().memory.owners  # noqa: SLF001  (as above)
    assert isinstance(owners, list)
    raw = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in owners}
    model = load.model
    now = storages(tensor for module in model.modules() for tensor in own_tensors(module).values())
    return {
        "held": snapshot.held.nbytes,
        "clone": snapshot.held.peak_clone,
        "changed": sum(nbytes for pointer, nbytes in raw.items() if pointer not in now),
        "module": max((sum(t.nbytes for t in own_tensors(each).values()) for each in _changing(model)), default=0),
    }


def _changing(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose transforms do something."""
    for module in model.modules():
        declares = getattr(module, "transform_effect", None)
        if declares is not None and declares():
            yield module


def _bytes(model: nn.Module) -> int:
    tensors = [tensor for module in model.modules() for tensor in own_tensors(module).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
