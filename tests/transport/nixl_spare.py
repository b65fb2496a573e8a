"""The agent that is made ahead: taken once, never left behind. Run by ``test_nixl``, in a process of its own."""

from __future__ import annotations

import itertools
import threading
from typing import Any

import pytest

from weightwire.errors import TransferError
from weightwire.transport.nixl import spare
from weightwire.transport.nixl.agent import Agent
from weightwire.transport.nixl.spare import SpareAgent

_numbers = itertools.count()


def name() -> str:
    return f"spare/{next(_numbers)}"


class Watched(Agent):
    """Says when it is made and when it is ended."""

    alive: set[str]
    gate: threading.Event

    def __init__(self, name: str, *, serves: bool) -> None:
        assert self.gate.wait(60)
        super().__init__(name, serves=serves)
        self.alive.add(name)

    def destroy(self) -> None:
        super().destroy()
        self.alive.discard(self.name)


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> type[Watched]:
    Watched.alive, Watched.gate = set(), threading.Event()
    Watched.gate.set()
    monkeypatch.setattr(spare, "Agent", Watched)
    return Watched


def settled(spare: SpareAgent) -> None:
    thread: threading.Thread = vars(spare)["_thread"]
    thread.join(60)
    assert not thread.is_alive()


def test_it_is_taken_once_and_others_are_made_then(watched: type[Watched]) -> None:
    made = SpareAgent(name, serves=False)
    settled(made)
    ahead = set(watched.alive)
    first, second = made.take(), made.take()
    assert {first.name} == ahead
    assert second.name != first.name
    made.close()
    assert watched.alive == {first.name, second.name}  # whoever took them ends them
    first.destroy()
    second.destroy()


def test_closed_unused_it_is_ended(watched: type[Watched]) -> None:
    made = SpareAgent(name, serves=True)
    settled(made)
    assert len(watched.alive) == 1
    made.close()
    made.close()
    assert watched.alive == set()


def test_closed_while_it_is_made_it_is_ended_too(watched: type[Watched]) -> None:
    watched.gate.clear()
    made = SpareAgent(name, serves=False)
    made.close()
    watched.gate.set()
    settled(made)
    assert watched.alive == set()


def test_who_wants_one_that_cannot_be_made_is_told_why(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: Any, **__: Any) -> Agent:
        raise TransferError("NIXL cannot start UCX", "check UCX_TLS")

    monkeypatch.setattr(spare, "Agent", fails)
    made = SpareAgent(name, serves=False)
    with pytest.raises(TransferError, match="cannot start UCX"):
        made.take()
    made.close()
