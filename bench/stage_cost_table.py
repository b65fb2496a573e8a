"""What ``stage_cost.py`` finds, for people.

python bench/stage_cost_table.py            write the table of docs/memory.md from docs/memory.json
python bench/stage_cost_table.py --check    fail if it is out of date
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

MIB = 1 << 20
DOCS = Path(__file__).parents[1] / "docs"
FOUND, PAGE = DOCS / "memory.json", DOCS / "memory.md"
COLUMNS = (("packed", "LOADED"), ("packed", "PROCESSED"), ("plain", "LOADED"), ("plain", "PROCESSED"))
HEAD = """| family | quantization | parallel | ranks | model | `packed`, `LOADED` | of it held = changed | copy / module | `packed`, `PROCESSED` | `plain`, `LOADED` | `plain`, `PROCESSED` |
|---|---|---|---|---|---|---|---|---|---|---|
"""  # noqa: E501  (one line of Markdown)

Found = dict[str, Any]
"""What one row costs, in bytes."""


def line_of(found: Found) -> str:
    """One row."""
    mib = {key: value / MIB for key, value in found.items() if isinstance(value, int)}
    names = ("family", "quantization", "kernel_layout", "parallel", "stage")
    ranks = "1 rank" if found["ranks"] == 1 else f"{found['ranks']} ranks, the largest"
    return (
        f"{' x '.join(found[name] for name in names)}: {ranks}: model {mib['own']:.0f} MiB, "
        f"source {mib['source_over']:.0f} over, receiver {mib['receiver_over']:.0f} over; "
        f"changed {mib['changed']:.1f}, held {mib['held']:.1f}, largest copy {mib['clone']:.1f}, "
        f"largest module {mib['module']:.1f}, bounded: {'yes' if found['bounded'] else 'NO'}"
    )


def table(found: Sequence[Found]) -> str:
    """A line for each family, quantization and way of being parallel, in MiB; its kernel layouts and stages beside."""
    lines: dict[tuple[str, str, str], dict[tuple[str, str], Found]] = {}
    for each in found:
        key = each["family"], each["quantization"], each["parallel"]
        lines.setdefault(key, {})[each["kernel_layout"], each["stage"]] = each
    return HEAD + "\n".join(f"| {' | '.join((*key, *_cells(by)))} |" for key, by in sorted(lines.items()))


def _cells(by: dict[tuple[str, str], Found]) -> list[str]:
    some, transformed = next(iter(by.values())), by.get(COLUMNS[0])
    over = [_over(by[column]) if column in by else "-" for column in COLUMNS]
    held = [_held(transformed), _copies(transformed)] if transformed else ["-", "-"]
    return [str(some["ranks"]), _mib(some["own"]), over[0], *held, *over[1:]]


def _over(found: Found) -> str:
    """Source / receiver; what is held is said where nobody expects any."""
    unexpected = f" (held {_mib(found['held'])})" if found["kernel_layout"] == "plain" and found["held"] else ""
    return f"{_mib(found['source_over'])} / {_mib(found['receiver_over'])}{unexpected}"


def _held(found: Found) -> str:
    return f"{found['held'] / MIB:.1f}" if found["bounded"] else f"**{found['held']} ≠ {found['changed']}**"


def _copies(found: Found) -> str:
    return f"{found['clone'] / MIB:.1f} / {found['module'] / MIB:.1f}"


def _mib(nbytes: int) -> str:
    return f"{nbytes / MIB:.0f}"


def main() -> int:
    """Entry point."""
    page, found = PAGE.read_text(encoding="utf-8"), json.loads(FOUND.read_text(encoding="utf-8"))
    before, begins, rest = page.partition(HEAD.partition("\n")[0])
    assert begins, f"{PAGE} has no table with these columns"
    _, ends, after = rest.partition("\n\n")
    made = before + table(found) + ends + after
    if "--check" not in sys.argv:
        PAGE.write_text(made, encoding="utf-8")
    elif made != page:
        print(f"{PAGE} is out of date; run: python bench/stage_cost_table.py", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
