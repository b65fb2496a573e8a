"""Every way in which a checkpoint directory can be wrong: one line that names the thing and what to do."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import BASE, random_tensors, write_checkpoint
from safetensors.torch import load_file, save_file

from weightwire.errors import CheckpointError, ConfigError, WeightwireError
from weightwire.runtime import LoaderSettings, ModelLoader, SafetensorsLoader, TpGroup, Weights
from weightwire.runtime.checkpoint.protocol import LoadRequest
from weightwire.runtime.config import parse_config, read_config

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"


def _load(directory: Path) -> None:
    ModelLoader(TpGroup.single(), LoaderSettings(dtype=torch.float32), SafetensorsLoader()).load(directory)


def _edit_config(**changes: Any) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        config = json.loads((directory / "config.json").read_text())
        (directory / "config.json").write_text(json.dumps({**config, **changes}))

    return edit


def _edit_tensors(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(directory: Path) -> None:
        tensors = load_file(directory / WEIGHTS)
        change(tensors)
        (directory / WEIGHTS).unlink()
        save_file(tensors, directory / WEIGHTS)

    return edit


def _truncate(directory: Path) -> None:
    content = (directory / WEIGHTS).read_bytes()
    (directory / WEIGHTS).write_bytes(content[: len(content) // 2])


def _split(directory: Path) -> None:
    """Two files with an index."""
    tensors = load_file(directory / WEIGHTS)
    names = sorted(tensors)
    weight_map = {name: f"part-{index % 2}.safetensors" for index, name in enumerate(names)}
    for filename in set(weight_map.values()):
        save_file({name: tensors[name] for name in names if weight_map[name] == filename}, directory / filename)
    (directory / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    (directory / WEIGHTS).unlink()


def _split_then(edit: Callable[[Path], object]) -> Callable[[Path], None]:
    def both(directory: Path) -> None:
        _split(directory)
        edit(directory)

    return both


def _index(text: str) -> Callable[[Path], object]:
    return lambda directory: (directory / INDEX).write_text(text)


Q = "model.layers.0.self_attn.q_proj.weight"
NORM = "model.norm.weight"

BAD: dict[str, tuple[Callable[[Path], object], type[WeightwireError], str]] = {
    "no directory": (lambda d: d.rename(d.parent / "gone"), CheckpointError, "cannot read .*config.json"),
    "config is not JSON": (lambda d: (d / "config.json").write_text("{"), CheckpointError, "config.json is not valid"),
    "config is a list": (lambda d: (d / "config.json").write_text("[]"), CheckpointError, "not hold a JSON object"),
    "config is binary": (lambda d: (d / "config.json").write_bytes(b"\xff\x00"), CheckpointError, "not valid JSON"),
    "config nests": (lambda d: (d / "config.json").write_text("[" * 10**5), CheckpointError, "not valid JSON"),
    "no architecture": (_edit_config(architectures=None), CheckpointError, "architectures is missing"),
    "foreign architecture": (_edit_config(architectures=["BertModel"]), ConfigError, "'BertModel' is not supported"),
    "no hidden size": (_edit_config(hidden_size=None), CheckpointError, "hidden_size is None"),
    "a bool as number": (_edit_config(vocab_size=True), CheckpointError, "vocab_size is True"),
    "a number as bool": (_edit_config(attention_bias=1), CheckpointError, "attention_bias is 1"),
    "foreign activation": (_edit_config(hidden_act="gelu"), ConfigError, "hidden_act 'gelu' is not supported"),
    "foreign rope": (_edit_config(rope_scaling={"rope_type": "longrope"}), ConfigError, "rope type 'longrope'"),
    "half a rope": (_edit_config(rope_scaling={"rope_type": "llama3"}), CheckpointError, "factor is None"),
    "no weights": (lambda d: (d / WEIGHTS).unlink(), CheckpointError, "has no model.safetensors"),
    "truncated": (_truncate, CheckpointError, "model.safetensors is corrupt or truncated"),
    "not safetensors": (lambda d: (d / WEIGHTS).write_bytes(b"x" * 64), CheckpointError, "is corrupt or truncated"),
    "empty file": (lambda d: (d / WEIGHTS).write_bytes(b""), CheckpointError, "is corrupt or truncated"),
    "tensor missing": (_edit_tensors(lambda t: t.pop(Q)), CheckpointError, f"lacks tensor {Q}"),
    "several missing": (_edit_tensors(lambda t: (t.pop(Q), t.pop(NORM))), CheckpointError, "and 1 more"),
    "tensor left over": (
        _edit_tensors(lambda t: t.update({"model.layers.2.mlp.extra": torch.ones(1)})),
        CheckpointError,
        "tensor model.layers.2.mlp.extra has no place",
    ),
    "all of another model": (
        _edit_tensors(lambda t: [t.pop(name) for name in list(t)] + [t.update({"bert.pooler": torch.ones(1)})]),
        CheckpointError,
        "lacks tensor .* more",
    ),
    "wrong shape": (
        _edit_tensors(lambda t: t.update({Q: t[Q][:-1].clone()})),
        CheckpointError,
        rf"tensor {Q} has shape \[63, 64\], the model needs \[64, 64\]",
    ),
    "transposed": (
        _edit_tensors(lambda t: t.update({"lm_head.weight": t["lm_head.weight"].t().contiguous()})),
        CheckpointError,
        r"lm_head.weight has shape \[64, 97\]",
    ),
    "broadcastable": (_edit_tensors(lambda t: t.update({NORM: torch.ones(1)})), CheckpointError, r"has shape \[1\]"),
    "integers": (
        _edit_tensors(lambda t: t.update({Q: t[Q].to(torch.int8)})),
        CheckpointError,
        f"tensor {Q} is torch.int8",
    ),
    "fp8": (
        _edit_tensors(lambda t: t.update({Q: t[Q].to(torch.float8_e4m3fn)})),
        CheckpointError,
        f"tensor {Q} is torch.float8",
    ),
    "index is not JSON": (_split_then(_index("{")), CheckpointError, f"{INDEX} is not valid JSON"),
    "index without map": (_split_then(_index("{}")), CheckpointError, "weight_map is missing"),
    "empty index": (_split_then(_index('{"weight_map": {}}')), CheckpointError, "the checkpoint holds no tensors"),
    "index leads outside": (
        _split_then(_index('{"weight_map": {"a": "../x.safetensors"}}')),
        CheckpointError,
        "is not a plain file name",
    ),
    "indexed file missing": (
        _split_then(lambda d: (d / "part-1.safetensors").unlink()),
        CheckpointError,
        "part-1.safetensors is missing",
    ),
    "index names a tensor that its file lacks": (
        _split_then(_index('{"weight_map": {"a": "part-0.safetensors"}}')),
        CheckpointError,
        "part-0.safetensors has no readable tensor a",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_checkpoint(name: str, tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint")
    damage, error, words = BAD[name]
    damage(directory)
    with pytest.raises(error, match=words) as caught:
        _load(directory)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_good_checkpoint_loads_in_one_file_and_in_two(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint")
    _load(directory)
    _split(directory)
    _load(directory)


def test_old_rotary_buffers_are_no_left_over(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path / "checkpoint")
    _edit_tensors(lambda t: t.update({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}))(directory)
    _load(directory)


def test_empty_weights_never_mean_done() -> None:
    with pytest.raises(CheckpointError, match="holds no tensors"):
        Weights({})


def test_heads_that_ranks_cannot_share(tmp_path: Path) -> None:
    from weightwire.runtime import TpCoordinates

    directory = write_checkpoint(tmp_path / "checkpoint")
    group = TpGroup.offline(TpCoordinates(size=3, rank=0))
    with pytest.raises(ConfigError, match=r"8 heads and 2 KV heads cannot be shared by 3 .*use one of: 1, 2, 4, 8"):
        ModelLoader(group, LoaderSettings(), SafetensorsLoader()).load(directory)


def test_both_spellings_of_rope_read_alike() -> None:
    new = {**BASE, "rope_theta": None, "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}
    old = {**BASE, "rope_theta": 5e5, "rope_scaling": None}
    path = Path("config.json")
    assert parse_config(new, path).rope == parse_config(old, path).rope
    assert parse_config(old, path).rope.theta == 5e5
    assert parse_config({**BASE, "eos_token_id": [2, 7]}, path).eos_token_ids == (2, 7)


def test_only_the_slices_of_this_rank_are_read(tmp_path: Path) -> None:
    from weightwire.runtime import LayerContext, TpCoordinates, construct, materialize
    from weightwire.runtime.mapping import Mapping

    changes = {"num_key_value_heads": 8, "intermediate_size": 96}
    directory = write_checkpoint(tmp_path / "checkpoint", changes)
    config = read_config(directory)
    context = LayerContext(TpGroup.offline(TpCoordinates(size=4, rank=1)), torch.float32)
    model = construct(config, {}, context)
    materialize(model, torch.device("cpu"))
    loader = SafetensorsLoader()
    weights = loader.load_weights(LoadRequest(directory, Mapping.for_tp(1, 4), model, config))
    read: dict[str, int] = {}

    class Counted:
        def __init__(self, source: Any) -> None:
            self.name, self.origin, self.shape, self._source = source.name, source.origin, source.shape, source

        def read(self, dim: int, start: int, stop: int) -> torch.Tensor:
            values: torch.Tensor = self._source.read(dim, start, stop)
            read[self.name] = read.get(self.name, 0) + values.numel()
            return values

    model.load_weights(Weights({name: Counted(source) for name, source in weights.tensors.items()}))
    whole = {name: tensor.numel() for name, tensor in random_tensors({**BASE, **changes}).items()}
    for name, count in read.items():
        share = 1 if "norm" in name else 25 / 97 if "embed" in name or "lm_head" in name else 1 / 4
        assert count == round(whole[name] * share), name
    assert sum(read.values()) * 4 < sum(whole.values()) * 1.2


def _memory_kib(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's peak memory counter")
def test_reading_a_slice_touches_no_more_than_the_slice(tmp_path: Path) -> None:
    rows = 1 << 14
    save_file({"big": torch.zeros(rows, 1024)}, tmp_path / WEIGHTS)  # 64 MiB
    loader = SafetensorsLoader()
    source = loader._open(tmp_path)["big"]
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts at the present value
    before = _memory_kib("VmRSS")
    part = source.read(0, 0, rows // 16)
    assert part.shape == (rows // 16, 1024)
    assert _memory_kib("VmHWM") - before < 32 << 10
