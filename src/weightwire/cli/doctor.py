"""``weightwire doctor``: what works on this host, tried out for real, and why the rest does not."""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import json
import os
import signal
import socket
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from weightwire.auth import default_secret_path, load_secret
from weightwire.cli.frame import (
    FAILURE,
    JsonOption,
    SecretOption,
    UrlOption,
    VerboseOption,
    begin,
    out,
    secret,
    settings,
)
from weightwire.config import Settings
from weightwire.engines.native.support import ROWS
from weightwire.errors import AuthError, WeightwireError
from weightwire.manifest.host_library import HostLibrary, loaded
from weightwire.wire.metadata_client import MetadataStub

PROBE_SECONDS = 60.0
SERVER_SECONDS = 5.0
RDMA_DEVICES = Path("/sys/class/infiniband")


class Verdict(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    NOTE = "note"
    """Does not work here, and nothing was asked for that needs it."""
    FAIL = "FAIL"
    """Was asked for, or is always needed, and does not work."""


_STYLES = {Verdict.OK: "green", Verdict.NOTE: "yellow", Verdict.FAIL: "bold red"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """One line of the report; ``detail`` names what was found and, where it is bad, what to do."""

    name: str
    verdict: Verdict
    detail: str


def doctor(
    *,
    url: UrlOption = None,
    secret_file: SecretOption = None,
    seconds: Annotated[
        float, typer.Option("--seconds", metavar="S", min=1, help="Bound for each check that may hang.")
    ] = PROBE_SECONDS,
    matrix: Annotated[
        bool, typer.Option("--matrix", help="Print what may be loaded from a peer, and try nothing out.")
    ] = False,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Try out what works on this host: transports, devices, ports, the secret, the metadata server.

    Each transport is tried with a real read between two processes. Exits with 1 if no transport works, or if something
    that the settings ask for does not.
    """
    begin(verbose=verbose)
    if matrix:
        _print_matrix(as_json=as_json)
        return 0
    found = settings(url=url, secret_file=secret_file)
    checks = list(_examine(found, seconds))
    if as_json:
        out().print_json(json.dumps([dataclasses.asdict(check) for check in checks]))
    else:
        _print(checks)
    return FAILURE if any(check.verdict is Verdict.FAIL for check in checks) else 0


def _print(checks: list[Check]) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    for column in ("check", "verdict", "detail"):
        table.add_column(column, overflow="fold")
    for check in checks:
        table.add_row(check.name, f"[{_STYLES[check.verdict]}]{check.verdict}[/]", check.detail)
    out().print(table)


def _print_matrix(*, as_json: bool) -> None:
    rows = [dataclasses.asdict(row) for row in sorted(ROWS)]
    if as_json:
        out().print_json(json.dumps(rows))
        return
    table = Table(box=None, pad_edge=False)
    for column in rows[0]:
        table.add_column(column.replace("_", " "), overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    out().print(table)


def _examine(found: Settings, seconds: float) -> Iterator[Check]:
    yield check_secret(found.secret_file)
    yield check_ports(found.bind, found.advertise)
    yield check_server(found)
    yield check_rdma(required=found.require_rdma)
    yield check_cuda(seconds)
    yield check_digest()
    probes = {name: probe(name, seconds) for name in ("nixl", "tcp")}
    yield from judge_transports(probes, found)


def check_secret(path: Path | None) -> Check:
    """Whether the secret can be used; makes none."""
    where = default_secret_path() if path is None else path
    if path is None and not where.exists():
        return Check(name="secret", verdict=Verdict.OK, detail=f"{where} will be made on first use")
    try:
        load_secret(where)
    except AuthError as error:
        return Check(name="secret", verdict=Verdict.FAIL, detail=str(error))
    mode = stat.S_IMODE(where.stat().st_mode)
    return Check(name="secret", verdict=Verdict.OK, detail=f"{where}, mode {mode:04o}")


def check_ports(bind: str | None, advertise: str | None) -> Check:
    """Whether this rank could listen where it is told to, and reach itself where others are told to."""
    host = bind or "127.0.0.1"
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as listening:
            listening.bind(address)
            listening.listen(1)
            port = listening.getsockname()[1]
            target = advertise or (host if host not in ("0.0.0.0", "::") else socket.gethostname())  # noqa: S104
            socket.create_connection((target, port), timeout=5).close()
    except OSError as error:
        told = f"told to others as {advertise}" if advertise else "not told to others under another name"
        detail = f"{host} ({told}): {error.strerror or error}; set WEIGHTWIRE_BIND and WEIGHTWIRE_ADVERTISE"
        return Check(name="ports", verdict=Verdict.FAIL, detail=detail)
    return Check(name="ports", verdict=Verdict.OK, detail=f"listening on {host} works, and {target} reaches it")


def check_server(found: Settings) -> Check:
    """Whether the metadata server answers, and holds the same secret."""
    if found.url is None:
        detail = "none is named; give --url HOST:PORT or set WEIGHTWIRE_URL to have it tried"
        return Check(name="server", verdict=Verdict.NOTE, detail=detail)
    try:
        stub = MetadataStub(found.url, secret(found))
        try:
            began = time.monotonic()
            count = len(stub.sources("", SERVER_SECONDS))
        finally:
            stub.close()
    except WeightwireError as error:
        return Check(name="server", verdict=Verdict.FAIL, detail=str(error))
    took = 1000 * (time.monotonic() - began)
    return Check(
        name="server", verdict=Verdict.OK, detail=f"{found.url} answered in {took:.0f} ms, {count} publications"
    )


def check_rdma(*, required: bool, root: Path = RDMA_DEVICES) -> Check:
    """Whether there are RDMA devices."""
    names = sorted(path.name for path in root.iterdir()) if root.is_dir() else []
    if names:
        return Check(name="rdma", verdict=Verdict.OK, detail=", ".join(names))
    verdict = Verdict.FAIL if required else Verdict.NOTE
    return Check(name="rdma", verdict=verdict, detail=f"no RDMA device in {root}; other hosts are reached over TCP")


def check_cuda(seconds: float) -> Check:
    """Whether torch sees GPUs."""
    found = probe("cuda", seconds)
    return Check(name="cuda", verdict=Verdict.OK if found["ok"] else Verdict.NOTE, detail=found["detail"])


def check_digest(found: HostLibrary | str | None = None) -> Check:
    """What digests host memory: the compiled library, or ``xxhash`` and why."""
    library = loaded() if found is None else found
    if isinstance(library, HostLibrary):
        return Check(name="digest", verdict=Verdict.OK, detail=f"the compiled one ({library.way})")
    detail = f"xxhash, several times slower than what can be compiled: {library}; install a C compiler, then weightwire"
    return Check(name="digest", verdict=Verdict.NOTE, detail=detail)


def judge_transports(probes: dict[str, dict[str, Any]], found: Settings) -> Iterator[Check]:
    """What the probes of the transports mean under these settings."""
    usable = [name for name in found.transports if probes.get(name, {}).get("ok")]
    for name, result in probes.items():
        needed = name in found.transports and (not usable or (found.require_rdma and name == "nixl"))
        failed = Verdict.FAIL if needed else Verdict.NOTE
        path = f" over {result['path']}" if result["path"] not in ("", name) else ""
        yield Check(name=name, verdict=Verdict.OK if result["ok"] else failed, detail=f"{result['detail']}{path}")
    if usable:
        refused = "".join(f"; {name} only reads, as {reason}" for name, reason in found.refused.items())
        yield Check(name="transports", verdict=Verdict.OK, detail=f"would use {', then '.join(usable)}{refused}")
        return
    asked = ", ".join(found.transports)
    detail = f"none of {asked} works here; see above, or set WEIGHTWIRE_TRANSPORTS"
    yield Check(name="transports", verdict=Verdict.FAIL, detail=detail)


def probe(name: str, seconds: float) -> dict[str, Any]:
    """Run one probe in a process of its own; a process that hangs or dies is a finding as well."""
    command = [sys.executable, "-m", "weightwire.transport.probe", name]
    with subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, start_new_session=True
    ) as process:
        try:
            output, errors = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            return _failed(f"no answer within {seconds:g} s")
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    lines = output.decode(errors="replace").splitlines()
    if process.returncode != 0 or not lines:
        last = errors.decode(errors="replace").strip().splitlines()[-1:] or ["it said nothing"]
        return _failed(f"its process ended with {_ending(process.returncode)}: {last[0]}")
    answer: dict[str, Any] = json.loads(lines[-1])
    return answer


def _failed(detail: str) -> dict[str, Any]:
    return {"ok": False, "detail": detail, "path": "", "gbps": 0.0}


def _ending(code: int) -> str:
    return signal.Signals(-code).name if code < 0 else f"exit code {code}"
