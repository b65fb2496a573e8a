"""Records, manifests and a peer service for the tests of the control plane."""

from __future__ import annotations

import dataclasses
import hashlib
import threading
from collections.abc import Iterator
from typing import Any

from weightwire.auth import Secret
from weightwire.errors import GenerationMoved
from weightwire.manifest.leaves import canonical_order, count_leaves
from weightwire.manifest.records import DIGEST_BYTES, Entry, Layout, Manifest, View
from weightwire.manifest.sharding import Cut, opaque, stacked
from weightwire.types import Coordinates, Role, Stage, State, TensorClass
from weightwire.wire.messages import (
    LeafRange,
    ManifestHeader,
    OpenRead,
    PeerStatus,
    ProgressUpdate,
    PublicationRecord,
    PublicationState,
    ReadGrant,
)

SECRET = Secret(b"0123456789abcdef0123456789abcdef")
OTHER_SECRET = Secret(b"fedcba9876543210fedcba9876543210")

STATE: State = {"layers.0": {"alpha": 1.5, "kind": "relu", "on": True, "none": None}, "layers.1": {"list": [1, 2]}}


def record(**changes: Any) -> PublicationRecord:
    """One rank of a replica of two, READY."""
    base = PublicationRecord(
        shard_key="shard-0",
        replica_key="replica",
        family_key="family",
        model_id="org/model",
        identity='{"model_id":"org/model"}',
        revision="abc",
        coordinates=Coordinates(tp_rank=0, tp_size=2),
        incarnation="life-0",
        replica_incarnation="replica-life",
        world_size=2,
        endpoints=("10.0.0.1:1000",),
        content_id="content-0",
        weights_id="weights",
        nbytes=1000,
        state=PublicationState.READY,
        generation=1,
        sequence=1,
        host="host-a",
        fraction=1.0,
        bytes_done=1000,
    )
    return dataclasses.replace(base, **changes)


def rank(number: int, life: str = "replica-life", **changes: Any) -> PublicationRecord:
    """Rank ``number`` of two of the replica ``life``; its own incarnation, endpoint and host."""
    return record(
        **{
            "shard_key": f"shard-{number}",
            "coordinates": Coordinates(tp_rank=number, tp_size=2),
            "incarnation": f"{life}-{number}",
            "replica_incarnation": life,
            "endpoints": (f"{life}:{1000 + number}",),
            "content_id": f"content-{number}",
            "host": f"host-of-{life}",
        }
        | changes
    )


def manifest(entries: int = 5, state: State | None = None) -> Manifest:
    """A legal manifest with ``entries`` small tensors, a view, an alias, a derived one and a ``None`` name."""
    weight = TensorClass.WEIGHT
    made = [
        Entry(
            name=f"layers.{n:06d}.weight",
            dtype="float32",
            shape=(2, 3),
            order=(0, 1),
            kind=TensorClass.WEIGHT,
            nbytes=24,
        )
        for n in range(entries)
    ]
    view = View(name="layers.view", dtype="float32", shape=(3,), stride=(1,), offset=12)
    rows = stacked([Cut((7, 3), 0, 6, 7, part="rows")], length=2)
    made[0] = dataclasses.replace(made[0], aliases=("tied.weight",), views=(view,), sharding=rows)
    made[1:2] = [dataclasses.replace(one, sharding=opaque("swizzled")) for one in made[1:2]]
    made.append(Entry(name="rope.cache", dtype="float16", shape=(4,), order=(0,), kind=TensorClass.DERIVED, nbytes=8))
    made.append(Entry(name="empty", dtype="bfloat16", shape=(0, 4), order=(0, 1), kind=weight, nbytes=0))
    layout = Layout(entries=canonical_order(made), state=STATE if state is None else state, absent=("bias.a", "bias.b"))
    digests = b"".join(
        hashlib.sha256(str(leaf).encode()).digest()[:DIGEST_BYTES] for leaf in range(count_leaves(layout.entries))
    )
    return Manifest(layout=layout, digests=digests)


def header(of: Manifest, **changes: Any) -> ManifestHeader:
    """The header that goes with ``of``."""
    base = ManifestHeader(
        shard_key="shard-0",
        incarnation="life-0",
        generation=3,
        content_id=of.content_id,
        derived_id=of.derived_id,
        weights_id="weights",
        stage=Stage.LOADED,
        role=Role.TARGET,
        coordinates=Coordinates(tp_rank=0, tp_size=2),
        revision="abc",
        ordinal=7,
        build_facts={"untied": True},
    )
    return dataclasses.replace(base, **changes)


class SamplePeer:
    """A ``PeerService`` that serves one manifest from memory."""

    def __init__(self, of: Manifest | None = None, incarnation: str = "life-0") -> None:
        self.incarnation = incarnation
        self.shown = of or manifest()
        self.closed: list[bytes] = []
        self.silent = threading.Event()
        """Clear: the progress stream goes on; set it to let a silent stream end."""
        self.progress_ended = threading.Event()

    def status(self, shard_key: str) -> PeerStatus:
        if shard_key != "shard-0":
            raise GenerationMoved("this shard is not published here", "ask for another source")
        return PeerStatus(
            shard_key=shard_key,
            incarnation=self.incarnation,
            generation=3,
            state=PublicationState.READY,
            content_id=self.shown.content_id,
            derived_id=self.shown.derived_id,
            weights_id="weights",
        )

    def manifest(self, shard_key: str) -> tuple[ManifestHeader, Manifest]:
        del shard_key
        return header(self.shown, incarnation=self.incarnation), self.shown

    def open_read(self, request: OpenRead) -> ReadGrant:
        if request.content_id != self.shown.content_id:
            raise GenerationMoved("the source holds other weights now", "ask for sources again")
        endpoints = {name: name.encode() * 500_000 for name in request.transports}
        return ReadGrant(lease=b"lease", generation=3, ttl_s=30.0, endpoints=endpoints)

    def progress(self, lease: bytes, since: int) -> Iterator[ProgressUpdate]:
        try:
            for version in range(since + 1, 4):
                yield ProgressUpdate(version=version, generation=3, ranges=(LeafRange(version, 1),))
            if lease == b"silent":
                self.silent.wait(20)
            while lease == b"endless":
                yield ProgressUpdate(version=4, generation=3)
                self.silent.wait(0.05)
            yield ProgressUpdate(version=4, generation=3, complete=True)
        finally:
            self.progress_ended.set()

    def close_read(self, lease: bytes) -> None:
        self.closed.append(lease)

    def self_check(self, shard_key: str, leaf: int) -> bool:
        del shard_key
        return leaf != 13
