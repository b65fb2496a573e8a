"""What a vLLM process of the tests does: an offline engine that obeys lines of JSON, or vLLM's own API server.

    python vllm_child.py OPTIONS-JSON

Events go to standard output, one JSON object a line; whatever vLLM prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from typing import Any


def main(options: dict[str, Any]) -> None:
    """Returns when told to stop, or raises what vLLM raises: the interpreter then ends as it does for any user."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if options["kind"] == "api":
        sys.argv = ["api_server", *options["arguments"]]
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
        return
    Offline(events, options["engine"]).obey()


class Offline:
    """A ``vllm.LLM``."""

    def __init__(self, events: Any, engine: dict[str, Any]) -> None:
        import vllm

        self._events = events
        began = time.monotonic()
        self._llm = vllm.LLM(**engine)
        self._emit("ready", seconds=time.monotonic() - began)

    def obey(self) -> None:
        """Until standard input ends or says ``stop``."""
        for line in sys.stdin:
            command = json.loads(line)
            if command["do"] == "stop":
                return
            getattr(self, f"do_{command['do']}")(command)

    def do_generate(self, command: dict[str, Any]) -> None:
        """Greedy token ids."""
        import vllm

        how = vllm.SamplingParams(temperature=0, max_tokens=command["tokens"], ignore_eos=True)
        answers = self._llm.generate(command["prompts"], how, use_tqdm=False)
        texts = [answer.outputs[0].text for answer in answers]
        self._emit("generated", tokens=[list(answer.outputs[0].token_ids) for answer in answers], texts=texts)

    def _emit(self, event: str, **fields: Any) -> None:
        self._events.write(json.dumps({"event": event, **fields}) + "\n")


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
