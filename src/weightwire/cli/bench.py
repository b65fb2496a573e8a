"""``weightwire bench``: measurements whose result weightwire itself uses."""

from __future__ import annotations

import contextlib
import json
import re
import signal
from collections.abc import Iterator
from typing import Annotated, Any

import typer
from rich.table import Table

from weightwire.auth import load_secret
from weightwire.cli.children import Child
from weightwire.cli.frame import JsonOption, SecretOption, VerboseOption, begin, out, progress_console, settings
from weightwire.tuning import Tuned, save, tuning_path

WORKER = "weightwire.target.tuning"
START_S = 60.0
LEAST_MIB = 16

app = typer.Typer(
    name="bench", help="Measure links, and set weightwire up for them.", no_args_is_help=True, add_completion=False
)

MibOption = Annotated[
    int,
    typer.Option("--mib", metavar="N", min=LEAST_MIB, max=4096, help="Bytes to move at a time; equal at both ends."),
]


@app.command()
def tune(
    *,
    peer: Annotated[
        str,
        typer.Option(
            "--peer", metavar="ENDPOINT", help="What `weightwire bench serve` printed on the other host; else loopback."
        ),
    ] = "",
    mib: MibOption = 256,
    seconds: Annotated[float, typer.Option("--seconds", metavar="S", min=1, max=600, help="About how long.")] = 45.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only print; write nothing.")] = False,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Measure how many streams and how large reads tcp should use here, and have every load of this user's use them.

    Verified pulls, digests included, over loopback or from the other host; stops measuring after the seconds given. The
    result is written to tuning.json beside the user's own secret; delete it to have the defaults again.
    """
    begin(verbose=verbose)
    if re.fullmatch("([0-9a-f]{2})*", peer) is None:
        raise typer.BadParameter("give what `weightwire bench serve` printed", param_hint="--peer")
    found = settings(secret_file=secret_file)
    load_secret(found.secret_file)  # what is wrong with it is told before a process is started
    environ = {"WEIGHTWIRE_SECRET_FILE": str(found.secret_file)} if found.secret_file else {}
    with contextlib.ExitStack() as stack:
        endpoint = peer or _loopback(stack, mib, environ)
        measured = _measure(stack, endpoint, mib, seconds, environ)
    tuned = Tuned(streams=measured["streams"], read_bytes=measured["read_bytes"])
    if not dry_run:
        save(tuned)
    if as_json:
        typer.echo(json.dumps(measured | {"written": "" if dry_run else str(tuning_path())}))
    else:
        _print(measured, written=not dry_run)


@app.command()
def serve(
    *,
    host: Annotated[str, typer.Option("--host", metavar="ADDRESS", help="This host's address on the link.")],
    mib: MibOption = 256,
    secret_file: SecretOption = None,
    verbose: VerboseOption = False,
) -> None:
    """Be the other end of `weightwire bench tune --peer`, until interrupted."""
    begin(verbose=verbose)
    found = settings(secret_file=secret_file)
    load_secret(found.secret_file)
    environ = {"WEIGHTWIRE_SECRET_FILE": str(found.secret_file)} if found.secret_file else {}
    with Child("the serving end", [WORKER, "serve", host, str(mib)], environ=environ) as child, _terminable():
        endpoint = child.expect("ready", START_S)["endpoint"]
        typer.echo(f"weightwire bench tune --mib {mib} --peer {endpoint}")
        child.attend()


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """SIGTERM ends it as Ctrl-C does, so that the child is ended, too."""
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _loopback(stack: contextlib.ExitStack, mib: int, environ: dict[str, str]) -> str:
    serving = stack.enter_context(Child("the serving end", [WORKER, "serve", "127.0.0.1", str(mib)], environ=environ))
    return str(serving.expect("ready", START_S)["endpoint"])


def _measure(
    stack: contextlib.ExitStack, endpoint: str, mib: int, seconds: float, environ: dict[str, str]
) -> dict[str, Any]:
    status = stack.enter_context(progress_console().status("measuring"))

    def heard(event: dict[str, Any]) -> None:
        status.update(f"{event['streams']} streams, reads of {event['read_bytes'] >> 20} MiB: {_rate(event['speed'])}")

    command = [WORKER, "measure", endpoint, str(mib), str(seconds)]
    child = stack.enter_context(Child("the measurement", command, environ=environ, heard=heard))
    event = child.expect("measured", START_S + 5 * seconds)
    return {name: event[name] for name in ("rows", "streams", "read_bytes")}


def _print(measured: dict[str, Any], *, written: bool) -> None:
    table = Table(box=None, pad_edge=False)
    reads = sorted({row["read_bytes"] for row in measured["rows"]})
    table.add_column("streams", justify="right")
    for read in reads:
        table.add_column(f"{read >> 20} MiB reads", justify="right")
    speeds = {(row["streams"], row["read_bytes"]): row["speed"] for row in measured["rows"]}
    for streams in sorted({row["streams"] for row in measured["rows"]}):
        table.add_row(str(streams), *(_cell(measured, speeds, streams, read) for read in reads))
    out().print(table)
    where = f"written to {tuning_path()}" if written else "not written"
    out().print(f"tcp: {measured['streams']} streams, reads of {measured['read_bytes'] >> 20} MiB; {where}")


def _cell(measured: dict[str, Any], speeds: dict[tuple[int, int], float], streams: int, read: int) -> str:
    text = _rate(speeds[streams, read]) if (streams, read) in speeds else ""
    return f"[bold]{text}[/bold]" if (streams, read) == (measured["streams"], measured["read_bytes"]) else text


def _rate(speed: float) -> str:
    return f"{speed / 1e9:.2f} GB/s" if speed >= 1e9 else f"{speed / 1e6:.0f} MB/s"
