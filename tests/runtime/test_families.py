"""Model families against transformers' own implementation, on one rank and on several real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from runtime_families import FAMILIES, FEW_TOKENS, NEW_TOKENS, PROMPTS, expected, write_family
from runtime_ranks import start_ranks, wait_all

from weightwire.runtime import (
    KernelLayout,
    LoaderSettings,
    ModelLoader,
    SafetensorsLoader,
    TpGroup,
    generate,
    prompt_logits,
    serve_store,
)

# logits of a few tens; transformers adds in another order (fused experts, absorbed attention), which moves the last
# of float32's 24 bits in each of some hundred additions
ATOL, RTOL = 5e-4, 1e-4

Expected = dict[str, tuple[torch.Tensor, list[list[int]]]]


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_family(directory / name, name)
    return directory


@pytest.fixture(scope="module")
def oracle() -> Expected:
    torch.set_num_threads(1)
    return {name: expected(name) for name in FAMILIES}


@pytest.mark.parametrize("layout", KernelLayout)
@pytest.mark.parametrize("family", FAMILIES)
def test_one_rank_equals_transformers(family: str, layout: KernelLayout, root: Path, oracle: Expected) -> None:
    settings = LoaderSettings(dtype=torch.float32, kernel_layout=layout)
    model = ModelLoader(TpGroup.single(), settings, SafetensorsLoader()).load(root / family).model
    logits, tokens = oracle[family]
    torch.testing.assert_close(prompt_logits(model, PROMPTS), logits, atol=ATOL, rtol=RTOL)
    assert generate(model, PROMPTS, max_new_tokens=NEW_TOKENS) == tokens


@pytest.fixture(scope="module", params=[2, 4])
def ranks(request: pytest.FixtureRequest, root: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each of some real ranks computed."""
    size = request.param
    workdir = tmp_path_factory.mktemp(f"tp{size}")
    (workdir / "families").symlink_to(root)
    store = serve_store()
    environments = [
        {
            "RANK": str(rank),
            "WORLD_SIZE": str(size),
            "MASTER_PORT": str(store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        for rank in range(size)
    ]
    assert wait_all(start_ranks("families", workdir, environments), 90) == [0] * size
    return [torch.load(workdir / f"rank{rank}.pt", weights_only=True) for rank in range(size)]


def test_ranks_equal_transformers_and_one_another(ranks: list[dict[str, Any]], oracle: Expected) -> None:
    assert {key.split("/")[0] for key in ranks[0]} == set(FAMILIES)
    assert {"tp", "pp", "ep2", "adp+ep2"} < {key.split("/")[1] for key in ranks[0]}
    for key, (logits, tokens) in ranks[0].items():
        reference_logits, reference_tokens = oracle[key.split("/")[0]]
        torch.testing.assert_close(logits, reference_logits, atol=ATOL, rtol=RTOL)
        assert tokens == [row[: len(mine)] for row, mine in zip(reference_tokens, tokens, strict=True)], key
        assert {len(row) for row in tokens} <= {NEW_TOKENS, FEW_TOKENS}
        for other in ranks[1:]:
            assert torch.equal(other[key][0], logits), key
            assert other[key][1] == tokens, key


def test_reference_models_differ_from_one_another(oracle: Expected) -> None:
    assert len({str(tokens) for _, tokens in oracle.values()}) == len(FAMILIES)
    assert all(len({token for row in tokens for token in row}) > 8 for _, tokens in oracle.values())
