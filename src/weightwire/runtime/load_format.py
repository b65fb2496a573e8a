"""Where a replica's weights come from, as the operator names it."""

from __future__ import annotations

from enum import Enum

from weightwire.errors import ConfigError


class LoadFormat(Enum):
    """How ``ModelLoader`` fills a model. The numbers are public: settings files may hold them.

    ``AUTO`` reads a checkpoint and slices it. ``DUMMY`` fills with seeded random numbers. ``PRESHARDED`` takes
    what the checkpoint loader puts in place: a rank's own shard, already cut.
    """

    AUTO = 0
    DUMMY = 1
    PRESHARDED = 3

    @classmethod
    def parse(cls, value: object) -> LoadFormat:
        """Return the member that ``value`` names: a member, its number, or its name in any case.

        A bool is refused although Python counts it as an int: ``True`` is a mistake here, not DUMMY.

        Raises:
            ConfigError: naming the value and the legal ones.
        """
        if isinstance(value, cls):
            return value
        if isinstance(value, int) and not isinstance(value, bool):
            for member in cls:
                if member.value == value:
                    return member
        if isinstance(value, str) and value.strip().upper() in cls.__members__:
            return cls[value.strip().upper()]
        legal = ", ".join(f"{member.name.lower()} ({member.value})" for member in cls)
        raise ConfigError(f"unknown load format {value!r}", f"use one of: {legal}")
