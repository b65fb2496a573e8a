"""``weightwire inspect``: one shard's identity and manifest, or why two of them differ."""

from __future__ import annotations

import collections
import dataclasses
import json
import time
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.markup import escape
from rich.table import Table

from weightwire.auth import Secret
from weightwire.cli.difference import Difference, comparable, differences
from weightwire.cli.documents import Document, describe, from_json, to_json
from weightwire.cli.frame import (
    FAILURE,
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
from weightwire.cli.listing import human_bytes, printable
from weightwire.config import Settings
from weightwire.errors import ConfigError, NoSourceError, PeerLost, PeerStalled, WeightwireError
from weightwire.identity.identity import Identity
from weightwire.wire.messages import PublicationRecord
from weightwire.wire.metadata_client import MetadataStub
from weightwire.wire.peer_client import PeerClient

ANSWER_SECONDS = 5.0
MANIFEST_SECONDS = 60.0
MAX_FILE_BYTES = 1 << 30

WHAT = (
    "A file, or a source by the beginning of its incarnation or shard key, or by its endpoint (see: sources --ranks)."
)


def inspect(
    *,
    what: Annotated[str | None, typer.Argument(metavar="[FILE|SOURCE]", help=WHAT, show_default=False)] = None,
    diff: Annotated[
        tuple[str, str] | None,
        typer.Option("--diff", metavar="A B", help="Explain how two files or sources differ.", show_default=False),
    ] = None,
    names: Annotated[bool, typer.Option("--names", help="List every tensor.")] = False,
    url: UrlOption = None,
    secret_file: SecretOption = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> int:
    """Show the identity and the manifest of one shard, or explain field by field how two of them differ.

    What --json prints can be saved, and read back as a FILE; a file may also hold a bare identity. With --diff, exits
    with 0 if nothing differs, else with 1.
    """
    begin(verbose=verbose)
    if (what is None) == (diff is None):
        raise typer.BadParameter("give one FILE or SOURCE, or two with --diff")
    found = settings(url=url, secret_file=secret_file)
    if diff is not None:
        return _explain(load(diff[0], found), load(diff[1], found), as_json=as_json)
    assert what is not None
    document = load(what, found)
    if as_json:
        out().print_json(json.dumps(to_json(document)))
    else:
        _show(document, names=names)
    return 0


def load(name: str, found: Settings) -> Document:
    """The document that ``name`` stands for: a file where there is one, else a live source.

    Raises:
        ConfigError: the file is malformed, or several sources are meant.
        NoSourceError: neither a file nor a source is called so.
        WeightwireError: the source does not give its manifest.
    """
    path = Path(name)
    if path.is_file():
        return from_json(name, _read(path))
    if found.url is None:
        raise ConfigError(
            f"there is no file {name}, and no metadata server is named to look for a source",
            "give --url HOST:PORT or set WEIGHTWIRE_URL",
        )
    return _live(name, require_url(found), secret(found))


def _read(path: Path) -> Any:
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ConfigError(f"{path} has more than {MAX_FILE_BYTES} bytes", "name another file")
    try:
        return json.loads(path.read_bytes())
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{path} is no JSON: {error}", "name a file that weightwire inspect --json wrote") from error


def _live(name: str, url: str, key: Secret) -> Document:
    stub = MetadataStub(url, key)
    try:
        records = [view.record for view in stub.sources("", ANSWER_SECONDS)]
    finally:
        stub.close()
    return _fetch(name, select(name, records), key)


def select(name: str, records: list[PublicationRecord]) -> PublicationRecord:
    """The one publication that ``name`` begins, or whose endpoint it is.

    Raises:
        NoSourceError: there is none.
        ConfigError: there are several; names some.
    """
    exact = [each for each in records if name in (each.incarnation, each.shard_key, *each.endpoints)]
    meant = exact or [each for each in records if each.incarnation.startswith(name) or each.shard_key.startswith(name)]
    if not meant:
        raise NoSourceError(f"no file and no source is called {name}", "see: weightwire sources --ranks")
    if len(meant) > 1:
        some = ", ".join(f"{each.incarnation[:12]} ({each.stage} {each.coordinates.label()})" for each in meant[:4])
        raise ConfigError(
            f"{name} means {len(meant)} publications: {some}", "give more of its incarnation or shard key"
        )
    return meant[0]


def _fetch(name: str, record: PublicationRecord, key: Secret) -> Document:
    deadline = time.monotonic() + MANIFEST_SECONDS
    failure: WeightwireError = NoSourceError(f"{name} has no endpoint yet", "it is still loading: try again later")
    for endpoint in record.endpoints:
        client = PeerClient(endpoint, record.incarnation, key)
        try:
            header, manifest = client.manifest(record.shard_key, timeout=max(1.0, deadline - time.monotonic()))
        except (PeerLost, PeerStalled) as error:
            failure = error
            continue
        finally:
            client.close()
        identity = Identity.from_dict(json.loads(record.identity)) if record.identity else None
        about = describe(record, header, record.incarnation)
        return Document(name=name, identity=identity, manifest=manifest.manifest, about=about)
    raise failure


def _show(document: Document, *, names: bool) -> None:
    console = out()
    pairs = dict(document.about)
    if document.identity is not None:
        pairs |= {f"identity.{field}": value for field, value in document.identity.to_dict().items() if value}
        pairs["identity.replica_key"] = document.identity.replica_key
    if document.manifest is not None:
        pairs |= _summary(document)
    grid = Table(box=None, pad_edge=False, show_header=False)
    grid.add_column(style="bold")
    grid.add_column(overflow="fold")
    for label, value in pairs.items():
        grid.add_row(escape(label), escape(printable(_plain(value))))
    console.print(grid)
    if names and document.manifest is not None:
        console.print(_tensors(document))


def _summary(document: Document) -> dict[str, Any]:
    assert document.manifest is not None
    layout = document.manifest.layout
    kinds = collections.Counter(f"{entry.dtype} {entry.kind}" for entry in layout.entries)
    return {
        "content_id": document.manifest.content_id,
        "derived_id": document.manifest.derived_id,
        "bytes": f"{layout.nbytes} ({human_bytes(layout.nbytes)})",
        "leaves": f"{len(layout.leaves)}, {layout.weight_leaves} of them weight",
        "tensors": f"{len(layout.entries)}: {', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}",
        "state": f"{len(layout.state)} modules",
        "absent": f"{len(layout.absent)} optional tensors",
    }


def _tensors(document: Document) -> Table:
    assert document.manifest is not None
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("tensor", "dtype", "shape", "class", "bytes", "also called"):
        table.add_column(column, justify="right" if column == "bytes" else "left", overflow="fold")
    for entry in document.manifest.layout.entries:
        others = ", ".join([*entry.aliases, *(f"{view.name} (view)" for view in entry.views)])
        shape = "x".join(map(str, entry.shape)) or "scalar"
        cells = (entry.name, entry.dtype, shape, str(entry.kind), str(entry.nbytes), others)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    return table


def _plain(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}={item}" for key, item in value.items()) or "-"
    return "-" if value in ("", None) else str(value)


def _explain(left: Document, right: Document, *, as_json: bool) -> int:
    parts = comparable(left, right)
    if not parts:
        raise ConfigError(
            f"{left.name} and {right.name} have no part in common to compare", "compare two identities or two manifests"
        )
    found = differences(left, right)
    if as_json:
        document = {"compared": parts, "differences": [dataclasses.asdict(each) for each in found]}
        out().print_json(json.dumps(document))
    else:
        _show_differences(left, right, parts, found)
    return FAILURE if found else 0


def _show_differences(left: Document, right: Document, parts: list[str], found: list[Difference]) -> None:
    if not found:
        out().print(escape(f"{left.name} and {right.name} are equal ({' and '.join(parts)} compared)"))
        return
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("part", "name", "field", left.name, right.name, ""):
        table.add_column(escape(column), overflow="fold")
    for each in found:
        note = "" if each.matters else "not part of the key"
        cells = (each.part, each.name, each.field, each.left, each.right, note)
        table.add_row(*(escape(printable(cell)) for cell in cells))
    out().print(table)
