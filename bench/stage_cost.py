"""Memory of a source and of a receiver beyond the model's own, for each row of the support table on one rank.

python bench/stage_cost.py [--family llama --family gemma2] [--quantization nvfp4] [--json]

Source and receiver are processes of their own, with the native engine in them and real sockets between them. Their
anonymous memory is sampled from before the load until its end (checkpoint files are mapped, and not counted), and what
the model itself has at the end is taken off. Of copy-on-transform it says what the guard counted, what really changed
(storages that are published and no longer the model's), and the largest module that transforms, by which it may go
beyond that.
"""

from __future__ import annotations

import argparse
import gc
import io
import json
import os
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from processes import Child, Line
from safetensors.torch import load_file, save_file
from torch import nn

from weightwire.auth import load_secret
from weightwire.config import ReplicaRole, Settings
from weightwire.engines.native.options import ReplicaOptions
from weightwire.engines.native.rank import Rank
from weightwire.engines.native.support import ROWS, UNQUANTIZED, Row
from weightwire.metadata.registry import Times
from weightwire.metadata.server.app import EmbeddedServer, ServerSettings
from weightwire.runtime.distributed import TpGroup
from weightwire.runtime.quantization.export import quantize
from weightwire.source.snapshot import own_tensors, storages
from weightwire.types import Stage

MIB = 1 << 20
SAMPLE_S = 0.002
LOAD_S = 300.0
FORM = {"fp8_qdq": "fp8_static"}
"""Quantization of the support table -> the checkpoint format, where it has another name."""
COMMON: dict[str, Any] = {
    "vocab_size": 8192,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 128,
    "max_position_embeddings": 1024,
}
MOE: dict[str, Any] = {"moe_intermediate_size": 512, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma2": ("Gemma2Config", {"query_pre_attn_scalar": 128}),
    "qwen3_moe": ("Qwen3MoeConfig", MOE | {"num_experts": 8}),
    "deepseek_v3": (
        "DeepseekV3Config",
        MOE
        | {
            "num_key_value_heads": 8,
            "n_routed_experts": 8,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 512,
            "kv_lora_rank": 256,
            "qk_rope_head_dim": 64,
            "qk_nope_head_dim": 128,
            "v_head_dim": 128,
            "first_k_dense_replace": 1,
        },
    ),
}


class Anonymous:
    """Anonymous memory of this process beyond what it had at first, sampled from then on."""

    def __init__(self) -> None:
        gc.collect()
        self._base = _anonymous()
        self.peak = 0
        threading.Thread(target=self._sample, daemon=True).start()

    def _sample(self) -> None:
        while True:
            self.peak = max(self.peak, _anonymous() - self._base)
            time.sleep(SAMPLE_S)


def _anonymous() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return next(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))


def write(directory: Path, family: str, quantization: str) -> Path:
    """A checkpoint of random numbers in bfloat16."""
    import transformers

    kind, changes = MODELS[family]
    config = getattr(transformers, kind)(**{**COMMON, **changes})
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(directory)
    if quantization != UNQUANTIZED:
        tensors = load_file(directory / "model.safetensors")
        found, section = quantize(tensors, FORM.get(quantization, quantization))
        save_file(found, directory / "model.safetensors", metadata={"format": "pt"})
        raw = json.loads((directory / "config.json").read_text(encoding="utf-8"))
        (directory / "config.json").write_text(json.dumps(raw | {"quantization_config": section}))
    return directory


def metadata(line: Line, secret_file: str) -> None:
    """A metadata server, until the line ends."""
    settings = ServerSettings(secret=load_secret(Path(secret_file)), times=Times(ttl_s=5.0, warming_s=0.0))
    with EmbeddedServer(settings) as server:
        line.say("ready", url=server.url)
        line.hear()


def replica(line: Line, options: dict[str, Any], url: str, secret_file: str, stage: str) -> None:
    """One rank; loads, tells what that cost, and serves until the line ends."""
    torch.set_num_threads(1)
    sys.stdout = io.StringIO()  # the rank's own events
    role = ReplicaRole.TARGET if options["load_format"] == "presharded" else ReplicaRole.SOURCE
    settings = Settings(
        url=url,
        secret_file=Path(secret_file),
        transports=("tcp",),
        role=role,
        stages=(Stage(stage),),
        load_timeout=LOAD_S,
    )
    memory = Anonymous()
    rank = Rank(ReplicaOptions(**options), settings, TpGroup.single())
    rank.load()
    target = rank.target
    time.sleep(10 * SAMPLE_S)
    model = target.model
    own = _bytes(model)
    told: dict[str, Any] = {"own": own, "over": memory.peak - own, "source": target.live.report.source}
    snapshot, publication = target.hooks._snapshot, target.hooks.publication  # noqa: SLF001  (what is measured)
    if snapshot is not None and publication is not None:
        owners = publication._held_now().memory.owners  # noqa: SLF001
        assert isinstance(owners, list)
        raw = {each.untyped_storage().data_ptr(): each.untyped_storage().nbytes() for each in owners}
        now = storages(tensor for module in model.modules() for tensor in own_tensors(module).values())
        told |= {
            "held": snapshot.held.nbytes,
            "clone": snapshot.held.peak_clone,
            "changed": sum(nbytes for pointer, nbytes in raw.items() if pointer not in now),
            "module": max((sum(t.nbytes for t in own_tensors(each).values()) for each in _changing(model)), default=0),
        }
    line.say("loaded", **told)
    line.hear()
    os._exit(0)


