"""Weights from a program that is not the native runtime: each rank's tensors, published by Hugging Face's names.

The same manifests and tokens as from the checkpoint, and then a source like any other; and what comes of programs that
publish something else: the disk, on all ranks.
"""

from __future__ import annotations

import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from engine_fleet import BIG, Fleet, Watch, bare
from naive_models import loaded
from publish_tensors import ENGINE
from runtime_models import write_checkpoint
from safetensors.torch import load_file, save_file
from tensor_programs import Programs

import weightwire
from weightwire.config import Settings
from weightwire.engines.native.events import Event
from weightwire.engines.native.identity import native_identities
from weightwire.engines.native.options import ReplicaOptions
from weightwire.errors import ConfigError, LoadError, ManifestMismatch
from weightwire.runtime import KernelLayout, Mapping, read_config
from weightwire.types import Stage

pytestmark = pytest.mark.timeout(240)  # a machine that is busy with other tests starts processes slowly

F32: dict[str, Any] = {"dtype": "float32"}
ALONE: dict[str, Any] = {"env": {"WEIGHTWIRE_ROLE": "off"}, "load_format": "auto"}
GARBAGE: dict[str, Any] = {"poison": True}
TAKEN = [("peer", "failed"), ("tensors", "ok")]
DISK = [("peer", "failed"), ("tensors", "failed"), ("disk", "ok")]


@pytest.fixture
def programs(fleet: Fleet) -> Iterator[Programs]:
    started = Programs(url=fleet.url, secret_file=fleet.secret_file)
    yield started
    started.kill()


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("llama") / "plain")


def steps(event: Event) -> list[tuple[str, str]]:
    """The ladder of one rank, as it was climbed."""
    return [(step["way"], step["outcome"]) for step in report(event)["steps"]]


def report(event: Event) -> dict[str, Any]:
    found = event["report"]
    assert isinstance(found, dict)
    return dict(found)


def published(events: list[dict[str, Any]]) -> list[str]:
    return [event["published"]["content_id"] for event in events]


def from_disk(checkpoint: Path, tp: int = 1, ep: int = 1) -> list[str]:
    """What a replica publishes that read ``checkpoint``."""
    return [loaded(checkpoint, tp=tp, rank=rank, ep=ep).manifest().content_id for rank in range(tp)]


def said(watch: Watch) -> tuple[list[list[str]], list[list[int]]]:
    return watch.digest(), watch.tokens()


@pytest.mark.parametrize("name", ["llama", "gemma2"])  # the head of the second is tied
def test_a_model_of_transformers_is_a_source_and_what_takes_it_is_one_for_its_own_kind(
    name: str, fleet: Fleet, programs: Programs, llama: Path, models: dict[str, Path]
) -> None:
    made = models.get(name, llama)
    programs.start(made, name, transformers=True)
    baseline = fleet.start(made, name, **ALONE, **F32)
    first = fleet.start(bare(made), name, tensors_of=ENGINE, faults=GARBAGE, **F32)
    events = first.loaded()
    assert [steps(event) for event in events] == [TAKEN]
    assert published(events) == from_disk(made)
    told = report(events[0])
    assert (told["source"], told["verified"], told["stage"]) == ("tensors", True, "")
    assert told["nbytes"] == sum(share["nbytes"] for share in told["shares"])
    assert told["nbytes"] > (made / "model.safetensors").stat().st_size * 0.9
    baseline.loaded()
    assert said(first) == said(baseline)
    second = fleet.start(bare(made), name, tensors_of=ENGINE, faults=GARBAGE, **F32)
    (event,) = second.loaded()
    assert steps(event) == [("peer", "ok")]
    assert published([event]) == from_disk(made)
    assert said(second) == said(baseline)


