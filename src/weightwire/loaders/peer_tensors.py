"""The native runtime's weights from a program of another kind: one rank's tensors under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch

from weightwire.errors import CheckpointError, DecisionError, MismatchError, WeightwireError
from weightwire.loaders.tensors import take_tensors
from weightwire.metadata.decision import Group, Verdict, Vote
from weightwire.runtime.checkpoint.protocol import CheckpointLoader, LoadRequest, MemorySource, TensorSource, Weights
from weightwire.runtime.checkpoint.safetensors_loader import facts_of
from weightwire.runtime.config import WORD_EMBEDDINGS_UNTIED, BuildFacts, ModelConfig
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.target.receiver import Receiver
from weightwire.target.report import LoadReport

_NUMBERS = ("weight", "bias")
"""Leaf names of tensors that are in the model's own dtype, unless they are quantized."""
_NEVER_QUANTIZED = ("model.embed_tokens.weight", "lm_head.weight")
_REMEDY = "publish each rank's part as docs/tensors.md says, or leave tensors_of out"


@dataclass(kw_only=True)
class PeerTensors:
    """A ``CheckpointLoader``: this rank's part of every tensor, cut by whoever publishes it. One load an object.

    All of it is received, into host memory, before the model is constructed: one more shard there until ``cleanup``.

    Attributes:
        who: the program, in words.
        dtype: of the model, and of every tensor that is not quantized: nothing is converted.
        files: reads the configuration.
        receive: makes the receiver for a config.
        max_nbytes: for a config: nothing is received where more is offered.
        group: the ranks; its epoch is this load's alone.
        vote_s: what the other ranks are waited for once this one's part is in place.
        report: how the tensors came, or did not.
    """

    who: str
    dtype: torch.dtype
    files: CheckpointLoader
    receive: Callable[[ModelConfig], Receiver]
    max_nbytes: Callable[[ModelConfig], int]
    group: Group
    vote_s: float
    report: LoadReport = field(default_factory=LoadReport)
    _sources: Mapping[str, TensorSource] = field(default_factory=dict)
    _facts: BuildFacts = field(default_factory=dict)

    def load_config(self, checkpoint_dir: Path) -> ModelConfig:
        """From the directory."""
        return self.files.load_config(checkpoint_dir)

    def build_facts(self, checkpoint_dir: Path, config: ModelConfig) -> BuildFacts:  # noqa: ARG002  (the protocol's)
        """Receive the tensors; what those of all ranks tell. All ranks raise if one does.

        Raises:
            WeightwireError: as ``take_tensors``.
            MismatchError: a tensor that is not quantized has another dtype than the model.
        """
        receiver = self.receive(config)
        self.report = receiver.report
        tensors = take_tensors(receiver, self.max_nbytes(config)).tensors
        try:
            _check_dtypes(tensors, self.dtype)
        except MismatchError as error:
            self.group.refuse("facts", error.problem)
            raise
        self._sources = {name: MemorySource(name, tensor, "the source") for name, tensor in tensors.items()}
        # equal rows on this rank say nothing of the other ranks' rows
        untied = bool(facts_of(self._sources, config, self.who))
        verdict = _agreed(self.group.vote("facts", Vote(ok=True, value=untied)))
        self._facts = {WORD_EMBEDDINGS_UNTIED: True} if any(verdict.values) else {}
        return self._facts

    def load_weights(self, request: LoadRequest) -> Weights:
        """What was received, for a model that was built with what ``build_facts`` returned.

        Raises:
            MismatchError: the model was built otherwise.
        """
        assert isinstance(request.model, DecoderForCausalLM)
        if request.model.build_facts != self._facts:
            raise MismatchError("they have other build facts than the model was built with", _REMEDY)
        return Weights(self._sources, presharded=True)

    def place(self, request: LoadRequest) -> None:
        """Copy the tensors into ``request.model``; returns when that has succeeded on all ranks. They are let go of.

        After an error the model's parameters hold no meaning, and may be loaded once more.

        Raises:
            MismatchError: this rank's tensors are not what the model needs.
            DecisionError: another rank's are not, or it did not finish.
        """
        assert isinstance(request.model, DecoderForCausalLM)
        try:
            request.model.load_weights(self.load_weights(request), request.progress)
        except WeightwireError as error:
            self.group.refuse("placed", error.problem)
            if isinstance(error, CheckpointError):
                raise MismatchError(error.problem, _REMEDY) from error
            raise
        finally:
            self.cleanup()
        _agreed(self.group.vote("placed", Vote(ok=True), self.vote_s))

    def cleanup(self) -> None:
        """Let go of the tensors. Idempotent."""
        self._sources = {}


def _agreed(verdict: Verdict) -> Verdict:
    if not verdict.ok:
        raise DecisionError(f"not all ranks could take theirs: {verdict.reason}", "see that rank's log")
    return verdict


def _check_dtypes(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype) -> None:
    """A checkpoint's numbers are rounded to the model's dtype as it is loaded; a peer's were, or are another model's.

    Raises:
        MismatchError: a weight or bias that is not quantized has another dtype.
    """
    for name, tensor in tensors.items():
        quantized = not tensor.is_floating_point() or tensor.element_size() < 2
        exact = name in _NEVER_QUANTIZED or (name.rpartition(".")[2] in _NUMBERS and not quantized)
        if exact and tensor.dtype is not dtype:
            raise MismatchError(f"the source: tensor {name} is {tensor.dtype}, the model {dtype}", _REMEDY)
