"""Several real ranks against transformers, on small random models."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_models import BASE, CASES, NEW_TOKENS, PROMPTS, write_checkpoint
from runtime_ranks import child_environment, start_ranks, wait_all

from weightwire.runtime import (
    LoaderSettings,
    ModelLoader,
    SafetensorsLoader,
    TpGroup,
    generate,
    prompt_logits,
    serve_store,
)

Results = list[dict[str, Any]]


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("checkpoints")
    for index, (name, changes) in enumerate(CASES.items()):
        write_checkpoint(root / name, changes, seed=index)
    return root


@pytest.fixture(scope="module")
def expected(checkpoints: Path) -> dict[str, tuple[torch.Tensor, list[list[int]]]]:
    """What transformers computes: the next token's logits, and the greedy continuation without a cache."""
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    found = {}
    for case in CASES:
        model = LlamaForCausalLM.from_pretrained(checkpoints / case, dtype=torch.float32)
        sequences = [list(prompt) for prompt in PROMPTS]
        first: list[torch.Tensor] = []
        with torch.no_grad():
            for sequence in sequences:
                for step in range(NEW_TOKENS):
                    logits = model(torch.tensor([sequence])).logits[0, -1]
                    first += [logits] if step == 0 else []
                    sequence.append(int(logits.argmax()))
        found[case] = torch.stack(first), [s[len(p) :] for s, p in zip(sequences, PROMPTS, strict=True)]
    return found


def _link(checkpoints: Path, workdir: Path) -> None:
    for case in CASES:
        (workdir / case).symlink_to(checkpoints / case)


def _results(workdir: Path, size: int) -> Results:
    return [torch.load(workdir / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


@pytest.fixture(scope="module")
def two_ranks(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Two ranks, started by the real torchrun."""
    workdir = tmp_path_factory.mktemp("tp2")
    _link(checkpoints, workdir)
    script = Path(sys.modules["runtime_ranks"].__file__ or "")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    with subprocess.Popen([*torchrun, str(script), "small", str(workdir)], env=child_environment()) as launcher:
        assert wait_all([launcher], 90) == [0]
    return _results(workdir, 2)


@pytest.fixture(scope="module")
def four_ranks(checkpoints: Path, tmp_path_factory: pytest.TempPathFactory) -> Results:
    """Four ranks whose parent serves the store, with mpirun's variables."""
    workdir = tmp_path_factory.mktemp("tp4")
    _link(checkpoints, workdir)
    store = serve_store()
    environments = [
        {
            "OMPI_COMM_WORLD_RANK": str(rank),
            "OMPI_COMM_WORLD_SIZE": "4",
            "OMPI_COMM_WORLD_LOCAL_RANK": str(rank),
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        for rank in range(4)
    ]
    assert wait_all(start_ranks("small", workdir, environments), 90) == [0, 0, 0, 0]
    return _results(workdir, 4)


def _check(results: Results, expected: dict[str, tuple[torch.Tensor, list[list[int]]]]) -> None:
    for case, (logits, tokens) in expected.items():
        for layout in ("plain/torch.float32", "packed/torch.float32", "staged"):
            for result in results:
                ours, our_tokens = result[f"{case}/{layout}"]
                torch.testing.assert_close(ours, logits, atol=2e-4, rtol=1e-4)
                assert our_tokens == tokens, (case, layout)


def _check_ranks_agree(results: Results) -> None:
    for key, (logits, tokens) in results[0].items():
        for other in results[1:]:
            assert torch.equal(other[key][0], logits), key
            assert other[key][1] == tokens, key


def test_two_ranks_equal_transformers(two_ranks: Results, expected: dict[str, Any]) -> None:
    _check(two_ranks, expected)


def test_four_ranks_equal_transformers(four_ranks: Results, expected: dict[str, Any]) -> None:
    _check(four_ranks, expected)


def test_every_rank_has_the_same_bits(two_ranks: Results, four_ranks: Results) -> None:
    _check_ranks_agree(two_ranks)
    _check_ranks_agree(four_ranks)


def test_two_replicas_of_one_layout_are_equal_in_bf16(two_ranks: Results, four_ranks: Results) -> None:
    for results in (two_ranks, four_ranks):
        logits, tokens = results[0]["gqa_llama3/plain/torch.bfloat16"]
        assert torch.equal(results[0]["again"][0], logits)
        assert results[0]["again"][1] == tokens


def test_packed_layout_gives_the_same_tokens(two_ranks: Results) -> None:
    """Only the transposed gate-up product may round differently, so packed is close and its tokens are equal."""
    for case in CASES:
        plain, packed = (two_ranks[0][f"{case}/{layout}/torch.float32"] for layout in ("plain", "packed"))
        torch.testing.assert_close(packed[0], plain[0], atol=1e-5, rtol=1e-5)
        assert packed[1] == plain[1]


def test_one_rank_equals_transformers(checkpoints: Path, expected: dict[str, Any]) -> None:
    for case, (logits, tokens) in expected.items():
        loader = ModelLoader(TpGroup.single(), LoaderSettings(dtype=torch.float32), SafetensorsLoader())
        model = loader.load(checkpoints / case).model
        torch.testing.assert_close(prompt_logits(model, PROMPTS), logits, atol=2e-4, rtol=1e-4)
        assert generate(model, PROMPTS, max_new_tokens=NEW_TOKENS) == tokens
        stop = tokens[0][1]
        cut = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS, eos_token_ids=[stop])
        assert cut == [t[: t.index(stop) + 1] if stop in t else t for t in tokens]


def test_reference_models_differ_from_one_another(expected: dict[str, Any]) -> None:
    assert BASE["vocab_size"] % 4
    assert len({str(tokens) for _, tokens in expected.values()}) == len(CASES)
