"""Small checkpoints with a tokenizer, and replicas of them as ``weightwire run`` starts them."""

from __future__ import annotations

import contextlib
import json
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from cli_process import COMMAND, Done, environment, weightwire
from runtime_models import BASE, write_checkpoint
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

QUICK = {"WEIGHTWIRE_TRANSPORTS": "tcp", "OMP_NUM_THREADS": "1"}
"""Loading NIXL takes longer than everything that is tested here; other tests are about it."""

TEMPLATE = "{% for message in messages %}<user> {{ message['content'] }} {% endfor %}<assistant> "


def checkpoint(directory: Path) -> Path:
    """A random model of two layers whose tokenizer knows the words w0 … w91."""
    write_checkpoint(directory)
    words = ["<unk>", "<end>", "<user>", "<assistant>", *(f"w{at}" for at in range(BASE["vocab_size"] - 4))]
    tokenizer = Tokenizer(WordLevel({word: at for at, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(directory / "tokenizer.json"))
    config = {"eos_token": "<end>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


def without_weights(source: Path, directory: Path) -> Path:
    """A copy with config and tokenizer only."""
    shutil.copytree(source, directory, ignore=shutil.ignore_patterns("*.safetensors"))
    return directory


def settings(state: Path) -> dict[str, str]:
    """Quick ones, and logs that stay in the test's directory."""
    return QUICK | {"TMPDIR": str(state)}


def run(state: Path, model: Path, *options: str) -> Done:
    """``weightwire run`` to its end."""
    return weightwire(state, "run", str(model), *options, bound=200, variables=settings(state))


@contextlib.contextmanager
def running(state: Path, model: Path, *options: str) -> Iterator[tuple[subprocess.Popen[str], dict[str, Any]]]:
    """``weightwire run`` that serves; the process, and what it told once it was ready."""
    command = [*COMMAND, "run", str(model), "--json", *options]
    with subprocess.Popen(
        command, env=environment(state, settings(state)), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield process, json.loads(line)
        finally:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            finally:
                process.kill()
