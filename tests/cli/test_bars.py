from __future__ import annotations

import io
import threading

from rich.console import Console

from weightwire.cli.bars import Bars
from weightwire.observability.progress import Progress, silent


def terminal() -> tuple[io.StringIO, Console]:
    stream = io.StringIO()
    return stream, Console(file=stream, force_terminal=True, width=120)


def test_each_phase_has_a_bar_with_human_amounts() -> None:
    stream, console = terminal()
    with Bars(console) as bars:
        callback: Progress = bars
        callback("transfer", 0, 0, "bytes")
        callback("transfer", 120_000_000, 269_060_000, "bytes")
        callback("[bold]verify", 3, 256, "leaves")
        assert bars.shown() == {"transfer": (120_000_000, 269_060_000), "[bold]verify": (3, 256)}
    assert "120.0 MB / 269.1 MB" in stream.getvalue()
    assert "3 leaves / 256 leaves" in stream.getvalue()
    assert "[bold]verify" in stream.getvalue()


def test_nothing_is_drawn_where_there_is_no_terminal() -> None:
    stream = io.StringIO()
    with Bars(Console(file=stream)) as bars:
        bars("transfer", 1, 2, "bytes")
    assert stream.getvalue() == ""
    silent("transfer", 1, 2, "bytes")


def test_many_threads_may_call_at_once() -> None:
    _, console = terminal()
    with Bars(console) as bars:

        def work(rank: int) -> None:
            for done in range(101):
                bars(f"rank {rank} transfer", done, 100, "bytes")

        threads = [threading.Thread(target=work, args=(rank,)) for rank in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)
        assert bars.shown() == {f"rank {rank} transfer": (100, 100) for rank in range(4)}
