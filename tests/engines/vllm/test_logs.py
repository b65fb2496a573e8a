from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest

from weightwire.engines.vllm.logs import Forward, forward


class Kept(logging.Handler):
    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(f"{record.levelname} {record.getMessage()}")


@pytest.fixture
def engine() -> Iterator[Kept]:
    library, vllm, kept = logging.getLogger("weightwire"), logging.getLogger("vllm"), Kept()
    before = library.level, library.propagate, list(library.handlers)
    vllm.addHandler(kept)
    yield kept
    vllm.removeHandler(kept)
    library.setLevel(before[0])
    library.propagate, library.handlers = before[1:]


def test_lines_of_the_library_are_shown_once_with_the_prefix(engine: Kept) -> None:
    forward("WARNING")
    forward("INFO")
    log = logging.getLogger("weightwire.target.pull")
    log.info("peer %s %d %%", "a", 3)
    log.debug("not shown")
    assert engine.lines == ["INFO weightwire: peer a 3 %"]
    assert sum(isinstance(each, Forward) for each in logging.getLogger("weightwire").handlers) == 1
