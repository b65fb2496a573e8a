"""One vLLM replica with the load format of ``vllm_loader.py``: greedy tokens of eight prompts, then it serves weights.

    python vllm_replica.py MODEL_DIR TP '{"model_id": "org/model", "revision": "r1", "url": "host:port"}'

Prints one line of JSON; ends when standard input does.
"""

from __future__ import annotations

import json
import sys
import time

import vllm
import vllm_loader  # noqa: F401  (registers the load format; here at the top, so that spawned workers do it too)

PROMPTS = [
    "The capital of France is",
    "A prime number is",
    "Water boils at",
    "Once upon a time",
    "def fibonacci(n):",
    "The opposite of hot is",
    "List three colours:",
    "In the year 1969",
]


def main(model: str, tp: str, extra: str) -> None:
    """See the module."""
    began = time.monotonic()
    llm = vllm.LLM(
        model,
        load_format="presharded",
        model_loader_extra_config=json.loads(extra),
        tensor_parallel_size=int(tp),
        enforce_eager=True,
        max_model_len=512,
    )
    ready = time.monotonic() - began
    answers = llm.generate(PROMPTS, vllm.SamplingParams(temperature=0, max_tokens=32, ignore_eos=True))
    tokens = [list(answer.outputs[0].token_ids) for answer in answers]
    print(json.dumps({"ready": ready, "text": PROMPTS[0] + answers[0].outputs[0].text, "tokens": tokens}), flush=True)
    sys.stdin.read()


if __name__ == "__main__":
    main(*sys.argv[1:])
