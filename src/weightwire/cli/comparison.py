"""What must be so when one replica's weights are another's: pure, over what they told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weightwire.cli.listing import SHORT
from weightwire.cli.outcome import Outcome


@dataclass(frozen=True, slots=True)
class Check:
    """One of them; ``detail`` says what was found, and where it is not so, what differs."""

    name: str
    ok: bool
    detail: str


def same_tokens(prompts: Sequence[str], first: Sequence[Sequence[int]], second: Sequence[Sequence[int]]) -> Check:
    """Whether two replicas gave the same tokens, prompt by prompt."""
    for prompt, one, other in zip(prompts, first, second, strict=True):
        if list(one) != list(other):
            pairs = zip(one, other, strict=False)
            at = next((at for at, (a, b) in enumerate(pairs) if a != b), min(len(one), len(other)))
            return Check("tokens", ok=False, detail=f"the tokens differ: at token {at} of the answer to {prompt!r}")
    counts = sorted({len(tokens) for tokens in first})
    each = "-".join(str(count) for count in counts)
    return Check("tokens", ok=True, detail=f"the same greedy tokens: {len(first)} prompts x {each} tokens")


def same_manifests(first: Outcome, second: Outcome) -> Check:
    """Whether the ranks of two replicas hold the same content, rank by rank."""
    ids = list(zip(first.content_ids, second.content_ids, strict=False))
    wrong = [str(rank) for rank, (one, other) in enumerate(ids) if not one or one != other]
    if len(first.ranks) != len(second.ranks):
        wrong = ["count"]
    if wrong:
        detail = f"the manifests differ: content id of rank {', '.join(wrong)} ({first.name}, {second.name})"
        return Check("manifests", ok=False, detail=detail)
    detail = f"the same manifests: content id of each rank, weights id {first.weights_id[:SHORT]}"
    return Check("manifests", ok=True, detail=detail)


def from_them(taken: Mapping[tuple[str, str], int], givers: Sequence[str]) -> Check:
    """Whether all bytes came from ``givers``: from each, unless one was done before the others were connected.

    Args:
        taken: (replica, path) -> bytes.
        givers: names of replicas.
    """
    given = {giver: sum(nbytes for (name, _), nbytes in taken.items() if name == giver) for giver in givers}
    others = sorted({name for name, _ in taken} - set(givers))
    if others or not any(given.values()):
        detail = (
            f"the third replica took its bytes from {' and '.join(others) or 'nobody'}, not from {' and '.join(givers)}"
        )
        return Check("sources", ok=False, detail=detail)
    busy = [giver for giver in givers if given[giver]]
    alone = "" if len(busy) == len(givers) else " alone, which was done before the others were connected"
    return Check("sources", ok=True, detail=f"the third replica took its bytes from {' and '.join(busy)}{alone}")
