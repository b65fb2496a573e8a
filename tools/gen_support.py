"""Write docs/support-matrix.md from the table that the code uses (``weightwire.engines.native.support``).

python tools/gen_support.py            write it
python tools/gen_support.py --check    fail if it is out of date
"""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path

from weightwire.engines.native.support import ROWS

PAGE = Path(__file__).parents[1] / "docs" / "support-matrix.md"
HEAD = """# What may be loaded from a peer

Generated from the table that the native engine itself asks (`python tools/gen_support.py`); `weightwire doctor
--matrix` prints it row by row. What is not here is refused by name, with the reason, and read from the disk. Rows are
run by `tests/engines/test_support_matrix.py` (llama), `tests/engines/test_families.py` (other families),
`tests/engines/test_quantized_families.py` (quantized experts and latent heads, and a Kimi-K2 shape on eight ranks) and
`tests/engines/test_parallel_layouts.py` (`pp` and `attention_dp`). A draft model has a row of its own; with layers for
multi-token prediction (`--mtp`) `single`, `tp+ep` and `pp` are run, by `tests/engines/test_drafts.py`.

Kernel layouts: `plain` leaves weights as they were loaded; `packed` runs the method's transform. Parallel: `single`
is one rank, `tp` shares tensors, `ep` experts besides, `pp` layers. Under `attention_dp` ranks share the rows of a
batch and the routed experts (cut them, or with `ep` share them whole), and each has all of the rest. A cut through a
block or group of weights that are stored together is refused when the model is built, whatever the table says. What
each row costs in memory stands in [memory](memory.md).

Linear layers and experts are quantized (`kv_b_proj` of latent attention with `fp8_block` alone), all of them, or, in
rows that say `(parts left out)`, but for those that the checkpoint leaves out. Which ones makes no row of its own: a
layer is stored in one of two ways, each with a row where all layers are. Run are attention (`deepseek_v3`,
`qwen3_moe`), attention and dense layers (the Kimi-K2 shape) and `o_proj` (`llama`).

| family | quantization | parallel | kernel layouts | stages |
|---|---|---|---|---|
"""


def page() -> str:
    """The whole page."""
    found: dict[tuple[str, str, str], tuple[set[str], set[str]]] = defaultdict(lambda: (set(), set()))
    for row in ROWS:
        layouts, stages = found[row.family, row.quantization, row.parallel]
        layouts.add(row.kernel_layout)
        stages.add(row.stage)
    lines = [
        f"| {' | '.join(key)} | {', '.join(sorted(layouts))} | {', '.join(sorted(stages))} |"
        for key, (layouts, stages) in sorted(found.items())
    ]
    return HEAD + "\n".join(lines) + "\n"


def main() -> int:
    """Entry point."""
    if "--check" not in sys.argv:
        PAGE.write_text(page())
    elif not PAGE.exists() or PAGE.read_text() != page():
        print("docs/support-matrix.md is out of date; run: make docs", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
