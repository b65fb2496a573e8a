"""Running servers that move to other published weights, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vllm_processes import PROMPTS, Api, Offline
from vllm_replicas import Fleet

from weightwire.config import Settings
from weightwire.engines.vllm.rollout import Rollout
from weightwire.engines.vllm.staging import Request

NEW = 7
"""Seed of the newer weights."""
LONG = [f"{number} " + " ".join(PROMPTS[number:] + PROMPTS[:number]) * 5 for number in range(2)]
"""Prompts of more than one block of the prefix cache (128 tokens on a CPU)."""
QUICK: dict[str, Any] = {"vote_s": 5.0, "stall_timeout": 3, "load_timeout": 20, "wait_for_loading": 5}
LIMIT_S = 30.0
READ_S = 0.5
"""How long one read takes where staging shall take seconds."""


def server(fleet: Fleet, checkpoint: Path, name: str, *, tp: int = 1, **options: Any) -> Api:
    """A server of ordinal 1, from the disk, that can be refreshed."""
    engine, extra = options.pop("engine", {}), options.pop("extra", {})
    made = fleet.api(
        checkpoint,
        name,
        tp=tp,
        extra=QUICK | {"ordinal": 1} | extra,
        env={"VLLM_SERVER_DEV_MODE": "1"},
        engine={"--weight-transfer-config": '{"backend": "weightwire"}', "--enable-prefix-caching": None} | engine,
        **options,
    )
    return made.ready()


def source(fleet: Fleet, checkpoint: Path, name: str, *, tp: int = 1, ordinal: int = 2, count: int = 2) -> Offline:
    """A replica of newer weights, once there are ``count`` to be seen."""
    extra = {"ordinal": ordinal, "role": "source", "revision": f"r{ordinal}"}
    made = fleet.offline(checkpoint, name, tp=tp, extra=extra).ready()
    fleet.until(name, count, LIMIT_S, made)
    return made


def move(replica: Api, fleet: Fleet | None = None, *, swap_s: float = 60.0, **request: Any) -> dict[str, float]:
    """What an operator runs; with ``fleet``, its weights arrive while the server answers."""
    settings = Settings(url=fleet.place.url, secret_file=fleet.place.state / "secret") if fleet else None
    asked = Request(**request)
    return Rollout(
        url=replica.url, request=asked, stage_s=90.0, drain_s=LIMIT_S, swap_s=swap_s, metadata=settings
    ).run()


def answers(replica: Api | Offline) -> Any:
    return replica.tokens(), replica.tokens(LONG, 8)
