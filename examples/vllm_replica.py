"""One vLLM replica: weights from a running one where there is one, eight greedy answers, then it serves weights.

    python vllm_replica.py MODEL '{"url": "host:port", "model_id": "org/model", "revision": "r1"}' [TP]

Nothing of weightwire is imported: with ``pip install weightwire[vllm]`` beside vLLM, the load format is there. Where
MODEL is a name on the Hub, ``model_id`` and ``revision`` may be left out. Prints one line of JSON; ends when standard
input does.
"""

from __future__ import annotations

import json
import sys
import time

import vllm

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


def main(model: str, extra: str, tp: str = "1") -> None:
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


if __name__ == "__main__":  # vLLM starts processes of its own, which import this file
    main(*sys.argv[1:])
