"""Digests are made while the disk is read, of quantized models too; what they say is what is there at the end."""

from __future__ import annotations

from pathlib import Path

import pytest
from engine_fleet import Fleet, bare, write_bf16
from runtime_quantized import DIMS, quantized, quantized_family

BESIDE = ("fp8_static", "nvfp4")
AFTER = ("fp8_dynamic", "nvfp4_awq")
"""Loading decides which tensors there are: what was digested before is not of what is there."""


def checked(fleet: Fleet, checkpoint: Path, model_id: str) -> bool:
    """Whether a source of it digested nothing after the loading; a receiver has the same bytes."""
    source = fleet.source(checkpoint, model_id)
    (loaded,) = source.loaded()
    assert loaded["published"]["published"]
    assert [[loaded["published"]["content_id"]]] == [digest[:1] for digest in source.digest()]
    receiver = fleet.target(bare(checkpoint), model_id)
    assert receiver.report()["source"] == "peer"
    assert receiver.digest() == source.digest()
    assert receiver.tokens() == source.tokens()
    after = any(event["event"] == "progress" and event["phase"] == "digest" for event in source.events)
    fleet.end(source, receiver)
    return not after


@pytest.mark.parametrize("form", [*BESIDE, *AFTER])
def test_quantized_layers_are_digested_while_they_are_read(form: str, fleet: Fleet, tmp_path: Path) -> None:
    checkpoint = quantized(write_bf16(tmp_path / "plain", DIMS), tmp_path / form, form)
    assert checked(fleet, checkpoint, f"beside-{form}") == (form in BESIDE)


def test_quantized_experts_are_digested_while_they_are_read(fleet: Fleet, tmp_path: Path) -> None:
    options = {"tp": 2, "dtype": "float32"}
    checkpoint = quantized_family(tmp_path, "qwen3_moe", "fp8_static")
    source = fleet.source(checkpoint, "beside-experts", **options)
    published = [event["published"]["content_id"] for event in source.loaded()]
    assert published == [content for content, _ in source.digest()]
    assert not any(event["event"] == "progress" and event["phase"] == "digest" for event in source.events)
