"""The shards of a replica of the same family: the same weights, cut for another number of tensor-parallel ranks."""

from __future__ import annotations

import dataclasses
import logging

from weightwire.errors import AuthError, NoSourceError, ProtocolError, TransferError, WeightwireError
from weightwire.identity.identity import Identity
from weightwire.manifest.records import weights_id
from weightwire.target.discover import fetch_manifest
from weightwire.target.offer import Choice, Offer, Shard, Want
from weightwire.target.reader import Reader
from weightwire.types import Coordinates
from weightwire.wire.messages import Candidate, FindShard, PublicationState

log = logging.getLogger(__name__)


def gather(reader: Reader, want: Want, choice: Choice) -> Offer:
    """The manifests of all ranks of what was chosen, checked to be the weights that were chosen.

    Raises:
        NoSourceError: nobody serves one of the shards.
        TransferError: those who do cannot be reached, or offer something else.
        AuthError: one of them does not hold our secret.
    """
    source = dataclasses.replace(want.stages[choice.stage], tp_size=choice.source_tp)
    shards = tuple(_shard(reader, source, choice, rank) for rank in range(choice.source_tp))
    found = weights_id({each.header.coordinates.label(): each.offered.ids[0] for each in shards})
    if found != choice.weights_id:
        raise ProtocolError("the source's ranks do not give the weights id that they publish", "use another source")
    first = shards[0]
    if any(each.header.build_facts != first.header.build_facts for each in shards):
        raise ProtocolError("the source's ranks name different build facts", "use another source")
    return Offer(
        choice=choice,
        header=first.header,
        offered=first.offered,
        origin=first.candidates[0],
        candidates=first.candidates,
        shards=shards,
    )


def _shard(reader: Reader, source: Identity, choice: Choice, rank: int) -> Shard:
    coordinates = Coordinates(tp_rank=rank, tp_size=choice.source_tp)
    query = FindShard(
        shard_key=source.shard_key(coordinates), weights_id=choice.weights_id, exclude=(reader.incarnation,)
    )
    found = reader.metadata.find_shard(query).candidates
    candidates = [each for each in found if each.record.state is PublicationState.READY]  # whole shards are read
    last: WeightwireError = NoSourceError(
        f"nobody serves {coordinates.label()} of {source.model_id}", "see: weightwire sources"
    )
    for number, candidate in enumerate(candidates):
        try:
            header, offered = fetch_manifest(reader, candidate, choice, coordinates)
        except (TransferError, AuthError) as error:
            log.warning("%s", error)
            last = error
            continue
        return Shard(header=header, offered=offered, candidates=_first(tuple(candidates), number))
    raise last


def _first(candidates: tuple[Candidate, ...], number: int) -> tuple[Candidate, ...]:
    """Whoever answered before those who did not."""
    return (*candidates[number:], *candidates[:number])
