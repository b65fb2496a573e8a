"""A reader of a running replica's weights, for benchmarks: no model, no engine, memory of its own."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import numpy.typing as npt


class Pulls:
    """Reads a model's weights as a starting replica does."""

    def __init__(self, url: str, transport: str, model_id: str) -> None:
        from weightwire.config import Settings
        from weightwire.loaders.member import Member
        from weightwire.metadata.client import MetadataClient
        from weightwire.target.discover import fetch_manifest
        from weightwire.target.offer import Choice
        from weightwire.wire.messages import FindShard

        self.member = Member(Settings.from_env(url=url, transports=transport), serves=False)
        self.reader = self.member.reader
        client: MetadataClient = self.member.metadata
        record = client.sources(model_id)[0].record
        listing = client.find_shard(FindShard(shard_key=record.shard_key, weights_id=record.weights_id))
        self.candidate = listing.candidates[0]
        choice = Choice(stage=record.stage, replica_key=record.replica_key, weights_id=record.weights_id)
        self.manifest = fetch_manifest(self.reader, self.candidate, choice, record.coordinates)[1].manifest
        self.nbytes = self.manifest.layout.nbytes
        self.memory: npt.NDArray[np.uint8] = np.zeros(self.nbytes, dtype=np.uint8)
        self.copy = np.zeros_like(self.memory)
        name, used = next(iter(self.reader.transports.items()))
        self.into = {name: used.register(self._space())}

    def _space(self) -> Any:
        from weightwire.manifest.address import AddressSpace, Region, Segment

        address = self.memory.ctypes.data
        return AddressSpace(
            [Segment(0, address, self.nbytes, "cpu")], [Region(address, self.nbytes, "cpu")], [self.memory]
        )

    def once(self) -> None:
        """Everything, verified."""
        from weightwire.manifest.leaves import chunk_bytes
        from weightwire.target.pull import Bounds, Pull
        from weightwire.target.schedule import Schedule
        from weightwire.target.session import PeerSession

        leaves = self.manifest.layout.leaves
        schedule = Schedule(leaves, range(len(leaves)), chunk_bytes(self.nbytes))
        pull = Pull(self.manifest, self.into, schedule, Bounds(deadline=time.monotonic() + 60))
        session = PeerSession(self.reader, self.candidate, self.manifest.content_id)
        try:
            pull.run(iter([session]))
        finally:
            session.close()

    def beside(self) -> None:
        """The work of ``once`` that is the reader's own: the copy and the digests."""
        from weightwire.manifest.digest import LeafDigests

        np.copyto(self.copy, self.memory)
        leaves = self.manifest.layout.leaves
        LeafDigests(self._space(), leaves).of(range(len(leaves)))
