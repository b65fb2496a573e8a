"""Prefill and decode on servers of their own, both loaded from a running replica; the KV cache goes over NIXL too."""

from __future__ import annotations

import json
import os
import re
import signal
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from vllm_checkpoints import Checkpoints
from vllm_processes import PROMPTS, TOKENS, Api, Tokens, free_port
from vllm_replicas import Fleet

KV = {"kv_connector": "NixlConnector", "kv_role": "kv_both", "kv_buffer_device": "cpu"}
EXACT = {"--dtype": "float32"}
"""Answers do not depend on what else is in the batch, nor on where a prompt was split."""
OTHER = "Bread is made of"
ASK_FOR_KV = {
    "do_remote_decode": True,
    "do_remote_prefill": False,
    "remote_engine_id": None,
    "remote_block_ids": None,
    "remote_host": None,
    "remote_port": None,
}


def kv_server(fleet: Fleet, model: Path, name: str) -> Api:
    """Loads from a peer or not at all, into memory that was poisoned; hands KV out and takes it in."""
    return fleet.api(
        model,
        name,
        extra={"on_miss": "fail", "poison": True},
        engine={**EXACT, "--kv-transfer-config": json.dumps(KV), "--shutdown-timeout": 10},
        env={"VLLM_NIXL_SIDE_CHANNEL_PORT": str(free_port())},
    )


def complete(server: Api, prompt: str, tokens: int, **more: Any) -> dict[str, Any]:
    """One greedy completion: the answer."""
    return server.ask(
        "/v1/completions",
        timeout=120.0,
        model="m",
        prompt=prompt,
        max_tokens=tokens,
        temperature=0,
        ignore_eos=True,
        return_token_ids=True,
        **more,
    )


def prefilled(prefill: Api, prompt: str) -> dict[str, Any]:
    """Where the KV cache of ``prompt`` lies now."""
    where: dict[str, Any] = complete(prefill, prompt, 1, kv_transfer_params=ASK_FOR_KV)["kv_transfer_params"]
    assert where["do_remote_prefill"], where
    assert any(where["remote_block_ids"]), where
    return where


def answers(answer: Callable[[str], dict[str, Any]]) -> Tokens:
    """To all prompts at once."""
    with ThreadPoolExecutor(len(PROMPTS)) as pool:
        return [said["choices"][0]["token_ids"] for said in pool.map(answer, PROMPTS)]


def metric(server: Api, name: str, label: str = "") -> float:
    """The sum of a Prometheus metric of vLLM's over its labels, or over those with ``label``."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    found = re.findall(rf"^{re.escape(name)}(?:{{[^}}]*{label}[^}}]*}})? (\S+)$", text, re.MULTILINE)
    assert found, f"{server.name} has no metric {name}"
    return sum(map(float, found))


def content(server: Api) -> str:
    """The content id of its weights."""
    match = re.search(r"content id ([0-9a-f]{64})", server.says("weightwire: content id"))
    assert match
    return match[1]


@pytest.mark.timeout(600, method="signal", func_only=True)  # by signal: servers are ended then
def test_prefill_and_decode_from_a_replica(fleet: Fleet, checkpoints: Checkpoints) -> None:
    name = "disaggregated"
    single = fleet.api(checkpoints.full("smollm2"), name, engine=EXACT).ready()
    fleet.until(name, 1, 30, single)
    prefill, decode = (kv_server(fleet, checkpoints.bare("smollm2"), name) for _ in range(2))
    expected = answers(lambda prompt: complete(single, prompt, TOKENS))  # while the others read it
    assert len({tuple(one) for one in expected}) == len(PROMPTS)
    for server in (prefill, decode):
        server.ready()
        assert server.lines("weightwire: received"), server.tail()
        assert content(server) == content(single)

    lost: list[str] = []

    def through_both(prompt: str) -> dict[str, Any]:
        try:
            return complete(decode, prompt, TOKENS, kv_transfer_params=prefilled(prefill, prompt))
        except AssertionError as refused:  # vLLM's connector gave a transfer up: a router asks again, once
            lost.append(str(refused))
            return complete(decode, prompt, TOKENS, kv_transfer_params=prefilled(prefill, prompt))

    through_both(OTHER)  # the servers shake hands
    assert answers(through_both) == expected
    assert metric(decode, "vllm:nixl_bytes_transferred_count") == len(PROMPTS) + 1
    assert metric(decode, "vllm:prompt_tokens_by_source_total", 'source="local_compute"') == 0  # no prefill there
    if not lost:
        hits = metric(decode, "vllm:external_prefix_cache_hits_total")
        assert hits == metric(prefill, "vllm:prompt_tokens_total") > 0
    assert metric(decode, "vllm:nixl_num_failed_transfers_total") <= len(lost)
    assert len(lost) <= 1, lost
    fleet.until(name, 3, 30, prefill, decode)  # weights are offered beside the KV cache, by NIXL too
    for server in (prefill, decode):
        os.kill(server.child.pid, signal.SIGTERM)
    for server in (prefill, decode):
        assert server.ends(60) == 0, server.tail()
        assert "Segmentation fault" not in server.log(), server.tail()
    assert len(fleet.replicas(name)) == 1
