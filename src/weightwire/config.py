"""Settings of one process, and the one table of environment variables that they can come from.

The table *is* the :class:`Settings` dataclass: every field names its variable, its parser, its default and one line of
documentation; ``VARIABLES`` and ``docs/reference.md`` are made from it. Values are parsed strictly: ``"0"`` is false,
``"maybe"`` is an error, and so is a misspelt name. No other module reads a ``WEIGHTWIRE_*`` variable.

Some settings have no variable. What one source may give away (``max_rate``, ``max_readers``) belongs to that source: a
variable is inherited by every process beside and below it, and each would take the whole cap for its own. How ``tcp``
uses a link (``tcp_streams``, ``tcp_read_bytes``) is a measurement's result and comes from its file (``tuning``).
"""

from __future__ import annotations

import difflib
import enum
import math
import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

from weightwire.errors import ConfigError
from weightwire.tuning import load, tuning_path
from weightwire.types import Stage

PREFIX = "WEIGHTWIRE_"
TRANSPORT_NAMES = ("nixl", "tcp", "inproc")
LOG_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")
MAX_SECONDS = 7 * 24 * 3600.0
"""Upper end of every bound: a wait that nobody would sit out is a mistake."""

_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_UNITS = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12} | {
    "kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40, "kbit": 125, "mbit": 125_000, "gbit": 125_000_000
}  # fmt: skip
_RATE = re.compile(r"(?P<number>[0-9]+(\.[0-9]*)?(e[0-9]{1,2})?)\s*(?P<unit>[A-Za-z]*)(/s)?")
MIN_RATE = 1e5
MAX_RATE = 1e15
"""Ends of a bandwidth cap, bytes a second: below the lower one nobody could load anything."""
MAX_READERS = 1024
MAX_STREAMS = 16
MIN_READ_BYTES, MAX_READ_BYTES = 1 << 20, 64 << 20

_HOST_PORT = re.compile(r"(?P<host>\[[0-9A-Fa-f:.%\w]+\]|[A-Za-z0-9._-]+):(?P<port>[0-9]{1,5})")
_NEAR = 0.75
"""How alike (difflib) an unknown name must be to a known one to be taken for a slip of the pen."""


class ReplicaRole(enum.StrEnum):
    """Which part this replica plays; not to be confused with ``types.Role``, which model of it a shard belongs to."""

    AUTO = "auto"
    """Pull where a source is found and publish then too; read the disk and publish where there is none."""
    SOURCE = "source"
    """Read the disk and publish; never pull."""
    TARGET = "target"
    """Pull; do not publish."""
    OFF = "off"
    """Neither: read the disk."""


class OnMiss(enum.StrEnum):
    """What a target does where no peer can serve it."""

    DISK = "disk"
    FAIL = "fail"


