"""Fill the last column of docs/hazards.md with the tests of each hazard (``test_hNN_…``, or ``test_hNN_hMM_…``).

    python tools/gen_hazards.py            write it
    python tools/gen_hazards.py --check    fail if it is out of date, or a row has neither a test nor a reason

A row without a test keeps a reason that begins with "not yet:".
"""

from __future__ import annotations

import re
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "hazards.md"
ROW = re.compile(r"\| (H\d\d) \| (.*) \| (.*) \| (.*) \|")
TEST = re.compile(r"def test_((?:h\d\d_)+)\w+\(")
SHOWN = 4


def tests() -> dict[str, list[str]]:
    """Hazard -> where its tests are, in a stable order."""
    found: dict[str, list[str]] = defaultdict(list)
    for path in sorted((ROOT / "tests").rglob("*.py")):
        names = [hazard for prefix in TEST.findall(path.read_text()) for hazard in prefix.rstrip("_").split("_")]
        for hazard in sorted(set(names)):
            count = names.count(hazard)
            where = path.relative_to(ROOT / "tests").as_posix()
            found[hazard.upper()].append(f"`{where}`" + (f" ({count})" if count > 1 else ""))
    return found


def filled(page: str) -> tuple[str, list[str]]:
    """The page with its last column filled, and the hazards that have neither a test nor a reason."""
    known, bare = tests(), []

    def row(match: re.Match[str]) -> str:
        hazard, what, here, last = match.groups()
        places = known.get(hazard, [])
        more = f" and {len(places) - SHOWN} more" if len(places) > SHOWN else ""
        if not places and not last.startswith("not yet:"):
            bare.append(hazard)
        return f"| {hazard} | {what} | {here} | {', '.join(places[:SHOWN]) + more if places else last} |"

    return ROW.sub(row, page), bare


def main() -> int:
    """Entry point."""
    before = PAGE.read_text()
    after, bare = filled(before)
    if "--check" not in sys.argv:
        PAGE.write_text(after)
    elif after != before:
        print("docs/hazards.md is out of date; run: make docs", file=sys.stderr)
        return 1
    if bare:
        print(f"no test and no reason in docs/hazards.md: {', '.join(bare)}", file=sys.stderr)
    return 1 if bare else 0


if __name__ == "__main__":
    sys.exit(main())
