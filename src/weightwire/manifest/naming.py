"""From groups of tensors that share bytes to entries with canonical names; broken ties become mirrors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from weightwire.errors import CatalogueError
from weightwire.manifest.construction import ConstructionNames
from weightwire.manifest.footprint import Footprint
from weightwire.manifest.records import Entry, View
from weightwire.manifest.relations import Group, Member
from weightwire.manifest.tree import Origin, Slot


@dataclass(frozen=True, slots=True)
class Broken:
    """A member that showed another entry's bytes at construction and has a storage of its own now."""

    member: Member
    view: View | None
    """How it lay in the entry; ``None`` for a tie."""

    def shown(self, primary: Footprint) -> Footprint:
        """The part of ``primary`` that the member repeats."""
        if self.view is None:
            return primary
        return replace(
            self.member.footprint,
            device=primary.device,
            address=primary.address + self.view.offset,
            stride=self.view.stride,
            extent=_extent(self.view, self.member.footprint),
        )


@dataclass(slots=True)
class Named:
    """An entry, the tensor that it stands for, and the storages that only repeat its bytes."""

    entry: Entry
    primary: Member
    mirrors: list[Broken] = field(default_factory=list)


class Stale:
    """Plain attributes that still show meta tensors: ``to_empty`` binds registered tensors only.

    What was a tie or a view at construction is rebuilt by the module itself after the fill (``cache_derived_state``),
    so its name stays in the layout and nothing is bound to it. Anything else on meta is refused by ``measure``.
    """

    def __init__(self, names: ConstructionNames | None) -> None:
        self._known = {**names.ties, **names.views} if names else {}
        self.names: list[str] = []

    def skips(self, slot: Slot) -> bool:
        """Whether ``slot`` is such a reference; remembers it."""
        found = (
            slot.origin is Origin.ATTRIBUTE
            and slot.tensor is not None
            and slot.tensor.is_meta
            and slot.name in self._known
        )
        if found:
            self.names.append(slot.name)
        return found


def name_groups(groups: Sequence[Group], names: ConstructionNames | None, stale: Stale) -> list[Named]:
    """One entry for each group, except for groups that construction tied to another one.

    Raises:
        CatalogueError: two tensors have one name.
    """
    order = {name: at for at, name in enumerate(names.names)} if names else {}
    named = [_entry(group, order) for group in groups]
    if names:
        named = _mended(named, names, stale)
    _refuse_duplicates(named)
    return named


def _entry(group: Group, order: Mapping[str, int]) -> Named:
    """Construction-time names where there are any (later ones are alias wiring), else all in order of preference."""
    aliases, views = group.aliases, group.views
    if len(aliases) > 1:
        known = sorted((m for m in aliases if m.slot.name in order), key=lambda m: order[m.slot.name])
        aliases = known or sorted(aliases, key=lambda m: m.rank)
    if order:
        views = [m for m in views if m.slot.name in order]
    primary, print_ = aliases[0], group.owner.footprint
    entry = Entry(
        name=primary.slot.name,
        dtype=print_.dtype,
        shape=print_.shape,
        order=print_.order,
        kind=group.kind,
        nbytes=print_.nbytes,
        aliases=tuple(sorted(m.slot.name for m in aliases[1:])) if len(aliases) > 1 else (),
        views=tuple(sorted((_view(m, group.owner) for m in views), key=lambda v: v.name)) if views else (),
    )
    return Named(entry, primary)


def _view(member: Member, owner: Member) -> View:
    print_ = member.footprint
    return View(
        name=member.slot.name,
        dtype=print_.dtype,
        shape=print_.shape,
        stride=print_.stride,
        offset=print_.address - owner.footprint.address,
    )


def _mended(named: list[Named], names: ConstructionNames, stale: Stale) -> list[Named]:
    """Give broken ties and views back to the entries that they showed at construction."""
    by_name = {item.entry.name: item for item in named}
    kept = []
    for item in named:
        home, view = _home(item.entry.name, names)
        target = by_name.get(home)
        if target is None or target is item or not _still_fits(item, target, view):
            kept.append(item)
        elif view is None:
            _absorb_tie(target, item)
        else:
            _absorb_view(target, item, view)
    for name in stale.names:
        home, view = _home(name, names)
        if home in by_name:
            entry = by_name[home].entry
            by_name[home].entry = _with(entry, [name], []) if view is None else _with(entry, [], [view])
    return kept


def _home(name: str, names: ConstructionNames) -> tuple[str, View | None]:
    """Where ``name`` belonged at construction: an entry's name, and how it lay there if it was a view."""
    first = names.ties.get(name, name)
    if first not in names.views:
        return first, None
    home, view = names.views[first]
    return home, replace(view, name=name)


def _still_fits(item: Named, target: Named, view: View | None) -> bool:
    """Whether the construction-time relation can still hold; a transform may have made it void."""
    mine, theirs = item.entry, target.entry
    if view is None:
        return (mine.dtype, mine.shape) == (theirs.dtype, theirs.shape)
    inside = view.offset + _extent(view, item.primary.footprint) <= theirs.nbytes
    return inside and (mine.dtype, mine.shape) == (view.dtype, view.shape) and target.primary.footprint.dense


def _absorb_tie(target: Named, item: Named) -> None:
    target.entry = _with(target.entry, [item.entry.name, *item.entry.aliases], item.entry.views)
    target.mirrors += [Broken(item.primary, None), *item.mirrors]


def _absorb_view(target: Named, item: Named, view: View) -> None:
    if item.entry.views:
        raise CatalogueError(
            f"{item.entry.name} was a view of {target.entry.name} and has views of its own now", "bind them together"
        )
    shown = [replace(view, name=name) for name in (item.entry.name, *item.entry.aliases)]
    target.entry = _with(target.entry, [], shown)
    target.mirrors.append(Broken(item.primary, view))


def _with(entry: Entry, aliases: Iterable[str], views: Iterable[View]) -> Entry:
    return replace(
        entry,
        aliases=tuple(sorted({*entry.aliases, *aliases})),
        views=tuple(sorted({*entry.views, *views}, key=lambda v: v.name)),
    )


def _extent(view: View, print_: Footprint) -> int:
    item = print_.nbytes // max(1, _count(view.shape))
    return (1 + sum((n - 1) * s for n, s in zip(view.shape, view.stride, strict=True))) * item if item else 0


def _count(shape: Iterable[int]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total


def _refuse_duplicates(named: Iterable[Named]) -> None:
    seen: set[str] = set()
    for item in named:
        for name in (item.entry.name, *item.entry.aliases, *(view.name for view in item.entry.views)):
            if name in seen:
                raise CatalogueError(f"two tensors are called {name}", "rename the attribute or key of one of them")
            seen.add(name)
