"""Small layers as quantized checkpoints have them on a device: packed weights, scales of their own dtypes, zero points.

The bytes are random (any byte pattern must arrive as it was, NaNs of ``float8`` included), so what is computed from
them is a digest of every tensor and, of the family whose arithmetic torch can do anywhere, a product.
"""

from __future__ import annotations

import hashlib

import torch
from torch import nn

WIDE, DEEP, GROUP = 512, 1024, 128

FAMILIES: dict[str, dict[str, tuple[torch.dtype, tuple[int, ...]]]] = {
    "fp8_block": {
        "weight": (torch.float8_e4m3fn, (WIDE, DEEP)),
        "weight_scale_inv": (torch.float32, (WIDE // GROUP, DEEP // GROUP)),
    },
    "fp8_tensor": {
        "weight": (torch.float8_e5m2, (WIDE, DEEP)),
        "weight_scale": (torch.float32, ()),
        "input_scale": (torch.float32, ()),
    },
    "int8": {"weight": (torch.int8, (WIDE, DEEP)), "weight_scale": (torch.bfloat16, (WIDE, 1))},
    "gptq_int4": {
        "qweight": (torch.int32, (DEEP // 8, WIDE)),
        "qzeros": (torch.int32, (DEEP // GROUP, WIDE // 8)),
        "scales": (torch.float16, (DEEP // GROUP, WIDE)),
        "g_idx": (torch.int32, (DEEP,)),
    },
    "nvfp4": {
        "weight": (torch.uint8, (WIDE, DEEP // 2)),
        "weight_scale": (torch.float8_e4m3fn, (WIDE, DEEP // 16)),
        "weight_scale_2": (torch.float32, ()),
    },
    "mxfp4": {"blocks": (torch.uint8, (WIDE, DEEP // 2)), "scales": (torch.float8_e8m0fnu, (WIDE, DEEP // 32))},
}


class Quantized(nn.Module):
    """One layer of each family, as frozen parameters."""

    def __init__(self) -> None:
        super().__init__()
        for family, tensors in FAMILIES.items():
            layer = nn.Module()
            for name, (dtype, shape) in tensors.items():
                layer.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=dtype), requires_grad=False))
            self.add_module(family, layer)


def raw(tensor: torch.Tensor) -> torch.Tensor:
    """Its bytes; a tensor without dimensions has them, too."""
    return tensor.detach().reshape(-1).view(torch.uint8)


@torch.no_grad()
def fill(model: Quantized, seed: int) -> None:
    generator = torch.Generator(next(model.parameters()).device).manual_seed(seed)
    for parameter in model.parameters():
        raw(parameter).random_(0, 256, generator=generator)


@torch.no_grad()
def tokens(model: Quantized) -> dict[str, object]:
    """A digest of every tensor, named, and of a product with the ``int8`` layer's weights."""
    whole = hashlib.sha256()
    for name, parameter in model.named_parameters():
        whole.update(name.encode() + raw(parameter).cpu().numpy().tobytes())
    wide = model.get_submodule("int8").weight.float()
    row = torch.arange(DEEP, device=wide.device, dtype=torch.float32) / DEEP
    return {"tokens": [int((wide @ row).argmax())], "logits": whole.hexdigest()[:16], "finite": True}