@pytest.mark.parametrize(
    ("name", "ep"),
    [("qwen3_moe", 2), ("deepseek_v3", 1), ("fp8_block", 1), ("fp8_static", 1), ("nvfp4_awq", 1), ("w4a16_awq", 1)],
)
def test_h14_h15_each_rank_s_part_from_a_program_of_two_ranks(
    name: str, ep: int, fleet: Fleet, programs: Programs, models: dict[str, Path]
) -> None:
    made, common = models[name], {"tp": 2, "ep": ep, **F32}
    programs.start(made, name, tp=2, ep=ep)
    baseline = fleet.start(made, name, **ALONE, **common)
    target = fleet.start(bare(made), name, tensors_of=ENGINE, faults=GARBAGE, **common)
    events = target.loaded()
    assert [steps(event) for event in events] == [TAKEN] * 2
    assert published(events) == from_disk(made, 2, ep)
    baseline.loaded()
    assert said(target) == said(baseline)


SHORT = "model.layers.1.mlp.down_proj.weight"
MISFITS: dict[str, tuple[dict[str, Any], str]] = {
    "whole": ({"whole": True}, r"k_proj\.weight has shape|embed_tokens\.weight has shape"),
    "missing": ({"without": "model.norm.weight"}, r"lacks tensor model\.norm\.weight"),
    "left over": ({"extra": "model.layers.0.self_attn.qkv_proj.weight"}, r"qkv_proj\.weight has no place"),
    "dtype": ({"other_dtype": {SHORT: "bfloat16"}}, rf"{SHORT} is torch\.bfloat16, the model torch\.float32"),
    "wider": ({"odd": {1: {"other_dtype": {"model.norm.weight": "float64"}}}}, r"norm\.weight is torch\.float64"),
    "head": ({"other_dtype": {"lm_head.weight": "float8_e4m3fn"}}, r"lm_head\.weight is torch\.float8_e4m3fn"),
    "on one rank": ({"odd": {1: {"short": SHORT}}}, rf"{SHORT} has shape"),
    "state": ({"state": True}, "declares state of the root module"),
    "too large": ({"odd": {1: {"large": 8 << 20}}}, "more than the .* that are allowed"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_h19_h23_what_does_not_fit_is_read_from_the_disk_by_all_ranks(
    case: str, fleet: Fleet, programs: Programs, llama: Path
) -> None:
    options, reason = MISFITS[case]
    programs.start(llama, case, tp=2, **options)
    target = fleet.start(llama, case, tp=2, tensors_of=ENGINE, faults=GARBAGE, **F32)
    events = target.loaded()
    assert [steps(event) for event in events] == [DISK] * 2
    assert [report(event)["source"] for event in events] == ["disk"] * 2
    assert published(events) == from_disk(llama, 2)
    reasons = [report(event)["steps"][1]["reason"] for event in events]
    assert all(re.search(reason, each) and "\n" not in each for each in reasons)  # each rank knows of the others'


def test_h05_h59_a_load_that_ended_half_way_leaves_nothing_behind(
    fleet: Fleet, programs: Programs, models: dict[str, Path]
) -> None:
    """Loading these layers removes parameters: what the program had of them is not what the disk has."""
    made = models["fp8_static"]
    inputs = [name for name in load_file(made / "model.safetensors") if name.endswith("input_scale")]
    assert inputs
    programs.start(made, "half", tp=2, without=inputs, odd={1: {"short": SHORT}})
    target = fleet.start(made, "half", tp=2, tensors_of=ENGINE, faults=GARBAGE, **F32)
    events = target.loaded()
    assert [steps(event) for event in events] == [DISK] * 2
    assert published(events) == from_disk(made, 2)


def test_h43_whole_tensors_of_one_rank_are_not_even_selected_by_two(
    fleet: Fleet, programs: Programs, llama: Path
) -> None:
    programs.start(llama, "one", whole=True)
    target = fleet.target(llama, "one", tp=2, tensors_of=ENGINE, **F32)
    events = target.loaded()
    assert [steps(event) for event in events] == [DISK] * 2
    assert all("tp_size 2 here, 1 there" in report(event)["steps"][1]["reason"] for event in events)
    assert [content for content, _ in target.digest()] == from_disk(llama, 2)
    bad = fleet.start(bare(llama), "one", tp=2, tensors_of=ENGINE, env={"WEIGHTWIRE_ON_MISS": "fail"}, **F32)
    with pytest.raises(LoadError, match=r"no peer \(no source.*; tensors of acme: no source.* and on_miss is fail"):
        bad.loaded()


def test_h43_h57_another_program_s_revision_or_name_is_not_taken(fleet: Fleet, programs: Programs, llama: Path) -> None:
    programs.start(llama, "named", whole=True)
    others = [
        fleet.start(llama, "named", **F32 | {"tensors_of": ENGINE} | told)
        for told in ({"tensors_of": "other"}, {"revision": "r2"}, {"dtype": "bfloat16"})
    ]
    assert [steps(event) for other in others for event in other.loaded()] == [DISK] * 3


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 78 MB."""
    return write_checkpoint(tmp_path_factory.mktemp("big") / "big", BIG)


def test_h26_a_program_that_dies_meanwhile(fleet: Fleet, programs: Programs, big: Path) -> None:
    programs.start(big, "dies", whole=True, slow_s=0.3)
    target = fleet.start(big, "dies", tensors_of=ENGINE, faults=GARBAGE, **F32)
    target.moved("transfer", 0.1)
    fleet.eventually("dies", lambda views: any(0 < each.record.fraction < 1 for each in views))  # others may wait
    programs.processes[0].send_signal(signal.SIGKILL)
    events = target.loaded()
    assert [steps(event) for event in events] == [DISK]
    assert published(events) == from_disk(big)


@pytest.mark.parametrize(("options", "ladder"), [({}, TAKEN), ({"short": SHORT}, DISK)], ids=["fits", "does not"])
def test_h53_the_tensors_are_let_go_of_once_they_are_copied_or_are_not(
    options: dict[str, Any], ladder: list[tuple[str, str]], fleet: Fleet, programs: Programs, big: Path
) -> None:
    """One more shard in host memory, and none afterwards."""
    model_id, nbytes = f"memory-{len(options)}", (big / "model.safetensors").stat().st_size
    programs.start(big, model_id, whole=True, **options)
    target = fleet.start(big, model_id, tensors_of=ENGINE, **F32)
    (event,) = target.loaded()
    assert steps(event) == ladder
    (memory,) = target.ask("memory", "memory")
    assert isinstance(memory["peak"], int)
    assert isinstance(memory["now"], int)
    assert options or memory["peak"] > 1.8 * nbytes
    assert memory["now"] < 1.3 * nbytes


def test_h23_h31_a_rank_whose_memory_is_bad_takes_all_to_the_disk(
    fleet: Fleet, programs: Programs, llama: Path
) -> None:
    programs.start(llama, "bad", tp=2)
    faults = {"corrupt": True, "rank": 1}
    target = fleet.start(llama, "bad", tp=2, tensors_of=ENGINE, faults=faults, **F32)
    events = target.loaded()
    assert [steps(event) for event in events] == [DISK] * 2
    assert "rank 1" in report(events[0])["steps"][1]["reason"]
    assert published(events) == from_disk(llama, 2)


def test_where_replicas_fail_in_the_middle_the_tensors_are_next(fleet: Fleet, programs: Programs, llama: Path) -> None:
    source = fleet.source(llama, "next", faults={"blind": True}, **F32)
    programs.start(llama, "next", whole=True)
    source.loaded()
    source.ask("flip", "flipped", what="weights")
    target = fleet.target(bare(llama), "next", tensors_of=ENGINE, faults=GARBAGE, **F32)
    (event,) = target.loaded()
    assert steps(event) == TAKEN
    assert len(report(event)["shares"]) == 1
    assert [content for content, _ in target.digest()] == from_disk(llama)


@pytest.fixture(scope="module")
def tied(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its config ties the head to the embedding, and so do its tensors."""
    return write_checkpoint(tmp_path_factory.mktemp("tied") / "tied", {"tie_word_embeddings": True, "vocab_size": 98})


def untied(checkpoint: Path, row: int) -> Path:
    """A copy that has a head of its own all the same, from a row on."""
    directory = checkpoint.with_name(f"untied-{row}")
    if not directory.exists():
        bare(checkpoint).rename(directory)
        tensors = load_file(checkpoint / "model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        tensors["lm_head.weight"][row:] += 1
        save_file(tensors, directory / "model.safetensors")
    return directory


def test_h61_a_head_that_differs_on_one_rank_alone_is_no_tied_one_on_any(
    fleet: Fleet, programs: Programs, tied: Path
) -> None:
    made = untied(tied, 60)  # the second rank's half
    programs.start(made, "untied", tp=2)
    baseline = fleet.start(made, "untied", tp=2, **ALONE, **F32)
    target = fleet.start(bare(made), "untied", tp=2, tensors_of=ENGINE, faults=GARBAGE, **F32)
    events = target.loaded()
    assert [steps(event) for event in events] == [TAKEN] * 2
    baseline.loaded()
    assert said(target) == said(baseline)
    assert len(published(events)) == 2


def test_h61_tensors_that_tell_something_else_than_the_replica_before_them(
    fleet: Fleet, programs: Programs, tied: Path
) -> None:
    """The model was built for a replica that then failed; the program's tensors, of a tied model, belong to another."""
    made = untied(tied, 60)
    source = fleet.source(made, "otherwise", faults={"blind": True}, **F32)
    programs.start(tied, "otherwise", whole=True)
    source.loaded()
    source.ask("flip", "flipped", what="weights")
    target = fleet.target(made, "otherwise", tensors_of=ENGINE, **F32)
    (event,) = target.loaded()
    assert steps(event) == DISK
    assert "other build facts" in report(event)["steps"][1]["reason"]


def test_h61_build_facts_of_a_replica_are_no_tensors(fleet: Fleet, tied: Path) -> None:
    made = untied(tied, 60)
    fleet.source(made, "facts", **F32).loaded()
    found = native_identities(
        made,
        read_config(made),
        model_id="facts",
        revision="r1",
        dtype="float32",
        kernel_layout=KernelLayout.PLAIN,
        mapping=Mapping.for_tp(0, 1),
    )
    settings = Settings(url=fleet.url, secret_file=fleet.secret_file, transports=("tcp",))
    with pytest.raises(ManifestMismatch, match="names the build fact word_embeddings_untied, which tensors by name do"):
        weightwire.receive_tensors(found[Stage.LOADED], max_nbytes=1 << 30, settings=settings)


@pytest.mark.parametrize(
    ("options", "problem"),
    [({"load_format": "auto"}, "nobody is asked for weights"), ({"weights_id": "ab"}, "weights_id pins weights of")],
)
def test_options_that_contradict_it_are_refused(options: dict[str, Any], problem: str, llama: Path) -> None:
    given = {"load_format": "presharded"} | options
    with pytest.raises(ConfigError, match=problem):
        ReplicaOptions(model=str(llama), model_id="x", tensors_of=ENGINE, **given)


def test_h61_a_model_that_was_built_as_wrong_tensors_said_does_not_leave_a_head_out(
    fleet: Fleet, programs: Programs, tied: Path
) -> None:
    """The program's embedding is tied, and something of it does not fit; the disk has a head of its own."""
    programs.start(tied, "contradiction", whole=True, short=SHORT)
    target = fleet.start(untied(tied, 60), "contradiction", tensors_of=ENGINE, **F32)
    with pytest.raises(LoadError, match="has other build facts than a peer"):
        target.loaded()
    agreeing = fleet.start(tied, "contradiction", tensors_of=ENGINE, **F32)
    (event,) = agreeing.loaded()
    assert steps(event) == DISK
