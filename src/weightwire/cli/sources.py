"""``weightwire sources``: who publishes what, once or as it changes."""

from __future__ import annotations

import json
import time
from typing import Annotated

import typer
from rich.console import Console, RenderableType
from rich.live import Live
from rich.text import Text

from weightwire.cli.frame import (
    JsonOption,
    SecretOption,
    UrlOption,
    VerboseOption,
    begin,
    out,
    require_url,
    secret,
    settings,
)
from weightwire.cli.listing import rows, table, to_json
from weightwire.errors import MetadataUnreachable
from weightwire.wire.metadata_client import MetadataStub
from weightwire.wire.reports import SourceView

ANSWER_SECONDS = 5.0


def sources(
    *,
    model: Annotated[str, typer.Option("--model", metavar="ID", help="Only this model's.", show_default=False)] = "",
    ranks: Annotated[bool, typer.Option("--ranks", help="One line for each rank instead of each replica.")] = False,
    watch: Annotated[
        bool, typer.Option("--watch", "-w", help="Go on until interrupted; redraw at each interval.")
    ] = False,
    interval: Annotated[float, typer.Option("--interval", metavar="S", min=0.1, help="Seconds between redraws.")] = 1.0,
    url: UrlOption = None,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """List the replicas that are published at the metadata server: what they hold, and how they are doing.

    With --json, all fields of every rank; with --watch --json, one line of it at each interval.
    """
    begin(verbose=verbose)
    found = settings(url=url, secret_file=secret_file)
    stub = MetadataStub(require_url(found), secret(found))
    try:
        if watch:
            _watch(stub, model, interval, by_rank=ranks, as_json=as_json)
            return
        views = stub.sources(model, ANSWER_SECONDS)
        if as_json:
            out().print_json(json.dumps(to_json(views)))
        else:
            out().print(_shown(views, by_rank=ranks))
    finally:
        stub.close()


def _shown(views: list[SourceView], *, by_rank: bool) -> RenderableType:
    return table(rows(views, by_rank=by_rank)) if views else Text("nothing is published")


def _watch(stub: MetadataStub, model: str, interval: float, *, by_rank: bool, as_json: bool) -> None:
    first = stub.sources(model, ANSWER_SECONDS)  # a server that is not there at the start is an error, not a wait
    console = out()
    try:
        if as_json or not console.is_terminal:
            _stream(stub, model, interval, console if not as_json else None, by_rank=by_rank)
            return
        with Live(_shown(first, by_rank=by_rank), console=console, auto_refresh=False) as live:
            while True:
                time.sleep(interval)
                live.update(_now(stub, model, by_rank=by_rank), refresh=True)
    except KeyboardInterrupt:
        return


def _now(stub: MetadataStub, model: str, *, by_rank: bool) -> RenderableType:
    try:
        return _shown(stub.sources(model, ANSWER_SECONDS), by_rank=by_rank)
    except MetadataUnreachable as error:  # it may come back; what was seen before is not shown as if it were so now
        return Text(f"{error.problem}; still trying", style="red")


def _stream(stub: MetadataStub, model: str, interval: float, console: Console | None, *, by_rank: bool) -> None:
    while True:
        if console is None:
            typer.echo(json.dumps(to_json(stub.sources(model, ANSWER_SECONDS))))
        else:
            console.print(_now(stub, model, by_rank=by_rank))
        time.sleep(interval)
