"""Numbers about a process, for Prometheus. Callers give plain values; no call here ever raises.

Every metric is a row of ``SPECS``; ``docs/reference.md`` is made from it. The metrics live in an object of their own,
made on demand, so importing this touches no global registry.
"""

from __future__ import annotations

import functools
import logging
import socketserver
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Concatenate, ParamSpec
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, make_wsgi_app

from weightwire.errors import ConfigError

_LOG = logging.getLogger(__name__)
P = ParamSpec("P")

PHASES = ("discover", "plan", "register", "transfer", "verify", "post_load", "total")
"""Parts of a load, in order; their seconds are measured, and ``Progress`` calls them by these names."""

RECEIVED = "received"
SERVED = "served"

_SECONDS = (0.001, 0.005, 0.02, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0, 600.0)
_REQUEST_SECONDS = 10.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Spec:
    """One metric.

    Attributes:
        name: as Prometheus shows it.
        kind: ``counter``, ``gauge`` or ``histogram``.
        labels: its label names.
        doc: one line.
    """

    name: str
    kind: str
    labels: tuple[str, ...] = ()
    doc: str


SPECS: tuple[Spec, ...] = (
    Spec(
        name="weightwire_phase_seconds",
        kind="histogram",
        labels=("phase",),
        doc=f"Seconds that one phase of a load or a publish took: {', '.join(PHASES)}.",
    ),
    Spec(
        name="weightwire_bytes_total",
        kind="counter",
        labels=("transport", "direction"),
        doc="Bytes of weights that were received or served, by transport.",
    ),
    Spec(
        name="weightwire_relayed_bytes_total",
        kind="counter",
        labels=("direction",),
        doc="Bytes of weights that were served while this process was still receiving them, or received from a process "
        "that was.",
    ),
    Spec(
        name="weightwire_loads_total",
        kind="counter",
        labels=("outcome",),
        doc="Loads that ended: peer, disk or failed.",
    ),
    Spec(
        name="weightwire_retries_total",
        kind="counter",
        labels=("reason",),
        doc="Reads that were asked for again, by the kind of error that made it necessary.",
    ),
    Spec(name="weightwire_bad_leaves_total", kind="counter", doc="Leaves that arrived with a wrong digest."),
    Spec(
        name="weightwire_slow_path_total",
        kind="counter",
        labels=("expected", "used"),
        doc="Loads that took a slower way than expected, such as tcp instead of nixl, or disk instead of peer.",
    ),
    Spec(
        name="weightwire_transport_path_info",
        kind="gauge",
        labels=("transport", "path"),
        doc="1 for each path that carried bytes in this process, such as nixl over ucx:cma.",
    ),
    Spec(name="weightwire_read_leases", kind="gauge", doc="Read leases that readers hold on this process now."),
    Spec(
        name="weightwire_max_rate_bytes",
        kind="gauge",
        doc="Bytes a second that this process serves at most, its bandwidth cap; 0 for no bound.",
    ),
    Spec(
        name="weightwire_paced_seconds_total",
        kind="counter",
        labels=("direction",),
        doc="Seconds that reads were held back to keep to a source's cap, summed over connections: by this process "
        "(served), or of its own reads (received).",
    ),
    Spec(
        name="weightwire_state",
        kind="gauge",
        labels=("state",),
        doc="1 for the state that this process's publication is in.",
    ),
    Spec(
        name="weightwire_raw_held_bytes",
        kind="gauge",
        doc="Bytes held only because raw weights stay published while the engine uses transformed ones.",
    ),
    Spec(name="weightwire_live_leases", kind="gauge", doc="Metadata server: publications whose lease lives."),
    Spec(
        name="weightwire_requests_total",
        kind="counter",
        labels=("method",),
        doc="Metadata server: calls that were answered, by method.",
    ),
)

_KINDS: Mapping[str, type[Counter | Gauge]] = {"counter": Counter, "gauge": Gauge}


def _never_raises(
    method: Callable[Concatenate[Metrics, P], None],
) -> Callable[Concatenate[Metrics, P], None]:
    @functools.wraps(method)
    def guarded(self: Metrics, /, *args: P.args, **kwargs: P.kwargs) -> None:
        try:
            method(self, *args, **kwargs)
        except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
            _LOG.warning("a metric was not recorded: %s: %s", method.__name__, error)

    return guarded


