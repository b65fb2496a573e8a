"""Build facts: what vLLM learns from the weight files before it constructs, told to replicas that have no files."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from vllm.config import ModelConfig

from weightwire.errors import MismatchError
from weightwire.types import Json

UNTIED = "word_embeddings_untied_by_checkpoint"
"""The config says that the embeddings are tied, and the checkpoint has an ``lm_head`` of its own (hazard H61)."""
WEIGHT_FILES = ("*.safetensors", "*.bin", "*.pt", "*.gguf")


def collect(model_config: ModelConfig) -> dict[str, Json]:
    """What this replica was built with."""
    return {UNTIED: bool(model_config.word_embeddings_untied_by_checkpoint)}


def apply(model_config: ModelConfig, offered: Mapping[str, Json]) -> None:
    """Let this replica be built as the source was; legal before construction only.

    Raises:
        MismatchError: a fact that is not known here, or one that this replica's own files contradict.
    """
    unknown = sorted(offered.keys() - {UNTIED})
    if unknown:
        raise MismatchError(f"the source was built by an unknown fact ({unknown[0]})", "run one version everywhere")
    theirs, ours = bool(offered.get(UNTIED, False)), bool(model_config.word_embeddings_untied_by_checkpoint)
    if theirs == ours:
        return
    if ours or has_weight_files(model_config.model):
        whose = "this replica's" if ours else "the source's"
        raise MismatchError(f"only {whose} checkpoint has an lm_head of its own", "use one checkpoint everywhere")
    # both levels, as vLLM itself does it in ModelConfig.maybe_untie_word_embeddings
    model_config.hf_config.tie_word_embeddings = False
    model_config.hf_config.get_text_config().tie_word_embeddings = False
    model_config.word_embeddings_untied_by_checkpoint = True


def has_weight_files(path: str) -> bool:
    """Whether ``path`` is a local directory with weight files; ``False`` for a name on the Hub."""
    return any(next(Path(path).glob(pattern), None) is not None for pattern in WEIGHT_FILES)
