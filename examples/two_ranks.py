"""Any ``nn.Module``, two ranks (TP=2): each rank publishes, and each rank receives, its own shard.

Start a metadata server (``weightwire serve --port 8470``), then, in two terminals:

    torchrun --nproc-per-node 2 --master-port 29501 examples/two_ranks.py publish 127.0.0.1:8470
    torchrun --nproc-per-node 2 --master-port 29502 examples/two_ranks.py receive 127.0.0.1:8470

The ranks decide together: all of them take the same weights from peers, or all raise.
"""

from __future__ import annotations

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

import weightwire


class HalfLinear(nn.Module):
    """One rank's half of a 2048 x 2048 projection, split by rows."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(rank)
        self.weight = nn.Parameter(torch.randn(1024, 2048, generator=generator))


def main(role: str, url: str) -> None:
    """Publish until standard input ends, or receive once."""
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    # The ranks' decisions go through a store, never through collectives. torchrun serves one, which outlives the ranks.
    store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False)
    group = weightwire.ranks(dist.PrefixStore("weightwire", store), rank, size)
    where = weightwire.Coordinates(tp_rank=rank, tp_size=size)
    identity = weightwire.module_identity("examples/half", "HalfLinear", "float32", revision="1", tp_size=size)
    model = HalfLinear(rank)
    if role == "publish":
        with weightwire.publish(model, identity, url=url, coordinates=where, group=group):
            print(f"rank {rank} serves, sum {model.weight.sum().item():.4f}", flush=True)
            sys.stdin.read()
    else:
        with torch.no_grad():
            model.weight.fill_(float("nan"))
        report = weightwire.receive(model, identity, url=url, coordinates=where, group=group)
        total = model.weight.sum().item()
        print(f"rank {rank} received {report.nbytes:,} bytes over {report.paths}, sum {total:.4f}", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
