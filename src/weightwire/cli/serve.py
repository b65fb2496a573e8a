"""``weightwire serve``: the metadata server in the foreground."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
from typing import Annotated

import typer

from weightwire.cli.frame import JsonOption, SecretOption, VerboseOption, begin, secret, settings
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import MetadataServer, ServerSettings
from weightwire.metadata.server.app import serve as run_server
from weightwire.observability.metrics import Metrics, MetricsServer, process_metrics, serve_metrics
from weightwire.wire.listen import join

WILDCARDS = ("0.0.0.0", "::", "")  # noqa: S104  (compared with, not listened on)
GRACE_S = 5.0


def serve(
    *,
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address or name to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="Port to listen on; 0: a free one.")
    ] = 0,
    ttl: Annotated[
        float,
        typer.Option("--ttl", metavar="S", min=0.5, max=3600, help="Seconds after which a silent source is forgotten."),
    ] = Times().ttl_s,
    metrics_port: Annotated[
        int | None,
        typer.Option(
            "--metrics-port",
            metavar="PORT",
            min=0,
            max=65535,
            help="Serve Prometheus metrics here; 0: a free one. Left out: no metrics.",
            show_default=False,
        ),
    ] = None,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Run the metadata server until SIGTERM or Ctrl-C. It keeps small records of who holds what, never weights.

    Prints one line with the address to give to others, then logs to standard error. Records live in memory: after a
    restart on the same port the sources register again by themselves.
    """
    found = settings(secret_file=secret_file)
    begin(verbose=verbose, level=found.log_level)
    chosen = ServerSettings(secret=secret(found), host=host, port=port, times=Times(ttl_s=ttl), grace_s=GRACE_S)
    metrics = process_metrics()
    with contextlib.ExitStack() as open_things:
        page: MetricsServer | None = None
        if metrics_port is not None:
            page = serve_metrics(host, metrics_port, metrics)
            open_things.callback(page.close)

        def started(server: MetadataServer) -> None:
            _tell(reachable(host, server.port), page, as_json=as_json)

        asyncio.run(run_server(chosen, observer=_Observed(metrics), started=started))


class _Observed:
    """The server's events as metrics."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics

    def called(self, rpc: str) -> None:
        """Count one call."""
        self._metrics.request(rpc)

    def leases(self, count: int) -> None:
        """Note how many leases live."""
        self._metrics.live_leases(count)


def reachable(host: str, port: int) -> str:
    """The ``host:port`` to give to others: this host's name where the server listens on all its addresses."""
    return join(socket.gethostname() if host in WILDCARDS else host, port)


def _tell(url: str, page: MetricsServer | None, *, as_json: bool) -> None:
    at = f"http://{join(*page.address)}/metrics" if page is not None else None
    if as_json:
        typer.echo(json.dumps({"url": url, "metrics": at}))
    else:
        typer.echo(f"metadata server: {url} (give it to others as --url or WEIGHTWIRE_URL)" + (f"; {at}" if at else ""))
