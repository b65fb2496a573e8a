"""Bounds of the tcp backend (every wait and every count has one here), and how it uses a link."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

from weightwire.errors import ConfigError

STREAMS = 4
"""Connections to one peer that pay, in reads of 16 MiB (loopback, both ends on it).

On 16 cores 1, 2 and 4 streams ran at 3.4, 6.2 and 12 GB/s (``bench/tcp.py``). On two cores verified loads of 1 GiB took
159, 148 and 147 ms over 2, 3 and 4, and half of those over 2 another 20 ms more: with two, a core is idle whenever one
is hashing. What suits a link better is measured by ``weightwire bench tune``.
"""

READ_BYTES = 16 * 1024 * 1024
"""What one read should ask for: a request costs both sides a round of the interpreter, whatever its size."""


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
        streams: connections to one peer that pay.
        read_bytes: what one read should ask for.

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
    streams: int = STREAMS
    read_bytes: int = READ_BYTES

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if not value > 0:
                raise ConfigError(f"tcp setting {field.name} is {value}", "give a positive number")
