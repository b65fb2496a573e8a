"""What may be loaded from a peer: the one table of family x quantization x kernel layout x parallelism x stage.

The code asks ``refusal`` before it asks or offers anything; what has no row is refused by name and read from the disk.
Every row is run by ``tests/engines`` with a baseline, a donor and a receiver. No torch here: the command line prints
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product

from weightwire.types import Stage

_ARCHITECTURES = {
    "DeepseekV3ForCausalLM": "deepseek_v3",
    "Gemma2ForCausalLM": "gemma2",
    "LlamaForCausalLM": "llama",
    "Qwen3ForCausalLM": "qwen3",
    "Qwen3MoeForCausalLM": "qwen3_moe",
}
_LAYOUTS = ("plain", "packed")
_STAGED = ("pp", "tp+pp")
_STAGES = tuple(stage.value for stage in Stage)
UNQUANTIZED = "unquantized"
PARTLY = " (parts left out)"
"""Behind a quantization that the checkpoint leaves layers out of, whichever: each is stored in one of two ways."""


@dataclass(frozen=True, order=True)
class Row:
    """One combination that is proven.

    ``parallel``: as ``parallel`` names it. ``kernel_layout``: the receiver's.
    """

    family: str
    quantization: str
    kernel_layout: str
    parallel: str
    stage: str

    def __str__(self) -> str:
        return f"{self.family} x {self.quantization} x {self.kernel_layout} x {self.parallel} x {self.stage}"


def _rows(family: str, quantizations: tuple[str, ...], parallel: tuple[str, ...]) -> frozenset[Row]:
    return frozenset(Row(*each) for each in product((family,), quantizations, _LAYOUTS, parallel, _STAGES))


QUANTIZATIONS = (
    "int8_weight_only",
    "fp8_qdq",
    "fp8_rowwise",
    "fp8_block",
    "nvfp4",
    "nvfp4_awq",
    "w4a16_awq",
)
"""Those of linear layers, proven on ``llama``."""
OF_EXPERTS = ("fp8_qdq", "fp8_block", "nvfp4")
"""Those of experts."""
OF_LATENT_HEADS = ("fp8_block", "nvfp4")
"""Those that are proven with latent attention; ``kv_b_proj`` itself is quantized with the first alone."""

_PARTLY_BLOCKS, _PARTLY_NVFP4 = f"fp8_block{PARTLY}", f"nvfp4{PARTLY}"

ROWS: frozenset[Row] = (
    _rows("llama", (UNQUANTIZED,), ("single", "tp", *_STAGED))
    | _rows("llama", QUANTIZATIONS, ("single", "tp"))
    | _rows("llama", (_PARTLY_BLOCKS,), ("tp",))
    | _rows("qwen3", (UNQUANTIZED,), ("single", "tp", *_STAGED))
    | _rows("qwen3_moe", (UNQUANTIZED,), ("single", "tp", "tp+ep", "attention_dp+ep", *_STAGED))
    | _rows("qwen3_moe", OF_EXPERTS, ("tp", "tp+ep"))
    | _rows("qwen3_moe", (_PARTLY_NVFP4,), ("tp+ep",))
    | _rows("deepseek_v3", (UNQUANTIZED,), ("single", "tp", "tp+ep", "attention_dp", "attention_dp+ep"))
    | _rows("deepseek_v3", (UNQUANTIZED,), ("tp+ep+pp", *_STAGED))
    | _rows("deepseek_v3", (*OF_LATENT_HEADS, _PARTLY_NVFP4), ("tp", "tp+ep"))
    | _rows("gemma2", (UNQUANTIZED,), ("single", "tp", *_STAGED))
)


def parallel(*, tp: int, pp: int = 1, ep: int = 1, attention_dp: bool = False) -> str:
    """What is shared by ranks: ``single`` for nothing, else names of ``tensors``, experts and stages, in this order.

    ``tp`` where ranks cut tensors, ``attention_dp`` where they share the rows of a batch and cut routed experts alone;
    ``ep`` where these are shared whole, too; ``pp`` where stages share layers.
    """
    axes = {"attention_dp": attention_dp, "tp": tp > 1 and not attention_dp, "ep": ep > 1, "pp": pp > 1}
    return "+".join(axis for axis, used in axes.items() if used) or "single"


def quantized_as(name: str | None, *, partly: bool) -> str:
    """A quantization as rows name it: ``None`` is that of no layer, ``partly`` where some are left out."""
    return f"{name}{PARTLY}" if name and partly else name or UNQUANTIZED


def row_of(*, architecture: str, quantization: str, kernel_layout: str, parallel: str, stage: Stage) -> Row:
    """The combination that a replica asks about, in the table or not; ``quantization`` as ``quantized_as`` has it."""
    family = _ARCHITECTURES.get(architecture, architecture)
    return Row(family, quantization, kernel_layout, parallel, stage.value)


def refusal(row: Row) -> str:
    """Why nothing may be loaded from a peer for ``row``; empty where it may."""
    if row in ROWS:
        return ""
    if row.family not in {each.family for each in ROWS}:
        why = f"no combination of {row.family} is proven"
    elif not any((each.family, each.quantization) == (row.family, row.quantization) for each in ROWS):
        why = f"{row.family} is not proven with {row.quantization} weights"
    elif not any((each.family, each.parallel) == (row.family, row.parallel) for each in ROWS):
        why = f"{row.family} is not proven under {row.parallel}"
    else:
        why = "no test runs it"
    return f"{row} is not in the support table: {why}"
