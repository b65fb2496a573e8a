"""A metadata server as ``weightwire serve`` runs it, and something published there."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli_process import COMMAND, environment

from weightwire.identity.identity import Identity
from weightwire.types import Coordinates
from weightwire.wire.messages import PublicationRecord, PublicationState

IDENTITY = Identity(model_id="acme/tiny", architecture="Tiny", dtype="uint8", engine="module", tp_size=2)


@dataclasses.dataclass(frozen=True)
class Serving:
    """A running ``weightwire serve``."""

    process: subprocess.Popen[str]
    url: str
    metrics: str | None


@contextlib.contextmanager
def serving(state: Path, *options: str) -> Iterator[Serving]:
    """Start it on a free port, wait for its line, and end it."""
    command = [*COMMAND, "serve", "--json", *options]
    with (
        (state / "serve.log").open("w") as log,
        subprocess.Popen(command, env=environment(state), stdout=subprocess.PIPE, stderr=log, text=True) as process,
    ):
        assert process.stdout is not None
        try:
            told = json.loads(process.stdout.readline() or "null")
            assert told is not None, (state / "serve.log").read_text()
            yield Serving(process, told["url"], told["metrics"])
        finally:
            process.kill()


def publication(rank: int, **fields: Any) -> PublicationRecord:
    """What rank ``rank`` of a replica of two would register."""
    coordinates = Coordinates(tp_rank=rank, tp_size=2)
    given: dict[str, Any] = {
        "shard_key": IDENTITY.shard_key(coordinates),
        "replica_key": IDENTITY.replica_key,
        "family_key": IDENTITY.family_key,
        "model_id": IDENTITY.model_id,
        "identity": json.dumps(IDENTITY.to_dict()),
        "coordinates": coordinates,
        "incarnation": f"{rank}" * 32,
        "replica_incarnation": "f" * 32,
        "world_size": 2,
        "endpoints": ("127.0.0.1:9",),
        "content_id": "c" * 64,
        "weights_id": "e" * 64,
        "nbytes": 1_500_000,
        "state": PublicationState.READY,
        "fraction": 1.0,
        "host": "this",
    }
    return PublicationRecord(**(given | fields))
