"""Write a quantized Hugging Face checkpoint from a float one, for tests and trials (no calibration is done).

    python tools/quantize_checkpoint.py SOURCE TARGET FORMAT [--leave-out PATTERN ...]

SOURCE holds config.json and model.safetensors (or several with an index). TARGET is made. FORMAT is one of those that
``weightwire.runtime.quantization.export`` lists; a wrong one prints them. PATTERN is the name of a module that is not
quantized, or a pattern of such names: ``'*self_attn*'``, ``model.layers.0``.

Linear layers and routed experts (qwen3_moe, deepseek_v3) are quantized, each expert by itself as published checkpoints
have them; embedding, head, routers and norms are not, nor is ``kv_b_proj`` but by ``fp8_block``.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from safetensors.torch import load_file, save_file

from weightwire.errors import WeightwireError
from weightwire.runtime.quantization.export import quantize

_NOT_COPIED = {"config.json", "model.safetensors.index.json"}


def write_quantized(source: Path, target: Path, form: str, leave_out: Sequence[str] = ()) -> Path:
    """``target`` with the checkpoint of ``source`` quantized, but for ``leave_out``; the other files as they are."""
    files = sorted(source.glob("*.safetensors"))
    tensors = {name: tensor for file in files for name, tensor in load_file(file).items()}
    quantized, section = quantize(tensors, form, leave_out)
    target.mkdir(parents=True)
    save_file(quantized, target / "model.safetensors", metadata={"format": "pt"})
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    (target / "config.json").write_text(json.dumps(raw | {"quantization_config": section}, indent=1))
    for file in source.iterdir():
        if file.is_file() and file.name not in _NOT_COPIED and file not in files:
            shutil.copy(file, target / file.name)
    return target


def main(arguments: list[str]) -> int:
    """Entry point."""
    required, option = arguments[:3], arguments[3:4]
    if len(required) < 3 or (option and (option != ["--leave-out"] or len(arguments) == 4)):
        print(__doc__, file=sys.stderr)
        return 2
    try:
        print(write_quantized(Path(required[0]), Path(required[1]), required[2], arguments[4:]))
    except WeightwireError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
