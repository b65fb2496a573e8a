"""The order of a load, and the hazards that the runtime itself must not have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_hooks import CPU, SINGLE, Injecting, Poisoning, Recorder, attention_of, part_of, poison, settings
from runtime_models import BASE, CASES, PROMPTS, random_tensors, write_checkpoint
from safetensors.torch import load_file, save_file
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from weightwire.errors import CheckpointError, ConfigError
from weightwire.runtime import (
    BuildFacts,
    DecoderForCausalLM,
    KernelLayout,
    LayerContext,
    LoadFormat,
    ModelLoader,
    SafetensorsLoader,
    TpCoordinates,
    TpGroup,
    Weights,
    construct,
    generate,
    materialize,
    prepare_processed,
    prepare_raw,
    prompt_logits,
    read_config,
)
from weightwire.runtime.layers.embedding import LMHead
from weightwire.runtime.layers.mlp import GatedMLP
from weightwire.runtime.layers.rotary import inverse_frequencies


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return write_checkpoint(tmp_path / "checkpoint", CASES["gqa_llama3"])


def test_order_of_a_load(checkpoint: Path) -> None:
    hooks = Recorder()
    result = ModelLoader(SINGLE, settings(KernelLayout.PACKED), Poisoning(), hooks).load(checkpoint)
    transforms = ["before QkvLinear", "after", "before GateUpLinear", "after"] * 2
    assert hooks.events == ["constructed", "loaded", *transforms, "post_loaded"]
    assert set(result.seconds) == {"construct", "materialize", "fill", "post_load"}
    assert result.injected is None
    assert not any(tensor.isnan().any() for tensor in result.model.parameters())


@pytest.mark.parametrize("case", ["gqa_llama3", "biased_tied"])
def test_a_parameter_is_final_once_all_its_parts_are_there_and_stays_as_it_is(case: str, tmp_path: Path) -> None:
    hooks = Recorder()
    ModelLoader(SINGLE, settings(), Poisoning(), hooks).load(write_checkpoint(tmp_path / "checkpoint", CASES[case]))
    tied = {"lm_head.weight"} if case == "biased_tied" else set()
    assert hooks.final.keys() == hooks.places.keys() - tied
    for name, then in hooks.final.items():
        assert torch.equal(then, hooks.raw[name]), name


class Requantising(LMHead):
    """Writes its weight once more when another layer is loaded."""

    def written_again(self) -> frozenset[str]:
        return frozenset({"weight"})


def test_what_is_declared_to_be_written_again_is_not_final_before_the_end(checkpoint: Path) -> None:
    model = construct(read_config(checkpoint), {}, LayerContext(SINGLE, torch.float32, KernelLayout.PLAIN))
    materialize(model, CPU)
    model.lm_head.__class__ = Requantising
    told: list[str] = []
    tensors = Weights.of(load_file(checkpoint / "model.safetensors"))
    model.load_weights(tensors, None, told.extend)
    missing = {name for name, _ in model.named_parameters()} - set(told)
    assert missing == {"lm_head.weight"}


def test_h01_aliases_rename_parameters_but_not_what_is_loaded(checkpoint: Path) -> None:
    hooks = Recorder()
    model = ModelLoader(SINGLE, settings(), SafetensorsLoader(), hooks).load(checkpoint).model
    renamed = {name for name, _ in model.named_parameters()}
    assert "model.layers.0.next_attn.qkv_proj.weight" in renamed
    assert "model.layers.1.self_attn.qkv_proj.weight" not in renamed
    assert "model.norm.weight" not in renamed
    # filling follows the structure, so that it is complete with aliases wired as well
    poison(model)
    model.load_weights(Weights.of(load_file(checkpoint / "model.safetensors")))
    assert all(torch.equal(tensor, hooks.raw[name]) for name, tensor in hooks.snapshot().items())


def test_aliases_are_legal_on_meta_and_idempotent(checkpoint: Path) -> None:
    model = construct(read_config(checkpoint), {}, LayerContext(SINGLE, torch.float32))
    model.setup_aliases()
    names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    model.setup_aliases()
    assert [name for name, _ in model.named_parameters(remove_duplicate=False)] == names
    assert model.model.decoder_layers[1].next_layer_layernorm is model.model.norm


@pytest.mark.parametrize("case", ["gqa_llama3", "biased_tied"])
def test_h17_padding_rows_are_zero_on_the_ranks_that_have_them(case: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", CASES[case])
    whole = load_file(directory / "model.safetensors")["model.embed_tokens.weight"]
    parts = [part_of(directory, 8, rank) for rank in range(8)]
    embeddings = [model.model.embed_tokens for model in parts]
    assert len({embedding.weight.shape for embedding in embeddings}) == 1
    assert embeddings[-1].real_rows < embeddings[-1].weight.shape[0]
    joined = torch.cat([embedding.weight.data for embedding in embeddings])
    assert torch.equal(joined[: len(whole)], whole)
    assert torch.equal(joined[len(whole) :], torch.zeros_like(joined[len(whole) :]))
    if case == "biased_tied":
        assert all(model.lm_head.weight is model.model.embed_tokens.weight for model in parts)
    else:
        assert not torch.cat([model.lm_head.weight.data for model in parts])[len(whole) :].any()


def mlp_of(model: DecoderForCausalLM) -> GatedMLP:
    mlp = model.model.decoder_layers[0].mlp
    assert isinstance(mlp, GatedMLP)
    return mlp


def test_ragged_and_empty_shards_join_to_the_whole(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", CASES["empty_shard"])
    whole = load_file(directory / "model.safetensors")
    mlps = [mlp_of(part_of(directory, 4, rank)) for rank in range(4)]
    widths = [mlp.down_proj.weight.shape[1] for mlp in mlps]
    assert widths == [2, 2, 1, 0]
    gates = [mlp.gate_up_proj.weight[:width] for mlp, width in zip(mlps, widths, strict=True)]
    ups = [mlp.gate_up_proj.weight[width:] for mlp, width in zip(mlps, widths, strict=True)]
    prefix = "model.layers.0.mlp"
    assert torch.equal(torch.cat(gates), whole[f"{prefix}.gate_proj.weight"])
    assert torch.equal(torch.cat(ups), whole[f"{prefix}.up_proj.weight"])
    downs = [mlp.down_proj.weight.data for mlp in mlps]
    assert torch.equal(torch.cat(downs, dim=1), whole[f"{prefix}.down_proj.weight"])
    packed = mlp_of(part_of(directory, 4, 3, KernelLayout.PACKED)).gate_up_proj
    assert packed.weight.shape == (64, 0)


@pytest.mark.parametrize("layout", KernelLayout)
def test_h18_reload_with_full_tensors_is_sliced_after_a_presharded_load(layout: KernelLayout, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", CASES["biased_tied"])
    group = TpGroup.offline(TpCoordinates(size=4, rank=3))
    baseline = Recorder()
    ModelLoader(group, settings(layout), Poisoning(), baseline).load(directory)
    final = baseline.snapshot()
    hooks = Recorder()
    loader = ModelLoader(group, settings(layout, LoadFormat.PRESHARDED), Injecting(baseline.raw, "LOADED"), hooks)
    model = loader.load(directory).model
    assert all(torch.equal(tensor, final[name]) for name, tensor in hooks.snapshot().items())

    other = random_tensors({**BASE, **CASES["biased_tied"]}, seed=5)
    loader.reload(model, Weights.of(other))
    assert "reloading" in hooks.events
    save_file(other, directory / "model.safetensors")
    fresh = Recorder()
    ModelLoader(group, settings(layout), Poisoning(), fresh).load(directory)
    assert all(torch.equal(tensor, fresh.raw[name]) for name, tensor in hooks.raw.items())
    again = fresh.snapshot()
    assert all(torch.equal(tensor, again[name]) for name, tensor in hooks.snapshot().items())


def test_h18_tensors_cut_before_are_taken_whole_once(checkpoint: Path) -> None:
    """Local tensors under Hugging Face names: whole with presharded, refused by shape without."""
    group = TpGroup.offline(TpCoordinates(size=4, rank=1))
    hooks = Recorder()
    model = ModelLoader(group, settings(), Poisoning(), hooks).load(checkpoint).model
    local = local_tensors(model)
    poison(model)
    model.load_weights(Weights.of(local, presharded=True))
    assert all(torch.equal(tensor, hooks.raw[name]) for name, tensor in hooks.snapshot().items())
    with pytest.raises(CheckpointError, match="the model needs"):
        model.load_weights(Weights.of(local))
    with pytest.raises(CheckpointError, match="the model needs"):
        model.load_weights(Weights.of(load_file(checkpoint / "model.safetensors"), presharded=True))
    model.load_weights(Weights.of(load_file(checkpoint / "model.safetensors")))
    assert all(torch.equal(tensor, hooks.raw[name]) for name, tensor in hooks.snapshot().items())


def local_tensors(model: DecoderForCausalLM) -> dict[str, torch.Tensor]:
    """A rank's own parameters under Hugging Face names, fused ones taken apart."""
    found: dict[str, torch.Tensor] = {}
    for target in model.weight_mapper().targets(model.loadable_layers()):
        layer: Any = target.layer
        for leaf in layer.checkpoint_tensors():
            tensor = getattr(layer, leaf).detach().clone()
            rows = [layer.local_rows(part) for part in layer.parts] if hasattr(layer, "parts") else [len(tensor)]
            for prefix, part in zip(target.prefixes, tensor.split(rows), strict=True):
                found[f"{prefix}.{leaf}"] = part
    return found


