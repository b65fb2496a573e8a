"""A compact tensor-parallel PyTorch runtime in the shape of TensorRT-LLM's PyTorch backend.

It knows nothing of networks or peers: bytes reach it through the ``CheckpointLoader`` protocol. Every loading hazard
can be run on it on a CPU. It is not a serving engine.
"""

from __future__ import annotations

from weightwire.runtime.checkpoint.protocol import (
    CheckpointLoader,
    Final,
    Injected,
    LoadRequest,
    MemorySource,
    Progress,
    Stage,
    TensorSource,
    Weights,
)
from weightwire.runtime.checkpoint.safetensors_loader import SafetensorsLoader, has_weights
from weightwire.runtime.config import WORD_EMBEDDINGS_UNTIED, BuildFacts, KernelLayout, ModelConfig, read_config
from weightwire.runtime.distributed import RankEnvironment, TpGroup, discover_rank, serve_store
from weightwire.runtime.generate import generate, mtp_logits, prompt_logits
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.load_format import LoadFormat
from weightwire.runtime.mapping import Mapping, TpCoordinates, effective_tp
from weightwire.runtime.materialize import materialize
from weightwire.runtime.model_loader import (
    LoaderSettings,
    LoadHooks,
    LoadResult,
    ModelLoader,
    NoHooks,
    fill_dummy,
    parse_dtype,
)
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.runtime.models.llama import LlamaForCausalLM
from weightwire.runtime.models.registry import construct
from weightwire.runtime.post_load import adopt_processed, post_load_weights, prepare_processed, prepare_raw

__all__ = [
    "WORD_EMBEDDINGS_UNTIED",
    "BuildFacts",
    "CheckpointLoader",
    "DecoderForCausalLM",
    "Final",
    "Injected",
    "KernelLayout",
    "LayerContext",
    "LlamaForCausalLM",
    "LoadFormat",
    "LoadHooks",
    "LoadRequest",
    "LoadResult",
    "LoaderSettings",
    "Mapping",
    "MemorySource",
    "ModelConfig",
    "ModelLoader",
    "NoHooks",
    "Progress",
    "RankEnvironment",
    "SafetensorsLoader",
    "Stage",
    "TensorSource",
    "TpCoordinates",
    "TpGroup",
    "Weights",
    "adopt_processed",
    "construct",
    "discover_rank",
    "effective_tp",
    "fill_dummy",
    "generate",
    "has_weights",
    "materialize",
    "mtp_logits",
    "parse_dtype",
    "post_load_weights",
    "prepare_processed",
    "prepare_raw",
    "prompt_logits",
    "read_config",
    "serve_store",
]
