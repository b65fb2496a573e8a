"""How a layer's weights are stored, in an object of its own: one delegation for linear layers, experts and heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

from torch import nn

from weightwire.errors import ManifestMismatch
from weightwire.manifest.sharding import Sharding
from weightwire.runtime.layers.shards import Part
from weightwire.runtime.mapping import TpCoordinates
from weightwire.types import Json

TransformEffect = Literal["in_place", "replaces"]
LayerT = TypeVar("LayerT")


class WeightMethod(Generic[LayerT]):
    """How a layer stores its weights. This is what all have in common: nothing is transformed.

    Life of a layer: ``create_weights``, ``load_weights`` (at its end everything that the checkpoint decides is done:
    parameters may have been created, removed and requantised), ``transform``. A receiver of raw bytes has
    ``create_weights`` and ``import_state`` instead of the first two, one of transformed bytes ``to_processed`` besides.
    """

    name = "unquantized"
    """As the support table and the raw layout have it."""
    raw_version = "v1"
    """Of the bytes after ``load_weights``; part of the identity."""
    transform_protocol = "v1"
    """Of the bytes after ``transform``; part of the identity."""

    def create_weights(self, layer: LayerT) -> None:
        """Register the layer's parameters, uninitialised, in their raw shapes."""
        raise NotImplementedError

    def checkpoint_tensors(self, layer: LayerT) -> tuple[str, ...]:
        """Leaf names that each part must have."""
        raise NotImplementedError

    def optional_tensors(self) -> tuple[str, ...]:
        """Leaf names that each part may have."""
        return ()

    def load_weights(self, layer: LayerT, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """As ``Loadable.load_weights``."""
        raise NotImplementedError

    def tensor_shards(self, layer: LayerT) -> dict[str, Sharding]:  # noqa: ARG002 - for those that can tell
        """Which parts of the whole layer's tensors the raw parameters are; left out, they cannot be resharded."""
        return {}

    def transform_effect(self, layer: LayerT) -> dict[str, TransformEffect]:  # noqa: ARG002
        """What ``transform`` will do to each own tensor that it touches; known from construction on."""
        return {}

    def transform(self, layer: LayerT) -> None:
        """Bring the weights into the kernel's layout; called once where there is an effect."""

    def to_processed(self, layer: LayerT) -> None:
        """Give raw parameters that are replaced their transformed shapes, uninitialised."""

    def to_raw(self, layer: LayerT) -> None:
        """Give parameters their raw shapes again, uninitialised where they differ, and forget what loading decided."""

    def export_state(self, layer: LayerT) -> dict[str, Json]:  # noqa: ARG002
        """What loading decided and no tensor says: scalars, and which optional parameters there are."""
        return {}

    def import_state(self, layer: LayerT, state: dict[str, Json]) -> None:  # noqa: ARG002
        """Take over what another layer of the same kind exported; creates and removes parameters.

        Raises:
            ManifestMismatch: it is not of this kind.
        """
        refuse_state(state, ())


class MethodLayer(nn.Module):
    """A layer whose weights are stored as its ``method`` says.

    Life: raw (constructed, loaded) → ``transform_weights`` → ``cache_derived_state``, which makes ``forward`` follow
    what the weights now are. A receiver of transformed bytes goes ``prepare_processed`` → bytes →
    ``_weights_transformed = True`` → ``cache_derived_state``.
    """

    method: WeightMethod[Any]
    weights_are_packed: bool = False
    """How ``forward`` reads the weights; set by ``cache_derived_state`` alone."""
    _weights_transformed: bool = False
    _raw: bool = True  # what the weights are, or are about to be filled with

    def refer(self) -> None:
        """Take references to the tensors that there are now; called whenever some may have been exchanged."""

    def tensor_shards(self) -> dict[str, Sharding]:
        """Of the raw weights, as the method stores them; transformed ones are never resharded."""
        return self.method.tensor_shards(self) if self._raw else {}

    def transform_effect(self) -> dict[str, TransformEffect]:
        """What ``transform_weights`` will do to each own tensor that it touches; known from construction on."""
        return self.method.transform_effect(self)

    def transform_weights(self) -> None:
        """Bring the weights into the kernel's layout. One-shot: a second call does nothing."""
        if self._weights_transformed:
            return
        if self.transform_effect():
            self.method.transform(self)
            self._raw = False
        self._weights_transformed = True

    def cache_derived_state(self) -> None:
        """Make ``forward`` follow the weights' layout, and refer to the tensors that there are now. Idempotent."""
        self.weights_are_packed = self._weights_transformed and bool(self.transform_effect())
        self.refer()

    def post_load_weights(self) -> None:
        """All stages in order, for this layer alone."""
        self.transform_weights()
        self.cache_derived_state()

    def prepare_processed(self) -> None:
        """Give replaced parameters their transformed shapes, uninitialised. Nothing is computed. Idempotent."""
        if self._raw and self.transform_effect():
            self.method.to_processed(self)
            self._raw = False
        self.refer()

    def prepare_raw(self) -> None:
        """Give parameters their raw shapes again, uninitialised where they differ; the transform may run anew."""
        self.method.to_raw(self)
        self._weights_transformed, self._raw = False, True
        self.cache_derived_state()

    def export_state(self) -> dict[str, Json]:
        """What loading decided and no tensor says."""
        return self.method.export_state(self)

    def import_state(self, state: dict[str, Json]) -> None:
        """Take over what the same layer of another replica exported."""
        self.method.import_state(self, state)
        self.refer()


class LoadableLayer(MethodLayer):
    """One that a checkpoint fills by itself: ``Loadable`` and ``TakesMore``."""

    def checkpoint_tensors(self) -> tuple[str, ...]:
        """Leaf names that each part must have in the checkpoint."""
        return self.method.checkpoint_tensors(self)

    def optional_tensors(self) -> tuple[str, ...]:
        """Leaf names that each part may have in the checkpoint."""
        return self.method.optional_tensors()

    def load_weights(self, parts: Sequence[Part], tp: TpCoordinates) -> frozenset[str]:
        """As ``Loadable.load_weights``."""
        written = self.method.load_weights(self, parts, tp)
        self.refer()
        return written


def refuse_state(state: Mapping[str, Json], known: Sequence[str]) -> None:
    """Refuse declared state that has not exactly the ``known`` keys.

    Raises:
        ManifestMismatch: naming the difference.
    """
    if sorted(state) != sorted(known):
        wrong = sorted(set(state) ^ set(known))
        raise ManifestMismatch(
            f"the source's layer declares other state than this one: {', '.join(wrong)[:200]}",
            "give both sides the same model and quantization",
        )
