"""The fallback ladder: peers, another program's tensors, the disk, one typed error.

Each rung is a ``Step`` in the load's report.
"""

from __future__ import annotations

import logging
from dataclasses import replace

from weightwire.config import OnMiss
from weightwire.errors import LoadError, WeightwireError
from weightwire.observability.metrics import process_metrics
from weightwire.target.report import LoadReport, Step

log = logging.getLogger(__name__)


def missed(report: LoadReport, error: WeightwireError) -> None:
    """No peer delivered, because of ``error``; take note, unless the last step says so."""
    if not report.steps or report.steps[-1].outcome != "failed":
        report.steps.append(Step(way="peer", who="", outcome="failed", reason=error.problem))


def step_down(report: LoadReport, error: WeightwireError, on_miss: OnMiss) -> None:
    """No peer delivered, because of ``error``: take note, or end it where the disk is not to be read.

    Raises:
        LoadError: it is not.
    """
    missed(report, error)
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


def tensors_missed(report: LoadReport, taken: LoadReport, seconds: float, error: WeightwireError) -> None:
    """Another program's tensors are not used, because of ``error``; ``taken`` says how far they came."""
    report.steps.append(_tensors(taken, "failed", seconds, error.problem))
    report.warnings += taken.warnings


def tensors_placed(report: LoadReport, taken: LoadReport, seconds: float) -> LoadReport:
    """The report that goes on where another program's tensors, which came as ``taken`` says, are in place."""
    return replace(
        taken,
        source="tensors",
        stage="",
        content_id="",
        weights_id="",
        source_weights_id=taken.weights_id,
        manifest=None,
        steps=[*report.steps, _tensors(taken, "ok", seconds)],
        warnings=[*report.warnings, *taken.warnings],
    )


def _tensors(taken: LoadReport, outcome: str, seconds: float, reason: str = "") -> Step:
    who = ", ".join(share.peer for share in taken.shares if share.nbytes)
    return Step(way="tensors", who=who, outcome=outcome, reason=reason, seconds=seconds)
