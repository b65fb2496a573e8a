"""Whether a source's revision is one that a target takes: a constraint beside the identity, never hashed."""

from __future__ import annotations


def compatible(wanted: str | None, offered: str | None, *, accept_unpinned: bool = False) -> bool:
    """Whether a target that wants ``wanted`` takes a source of revision ``offered``.

    A target that names a revision takes that one only; one that names none takes a source only if told to.
    """
    return not refusal(wanted, offered, accept_unpinned=accept_unpinned)


def refusal(wanted: str | None, offered: str | None, *, accept_unpinned: bool = False) -> str:
    """Why not, on one line with the remedy; empty where the source is taken."""
    if wanted is None:
        return "" if accept_unpinned else "no revision was asked for; name one, or pass --accept-unpinned"
    if offered == wanted:
        return ""
    have = "no revision" if offered is None else f"revision {offered}"
    return f"the source has {have}, wanted is {wanted}; start a source of that revision, or ask for another"
