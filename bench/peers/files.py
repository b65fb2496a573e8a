"""Loaders of files from a warm page cache: safetensors, Run:ai's model streamer, fastsafetensors.

    python bench/peers/files.py FILE NBYTES COUNT

Commands name a way; each fills the same parameters and says ``seconds``.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from process import check, dirty, obey, tell, touched, value_of
from safetensors import safe_open


def name(at: int) -> str:
    return f"tensor.{at:06}"


def write(path: Path, nbytes: int, count: int) -> None:
    from safetensors.torch import save_file

    size = nbytes // count
    save_file({name(at): torch.full((size,), value_of(at), dtype=torch.uint8) for at in range(count)}, path)


def safetensors(path: str, into: dict[str, torch.Tensor]) -> None:
    with safe_open(path, framework="pt") as file:
        for key, tensor in into.items():
            tensor.copy_(file.get_tensor(key))


def runai(path: str, into: dict[str, torch.Tensor]) -> None:
    from runai_model_streamer import SafetensorsStreamer

    with SafetensorsStreamer() as streamer:
        streamer.stream_file(path)
        for key, tensor in streamer.get_tensors():
            into[key].copy_(tensor)


def fastsafetensors(path: str, into: dict[str, torch.Tensor]) -> None:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device("cpu"), nogds=True)
    loader.add_filenames({0: [path]})
    loaded = loader.copy_files_to_device()
    for key, tensor in into.items():
        tensor.copy_(loaded.get_tensor(key))
    loaded.close()
    loader.close()


WAYS: dict[str, Callable[[str, dict[str, torch.Tensor]], None]] = {
    "safetensors": safetensors,
    "runai": runai,
    "fastsafetensors": fastsafetensors,
}


def main() -> None:
    path, nbytes, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    if not Path(path).exists():
        write(Path(path), nbytes, count)
    parts = touched(nbytes, count)
    into = {name(at): torch.from_numpy(part) for at, part in enumerate(parts)}
    Path(path).read_bytes()  # into the page cache
    tell(ready=True)

    def act(command: Mapping[str, Any]) -> Mapping[str, object]:
        torch.set_num_threads(command.get("threads", 1))
        dirty(parts)
        began = time.perf_counter()
        WAYS[command["way"]](path, into)
        seconds = time.perf_counter() - began
        check(parts)
        return {"seconds": seconds}

    obey(act)


if __name__ == "__main__":
    main()
