"""With what each kind of layer of a quantized checkpoint is stored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from weightwire.errors import ConfigError
from weightwire.runtime.layers.latent import HeadsMethod, KeyValueMethod
from weightwire.runtime.layers.linear import LinearMethod
from weightwire.runtime.layers.method import WeightMethod
from weightwire.runtime.layers.moe import MoeMethod
from weightwire.runtime.quantization.config import FP8_BLOCK, W4A16_AWQ, QuantizationConfig
from weightwire.runtime.quantization.experts_fp8 import Fp8BlockMoeMethod, Fp8QdqMoeMethod
from weightwire.runtime.quantization.experts_nvfp4 import Nvfp4MoeMethod
from weightwire.runtime.quantization.latent_fp8 import Fp8BlockHeadsMethod, Fp8BlockKeyValueMethod
from weightwire.runtime.quantization.linear_fp8 import Fp8BlockMethod, Fp8QdqMethod, Fp8RowwiseMethod
from weightwire.runtime.quantization.linear_int import Int8WeightOnlyMethod, W4A16AwqMethod
from weightwire.runtime.quantization.linear_nvfp4 import Nvfp4AwqMethod, Nvfp4Method

LINEAR: dict[str, type[LinearMethod]] = {
    method.name: method
    for method in (
        Int8WeightOnlyMethod,
        Fp8QdqMethod,
        Fp8RowwiseMethod,
        Fp8BlockMethod,
        Nvfp4Method,
        Nvfp4AwqMethod,
    )
}
EXPERTS: dict[str, type[MoeMethod]] = {
    method.name: method for method in (Fp8QdqMoeMethod, Fp8BlockMoeMethod, Nvfp4MoeMethod)
}


@dataclass(frozen=True)
class QuantizedMethods:
    """The ``Methods`` of one checkpoint."""

    config: QuantizationConfig

    def linear(self, parts: Sequence[str]) -> LinearMethod | None:
        """All are computed."""
        return None if self.config.left_out.all_of(parts) else self._linear()

    def experts(self, parts: Sequence[str]) -> MoeMethod | None:
        """Some are computed."""
        if self.config.left_out.all_of(parts):
            return None
        if self.config.name not in EXPERTS:
            raise ConfigError(
                f"experts with {self.config.name} weights are not supported", f"this runtime knows {', '.join(EXPERTS)}"
            )
        return EXPERTS[self.config.name]()

    def key_values(self, part: str) -> KeyValueMethod | None:
        """``fp8_block``."""
        return Fp8BlockKeyValueMethod() if self._quantizes_key_values(part) else None

    def heads(self, part: str) -> HeadsMethod | None:
        """As ``key_values``."""
        return Fp8BlockHeadsMethod() if self._quantizes_key_values(part) else None

    def kinds(self, *, experts: bool, latent: bool, partly: bool) -> list[WeightMethod[Any]]:
        """First that of linear layers, which has the quantization's name."""
        found: list[WeightMethod[Any]] = [self._linear()]
        if experts and self.config.name in EXPERTS:
            found.append(EXPERTS[self.config.name]())
        if latent and self.config.name == FP8_BLOCK:
            found += [Fp8BlockKeyValueMethod(), Fp8BlockHeadsMethod()]
        elif latent:
            partly = True
        # all that is not quantized is stored by methods of one name and one version
        return [*found, LinearMethod()] if partly else found

    def _linear(self) -> LinearMethod:
        return W4A16AwqMethod(self.config.group) if self.config.name == W4A16_AWQ else LINEAR[self.config.name]()

    def _quantizes_key_values(self, part: str) -> bool:
        if self.config.left_out.has(part):
            return False
        if self.config.name != FP8_BLOCK:
            raise ConfigError(
                f"{part} with {self.config.name} weights is not supported",
                "its rows are reordered and multiplied head by head: leave it out of the quantization (*kv_b_proj*)",
            )
        return True