class Writes(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes every operation that makes or changes real memory, and how many bytes."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.bytes: dict[str, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not result.is_meta:
            name = str(func)
            self.bytes[name] = self.bytes.get(name, 0) + result.nbytes
        return result


def test_h56_nothing_is_computed_on_bytes_that_will_be_replaced(checkpoint: Path) -> None:
    with Writes() as writes:
        model = construct(read_config(checkpoint), {}, LayerContext(SINGLE, torch.bfloat16, KernelLayout.PACKED))
    assert writes.bytes == {}
    rotary = model.model.rotary_emb
    derived = [rotary.inv_freq, rotary.cos_sin_cache]
    model.model.rotary_emb = nn.Identity()  # type: ignore[assignment]
    with Writes() as writes:
        materialize(model, CPU)
        prepare_processed(model)
        prepare_raw(model)
    # allocated and pointed at; no fill, no random number, no conversion
    assert set(writes.bytes) <= {
        "aten.empty.memory_format",
        "aten.set_.source_Storage_storage_offset",
        "aten.detach.default",
    }
    assert all(tensor.is_meta for tensor in derived)


@pytest.mark.parametrize("differs", [True, False])
def test_h61_an_own_lm_head_unties_the_model_before_it_is_built(differs: bool, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint", CASES["biased_tied"])
    tensors = load_file(directory / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    head[-1, -1] += 1 if differs else 0
    (directory / "model.safetensors").unlink()
    save_file({**tensors, "lm_head.weight": head}, directory / "model.safetensors")
    hooks = Recorder()
    result = ModelLoader(SINGLE, settings(), Poisoning(), hooks).load(directory)
    assert result.build_facts == result.model.build_facts == ({"word_embeddings_untied": True} if differs else {})
    assert result.config.tie_word_embeddings is not differs
    assert torch.equal(result.model.lm_head.weight, head)
    # a target without files builds the same storages only where it is told the facts
    (directory / "model.safetensors").unlink()
    target = Injecting(hooks.raw, "LOADED", result.build_facts)
    model = ModelLoader(SINGLE, settings(load_format=LoadFormat.PRESHARDED), target).load(directory).model
    assert torch.equal(prompt_logits(model, PROMPTS), prompt_logits(result.model, PROMPTS))
    assert (model.lm_head.weight is model.model.embed_tokens.weight) is not differs


@pytest.mark.parametrize("facts", [{"unheard_of": True}, {"word_embeddings_untied": 1}])
def test_h61_foreign_build_facts_are_refused_by_name(facts: BuildFacts, checkpoint: Path) -> None:
    with pytest.raises(ConfigError, match=f"build fact '?{next(iter(facts))}"):
        construct(read_config(checkpoint), facts, LayerContext(SINGLE, torch.float32))


def test_materialising_keeps_ties_by_object_and_by_storage() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.empty(4, 6))
            self.same_object = self.a
            self.same_storage = nn.Parameter(self.a.data)
            self.interior = nn.Parameter(self.a.data[1:3, ::2])
            self.register_buffer("buffer", torch.empty(3, dtype=torch.int64))
            self.plain = self.buffer
            self.empty = nn.Parameter(torch.empty(0, 5), requires_grad=False)

    with torch.device("meta"):
        model = Tied()
    materialize(model, CPU)
    assert model.same_object is model.a
    assert model.plain is model.buffer
    assert model.same_storage.data_ptr() == model.a.data_ptr() != 0
    assert model.interior.stride() == (6, 2)
    assert model.interior.data_ptr() == model.a.data_ptr() + 6 * 4
    assert model.interior.untyped_storage().nbytes() == 4 * 6 * 4
    assert model.empty.shape == (0, 5)
    assert not model.empty.requires_grad
    assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])


