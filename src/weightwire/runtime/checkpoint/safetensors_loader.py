"""Hugging Face safetensors directories, read slice by slice."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from weightwire.errors import CheckpointError
from weightwire.runtime.checkpoint.protocol import LoadRequest, TensorSource, Weights
from weightwire.runtime.config import WORD_EMBEDDINGS_UNTIED, BuildFacts, ModelConfig, read_config, read_json_object

logger = logging.getLogger(__name__)

_INDEX = "model.safetensors.index.json"
_COMPLETE = "download the checkpoint again"
_COMPARE_ROWS = 4096


class _FileSource:
    """One tensor of one open safetensors file."""

    def __init__(self, name: str, path: Path, file: Any) -> None:
        self.name = name
        self.origin = str(path)
        try:
            self._slice = file.get_slice(name)
            self.shape: tuple[int, ...] = tuple(self._slice.get_shape())
        except SafetensorError as error:
            raise CheckpointError(f"{path} has no readable tensor {name}", _COMPLETE) from error

    def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
        if start == stop:  # safetensors refuses an empty slice
            shape = list(self.shape)
            shape[dim] = 0
            return torch.empty(shape, dtype=torch.bfloat16)
        index = (slice(None),) * dim + (slice(start, stop),) if self.shape else ()
        try:
            values: torch.Tensor = self._slice[index]
        except (SafetensorError, ValueError, OSError) as error:
            raise CheckpointError(f"{self.origin}: tensor {self.name} cannot be read", _COMPLETE) from error
        return values


class SafetensorsLoader:
    """``CheckpointLoader`` for a directory with ``config.json`` and ``model.safetensors``, or several with an index.

    Files are memory-mapped and only the slices that a rank asks for are touched. They must not change while open.
    """

    def __init__(self) -> None:
        self._files: dict[Path, Any] = {}

    def load_config(self, checkpoint_dir: Path) -> ModelConfig:
        """Read ``config.json``; raises as ``read_config``."""
        return read_config(checkpoint_dir)

    def build_facts(self, checkpoint_dir: Path, config: ModelConfig) -> BuildFacts:
        """What only the files tell: ``word_embeddings_untied`` where an ``lm_head`` of its own contradicts the config.

        Empty where there is nothing to tell, also where the directory has no weights at all.

        Raises:
            CheckpointError: the files cannot be read.
        """
        if not config.tie_word_embeddings or not has_weights(checkpoint_dir):
            return {}
        return facts_of(self._open(checkpoint_dir), config, str(checkpoint_dir))

    def load_weights(self, request: LoadRequest) -> Weights:
        """All tensors of the checkpoint, unread.

        Raises:
            CheckpointError: a file is missing or corrupt, or does not hold what the index says.
        """
        return Weights(self._open(request.checkpoint_dir))

    def cleanup(self) -> None:
        """Close the files."""
        self._files.clear()

    def _open(self, directory: Path) -> dict[str, TensorSource]:
        index = directory / _INDEX
        if index.exists():
            return self._open_indexed(directory, index)
        path = directory / "model.safetensors"
        if not path.exists():
            raise CheckpointError(
                f"{directory} has no model.safetensors and no {_INDEX}",
                "give a checkpoint directory with weights, or a running source",
            )
        file = self._file(path)
        return {name: _FileSource(name, path, file) for name in file.keys()}  # noqa: SIM118 - not a dict

    def _open_indexed(self, directory: Path, index: Path) -> dict[str, TensorSource]:
        weight_map = read_json_object(index, _COMPLETE).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
            raise CheckpointError(f"{index}: weight_map is missing or not a table of file names", _COMPLETE)
        sources: dict[str, TensorSource] = {}
        for name, filename in weight_map.items():
            if Path(filename).name != filename:
                raise CheckpointError(f"{index}: {filename!r} is not a plain file name", _COMPLETE)
            path = directory / filename
            sources[name] = _FileSource(name, path, self._file(path))
        return sources

    def _file(self, path: Path) -> Any:
        if path not in self._files:
            try:
                self._files[path] = safe_open(str(path), framework="pt", device="cpu")
            except (SafetensorError, OSError) as error:
                problem = "is missing" if not path.exists() else "is corrupt or truncated"
                raise CheckpointError(f"{path} {problem}", _COMPLETE) from error
        return self._files[path]


def has_weights(directory: Path) -> bool:
    """Whether the directory claims to hold weights (not whether they are complete)."""
    return (directory / _INDEX).exists() or (directory / "model.safetensors").exists()


def facts_of(sources: Mapping[str, TensorSource], config: ModelConfig, where: str) -> BuildFacts:
    """What a checkpoint's tensors, which are at ``where``, tell of construction; see ``SafetensorsLoader.build_facts``.

    Raises:
        CheckpointError: they cannot be read.
    """
    head, embedding = sources.get("lm_head.weight"), sources.get("model.embed_tokens.weight")
    if not config.tie_word_embeddings or head is None or embedding is None or _equal(head, embedding):
        return {}
    logger.info("%s: lm_head differs from the embedding although the config ties them; untied", where)
    return {WORD_EMBEDDINGS_UNTIED: True}


def _equal(one: TensorSource, other: TensorSource) -> bool:
    if one.shape != other.shape or not one.shape:
        return False
    rows = one.shape[0]
    for start in range(0, rows, _COMPARE_ROWS):
        stop = min(start + _COMPARE_ROWS, rows)
        if not torch.equal(one.read(0, start, stop), other.read(0, start, stop)):
            return False
    return True