class Metrics:
    """The metrics of one process. Thread-safe; no method raises, whatever it is given.

    Args:
        registry: where they are collected; a fresh one of its own where left out.
    """

    def __init__(self, registry: CollectorRegistry | None = None) -> None:
        self.registry = CollectorRegistry() if registry is None else registry
        self._lock = threading.Lock()
        self._state = ""
        self._seconds: dict[str, Histogram] = {}
        self._plain: dict[str, Counter | Gauge] = {}
        for spec in SPECS:
            if spec.kind == "histogram":
                self._seconds[spec.name] = Histogram(
                    spec.name, spec.doc, spec.labels, registry=self.registry, buckets=_SECONDS
                )
            else:
                self._plain[spec.name] = _KINDS[spec.kind](spec.name, spec.doc, spec.labels, registry=self.registry)

    @_never_raises
    def phase(self, phase: str, seconds: float) -> None:
        """A phase of a load or a publish (one of ``PHASES``) took ``seconds``."""
        if phase not in PHASES:
            raise ValueError(f"no phase is called {phase!r}")
        self._seconds["weightwire_phase_seconds"].labels(phase).observe(seconds)

    @_never_raises
    def moved(self, transport: str, direction: str, nbytes: int) -> None:
        """``nbytes`` of weights went over ``transport``; ``direction`` is ``RECEIVED`` or ``SERVED``."""
        self._count("weightwire_bytes_total", nbytes, transport, direction)

    @_never_raises
    def relayed(self, direction: str, nbytes: int) -> None:
        """``nbytes`` were passed on by a process that is still receiving; ``direction`` as for ``moved``."""
        self._count("weightwire_relayed_bytes_total", nbytes, direction)

    @_never_raises
    def load(self, outcome: str) -> None:
        """A load ended: ``peer``, ``disk`` or ``failed``."""
        self._count("weightwire_loads_total", 1, outcome)

    @_never_raises
    def retry(self, reason: str) -> None:
        """A read is asked for again; ``reason`` is the type name of the error, never its text (it becomes a label)."""
        self._count("weightwire_retries_total", 1, reason)

    @_never_raises
    def bad_leaves(self, count: int = 1) -> None:
        """``count`` leaves arrived with a wrong digest."""
        self._count("weightwire_bad_leaves_total", count)

    @_never_raises
    def slow_path(self, expected: str, used: str) -> None:
        """A slower way was taken than expected: ``slow_path("nixl", "tcp")``, ``slow_path("peer", "disk")``."""
        self._count("weightwire_slow_path_total", 1, expected, used)

    @_never_raises
    def path(self, transport: str, path: str) -> None:
        """``transport`` really moves bytes over ``path`` (``Connection.path``)."""
        self._set("weightwire_transport_path_info", 1, transport, path)

    @_never_raises
    def leases(self, count: int) -> None:
        """``count`` read leases are held on this process now."""
        self._set("weightwire_read_leases", count)

    @_never_raises
    def cap(self, max_rate: float) -> None:
        """This process serves at most ``max_rate`` bytes a second; 0 for no bound."""
        self._set("weightwire_max_rate_bytes", max_rate)

    @_never_raises
    def paced(self, direction: str, seconds: float) -> None:
        """One connection was held back for ``seconds`` by a source's cap; ``direction`` as for ``moved``."""
        self._count("weightwire_paced_seconds_total", seconds, direction)

    @_never_raises
    def state(self, state: str) -> None:
        """This process's publication is in ``state`` now, and in no other."""
        with self._lock:
            self._set("weightwire_state", 1, state)
            if self._state not in ("", state):
                self._plain["weightwire_state"].remove(self._state)
            self._state = state

    @_never_raises
    def held(self, nbytes: int) -> None:
        """``nbytes`` are held now only because raw weights stay published."""
        self._set("weightwire_raw_held_bytes", nbytes)

    @_never_raises
    def live_leases(self, count: int) -> None:
        """The metadata server keeps ``count`` leases now."""
        self._set("weightwire_live_leases", count)

    @_never_raises
    def request(self, method: str) -> None:
        """The metadata server answered a call of ``method``."""
        self._count("weightwire_requests_total", 1, method)

    def _child(self, name: str, labels: tuple[str, ...]) -> Counter | Gauge:
        return self._plain[name].labels(*labels) if labels else self._plain[name]

    def _count(self, name: str, amount: float, *labels: str) -> None:
        self._child(name, labels).inc(amount)

    def _set(self, name: str, value: float, *labels: str) -> None:
        gauge = self._child(name, labels)
        assert isinstance(gauge, Gauge)
        gauge.set(value)


@functools.cache
def process_metrics() -> Metrics:
    """The metrics of this process, made on first use."""
    return Metrics()


class _Server(socketserver.ThreadingMixIn, WSGIServer):
    daemon_threads = True
    block_on_close = False
    allow_reuse_port = False  # two processes on one port would split the scrapes between them

    def server_bind(self) -> None:
        # Not HTTPServer's: that one looks its own name up, which waits for as long as the resolver likes.
        socketserver.TCPServer.server_bind(self)
        self.server_name, self.server_port = str(self.server_address[0]), int(self.server_address[1])
        self.setup_environ()


class _Handler(WSGIRequestHandler):
    timeout = _REQUEST_SECONDS

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002  (the name is the base class's)
        """A scrape is not worth a line."""


class MetricsServer:
    """Serves one ``Metrics`` over HTTP at ``/metrics`` until ``close``. Made by :func:`serve_metrics`."""

    def __init__(self, server: WSGIServer) -> None:
        self._server = server
        self._thread = threading.Thread(target=server.serve_forever, name="weightwire-metrics", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        """Host and port that it listens on."""
        return self._server.server_name, self._server.server_port

    def close(self) -> None:
        """Stop serving and free the port; idempotent, bounded."""
        if self._thread.is_alive():
            self._server.shutdown()
            self._thread.join(_REQUEST_SECONDS)
        self._server.server_close()


def serve_metrics(host: str, port: int, metrics: Metrics | None = None) -> MetricsServer:
    """Serve metrics over HTTP, without a credential: they hold counts and seconds, no names of weights.

    Args:
        host: an IPv4 address or a name of this host.
        port: 0 lets the system choose.
        metrics: those of this process where left out.

    Raises:
        ConfigError: the port is taken, or cannot be listened on.
    """
    try:
        server = _Server((host, port), _Handler)
    except (OSError, OverflowError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(
            f"metrics cannot be served on {host}:{port}: {reason}", "choose another port, or 0 for a free one"
        ) from error
    server.set_app(make_wsgi_app((metrics or process_metrics()).registry))
    return MetricsServer(server)
