"""The real model: tokens equal to those of transformers, on one rank and on three."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from runtime_ranks import child_environment, start_ranks, wait_all

from weightwire.engines.native.smollm2 import build_checkpoint, strip_weights
from weightwire.errors import CheckpointError
from weightwire.runtime import (
    LoaderSettings,
    ModelLoader,
    SafetensorsLoader,
    TpGroup,
    generate,
    has_weights,
    serve_store,
)

pytestmark = pytest.mark.model

QUESTIONS = ["What is the capital of France?", "Name three colours."]
NEW_TOKENS = 8


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    # in a process of its own: the conversion's libraries leave warnings behind
    code = "from weightwire.engines.native.smollm2 import build_checkpoint as b; b()"
    subprocess.run([sys.executable, "-c", code], env=child_environment(), check=True, timeout=110)
    return build_checkpoint()


@pytest.fixture(scope="module")
def prompts(checkpoint: Path) -> list[list[int]]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [
        tokenizer.apply_chat_template([{"role": "user", "content": q}], add_generation_prompt=True)["input_ids"]
        for q in QUESTIONS
    ]


@pytest.fixture(scope="module")
def one_rank(checkpoint: Path, prompts: list[list[int]]) -> list[list[int]]:
    torch.set_num_threads(1)
    seen: list[tuple[int, int]] = []
    loader = ModelLoader(TpGroup.single(), LoaderSettings(dtype=torch.float32), SafetensorsLoader())
    model = loader.load(checkpoint, lambda done, total: seen.append((done, total))).model
    assert seen == sorted(seen)
    assert seen[-1][0] == seen[-1][1] == sum(p.nbytes for p in model.parameters())
    return generate(model, prompts, max_new_tokens=NEW_TOKENS)


def test_one_rank_equals_transformers(checkpoint: Path, prompts: list[list[int]], one_rank: list[list[int]]) -> None:
    """Each of our tokens is transformers' choice after the same prefix; so by induction the sequences are equal."""
    from transformers import AutoTokenizer, LlamaForCausalLM

    reference = LlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, tokens in zip(prompts, one_rank, strict=True):
        with torch.no_grad():
            logits = reference(torch.tensor([prompt + tokens])).logits[0]
        chosen = logits[len(prompt) - 1 : -1].argmax(-1).tolist()
        assert chosen == tokens
    text = AutoTokenizer.from_pretrained(checkpoint).decode(one_rank[0], skip_special_tokens=True)
    assert text.startswith("The capital of France is Paris.")


def test_three_ranks_equal_one(
    checkpoint: Path, prompts: list[list[int]], one_rank: list[list[int]], tmp_path: Path
) -> None:
    job = {"checkpoint": str(checkpoint), "prompts": prompts, "max_new_tokens": NEW_TOKENS}
    torch.save(job, tmp_path / "job.pt")
    store = serve_store()
    shared = {"WORLD_SIZE": "3", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    ranks = start_ranks("smollm2", tmp_path, [{**shared, "RANK": str(rank)} for rank in range(3)])
    assert wait_all(ranks, 100) == [0, 0, 0]
    for rank in range(3):
        assert torch.load(tmp_path / f"rank{rank}.pt", weights_only=True)["tokens"] == one_rank


def test_stripped_directory_has_no_weights(checkpoint: Path, tmp_path: Path) -> None:
    stripped = strip_weights(checkpoint, tmp_path / "target")
    assert not has_weights(stripped)
    assert {path.name for path in stripped.iterdir()} >= {"config.json", "tokenizer.json", "tokenizer_config.json"}
    assert sum(path.stat().st_size for path in stripped.iterdir()) < 10 << 20
    with pytest.raises(CheckpointError, match=r"has no model\.safetensors"):
        ModelLoader(TpGroup.single(), LoaderSettings(), SafetensorsLoader()).load(stripped)
    with pytest.raises(CheckpointError, match="holds weights already"):
        strip_weights(stripped, checkpoint)