def _changing(model: nn.Module) -> Iterator[nn.Module]:
    """Modules whose transforms do something."""
    for module in model.modules():
        declares = getattr(module, "transform_effect", None)
        if declares is not None and declares():
            yield module


def _bytes(model: nn.Module) -> int:
    tensors = [tensor for module in model.modules() for tensor in own_tensors(module).values()]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


def measure(row: Row, checkpoint: Path, bare: Path, url: str, secret_file: str) -> dict[str, Any]:
    """What one row costs."""
    shared = {"model_id": str(row), "revision": "r1", "kernel_layout": row.kernel_layout, "publish_stage": row.stage}
    given = [
        {"model": str(checkpoint), "load_format": "auto", **shared},
        {"model": str(bare), "load_format": "presharded", **shared},
    ]
    children, told = [], []
    try:
        for name, options in zip(("source", "receiver"), given, strict=True):
            children.append(Child(name, replica, options, url, secret_file, row.stage))
            told.append(children[-1].expect("loaded", LOAD_S))
    finally:
        for child in reversed(children):
            child.kill()
    source, receiver = told
    assert receiver["source"] == "peer"
    return {
        "row": str(row),
        "own": source["own"],
        "source over": source["over"],
        "receiver over": receiver["over"],
        **{key: source.get(key, 0) for key in ("changed", "held", "clone", "module")},
    }


def check(found: dict[str, Any]) -> str:
    """Whether copy-on-transform held no more than what changed, and copied no more than one module beyond it."""
    exact = found["held"] == found["changed"]
    return "yes" if exact and found["clone"] <= found["module"] else "NO"


@contextmanager
def server(root: Path) -> Iterator[tuple[str, str]]:
    """A metadata server's address, and the file of the shared secret."""
    secret = root / "secret"
    secret.write_text("0123456789abcdef0123456789abcdef\n")
    secret.chmod(0o600)
    child = Child("metadata server", metadata, str(secret))
    try:
        yield child.expect("ready")["url"], str(secret)
    finally:
        child.kill()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--family", action="append", choices=sorted(MODELS), help="only these")
    parser.add_argument("--quantization", action="append", help="only these")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    rows = sorted(row for row in ROWS if row.parallel == "single")
    rows = [row for row in rows if row.family in (arguments.family or MODELS)]
    rows = [row for row in rows if not arguments.quantization or row.quantization in arguments.quantization]
    found = []
    with tempfile.TemporaryDirectory() as directory, server(Path(directory)) as (url, secret):
        for family, quantization in sorted({(row.family, row.quantization) for row in rows}):
            root = Path(directory) / f"{family}-{quantization}"
            checkpoint = _written(root / "model", family, quantization)
            bare = root / "bare"
            bare.mkdir()
            (bare / "config.json").write_text((checkpoint / "config.json").read_text(encoding="utf-8"))
            for row in rows:
                if (row.family, row.quantization) == (family, quantization):
                    found.append(measure(row, checkpoint, bare, url, secret))
                    if not arguments.json:
                        print(_line(found[-1]), flush=True)
    if arguments.json:
        print(json.dumps(found))


def _written(directory: Path, family: str, quantization: str) -> Path:
    """In a process of its own: ours must have no threads."""
    child = Child("writer", _write, str(directory), family, quantization)
    child.expect("written", LOAD_S)
    child.kill()
    return directory


def _write(line: Line, directory: str, family: str, quantization: str) -> None:
    write(Path(directory), family, quantization)
    line.say("written")
    line.hear()


def _line(found: dict[str, Any]) -> str:
    sizes = {key: value / MIB for key, value in found.items() if isinstance(value, int)}
    return (
        f"{found['row']}: model {sizes['own']:.0f} MiB, source {sizes['source over']:.0f} over, "
        f"receiver {sizes['receiver over']:.0f} over; changed {sizes['changed']:.1f}, held {sizes['held']:.1f}, "
        f"largest copy {sizes['clone']:.1f}, largest module {sizes['module']:.1f}, bounded: {check(found)}"
    )


if __name__ == "__main__":
    main()
