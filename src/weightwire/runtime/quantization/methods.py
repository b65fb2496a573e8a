"""With what each kind of layer of a quantized checkpoint is stored."""

from __future__ import annotations

from dataclasses import dataclass

from weightwire.errors import ConfigError
from weightwire.runtime.layers.latent import HeadsMethod, KeyValueMethod
from weightwire.runtime.layers.linear import LinearMethod
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

    def linear(self) -> LinearMethod:
        """All are computed."""
        return W4A16AwqMethod(self.config.group) if self.config.name == W4A16_AWQ else LINEAR[self.config.name]()

    def experts(self) -> MoeMethod:
        """Some are computed."""
        if self.config.name not in EXPERTS:
            raise ConfigError(
                f"experts with {self.config.name} weights are not supported", f"this runtime knows {', '.join(EXPERTS)}"
            )
        return EXPERTS[self.config.name]()

    def key_values(self) -> KeyValueMethod:
        """``fp8_block``, and any where the checkpoint leaves it out."""
        return Fp8BlockKeyValueMethod() if self._quantizes_key_values else KeyValueMethod()

    def heads(self) -> HeadsMethod:
        """As ``key_values``."""
        return Fp8BlockHeadsMethod() if self._quantizes_key_values else HeadsMethod()

    @property
    def _quantizes_key_values(self) -> bool:
        if self.config.name != FP8_BLOCK and not self.config.plain_key_values:
            raise ConfigError(
                f"kv_b_proj with {self.config.name} weights is not supported",
                "its rows are reordered and multiplied head by head: leave it out of the quantization (*kv_b_proj*)",
            )
        return not self.config.plain_key_values
