"""The fallback ladder: peers, then the disk, then one typed error. Each rung is a ``Step`` in the load's report."""

from __future__ import annotations

import logging

from weightwire.config import OnMiss
from weightwire.errors import LoadError, WeightwireError
from weightwire.observability.metrics import process_metrics
from weightwire.target.report import LoadReport, Step

log = logging.getLogger(__name__)


def step_down(report: LoadReport, error: WeightwireError, on_miss: OnMiss) -> None:
    """No peer delivered, because of ``error``: take note, or end it where the disk is not to be read.

    Raises:
        LoadError: it is not.
    """
    if not report.steps or report.steps[-1].outcome != "failed":
        report.steps.append(Step(way="peer", who="", outcome="failed", reason=error.problem))
    if on_miss is OnMiss.FAIL:
        raise LoadError(f"no peer ({error.problem}), and on_miss is fail", error.remedy) from error
    log.warning("no peer: %s; reading the disk instead", error)


def disk_read(report: LoadReport, where: str, seconds: float, *, missed: bool) -> None:
    """The weights came from the disk at ``where``; ``missed``: because no peer delivered."""
    report.source, report.stage = "disk", ""
    process_metrics().load("disk")
    report.steps.append(Step(way="disk", who=where, outcome="ok", seconds=seconds))
    if missed:
        process_metrics().slow_path("peer", "disk")
