"""Memory of a source and of a receiver beyond the model's own, for each row of the support table.

python bench/stage_cost.py [--family llama --family gemma2] [--quantization nvfp4] [--parallel tp] [--json]

Source and receiver are replicas of the native engine, each rank a process of its own (two along each axis that a row
has), with real sockets between them. Each rank's anonymous memory is sampled from before the load until its end
(checkpoint files are mapped, and not counted), and what the model itself has there at the end is taken off; told is the
largest rank's. Of copy-on-transform it says what the guard counted, what really changed (storages that are published
and no longer the model's), and the largest module that transforms, by which it may go beyond that. Exits with 1 where
some rank of some row held anything else than what changed, or copied more than one module at a time beyond it.

    python bench/stage_cost.py --into docs/memory.json && python bench/stage_cost_table.py

measures what the table has and that file has not, and brings docs/memory.md up to date; without the file, everything.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from processes import Child, Failed, Line
from stage_cost_models import sizes, unknown, write
from stage_cost_rank import LOAD_S, prepare, rank, store
from stage_cost_table import line_of

from weightwire.auth import load_secret
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.support import ROWS, Row
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings

Told = list[dict[str, Any]]
"""What each rank of a replica says of its load."""


def metadata(line: Line, secret_file: str) -> None:
    """A metadata server, until the line ends."""
    settings = ServerSettings(secret=load_secret(Path(secret_file)), times=Times(ttl_s=5.0, warming_s=0.0))
    with EmbeddedServer(settings) as server:
        line.say("ready", url=server.url)
        line.hear()


@contextmanager
def server(root: Path) -> Iterator[tuple[str, str]]:
    """A metadata server's address, and the file of the shared secret."""
    secret = root / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    child = Child("metadata server", metadata, str(secret))
    try:
        yield child.expect("ready")["url"], str(secret)
    finally:
        child.kill()


@contextmanager
def replica(name: str, options: dict[str, Any], url: str, secret_file: str) -> Iterator[Told]:
    """A replica that has loaded, and what each of its ranks says of that; killed at the end."""
    count = ReplicaOptions(**options).world_size
    children = [Child(f"store of the {name}", store)]
    try:
        port = children[0].expect("ready")["port"]
        ranks = [Child(f"{name}'s rank {at}", rank, at, port, options, url, secret_file) for at in range(count)]
        children += ranks
        yield [each.expect("loaded", LOAD_S) for each in ranks]
    finally:
        for child in reversed(children):
            child.kill()


def measure(row: Row, checkpoint: Path, bare: Path, url: str, secret_file: str) -> dict[str, Any]:
    """What one row costs: of each figure, the largest rank's."""
    layout = {"kernel_layout": row.kernel_layout, "publish_stage": row.stage, **sizes(row)}
    shared = {"model_id": str(row), "revision": "r1", **layout}
    with replica("source", {"model": str(checkpoint), "load_format": "auto", **shared}, url, secret_file) as source:
        given = {"model": str(bare), "load_format": "presharded", **shared}
        with replica("receiver", given, url, secret_file) as receiver:
            if any(told["origin"] != "peer" for told in receiver):
                raise Failed("the receiver took nothing from the source")
    return {
        **asdict(row),
        "ranks": len(source),
        "own": _largest(source, "own"),
        "source_over": _largest(source, "over"),
        "receiver_over": _largest(receiver, "over"),
        **{name: _largest(source, name) for name in ("changed", "held", "clone", "module")},
        "bounded": all(map(bounded, source)),
    }


def _largest(told: Told, name: str) -> int:
    return max(int(each[name]) for each in told)


def bounded(told: dict[str, Any]) -> bool:
    """Whether copy-on-transform held just what changed on a rank, and copied no more than one module beyond it."""
    return bool(told["held"] == told["changed"] and told["clone"] <= told["module"])


def chosen(arguments: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, without those that nothing is known of here, which are named."""
    rows = []
    for row in sorted(ROWS):
        asked = {field.name: getattr(arguments, field.name) for field in fields(Row)}
        if any(only and getattr(row, name) not in only for name, only in asked.items()):
            continue
        if reason := unknown(row):
            print(f"not measured: {row}: {reason}", file=sys.stderr)
        else:
            rows.append(row)
    return rows


def measured(rows: Sequence[Row], root: Path) -> Iterator[dict[str, Any]]:
    """What each row costs, models written one after the other."""
    prepare()
    with server(root) as (url, secret):
        for family, quantization in sorted({(row.family, row.quantization) for row in rows}):
            with tempfile.TemporaryDirectory(dir=root) as directory:
                checkpoint, bare = _written(Path(directory), family, quantization)
                for row in rows:
                    if (row.family, row.quantization) == (family, quantization):
                        yield _patiently(row, checkpoint, bare, url, secret)


def _patiently(row: Row, *places: Any) -> dict[str, Any]:
    """A second time where a machine that is too busy let a wait end."""
    try:
        return measure(row, *places)
    except Failed as error:
        print(f"{row}: {error}; once more", file=sys.stderr)
        return measure(row, *places)


def _written(root: Path, family: str, quantization: str) -> tuple[Path, Path]:
    """A checkpoint, and a directory with no more than its configuration."""
    checkpoint, bare = root / "model", root / "bare"
    child = Child("writer", write, str(checkpoint), family, quantization)
    child.expect("written", LOAD_S)
    child.kill()
    bare.mkdir()
    (bare / "config.json").write_text((checkpoint / "config.json").read_text(encoding="utf-8"))
    return checkpoint, bare


def main() -> int:
    """Entry point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Row):
        values = sorted({getattr(row, field.name) for row in ROWS})
        parser.add_argument(f"--{field.name.replace('_', '-')}", action="append", choices=values, help="only these")
    parser.add_argument("--json", action="store_true", help="one object a row, in bytes; lines go to stderr")
    parser.add_argument("--into", type=Path, help="add what is not in this file, which --json gave, and drop old rows")
    arguments = parser.parse_args()
    rows = chosen(arguments)
    known = _known(arguments.into) if arguments.into else {}
    found = []
    with tempfile.TemporaryDirectory() as directory:
        for each in measured([row for row in rows if row not in known], Path(directory)):
            found.append(each)
            print(line_of(each), file=sys.stderr if arguments.json else sys.stdout, flush=True)
    if arguments.json:
        print(_text(found))
    if arguments.into:
        both = {row: each for row, each in known.items() if row in ROWS} | {_row(each): each for each in found}
        arguments.into.write_text(_text([both[row] for row in sorted(both)]) + "\n", encoding="utf-8")
    return 0 if all(each["bounded"] for each in found) else 1


def _known(path: Path) -> dict[Row, dict[str, Any]]:
    found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    return {_row(each): each for each in found}


def _row(found: dict[str, Any]) -> Row:
    return Row(**{field.name: found[field.name] for field in fields(Row)})


def _text(found: Sequence[dict[str, Any]]) -> str:
    return "[" + ",\n ".join(map(json.dumps, found)) + "]"


if __name__ == "__main__":
    sys.exit(main())
