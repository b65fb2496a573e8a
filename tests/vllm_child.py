"""What a vLLM process of the tests does: an offline engine that obeys lines of JSON, or one of vLLM's own commands.

    python vllm_child.py OPTIONS-JSON

Events go to standard output, one JSON object a line; whatever vLLM prints goes to standard error.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import time
from pathlib import Path
from typing import Any


def main(options: dict[str, Any]) -> None:
    """Returns when told to stop, or raises what vLLM raises: the interpreter then ends as it does for any user."""
    events = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)
    if options["kind"] == "api":
        sys.argv = ["api_server", *options["arguments"]]
        runpy.run_module("vllm.entrypoints.openai.api_server", run_name="__main__")
        return
    if options["kind"] == "serve":
        from vllm.entrypoints.cli.main import main as vllm_command

        sys.argv = ["vllm", "serve", *options["arguments"]]
        vllm_command()
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

    def do_reload(self, command: dict[str, Any]) -> None:
        """As a trainer does: its tensors go straight to the worker."""
        from safetensors.torch import load_file

        weights = load_file(Path(command["model"]) / "model.safetensors")
        self._llm.collective_rpc("reload_weights", kwargs={"weights_iterator": weights.items()})
        self._emit("reloaded")

    def do_withdraw(self, _command: dict[str, Any]) -> None:
        """End what the worker in this process publishes: bytes that are resident before and after, and still held."""
        from weightwire.engines.vllm.serving import process_serving
        from weightwire.types import Role

        serving = process_serving()
        publication = serving.publication(Role.TARGET)
        before = resident()
        serving.withdraw(Role.TARGET)
        self._emit("withdrawn", before=before, after=resident(), held=publication.held.nbytes if publication else -1)

    def _emit(self, event: str, **fields: Any) -> None:
        self._events.write(json.dumps({"event": event, **fields}) + "\n")


def resident() -> int:
    """Bytes of this process that are in memory and its own."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
