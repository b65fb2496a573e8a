"""Which tensors share bytes: owners, aliases (all the same bytes) and views (part of an owner's bytes)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from weightwire.errors import CatalogueError
from weightwire.manifest.footprint import Footprint, overlap
from weightwire.manifest.tree import Slot
from weightwire.types import TensorClass


@dataclass(frozen=True, slots=True)
class Member:
    """A tensor that takes part.

    Attributes:
        rank: place in the order of preference for names, unique.
        slot: where it is held.
        storage: identity of its storage object, for tensors without bytes.
        kind: its declared or default class; ``None`` where nobody said, which is legal for aliases and views only.
        footprint: where it lies.
    """

    rank: int
    slot: Slot
    storage: int
    kind: TensorClass | None
    footprint: Footprint


@dataclass(slots=True)
class Group:
    """One owner of bytes and everything that shows them.

    Attributes:
        owner: covers all bytes of the group.
        aliases: cover the same bytes in the same way, the owner among them.
        views: lie inside the owner.
    """

    owner: Member
    aliases: list[Member] = field(default_factory=list)
    views: list[Member] = field(default_factory=list)

    @property
    def kind(self) -> TensorClass:
        """``WEIGHT`` as soon as one member is."""
        kinds = {member.kind for member in (*self.aliases, *self.views)}
        return TensorClass.WEIGHT if TensorClass.WEIGHT in kinds else TensorClass.DERIVED


def relate(members: Sequence[Member]) -> list[Group]:
    """Group ``members`` by the bytes that they cover.

    Raises:
        CatalogueError: two tensors share some bytes but neither contains the other, or a tensor of no class has
            bytes of its own; names them.
    """
    groups = [group for cluster in _clusters([m for m in members if m.footprint.nbytes]) for group in _solve(cluster)]
    return groups + _empty([m for m in members if not m.footprint.nbytes])


def _clusters(members: Sequence[Member]) -> Iterator[list[Member]]:
    """Members whose extents touch, directly or through others."""
    cluster: list[Member] = []
    device, end = "", 0
    for member in sorted(members, key=lambda m: (m.footprint.device, m.footprint.address)):
        print_ = member.footprint
        if cluster and (print_.device != device or print_.address >= end):
            yield cluster
            cluster, end = [], 0
        cluster.append(member)
        device, end = print_.device, max(end, print_.end)
    if cluster:
        yield cluster


def _solve(cluster: list[Member]) -> list[Group]:
    groups: list[Group] = []
    for member in sorted(cluster, key=_owner_preference):
        if not any(_joins(group, member) for group in groups):
            _refuse_unclassified(member)
            groups.append(Group(member, [member]))
    return groups


def _owner_preference(member: Member) -> tuple[bool, int, bool, bool, int]:
    print_ = member.footprint
    return (
        member.kind is None,
        -print_.nbytes,
        not print_.dense,
        print_.order != tuple(range(len(print_.order))),
        member.rank,
    )


def _joins(group: Group, member: Member) -> bool:
    """Put ``member`` into ``group`` if its bytes lie there."""
    owner, print_ = group.owner.footprint, member.footprint
    if _identical(owner, print_):
        group.aliases.append(member)
        return True
    if owner.dense and owner.address <= print_.address and print_.end <= owner.end:
        group.views.append(member)
        return True
    if overlap(owner, print_):
        raise CatalogueError(
            f"{member.slot.name} and {group.owner.slot.name} share some bytes but neither contains the other",
            "clone one of them, or register the tensor that holds both",
        )
    return False


def _identical(one: Footprint, other: Footprint) -> bool:
    """Same bytes, same meaning; strides of dimensions of size 1 do not count."""
    if (one.address, one.nbytes, one.dtype, one.shape) != (other.address, other.nbytes, other.dtype, other.shape):
        return False
    strides = zip(one.shape, one.stride, other.stride, strict=True)
    return all(mine == theirs for size, mine, theirs in strides if size != 1)


def _empty(members: Sequence[Member]) -> list[Group]:
    """Tensors without bytes are the same if they are one object or share a storage."""
    groups: dict[tuple[int, str, tuple[int, ...]], Group] = {}
    for member in sorted(members, key=lambda m: (m.kind is None, m.rank)):
        key = (member.storage, member.footprint.dtype, member.footprint.shape)
        if key not in groups:
            _refuse_unclassified(member)
            groups[key] = Group(member)
        groups[key].aliases.append(member)
    return list(groups.values())


def _refuse_unclassified(member: Member) -> None:
    if member.kind is None:
        raise CatalogueError(
            f"{member.slot.name} is a tensor of no class",
            f"declare {member.slot.local!r} as weight, derived or runtime in tensor_classes(), or pass classes=",
        )
