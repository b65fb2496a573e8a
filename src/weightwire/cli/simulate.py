"""``weightwire simulate``: how long a fan-out would take, under a virtual clock, with the scheduler of real loads."""

from __future__ import annotations

import dataclasses
import itertools
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from weightwire.cli.frame import JsonOption, VerboseOption, begin, out
from weightwire.metadata.selection import CHAIN
from weightwire.simulate.report import Outcome, svg
from weightwire.simulate.report import simulate as run
from weightwire.simulate.swarm import Plan

GB = 1e9


def _option(name: str, metavar: str, text: str, least: float = 0, most: float | None = None) -> Any:
    return typer.Option(name, metavar=metavar, min=least, max=most, help=text)


Replicas = Annotated[list[int], _option("--replicas", "N", "Newcomers; repeat it for more rows.", 1)]
Gigabytes = Annotated[float, _option("--gb", "GB", "Bytes of the shard.", 0.001)]
Rate = Annotated[float, _option("--rate", "GB/S", "Of each link, in each direction.", 1e-6)]
Sources = Annotated[int, _option("--sources", "N", "Complete replicas at first.", 1)]
Cap = Annotated[float, _option("--cap", "GB/S", "What one source gives; 0: all it can.")]
Racks = Annotated[int, _option("--racks", "N", "Hosts are dealt out to so many, in turn; 0: to none.")]
Oversubscription = Annotated[float, _option("--oversubscription", "X", "Of a rack's link to the others.", 1)]
Deaths = Annotated[list[float], _option("--deaths", "SHARE", "Of newcomers; repeat it for more rows.", 0, 1)]
Rejoin = Annotated[float, _option("--rejoin", "S", "From a death until another one starts; 0: none does.")]
Slow = Annotated[float, _option("--slow", "SHARE", "Of newcomers: with slow links.", 0, 1)]
SlowFactor = Annotated[float, _option("--slow-factor", "X", "How many times slower.", 1)]
Spread = Annotated[float, _option("--spread", "S", "Newcomers arrive within it; 0: all at once.")]
Chunk = Annotated[float, _option("--chunk", "MB", "0: as a real load, but at most 5 million events.")]
Latency = Annotated[float, _option("--latency", "S", "From a chunk's arrival to the next reader's request.")]
Heal = Annotated[float, _option("--heal", "S", "From a death until its readers have another.")]
Chain = Annotated[int, _option("--chain", "N", "Up to so many relays form a chain, more form trees.")]
Star = Annotated[bool, typer.Option("--star", help="Without relays: all read from the sources.")]
Seed = Annotated[int, _option("--seed", "N", "Of arrivals, deaths and slow ones.")]
Plot = Annotated[
    Path | None, typer.Option("--plot", metavar="FILE.svg", help="Draw READY over time.", show_default=False)
]


def simulate(
    *,
    replicas: Replicas = [8],  # noqa: B006  (typer copies it)
    gb: Gigabytes = 90.0,
    rate: Rate = 50.0,
    sources: Sources = 1,
    cap: Cap = 0.0,
    racks: Racks = 0,
    oversubscription: Oversubscription = 1.0,
    deaths: Deaths = [0.0],  # noqa: B006
    rejoin: Rejoin = 0.0,
    slow: Slow = 0.0,
    slow_factor: SlowFactor = 4.0,
    spread: Spread = 0.0,
    chunk: Chunk = 0.0,
    latency: Latency = 0.0005,
    heal: Heal = 0.05,
    chain: Chain = CHAIN,
    star: Star = False,
    seed: Seed = 0,
    plot: Plot = None,
    as_json: JsonOption = False,
    verbose: VerboseOption = False,
) -> None:
    """Simulate a fan-out: real selection and scheduling, a virtual clock, no bytes.

    Prints how long replicas take from their arrival until they are READY, against the least that the network allows.
    """
    begin(verbose=verbose)
    plan = Plan(
        replicas=0,
        nbytes=int(gb * GB),
        rate=rate * GB,
        sources=sources,
        chunk=int(chunk * 1e6),
        cap=cap * GB,
        racks=racks,
        oversubscription=oversubscription,
        slow=slow,
        slow_factor=slow_factor,
        rejoin_s=rejoin,
        spread_s=spread,
        latency_s=latency,
        heal_s=heal,
        chain=chain,
        star=star,
        seed=seed,
    )
    found: list[tuple[str, Outcome]] = []
    for count, share in itertools.product(replicas, deaths):
        label = f"{count} replicas" + (f", {share:.0%} die" if share else "")
        found.append((label, run(dataclasses.replace(plan, replicas=count, deaths=share))))
    if plot is not None:
        plot.write_text(svg(found))
    if as_json:
        out().print_json(json.dumps([outcome.to_json() for _, outcome in found]))
    else:
        out().print(_table(found))


def _table(found: list[tuple[str, Outcome]]) -> Table:
    table = Table("", "bound", "median", "p99", "last", "last / bound", "source egress", "twice", "chunks", "events")
    for label, each in found:
        chunks = -(-each.plan.nbytes // each.plan.chunk)
        slow = f" (slow {each.slow_s:.3g} s)" if each.slow_s else ""
        left = f" ({each.unfinished} never)" if each.unfinished else ""
        table.add_row(
            label,
            *(f"{seconds:.3f} s" for seconds in (each.bound_s, each.median_s, each.p99_s)),
            f"{each.last_s:.3f} s{slow}{left}",
            f"{each.ratio:.3f}",
            f"{each.egress:.3f} shards",
            f"{each.duplicated:.3f}",
            str(chunks),
            f"{each.events:,}",
        )
    return table