def test_derived_tensors_are_computed_after_meta(checkpoint: Path) -> None:
    model = ModelLoader(SINGLE, settings(), SafetensorsLoader()).load(checkpoint).model
    rotary = model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, inverse_frequencies(model.config.rope, model.config.head_dim))
    assert 0 < rotary.inv_freq.min() < rotary.inv_freq.max() < 1
    positions = torch.arange(128, dtype=torch.float32)
    angles = torch.outer(positions, rotary.inv_freq)
    assert torch.equal(rotary.cos_sin_cache, torch.cat((angles.cos(), angles.sin()), dim=-1))
    assert rotary.tensor_classes() == {"inv_freq": "derived", "cos_sin_cache": "derived"}
    assert "inv_freq" not in dict(model.state_dict())


def test_the_cache_is_run_time_state(checkpoint: Path) -> None:
    model = ModelLoader(SINGLE, settings(), SafetensorsLoader()).load(checkpoint).model
    attention = attention_of(model, 0)
    assert vars(attention)["k_cache"] is None
    generate(model, PROMPTS, max_new_tokens=2)
    assert isinstance(vars(attention)["k_cache"], torch.Tensor)
    assert attention.tensor_classes() == {"k_cache": "runtime", "v_cache": "runtime"}
    assert not any("cache" in name for name, _ in [*model.named_parameters(), *model.named_buffers()])
    model.release_cache()
    assert vars(attention)["k_cache"] is None


