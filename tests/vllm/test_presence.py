from __future__ import annotations

import importlib.util

import pytest


def test_vllm_is_here() -> None:
    spec = importlib.util.find_spec("vllm")
    if spec is None or spec.origin is None:
        pytest.skip("vllm is not installed, so nothing of tests/vllm runs: make test-vllm")
