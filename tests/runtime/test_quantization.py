"""Quantized linear layers: against the dequantised checkpoint, cut before or not, and what naive receiving does."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from pathlib import Path

import pytest
import torch
from runtime_models import PROMPTS, write_checkpoint
from runtime_quantized import BLOCK_DIMS, DIMS, dequantised, quantized
from safetensors.torch import load_file
from torch.profiler import ProfilerActivity, profile

from weightwire.errors import CheckpointError, ConfigError, ManifestMismatch
from weightwire.runtime import (
    DecoderForCausalLM,
    KernelLayout,
    LoaderSettings,
    ModelLoader,
    SafetensorsLoader,
    TpCoordinates,
    TpGroup,
    Weights,
    construct,
    materialize,
    post_load_weights,
    prompt_logits,
    read_config,
)
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.linear import Linear, OutPart, TensorParallelMode
from weightwire.runtime.quantization import fp8, nvfp4
from weightwire.runtime.quantization.export import FORMATS
from weightwire.runtime.quantization.linear_fp8 import Fp8BlockMethod
from weightwire.source.snapshot import Snapshot, storages

TP = 2
CPU = torch.device("cpu")
COLUMN = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
UNCUT = {"weight_scale_2", "input_scale"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("quantized")
    plain, blocks = write_checkpoint(root / "plain", DIMS), write_checkpoint(root / "blocks", BLOCK_DIMS)
    return {form: quantized(blocks if form == "fp8_block" else plain, root / form, form) for form in FORMATS}


def model_of(directory: Path, weights: Weights, tp: int = 1, rank: int = 0) -> DecoderForCausalLM:
    group = TpGroup.offline(TpCoordinates(size=tp, rank=rank)) if tp > 1 else TpGroup.single()
    model = construct(read_config(directory), {}, LayerContext(group, torch.float32))
    materialize(model, CPU)
    with torch.no_grad():
        for tensor in model.parameters():
            tensor.reshape(-1).view(torch.uint8).fill_(0x7F)
    model.load_weights(weights)
    return model


def loaded(directory: Path, layout: KernelLayout = KernelLayout.PLAIN) -> DecoderForCausalLM:
    settings = LoaderSettings(dtype=torch.float32, kernel_layout=layout)
    return ModelLoader(TpGroup.single(), settings, SafetensorsLoader()).load(directory).model


def linears(model: DecoderForCausalLM) -> dict[str, Linear]:
    """By construction-time names, whatever aliases there are."""
    every = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in every if isinstance(module, Linear) and "next_" not in name}


@pytest.mark.parametrize("layout", KernelLayout)
@pytest.mark.parametrize("form", FORMATS)
def test_layers_multiply_by_the_dequantised_checkpoint(form: str, layout: KernelLayout, made: dict[str, Path]) -> None:
    tensors = load_file(made[form] / "model.safetensors")
    wanted = dequantised(tensors, form)
    model = loaded(made[form], layout)
    names = {"qkv_proj": ("q_proj", "k_proj", "v_proj"), "gate_up_proj": ("gate_proj", "up_proj")}
    # rounding anew: fused parts to the common scale, blocks to powers of two; else only the order of products
    resmoothed = form == "fp8_block" and layout is KernelLayout.PACKED
    for name, layer in linears(model).items():
        parent, _, leaf = name.rpartition(".")
        whole = torch.cat([wanted[f"{parent}.{part}."] for part in names.get(leaf, (leaf,))])
        anew = resmoothed or (leaf in names and form.startswith(("fp8_static", "fp8_dynamic", "nvfp4")))
        found = layer.method.dequantised(layer)  # type: ignore[attr-defined]
        error = (found - whole).norm() / whole.norm()
        assert error < (0.05 if anew else 1e-6), name


@pytest.mark.parametrize("form", FORMATS)
def test_h14_scales_of_a_shard_that_was_cut_before_are_not_cut_again(form: str, made: dict[str, Path]) -> None:
    tensors = load_file(made[form] / "model.safetensors")
    for rank in range(TP):
        ours = model_of(made[form], Weights.of(tensors), TP, rank)
        mine = {name: _shard(name, tensor, rank) for name, tensor in tensors.items()}
        cut_before = model_of(made[form], Weights.of(mine, presharded=True), TP, rank)
        for name, tensor in ours.named_parameters():
            other = cut_before.get_parameter(name)
            assert torch.equal(_bytes(tensor), _bytes(other)), name
        with pytest.raises(CheckpointError):  # the naive way: the same dictionary, cut (once more)
            model_of(made[form], Weights.of(mine), TP, rank)


def _shard(name: str, tensor: torch.Tensor, rank: int) -> torch.Tensor:
    """One rank's part in HF naming, by torch's own chunking."""
    module, leaf = name.split(".")[-2:]
    if leaf in UNCUT or "norm" in module or not tensor.dim():
        return tensor
    if module in {"embed_tokens", "lm_head"}:
        rows = -(-tensor.shape[0] // TP)
        padded = torch.zeros(rows * TP, tensor.shape[1])
        padded[: tensor.shape[0]] = tensor
        return padded[rank * rows : (rank + 1) * rows]
    if module in COLUMN:
        return tensor if leaf == "pre_quant_scale" else tensor.chunk(TP, 0)[rank]
    by_row = leaf == "weight_scale" and tensor.shape[-1] == 1
    return tensor if by_row else tensor.chunk(TP, -1)[rank]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def _receive(directory: Path, source: DecoderForCausalLM, *, state: bool) -> DecoderForCausalLM:
    """By names alone, as a naive receiver does, or with the declared state first."""
    model = construct(read_config(directory), {}, LayerContext(TpGroup.single(), torch.float32))
    materialize(model, CPU)
    for name, layer in linears(model).items():
        for leaf in ("input_scale", "inv_input_scale"):
            if getattr(layer, leaf, None) is not None:
                getattr(layer, leaf).fill_(1.0)  # what its constructor would have given it
        if state:
            layer.import_state(linears(source)[name].export_state())
    theirs = dict(source.named_parameters())
    for name, tensor in model.named_parameters():
        if name in theirs:
            tensor.copy_(theirs[name])
    post_load_weights(model)
    return model


@pytest.mark.parametrize(
    ("form", "hazard"), [("w4a16_awq", "created"), ("nvfp4_awq", "created and scalar"), ("fp8_dynamic", "removed")]
)
def test_h04_h05_h06_names_alone_are_silently_wrong_and_declared_state_is_right(
    form: str, hazard: str, made: dict[str, Path]
) -> None:
    source = model_of(made[form], Weights.of(load_file(made[form] / "model.safetensors")))
    naive, ours = (_receive(made[form], source, state=state) for state in (False, True))
    post_load_weights(source)
    wanted = prompt_logits(source, PROMPTS)
    assert torch.equal(prompt_logits(ours, PROMPTS), wanted)
    assert not torch.allclose(prompt_logits(naive, PROMPTS), wanted, rtol=0.01), hazard


def test_h05_state_of_another_kind_is_refused(made: dict[str, Path]) -> None:
    layer = next(iter(linears(loaded(made["fp8_dynamic"])).values()))
    for state in ({}, {"static_input": 1}, {"static_input": True, "more": 1}):
        with pytest.raises(ManifestMismatch):
            layer.import_state(state)  # type: ignore[arg-type]


@pytest.mark.parametrize("form", ["fp8_block", "nvfp4"])
def test_h09_h10_published_bytes_outlive_a_transform_that_replaces_them(form: str, made: dict[str, Path]) -> None:
    config = read_config(made[form])
    model = construct(config, {}, LayerContext(TpGroup.single(), torch.float32, KernelLayout.PACKED))
    materialize(model, CPU)
    model.load_weights(Weights.of(load_file(made[form] / "model.safetensors")))
    held = dict(model.named_parameters())
    before = {name: _bytes(tensor).clone() for name, tensor in held.items()}
    snapshot = Snapshot(model=model, published=storages(held.values()))
    post_load_weights(model, snapshot.guard)
    assert all(torch.equal(_bytes(tensor), before[name]) for name, tensor in held.items())
    now = set(map(id, model.parameters()))
    replaced = sum(tensor.nbytes for tensor in held.values() if id(tensor) not in now)
    assert snapshot.held.nbytes == replaced > 0


def test_h18_a_reload_with_whole_tensors_is_cut_though_the_load_was_not(made: dict[str, Path]) -> None:
    tensors = load_file(made["fp8_rowwise"] / "model.safetensors")
    mine = {name: _shard(name, tensor, 1) for name, tensor in tensors.items()}
    model = model_of(made["fp8_rowwise"], Weights.of(mine, presharded=True), TP, 1)
    before = {name: _bytes(tensor).clone() for name, tensor in model.named_parameters()}
    model.load_weights(Weights.of(tensors))
    assert all(torch.equal(_bytes(tensor), before[name]) for name, tensor in model.named_parameters())


def test_a_cut_through_a_block_is_refused_by_name(made: dict[str, Path]) -> None:
    group = TpGroup.offline(TpCoordinates(size=4, rank=0))
    context = LayerContext(group, torch.float32)
    with pytest.raises(ConfigError, match="nvfp4"):
        construct(read_config(made["nvfp4"]), {}, context)
    with pytest.raises(ConfigError, match="fp8_block: rank 0 of 4 would cut through 128 weights"):
        Linear(context, 256, [OutPart(128)], mode=TensorParallelMode.ROW, method=Fp8BlockMethod())


def test_interleaving_and_packing_are_undone() -> None:
    scales = torch.arange(40 * 5, dtype=torch.uint8).view(40, 5).view(torch.float8_e4m3fn)
    flat = nvfp4.interleave(scales)
    assert torch.equal(_bytes(nvfp4.deinterleave(flat, 40, 5)), _bytes(scales))
    assert flat.shape == (128 * 8,)
    assert flat.view(torch.uint8)[4] == scales.view(torch.uint8)[32, 0]  # row 32 lies beside row 0
    numbers = torch.tensor([[0.0, 0.5, -1.0, 1.5, 2.0, -3.0, 4.0, 6.0] * 2])
    packed, block = nvfp4.quantise(numbers, torch.tensor(1.0))
    assert torch.equal(nvfp4.dequantise(packed, block, torch.tensor(1.0)), numbers)
    powers = torch.exp2(torch.tensor([[-3.0, 0.0, 5.0, 1.0, -20.0], [2.0, 1.0, 0.0, -1.0, -2.0]]))
    assert torch.equal(fp8.read_e8m0(fp8.lay_out_e8m0(powers, 200), 5), powers.repeat_interleave(128, 0)[:200])


def test_weights_are_resmoothed_some_rows_at_a_time_to_the_same_bytes() -> None:
    values = torch.randn(5 * 128 + 7, 200, generator=torch.Generator().manual_seed(3))
    scales = fp8.block_scales(values)
    weight = fp8.quantise(values, fp8.expand(scales, *values.shape))
    whole = fp8.resmooth(weight, scales, 128 * 100)
    for rows in (128, 384, 1024):
        assert all(
            torch.equal(_bytes(a), _bytes(b)) for a, b in zip(fp8.resmooth(weight, scales, rows), whole, strict=True)
        )
    assert torch.equal(whole[1].log2(), whole[1].log2().round())


def _peak(work: Callable[[], object]) -> int:
    """Most bytes of torch's that were alive at a time beyond those before, in ``work``."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        work()
    assert profiled.profiler is not None
    events = sorted(profiled.profiler.kineto_results.events(), key=lambda event: event.start_ns())
    return int(max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")))


def test_weights_are_made_anew_with_little_memory_beside_them() -> None:
    count, rows, columns = 8, 1024, 512
    values = torch.randn(count, rows, columns, generator=torch.Generator().manual_seed(5))
    scales = torch.stack([fp8.block_scales(each) for each in values])
    weights = torch.stack(
        [fp8.quantise(each, fp8.expand(by, rows, columns)) for each, by in zip(values, scales, strict=True)]
    )
    one, small = torch.tensor(1.0), 5 * 4 * fp8.BLOCK * columns  # five float32 copies of 128 rows
    assert _peak(lambda: fp8.requantise(weights.view(-1, columns), one, one * 1.5)) < small
    assert _peak(lambda: fp8.resmooth(weights[0], scales[0])) < weights[0].nbytes + small
    laid_out = 4 * rows * count
    assert _peak(lambda: fp8.pack_blocks(weights, scales)) < (count + 1) * weights[0].nbytes + small + laid_out
    bytes_of = torch.zeros(count, 40, 40, dtype=torch.uint8)
    flats = torch.zeros(count, nvfp4.interleaved_size(40, 5), dtype=torch.uint8).view(nvfp4.FP8)
    padded = sum(tensor.nbytes for tensor in nvfp4.pad_all(bytes_of, flats))
    assert _peak(lambda: nvfp4.pad_all(bytes_of, flats)) < 1.5 * padded


def test_rounding_anew_some_rows_at_a_time_gives_the_same_bytes() -> None:
    weight = fp8.quantise(torch.randn(300, 40, generator=torch.Generator().manual_seed(6)), torch.tensor(0.01))
    own, common = torch.tensor(0.01), torch.tensor(0.017)
    wanted = fp8.quantise(fp8.dequantise(weight, own), common)
    assert not torch.equal(_bytes(wanted), _bytes(weight))
    fp8.requantise(weight, own, common)
    assert torch.equal(_bytes(weight), _bytes(wanted))


def test_what_is_made_of_a_device_s_tensors_is_there_too() -> None:
    """On meta: nothing of it could be copied into memory of the host."""
    values, powers = torch.empty(200, 300, device="meta"), torch.empty(2, 3, device="meta")
    assert fp8.block_scales(values).device.type == "meta"
    assert fp8.lay_out_e8m0(powers, 200).device.type == "meta"
    assert all(part.device.type == "meta" for part in fp8.resmooth(values.to(fp8.FP8), powers))
