"""What a replica's ranks told about their load, as one thing to show. Pure.

A replica is as slow as its slowest rank: seconds are the largest of all ranks, bytes are sums.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

PHASES = ("discover", "plan", "register", "transfer", "verify", "publish", "post-load", "total")
"""In the order in which they happen; ``verify`` runs inside ``transfer`` and is summed over its threads."""

_FROM_PEERS = ("peer", "tensors")


@dataclass(frozen=True)
class Outcome:
    """One replica's load.

    Attributes:
        name: of the replica.
        ranks: what each rank told with its ``loaded`` event, in rank order.
        ready_s: from starting the processes until all ranks could answer.
    """

    name: str
    ranks: tuple[Mapping[str, Any], ...]
    ready_s: float

    @cached_property
    def reports(self) -> list[Mapping[str, Any]]:
        """Each rank's ``LoadReport``."""
        return [rank["report"] for rank in self.ranks]

    @property
    def source(self) -> str:
        """``peer``, ``tensors`` (another program's), ``disk``, or ``random`` for dummy weights."""
        return "+".join(dict.fromkeys(report["source"] or "random" for report in self.reports))

    @property
    def taken_from_peers(self) -> bool:
        """Whether all bytes came over the network, from replicas or another program."""
        return all(report["source"] in _FROM_PEERS for report in self.reports)

    @property
    def verified(self) -> bool:
        """Whether every byte had its digest."""
        return all(report["verified"] for report in self.reports)

    @property
    def nbytes(self) -> int:
        """Bytes received or read."""
        return sum(rank["nbytes"] for rank in self.ranks)

    @property
    def gigabytes_per_second(self) -> float:
        """All bytes over the slowest rank's transfer; 0 where there was none."""
        elapsed = self.seconds.get("transfer", 0.0)
        return self.nbytes / elapsed / 1e9 if elapsed else 0.0

    @property
    def draft_source(self) -> str:
        """As ``source``, of the draft model; empty where there is none."""
        drafts = [rank["draft"]["report"] for rank in self.ranks if "draft" in rank]
        return "+".join(dict.fromkeys(report["source"] or "random" for report in drafts))

    @property
    def draft_misses(self) -> list[str]:
        """As ``misses``, of the draft model."""
        steps = (step for rank in self.ranks if "draft" in rank for step in rank["draft"]["report"]["steps"])
        return _once(step["reason"] for step in steps if step["outcome"] != "ok" and step["reason"])

    @property
    def metrics(self) -> list[str]:
        """Where each rank serves its metrics; empty where they were not asked for."""
        return [rank["metrics"] for rank in self.ranks if "metrics" in rank]

    @cached_property
    def seconds(self) -> dict[str, float]:
        """Phase -> seconds, of those ``PHASES`` that happened."""
        each = [_phases(rank) for rank in self.ranks]
        return {
            phase: max(found.get(phase, 0.0) for found in each) for phase in PHASES if any(phase in f for f in each)
        }

    @property
    def paths(self) -> list[str]:
        """What carried the bytes."""
        return sorted({path for report in self.reports for path in report["paths"]})

    @property
    def unavailable(self) -> dict[str, str]:
        """Transports that were wished for and are not used here: name -> why."""
        found: dict[str, str] = {}
        for rank in self.ranks:
            found |= rank.get("unavailable", {})
            found |= (rank["published"] or {}).get("unavailable", {})
        return found

    @property
    def peers(self) -> list[str]:
        """How each rank is called by those who read from it."""
        return [rank["peer"] for rank in self.ranks if "peer" in rank]

    @property
    def warnings(self) -> list[str]:
        """What a person should know, each once: slow paths, dropped peers, an unpinned revision."""
        return _once(line for report in self.reports for line in report["warnings"])

    @property
    def notes(self) -> list[str]:
        """The warnings, and why a transport is not in use."""
        return _once([*self.warnings, *(f"{name} is not available: {why}" for name, why in self.unavailable.items())])

    @property
    def misses(self) -> list[str]:
        """Why a step of the fallback ladder was left, each once."""
        steps = (step for report in self.reports for step in report["steps"])
        return _once(step["reason"] for step in steps if step["outcome"] != "ok" and step["reason"])

    @property
    def revision(self) -> str:
        """That of the weights taken from peers, as far as it is known."""
        return next((report["revision"] for report in self.reports if report["revision"]), "")

    @property
    def content_ids(self) -> list[str]:
        """Of each rank's manifest; empty where a rank neither received nor published."""
        return [(rank["published"] or {}).get("content_id") or rank["report"]["content_id"] for rank in self.ranks]

    @property
    def weights_id(self) -> str:
        """Of the replica, where it is known."""
        known = ((rank["published"] or {}).get("weights_id") or rank["report"]["weights_id"] for rank in self.ranks)
        return next((each for each in known if each), "")

    @property
    def published(self) -> str:
        """The stage that is published, if all ranks are."""
        reports = [rank["published"] for rank in self.ranks]
        if not all(report and report["published"] for report in reports):
            return ""
        return str(reports[0]["stage"])

    @property
    def not_published(self) -> list[str]:
        """Why not, each reason once; empty also where nobody wanted to."""
        return _once(rank["published"]["reason"] for rank in self.ranks if (rank["published"] or {}).get("reason"))

    @property
    def served_over(self) -> list[str]:
        """Transports that others may read over."""
        return _once(name for rank in self.ranks for name in (rank["published"] or {}).get("transports", ()))

    def taken(self, names: Mapping[str, str] | None = None) -> dict[tuple[str, str], int]:
        """(peer, path) -> bytes it gave to all ranks together, in order of the peers' names.

        Args:
            names: of peers' labels, to put several ranks of one replica together.
        """
        found: dict[tuple[str, str], int] = {}
        for share in _shares(self.reports):
            key = ((names or {}).get(share["peer"], share["peer"]), share["path"])
            found[key] = found.get(key, 0) + share["nbytes"]
        return dict(sorted(found.items()))

    def to_json(self) -> dict[str, Any]:
        """What is shown, and what each rank told."""
        return {
            "name": self.name,
            "source": self.source,
            "draft_source": self.draft_source,
            "verified": self.verified,
            "nbytes": self.nbytes,
            "gigabytes_per_second": self.gigabytes_per_second,
            "seconds": self.seconds,
            "ready_s": self.ready_s,
            "transports": self.paths,
            "unavailable": self.unavailable,
            "revision": self.revision,
            "weights_id": self.weights_id,
            "content_ids": self.content_ids,
            "published": self.published,
            "metrics": self.metrics,
            "warnings": self.warnings,
            "ranks": [dict(rank) for rank in self.ranks],
        }


def _phases(rank: Mapping[str, Any]) -> dict[str, float]:
    report, laps, published = rank["report"], rank["seconds"], rank["published"] or {}
    seconds = {name: float(value) for name, value in report["seconds"].items() if name in PHASES}
    if report["source"] not in _FROM_PEERS:
        seconds["transfer"] = laps["fill"]
    publishing = sum(published.get("seconds", {}).values())
    # the raw stage is published within the post-load lap, the processed one behind all laps
    inside = publishing if published.get("stage") == "LOADED" else 0.0
    if published:
        seconds["publish"] = publishing
    seconds["post-load"] = max(0.0, laps["post_load"] - inside)
    seconds["total"] = sum(laps.values()) + publishing - inside
    return seconds


def _shares(reports: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    return (share for report in reports for share in report["shares"] if share["nbytes"])


def _once(lines: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(lines))
