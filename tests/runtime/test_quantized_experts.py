"""Quantized experts and latent heads, layer by layer: cuts, transforms, references, state, and what is refused."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping as Table
from pathlib import Path
from typing import Any

import pytest
import torch
from manifest_support import manifest_of
from runtime_families import PROMPTS, write_family
from runtime_quantized import FAMILY_DIMS, FAMILY_FORMS, Tensors, quantized, quantized_family
from runtime_ranks import child_environment
from safetensors.torch import load_file, save_file

from weightwire.errors import CheckpointError, ConfigError, ManifestMismatch
from weightwire.manifest.catalogue import capture, catalogue
from weightwire.manifest.plan import plan
from weightwire.runtime import (
    DecoderForCausalLM,
    KernelLayout,
    LoaderSettings,
    Mapping,
    ModelLoader,
    SafetensorsLoader,
    TpGroup,
    Weights,
    adopt_processed,
    construct,
    materialize,
    post_load_weights,
    prepare_processed,
    prompt_logits,
    read_config,
)
from weightwire.runtime.layers.context import LayerContext
from weightwire.runtime.layers.method import MethodLayer
from weightwire.runtime.layers.moe import FusedMoE
from weightwire.source.snapshot import Snapshot, own_tensors, storages

CPU = torch.device("cpu")
TP, EP = 4, 2
EACH = [(family, form) for family, forms in FAMILY_FORMS.items() for form in forms]
TRANSFORMED = [each for each in EACH if not each[1].startswith(("fp8_static", "fp8_dynamic"))]
ROWS = ("q_proj", "q_b_proj", "k_proj", "v_proj", "kv_b_proj", "gate_proj", "up_proj")
COLUMNS = ("o_proj", "down_proj")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    torch.set_num_threads(1)
    root = tmp_path_factory.mktemp("experts")
    return {each: quantized_family(root, *each) for each in EACH}


def tensors_of(directory: Path) -> Tensors:
    found: Tensors = load_file(directory / "model.safetensors")
    return found


def constructed(directory: Path, layout: KernelLayout = KernelLayout.PLAIN, rank: int | None = None) -> Any:
    """Materialised, and full of what is no number; one rank alone, or ``rank`` of several."""
    mapping = Mapping.for_tp(rank or 0, TP, EP) if rank is not None else Mapping.for_tp(0, 1)
    group = TpGroup.single() if rank is None else TpGroup.offline(mapping.tp)
    model = construct(read_config(directory), {}, LayerContext(group, torch.float32, layout, mapping))
    names = capture(model)
    materialize(model, CPU)
    poison(model)
    return model, names


@torch.no_grad()
def poison(model: DecoderForCausalLM) -> None:
    for tensor in model.parameters():
        tensor.reshape(-1).view(torch.uint8).fill_(0x7F)


def raw(directory: Path, layout: KernelLayout = KernelLayout.PLAIN, rank: int | None = None) -> DecoderForCausalLM:
    """Loaded, and nothing more."""
    model: DecoderForCausalLM = constructed(directory, layout, rank)[0]
    model.load_weights(Weights.of(tensors_of(directory)))
    return model


def experts_of(model: DecoderForCausalLM) -> list[FusedMoE]:
    return [module for module in model.modules() if isinstance(module, FusedMoE)]


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def cut(tensors: Tensors, rank: int, kv_heads: int, num_experts: int) -> Tensors:
    """One rank's part in HF naming, by torch's own chunking; of others' experts only the input scales."""
    mine = {}
    for name, tensor in tensors.items():
        parts = name.split(".")
        module, leaf, pieces, number = parts[-2], parts[-1], TP, rank
        if "experts" in parts:
            expert, each = int(parts[parts.index("experts") + 1]), num_experts // EP
            if expert // each != rank % EP:
                if leaf == "input_scale":
                    mine[name] = tensor
                continue
            pieces, number = TP // EP, rank // EP
        if module in ("k_proj", "v_proj") and kv_heads < TP:
            pieces, number = kv_heads, rank * kv_heads // TP
        if module in ("embed_tokens", "lm_head"):
            rows = -(-tensor.shape[0] // TP)
            mine[name] = torch.nn.functional.pad(tensor, (0, 0, 0, rows * TP - tensor.shape[0])).chunk(TP)[rank]
        elif tensor.dim() == 2 and module in (*ROWS, *COLUMNS):
            mine[name] = tensor.chunk(pieces, 0 if module in ROWS else 1)[number]
        else:
            mine[name] = tensor
    return mine


@pytest.mark.parametrize("each", EACH, ids="-".join)
def test_h14_h15_experts_and_their_scales_that_were_cut_before_are_not_cut_again(
    each: tuple[str, str], made: Table[tuple[str, str], Path]
) -> None:
    config, tensors = read_config(made[each]), tensors_of(made[each])
    assert config.moe is not None
    for rank in range(TP):
        mine = cut(tensors, rank, config.num_kv_heads, config.moe.num_experts)
        model: DecoderForCausalLM = constructed(made[each], rank=rank)[0]
        model.load_weights(Weights.of(mine, presharded=True))
        for name, tensor in raw(made[each], rank=rank).named_parameters():
            assert torch.equal(_bytes(tensor), _bytes(model.get_parameter(name))), name
        with pytest.raises(CheckpointError):  # the naive way: the same dictionary, cut (once more)
            constructed(made[each], rank=rank)[0].load_weights(Weights.of(mine))


@pytest.mark.parametrize("form", ["fp8_static", "nvfp4"])
def test_input_scales_are_those_of_all_experts_also_of_other_ranks(
    form: str, made: Table[tuple[str, str], Path]
) -> None:
    directory = made["qwen3_moe", form]
    tensors = tensors_of(directory)
    layers = [experts_of(raw(directory, rank=rank))[0] for rank in range(TP)]
    prefix = "model.layers.0.mlp.experts."
    names = [name for name in tensors if name.startswith(prefix) and name.endswith("gate_proj.input_scale")]
    own = {int(name.removeprefix(prefix).split(".")[0]): float(tensors[name]) for name in names}
    assert max(own[expert] for expert in layers[0].local_experts) < max(own.values())
    for layer in layers:
        found = layer.fc31_input_dequant if form == "fp8_static" else 1 / layer.fc31_input_scale
        assert found is not None
        assert float(found) == pytest.approx(max(own.values()))


@pytest.mark.parametrize("each", TRANSFORMED, ids="-".join)
def test_h09_h10_transforms_do_what_they_declare_and_published_bytes_outlive_them(
    each: tuple[str, str], made: Table[tuple[str, str], Path]
) -> None:
    model = raw(made[each], KernelLayout.PACKED)
    held = dict(model.named_parameters())
    before = {name: _bytes(tensor).clone() for name, tensor in held.items()}
    layers = [module for module in model.modules() if isinstance(module, MethodLayer)]
    old = [(layer, own_tensors(layer), layer.transform_effect()) for layer in layers]
    snapshot = Snapshot(model=model, published=storages(held.values()))
    post_load_weights(model, snapshot.guard)
    assert all(torch.equal(_bytes(tensor), before[name]) for name, tensor in held.items())
    for layer, tensors, effect in old:
        after = own_tensors(layer)
        replaced = {name for name, tensor in tensors.items() if after[name].data_ptr() != tensor.data_ptr()}
        assert replaced == {name for name, what in effect.items() if what == "replaces"}
    assert any(effect for layer, _, effect in old if isinstance(layer, FusedMoE))
    now = storages(model.parameters())  # a view that is replaced holds nothing: what it was a view of lives on
    old_storages = {storage.data_ptr(): storage.nbytes() for storage in (t.untyped_storage() for t in held.values())}
    assert snapshot.held.nbytes == sum(size for pointer, size in old_storages.items() if pointer not in now) > 0


@pytest.mark.parametrize("layout", KernelLayout)
@pytest.mark.parametrize("each", EACH, ids="-".join)
def test_processed_shapes_take_processed_bytes_and_raw_ones_come_back(
    each: tuple[str, str], layout: KernelLayout, made: Table[tuple[str, str], Path]
) -> None:
    """And the other way round: a receiver of processed bytes that falls back to the disk."""
    source = raw(made[each], layout)
    published = dict(source.named_parameters())
    post_load_weights(source)
    wanted = prompt_logits(source, PROMPTS)
    receiver, _ = constructed(made[each], layout)
    prepare_processed(receiver)
    with torch.no_grad():
        poison(receiver)
        _take_state(receiver, source)
        for name, tensor in receiver.named_parameters():
            tensor.copy_(source.get_parameter(name))
    adopt_processed(receiver)
    assert torch.equal(prompt_logits(receiver, PROMPTS), wanted)
    settings = LoaderSettings(dtype=torch.float32, kernel_layout=layout)
    loader = ModelLoader(TpGroup.single(), settings, SafetensorsLoader())
    loader.reload(receiver, Weights.of(tensors_of(made[each])))
    assert torch.equal(prompt_logits(receiver, PROMPTS), wanted)
    assert {name for name, _ in receiver.named_parameters()} <= published.keys() | {
        name for name, _ in source.named_parameters()
    }


def _modules(model: DecoderForCausalLM) -> dict[str, MethodLayer]:
    every = model.named_modules(remove_duplicate=False)
    return {name: module for name, module in every if isinstance(module, MethodLayer) and "next_" not in name}


def _take_state(receiver: DecoderForCausalLM, source: DecoderForCausalLM) -> None:
    theirs = _modules(source)
    for name, layer in _modules(receiver).items():
        state = theirs[name].export_state()
        if state:
            layer.import_state(state)


def test_h05_removed_scales_of_experts_are_state(made: Table[tuple[str, str], Path]) -> None:
    """By names alone the static kernel runs, with whatever scale the constructor left: silently wrong."""
    directory = made["qwen3_moe", "fp8_dynamic"]
    source = raw(directory)
    logits = []
    for state in (False, True):
        receiver, _ = constructed(directory)
        with torch.no_grad():
            for layer in _modules(receiver).values():
                for leaf in ("input_scale", "inv_input_scale", "fc31_input_dequant", "fc2_quant"):
                    if getattr(layer, leaf, None) is not None:
                        getattr(layer, leaf).fill_(1.0)
            if state:
                _take_state(receiver, source)
            theirs = dict(source.named_parameters())
            for name, tensor in receiver.named_parameters():
                if name in theirs:
                    tensor.copy_(theirs[name])
        post_load_weights(receiver)
        logits.append(prompt_logits(receiver, PROMPTS))
    post_load_weights(source)
    wanted = prompt_logits(source, PROMPTS)
    assert torch.equal(logits[1], wanted)
    assert not torch.allclose(logits[0], wanted, rtol=0.01)


@pytest.mark.parametrize("form", ["fp8_block", "nvfp4"])
def test_h07_references_that_are_not_taken_anew_are_silently_wrong(
    form: str, made: Table[tuple[str, str], Path], tmp_path: Path
) -> None:
    """Kernels read scales through ``quant_scales`` alone, which transforms and reloads leave behind."""
    first = made["qwen3_moe", form]
    other = _scaled(first, tmp_path / "other", 0.5)
    settings = LoaderSettings(dtype=torch.float32, kernel_layout=KernelLayout.PACKED)
    loader = ModelLoader(TpGroup.single(), settings, SafetensorsLoader())
    wanted = prompt_logits(loader.load(other).model, PROMPTS)
    for stale in (False, True):
        model = loader.load(first).model
        for layer in experts_of(model) if stale else ():
            layer.refer = lambda: None  # type: ignore[method-assign]
        loader.reload(model, Weights.of(tensors_of(other)))
        assert torch.equal(prompt_logits(model, PROMPTS), wanted) is not stale
        for layer in experts_of(model):
            own = {id(tensor) for tensor in layer.parameters()}
            assert all(id(scale) in own for scale in layer.quant_scales) is not stale


def _scaled(source: Path, target: Path, factor: float) -> Path:
    """A checkpoint with the same bytes of experts' weights, and other scales."""
    leaves = (".weight_scale", ".weight_scale_inv")
    target.mkdir()
    changed = {
        name: (tensor.float() * factor).to(tensor.dtype) if ".experts." in name and name.endswith(leaves) else tensor
        for name, tensor in tensors_of(source).items()
    }
    save_file(changed, target / "model.safetensors")
    (target / "config.json").write_text((source / "config.json").read_text())
    return target


FUSED = {"fp8_static": "fc31_dequant", "fp8_block": "w3_w1_weight_scaling_factor", "nvfp4": "fc31_alpha"}


@pytest.mark.parametrize(("form", "leaf"), FUSED.items())
def test_h21_a_fused_scale_that_is_left_out_is_refused_and_one_that_is_not_copied_shows(
    form: str, leaf: str, made: Table[tuple[str, str], Path]
) -> None:
    directory = made["qwen3_moe", form]
    (source, names), (target, same) = (constructed(directory) for _ in range(2))
    source.load_weights(Weights.of(tensors_of(directory)))
    offered = manifest_of(catalogue(source, names))
    with torch.no_grad():
        _take_state(target, source)
        for name, tensor in target.named_parameters():
            if not name.endswith(leaf):
                tensor.copy_(source.get_parameter(name))
    ours = catalogue(target, same)
    assert plan(ours.layout, offered).manifest is offered
    assert manifest_of(ours).content_id != offered.content_id
    with torch.no_grad():
        for name, tensor in target.named_parameters():
            tensor.copy_(source.get_parameter(name))
    assert manifest_of(catalogue(target, same)).content_id == offered.content_id
    for layer in experts_of(target):
        delattr(layer, leaf)
        layer.quant_scales = ()
    with pytest.raises(ManifestMismatch, match=rf"only at the source: .*{leaf}"):
        plan(catalogue(target).layout, offered)


def test_views_of_quantized_heads_travel_once(made: Table[tuple[str, str], Path]) -> None:
    """``v_b_proj`` and its scale show bytes of ``kv_b_proj``, plain; packed they are tensors of their own."""
    directory = made["deepseek_v3", "fp8_block"]
    model, names = constructed(directory)
    model.load_weights(Weights.of(tensors_of(directory)))
    entries = {entry.name: entry for entry in catalogue(model, names).layout.entries}
    for owner, view in (("kv_b_proj.weight", "v_b_proj"), ("kv_b_proj.weight_scale", "v_b_proj_scale")):
        prefix = "model.layers.0.self_attn."
        assert prefix + view not in entries
        assert [each.name for each in entries[prefix + owner].views] == [prefix + view]


def _edited(source: Path, target: Path, *, config: Any = None, drop: str = "") -> Path:
    target.mkdir()
    raw_config = json.loads((source / "config.json").read_text())
    raw_config["quantization_config"] |= config or {}
    (target / "config.json").write_text(json.dumps(raw_config))
    tensors = {name: tensor for name, tensor in tensors_of(source).items() if not drop or drop not in name}
    save_file(tensors, target / "model.safetensors")
    return target


def test_what_is_not_computed_is_refused_by_name(made: Table[tuple[str, str], Path], tmp_path: Path) -> None:
    latent = made["deepseek_v3", "nvfp4"]
    every = _edited(latent, tmp_path / "every", config={"exclude_modules": ["lm_head"]})
    with pytest.raises(ConfigError, match="kv_b_proj with nvfp4 weights is not supported"):
        constructed(every)
    some = ["lm_head", "model.layers.0.self_attn.kv_b_proj"]
    with pytest.raises(ConfigError, match=r"layers\.1\.self_attn\.kv_b_proj with nvfp4 weights is not supported"):
        constructed(_edited(latent, tmp_path / "some", config={"exclude_modules": some}))
    listed = [*some, "model.layers.1.self_attn.kv_b_proj", "model.layers.1.mlp.gate"]
    assert constructed(_edited(latent, tmp_path / "listed", config={"exclude_modules": listed}))
    for names in (["*kv_b_proj*", "*.mlp.gate"], ["re:.*kv_b_proj.*", "re:.*mlp.gate$"]):
        path = tmp_path / str(len(names[0]))
        assert constructed(_edited(latent, path, config={"exclude_modules": names}))
    source = write_family(tmp_path / "float", "qwen3_moe", changes=FAMILY_DIMS["qwen3_moe"])
    with pytest.raises(ConfigError, match="experts with int8_weight_only weights are not supported"):
        constructed(quantized(source, tmp_path / "int8", "int8_weight_only"))
    group = TpGroup.offline(Mapping.for_tp(0, TP).tp)
    with pytest.raises(ConfigError, match="fp8_block experts: rank 0 of 4 would cut through 128 weights"):
        construct(read_config(made["qwen3_moe", "fp8_block"]), {}, LayerContext(group, torch.float32))


def test_checkpoints_without_some_experts_scales_are_refused(
    made: Table[tuple[str, str], Path], tmp_path: Path
) -> None:
    elsewhere = ".experts.7.up_proj.input_scale"  # rank 0 holds none of it, and needs it
    for form, words in (("nvfp4", "the checkpoint lacks tensor"), ("fp8_static", "only some experts of a layer have")):
        directory = _edited(made["qwen3_moe", form], tmp_path / form, drop=elsewhere)
        with pytest.raises(CheckpointError, match=words):
            raw(directory, rank=0)


@pytest.mark.parametrize("each", [("qwen3_moe", "fp8_static"), ("deepseek_v3", "nvfp4")], ids="-".join)
def test_the_tool_writes_checkpoints_of_experts_and_latent_heads(
    each: tuple[str, str], made: Table[tuple[str, str], Path], tmp_path: Path
) -> None:
    tool = Path(__file__).parents[2] / "tools" / "quantize_checkpoint.py"
    source = made[each].with_name(f"{made[each].name}-float")
    command = [sys.executable, str(tool), str(source), str(tmp_path / "written"), each[1]]
    subprocess.run(command, check=True, env=child_environment(), timeout=60, stdout=subprocess.DEVNULL)
    written, wanted = tensors_of(tmp_path / "written"), tensors_of(made[each])
    assert written.keys() == wanted.keys()
    assert all(torch.equal(_bytes(tensor), _bytes(wanted[name])) for name, tensor in written.items())
    assert read_config(tmp_path / "written") == read_config(made[each])
    quantized_ = {name.rsplit(".", 2)[-2] for name in written if name.endswith(".weight_scale")}
    assert ("kv_a_proj_with_mqa" in quantized_) is (each[0] == "deepseek_v3")
    assert "kv_b_proj" not in quantized_
    assert any(".experts.7.down_proj.weight_scale" in name for name in written)