def test_dummy_is_seeded_and_complete(checkpoint: Path) -> None:
    (checkpoint / "model.safetensors").unlink()
    one, other = Recorder(), Recorder()
    for hooks, layout in ((one, KernelLayout.PLAIN), (other, KernelLayout.PACKED)):
        loader = ModelLoader(SINGLE, settings(layout, LoadFormat.DUMMY), SafetensorsLoader(), hooks)
        model = loader.load(checkpoint).model
        assert len(generate(model, PROMPTS, max_new_tokens=2)) == len(PROMPTS)
    assert all(torch.equal(tensor, other.raw[name]) for name, tensor in one.raw.items())
    assert all(0 < tensor.abs().max() <= 1e-3 for tensor in one.raw.values())
    assert len({tensor.sum().item() for tensor in one.raw.values()}) == len(one.raw)


def test_a_parameter_that_no_layer_fills_is_an_error(checkpoint: Path) -> None:
    model = construct(read_config(checkpoint), {}, LayerContext(SINGLE, torch.float32))
    model.model.norm.register_parameter("extra", nn.Parameter(torch.empty(3), requires_grad=False))
    materialize(model, CPU)
    with pytest.raises(CheckpointError, match=r"parameter model\.norm\.extra was not filled"):
        model.load_weights(Weights.of(load_file(checkpoint / "model.safetensors")))


def test_a_model_without_aliases_does_not_run(checkpoint: Path) -> None:
    model = construct(read_config(checkpoint), {}, LayerContext(SINGLE, torch.float32))
    materialize(model, CPU)
    model.load_weights(Weights.of(load_file(checkpoint / "model.safetensors")))
    with pytest.raises(RuntimeError, match="post_load_weights"):
        generate(model, PROMPTS, max_new_tokens=1)


@pytest.mark.parametrize(
    ("prompts", "count", "words"),
    [
        ([[]], 1, "prompt 0 is empty"),
        ([[1], [97]], 1, "prompt 1 has a token outside"),
        ([[-1]], 1, "outside"),
        ([[1] * 120], 9, "exceed the model's 128 positions"),
        ([[1]], 0, "max_new_tokens is 0"),
    ],
)
def test_bad_prompts(prompts: list[list[int]], count: int, words: str, checkpoint: Path) -> None:
    model = ModelLoader(SINGLE, settings(), SafetensorsLoader()).load(checkpoint).model
    with pytest.raises(ConfigError, match=words):
        generate(model, prompts, max_new_tokens=count)
    assert generate(model, [], max_new_tokens=1) == []
