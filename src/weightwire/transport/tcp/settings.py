"""Bounds of the tcp backend: every wait and every count has one here."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from weightwire.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class TcpSettings:
    """All positive; ``_s`` are seconds.

    Attributes:
        greeting_s: longest that a client may take to prove itself.
        greetings: most clients that are proving themselves at a time; one more ends the oldest.
        sessions: most clients served at a time; one more is refused.
        idle_s: a client that asks for nothing for so long is let go.
        send_stall_s: a client that takes no byte for so long is let go.
        dead_host_s: a host that acknowledges nothing for so long is given up by the kernel.
        close_s: longest that ``close`` waits for our own threads.

    Raises:
        ConfigError: a bound that is not positive.
    """

    greeting_s: float = 5.0
    greetings: int = 64
    sessions: int = 512
    idle_s: float = 600.0
    send_stall_s: float = 60.0
    dead_host_s: float = 20.0
    close_s: float = 5.0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"tcp setting {field.name} is {value}", "give a positive number")
