"""Identities and manifests as JSON documents that ``weightwire inspect --json`` prints and reads back. Pure."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

from weightwire.errors import ConfigError, ProtocolError
from weightwire.identity.identity import Identity
from weightwire.manifest.plan import validate_manifest
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest, View
from weightwire.types import TensorClass
from weightwire.wire.messages import ManifestHeader, PublicationRecord

FORMAT = "weightwire.inspect.v1"


@dataclass(frozen=True, slots=True, kw_only=True)
class Document:
    """What is known of one shard; a file may hold less than a live source tells.

    Attributes:
        name: how the user called it: a file, or a source.
        identity: what makes it interchangeable, where known.
        manifest: its bytes' description, where known.
        about: generation, revision, coordinates … as plain JSON, for people.
    """

    name: str
    identity: Identity | None = None
    manifest: Manifest | None = None
    about: dict[str, Any]


def describe(record: PublicationRecord, header: ManifestHeader, incarnation: str) -> dict[str, Any]:
    """The ``about`` part for a live source."""
    return {
        "model_id": record.model_id,
        "stage": str(header.stage),
        "role": str(header.role),
        "coordinates": dataclasses.asdict(header.coordinates),
        "world_size": record.world_size,
        "revision": header.revision,
        "ordinal": header.ordinal,
        "shard_key": header.shard_key,
        "replica_key": record.replica_key,
        "weights_id": header.weights_id,
        "incarnation": incarnation,
        "generation": header.generation,
        "build_facts": dict(header.build_facts),
    }


def to_json(document: Document) -> dict[str, Any]:
    """The document as JSON values; :func:`from_json` gives an equal one back."""
    plain: dict[str, Any] = {"format": FORMAT, "about": document.about}
    if document.identity is not None:
        plain["identity"] = document.identity.to_dict()
    if document.manifest is not None:
        plain["manifest"] = _manifest_to_json(document.manifest)
    return plain


def from_json(name: str, values: Any) -> Document:
    """Read a document, or a bare identity (``Identity.to_dict``), from JSON values.

    Raises:
        ConfigError: it is neither, or contradicts itself; names the file.
    """
    try:
        if not isinstance(values, dict):
            raise ConfigError(f"{name} holds no JSON object")
        if "model_id" in values and "architecture" in values:
            return Document(name=name, identity=Identity.from_dict(values), about={})
        if values.get("format") != FORMAT:
            raise ConfigError(f"{name} is no {FORMAT} document", "write one with: weightwire inspect SOURCE --json")
        return Document(
            name=name,
            identity=Identity.from_dict(values["identity"]) if "identity" in values else None,
            manifest=_manifest_from_json(values["manifest"]) if "manifest" in values else None,
            about=dict(values.get("about", {})),
        )
    except (AttributeError, KeyError, TypeError, ValueError, ProtocolError) as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"{name} is malformed: {error}", "write it again with: weightwire inspect --json") from error


def _manifest_to_json(manifest: Manifest) -> dict[str, Any]:
    layout = manifest.layout
    return {
        "content_id": manifest.content_id,
        "derived_id": manifest.derived_id,
        "nbytes": layout.nbytes,
        "entries": [dataclasses.asdict(entry) | {"kind": entry.kind.value} for entry in layout.entries],
        "state": {module: dict(values) for module, values in layout.state.items()},
        "absent": list(layout.absent),
        "digests": [manifest.digest(leaf).hex() for leaf in range(len(layout.leaves))],
    }


def _manifest_from_json(values: dict[str, Any]) -> Manifest:
    layout = Layout(
        entries=tuple(_entry(each) for each in values["entries"]),
        state=values["state"],
        absent=tuple(values["absent"]),
    )
    digests = [bytes.fromhex(each) for each in values["digests"]]
    if any(len(each) != DIGEST_BYTES for each in digests):
        raise ProtocolError("a digest has another length than this version's")
    manifest = Manifest(layout=layout, digests=b"".join(digests))
    validate_manifest(manifest)
    if manifest.content_id != values["content_id"]:
        raise ProtocolError("its content id is not what its entries and digests give")
    return manifest


def _entry(values: dict[str, Any]) -> Entry:
    views = tuple(
        View(**{**each, "shape": tuple(each["shape"]), "stride": tuple(each["stride"])}) for each in values["views"]
    )
    tuples = {name: tuple(values[name]) for name in ("shape", "order", "aliases")}
    return Entry(**{**values, **tuples, "views": views, "kind": TensorClass(values["kind"])})