class _Illegal(Exception):
    """A text that a parser refuses; the argument says what would be legal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Variable:
    """One row of the table.

    Attributes:
        name: of the environment variable; empty for a setting that only arguments give.
        parse: text to value; raises ``_Illegal``.
        legal: what ``parse`` takes, for messages and documentation.
        doc: one line.
        show: whether an illegal value may be repeated in a message (it may be a secret put in the wrong place).
    """

    name: str
    parse: Callable[[str], Any]
    legal: str
    doc: str
    show: bool = True

    def read(self, text: str, called: str) -> Any:
        """The value of ``text``.

        Args:
            text: as the user wrote it.
            called: how the user knows it: the variable's or an argument's name.

        Raises:
            ConfigError: it is not legal; names ``called``, the value and what is legal.
        """
        try:
            return self.parse(text.strip())
        except _Illegal as reason:
            value = repr(text) if self.show else "what it holds (not shown)"
            detail = f" ({reason})" if str(reason) else ""
            raise ConfigError(f"{called} cannot be {value}{detail}", f"legal: {self.legal}") from None


def _bool(text: str) -> bool:
    lowered = text.lower()
    if lowered not in _TRUE | _FALSE:
        raise _Illegal
    return lowered in _TRUE


def _choice(values: tuple[str, ...]) -> Callable[[str], str]:
    by_folded = {value.lower(): value for value in values}

    def parse(text: str) -> str:
        if text.lower() not in by_folded:
            raise _Illegal
        return by_folded[text.lower()]

    return parse


def _ordered(values: tuple[str, ...]) -> Callable[[str], tuple[str, ...]]:
    one = _choice(values)

    def parse(text: str) -> tuple[str, ...]:
        found = tuple(one(part.strip()) for part in text.split(","))
        if len(set(found)) != len(found):
            raise _Illegal("one is named twice")
        return found

    return parse


def _stages(text: str) -> tuple[Stage, ...]:
    return tuple(Stage(name) for name in _ordered(tuple(Stage))(text))


def _enum(kind: type[enum.StrEnum]) -> Callable[[str], enum.StrEnum]:
    one = _choice(tuple(kind))
    return lambda text: kind(one(text))


def _seconds(*, zero: bool) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise _Illegal from None
        if not math.isfinite(value) or not 0 <= value <= MAX_SECONDS or (value == 0 and not zero):
            raise _Illegal
        return value

    return parse


def _rate(text: str) -> float:
    match = _RATE.fullmatch(text)
    unit = match["unit"] if match else ""
    if match is None or (unit and unit.lower() not in _UNITS):
        raise _Illegal
    if re.fullmatch("[kMGT]?b", unit):
        raise _Illegal(f"{unit} may be bits or bytes: write {unit[:-1]}B or {unit[:-1]}bit")
    value = float(match["number"]) * _UNITS[unit.lower() or "b"]
    if value and not MIN_RATE <= value <= MAX_RATE:
        raise _Illegal
    return value


def _whole(most: int) -> Callable[[str], int]:
    def parse(text: str) -> int:
        if not re.fullmatch("[0-9]{1,9}", text) or int(text) > most:
            raise _Illegal
        return int(text)

    return parse


def _host_port(text: str) -> str:
    match = _HOST_PORT.fullmatch(text)
    if match is None or not 1 <= int(match["port"]) <= 65535:
        raise _Illegal
    return text


def _address(text: str) -> str:
    if not re.fullmatch(r"[0-9A-Za-z._:%-]+", text):
        raise _Illegal
    return text


def _path(text: str) -> Path:
    if "/" not in text or "\0" in text:
        raise _Illegal
    return Path(text).expanduser()


def _argument(parse: Callable[[str], Any], *, legal: str, doc: str) -> dict[str, Variable]:
    return {_ROW: Variable(name="", parse=parse, legal=legal, doc=doc)}


def _env(name: str, parse: Callable[[str], Any], *, legal: str, doc: str, show: bool = True) -> dict[str, Variable]:
    return {_ROW: Variable(name=name, parse=parse, legal=legal, doc=doc, show=show)}


_ROW = "variable"
_BOOL = "1, true, yes, on, 0, false, no, off"
_SECONDS = f"seconds, more than 0, at most {MAX_SECONDS:g}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """What a process was told, checked. Immutable; make one with :meth:`from_env`.

    Raises:
        ConfigError: two settings contradict each other.
    """

    url: str | None = field(
        default=None,
        metadata=_env(
            "WEIGHTWIRE_URL",
            _host_port,
            legal="host:port, such as 10.0.0.5:8471 or [fd00::5]:8471",
            doc="Where the metadata server listens. Unset: no metadata server.",
        ),
    )
    secret_file: Path | None = field(
        default=None,
        metadata=_env(
            "WEIGHTWIRE_SECRET_FILE",
            _path,
            legal="the path of a file, with at least one /",
            doc="File with the shared secret (mode 0600). Unset: the user's own, made on first use.",
            show=False,
        ),
    )
    transports: tuple[str, ...] = field(
        default=("nixl", "tcp"),
        metadata=_env(
            "WEIGHTWIRE_TRANSPORTS",
            _ordered(TRANSPORT_NAMES),
            legal=f"{', '.join(TRANSPORT_NAMES)}, separated by commas, best first",
            doc="Transports to use, best first. One that is not available here is named in the report.",
        ),
    )
    role: ReplicaRole = field(
        default=ReplicaRole.AUTO,
        metadata=_env(
            "WEIGHTWIRE_ROLE",
            _enum(ReplicaRole),
            legal=", ".join(ReplicaRole),
            doc="Part of this replica: whichever is possible, publish only, pull only, or neither.",
        ),
    )
    stages: tuple[Stage, ...] = field(
        default=(Stage.LOADED, Stage.PROCESSED),
        metadata=_env(
            "WEIGHTWIRE_STAGES",
            _stages,
            legal=f"{', '.join(Stage)}, separated by commas, preferred first",
            doc="Stages that a target accepts, and a source may publish, preferred first.",
        ),
    )
    on_miss: OnMiss = field(
        default=OnMiss.DISK,
        metadata=_env(
            "WEIGHTWIRE_ON_MISS",
            _enum(OnMiss),
            legal=", ".join(OnMiss),
            doc="Where no peer can serve: read the disk, or fail.",
        ),
    )
    require_rdma: bool = field(
        default=False,
        metadata=_env(
            "WEIGHTWIRE_REQUIRE_RDMA",
            _bool,
            legal=_BOOL,
            doc="Refuse every path that is not RDMA or NVLink, instead of only reporting it.",
        ),
    )
    bind: str | None = field(
        default=None,
        metadata=_env(
            "WEIGHTWIRE_BIND",
            _address,
            legal="an address or name of this host",
            doc="Address that this rank's endpoints listen on. Unset: the one facing the metadata server.",
        ),
    )
    advertise: str | None = field(
        default=None,
        metadata=_env(
            "WEIGHTWIRE_ADVERTISE",
            _address,
            legal="an address or name under which other hosts reach this one",
            doc="Address that other hosts are told. Unset: the one listened on.",
        ),
    )
    load_timeout: float = field(
        default=600.0,
        metadata=_env(
            "WEIGHTWIRE_LOAD_TIMEOUT",
            _seconds(zero=False),
            legal=_SECONDS,
            doc="Seconds that one load may take in all.",
        ),
    )
    stall_timeout: float = field(
        default=10.0,
        metadata=_env(
            "WEIGHTWIRE_STALL_TIMEOUT",
            _seconds(zero=False),
            legal=_SECONDS,
            doc="Seconds without progress after which a peer is given up.",
        ),
    )
    accept_unpinned: bool = field(
        default=False,
        metadata=_env(
            "WEIGHTWIRE_ACCEPT_UNPINNED",
            _bool,
            legal=_BOOL,
            doc="Take weights of any revision where none is named; the report says so in capitals.",
        ),
    )
    wait_for_loading: float = field(
        default=300.0,
        metadata=_env(
            "WEIGHTWIRE_WAIT_FOR_LOADING",
            _seconds(zero=True),
            legal=f"seconds, at most {MAX_SECONDS:g}; 0 turns it off",
            doc="Seconds to wait for a replica that is still loading and makes progress.",
        ),
    )
    untrusted_readers: bool = field(
        default=False,
        metadata=_env(
            "WEIGHTWIRE_UNTRUSTED_READERS",
            _bool,
            legal=_BOOL,
            doc="Readers must not be able to write: refuses nixl, whose read leases could be used to.",
        ),
    )
    log_level: str = field(
        default="INFO",
        metadata=_env(
            "WEIGHTWIRE_LOG_LEVEL",
            _choice(LOG_LEVELS),
            legal=", ".join(LOG_LEVELS),
            doc="Least severe log line that is written.",
        ),
    )
    max_rate: float = field(
        default=0.0,
        metadata=_argument(
            _rate,
            legal="bytes a second, such as 200MB/s, 1.5GB or 10Gbit; at least 100kB; 0 for no bound",
            doc="Bandwidth cap of each source process: what all its readers together are served.",
        ),
    )
    max_readers: int = field(
        default=0,
        metadata=_argument(
            _whole(MAX_READERS),
            legal=f"a number up to {MAX_READERS}; 0 for no bound",
            doc="How many processes may read from one source process at a time; others wait or read elsewhere.",
        ),
    )

    tcp_streams: int = field(
        default=0,
        metadata=_argument(
            _whole(MAX_STREAMS),
            legal=f"a number up to {MAX_STREAMS}; 0 for what suits most links",
            doc="Connections to one source over tcp; `weightwire bench tune` finds and sets it.",
        ),
    )
    tcp_read_bytes: int = field(
        default=0,
        metadata=_argument(
            _whole(MAX_READ_BYTES),
            legal=f"bytes, {MIN_READ_BYTES} to {MAX_READ_BYTES}; 0 for what suits most links",
            doc="What one read over tcp asks for; `weightwire bench tune` finds and sets it.",
        ),
    )

    def __post_init__(self) -> None:
        if not 0 <= self.tcp_streams <= MAX_STREAMS:
            raise ConfigError(f"tcp_streams cannot be {self.tcp_streams}", f"legal: {SETTINGS['tcp_streams'].legal}")
        if self.tcp_read_bytes and not MIN_READ_BYTES <= self.tcp_read_bytes <= MAX_READ_BYTES:
            legal = SETTINGS["tcp_read_bytes"].legal
            raise ConfigError(f"tcp_read_bytes cannot be {self.tcp_read_bytes}", f"legal: {legal}")
        if self.max_rate and not MIN_RATE <= self.max_rate <= MAX_RATE:
            raise ConfigError(f"max_rate cannot be {self.max_rate}", f"legal: {SETTINGS['max_rate'].legal}")
        if not 0 <= self.max_readers <= MAX_READERS:
            raise ConfigError(f"max_readers cannot be {self.max_readers}", f"legal: {SETTINGS['max_readers'].legal}")
        if not self.transports:
            raise ConfigError("no transport is named", f"name some of: {', '.join(TRANSPORT_NAMES)}")
        if self.require_rdma and self.untrusted_readers:
            raise ConfigError(
                "require_rdma and untrusted_readers contradict each other: RDMA means nixl, whose readers can write",
                "unset WEIGHTWIRE_REQUIRE_RDMA or WEIGHTWIRE_UNTRUSTED_READERS",
            )
        if self.require_rdma and "nixl" not in self.transports:
            raise ConfigError(
                f"require_rdma is set, but the transports ({', '.join(self.transports)}) have no nixl",
                "add nixl to WEIGHTWIRE_TRANSPORTS or unset WEIGHTWIRE_REQUIRE_RDMA",
            )

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: Any) -> Self:
        """Settings from the environment, with what the caller knows better on top.

        Args:
            environ: instead of the process's own environment.
            overrides: by field name. ``None`` means not given; a string is parsed as the variable's text would be;
                anything else is taken as it is. The variable of an overridden field is not looked at.

        Raises:
            ConfigError: an illegal value, a misspelt variable name, settings that contradict each other, or a file of
                ``weightwire bench tune`` that is not what it writes.
            TypeError: an override that is no field (a programmer's error).
        """
        source = os.environ if environ is None else environ
        _refuse_misspelt(source)
        given = {name: value for name, value in overrides.items() if value is not None}
        tuned = load(tuning_path(source))
        values: dict[str, Any] = {"tcp_streams": tuned.streams, "tcp_read_bytes": tuned.read_bytes} if tuned else {}
        for row, variable in SETTINGS.items():
            if row in given:
                value = given.pop(row)
                values[row] = variable.read(value, row) if isinstance(value, str) else value
            elif variable.name and variable.name in source:
                values[row] = variable.read(source[variable.name], variable.name)
        return cls(**values, **given)

    @property
    def offered(self) -> tuple[str, ...]:
        """The transports that a source may serve over: without ``nixl`` where readers are not trusted."""
        return tuple(name for name in self.transports if not (self.untrusted_readers and name == "nixl"))

    @property
    def refused(self) -> Mapping[str, str]:
        """Transports that these settings rule out, with the reason; for the report."""
        return {name: "untrusted_readers is set" for name in self.transports if name not in self.offered}


SETTINGS: Mapping[str, Variable] = {row.name: row.metadata[_ROW] for row in fields(Settings)}
"""Field of :class:`Settings` -> its row of the table."""

VARIABLES: Mapping[str, Variable] = {name: row for name, row in SETTINGS.items() if row.name}
"""Those that an environment variable sets."""


def _refuse_misspelt(environ: Mapping[str, str]) -> None:
    # Only near misses: Kubernetes puts WEIGHTWIRE_SERVICE_HOST, WEIGHTWIRE_PORT … into every pod beside a Service
    # that is called weightwire, and those are nobody's mistake.
    known = {variable.name.removeprefix(PREFIX): variable.name for variable in VARIABLES.values()}
    for name in environ:
        rest = name.removeprefix(PREFIX)
        if rest == name or rest in known:
            continue
        if near := difflib.get_close_matches(rest, known, n=1, cutoff=_NEAR):
            raise ConfigError(f"there is no environment variable {name}", f"did you mean {known[near[0]]}?")
