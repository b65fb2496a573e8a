"""How a long operation tells how far it is. The bars are drawn by the cli; the library only calls back."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """A callback, called from whichever thread does the work: it must be quick, and neither block nor raise."""

    def __call__(self, phase: str, done: int, total: int, unit: str) -> None:
        """Take note of progress.

        Args:
            phase: one of ``metrics.PHASES``, or a step of the caller's own such as ``read checkpoint``.
            done: how much of it is done; never falls within one phase.
            total: how much there is; 0 while it is not known.
            unit: ``bytes``, ``tensors`` or ``leaves``.
        """
        ...


def silent(phase: str, done: int, total: int, unit: str) -> None:
    """The default: nobody is watching."""
