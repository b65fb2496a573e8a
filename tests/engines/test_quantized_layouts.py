"""Quantized experts and latent heads: each rank's own files, and another tensor-parallel size on the two sides."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines.test_presharded import Rank
from engines.test_resharded_families import fill, ranks
from naive_models import empty, loaded
from presharded_files import write_ranks
from runtime_quantized import FAMILY_FORMS, PARTLY_FORMS, quantized_family
from safetensors.torch import load_file

from weightwire.errors import CheckpointError, ManifestMismatch
from weightwire.runtime import Weights

EACH = [(name, form) for name, forms in FAMILY_FORMS.items() for form in (*forms, PARTLY_FORMS[name])]


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str], Path]:
    root = tmp_path_factory.mktemp("quantized")
    return {(name, form): quantized_family(root, name, form) for name, form in EACH}


@pytest.mark.parametrize("ep", [1, 2])
@pytest.mark.parametrize("each", EACH, ids="-".join)
def test_h14_h15_h18_ranks_files_of_quantized_experts_are_the_full_checkpoint(
    each: tuple[str, str], ep: int, made: dict[tuple[str, str], Path], tmp_path: Path
) -> None:
    directory = write_ranks(made[each], tmp_path / "ranks", 2, ep)
    whole = Weights.of(load_file(made[each] / "model.safetensors"))
    for number in range(2):
        wanted = loaded(made[each], tp=2, rank=number, ep=ep).manifest()
        rank = Rank(directory, 2, number, ep)
        model = rank.load()
        assert rank.raw.manifest.content_id == wanted.content_id
        with pytest.raises(CheckpointError, match="the model needs"):
            rank.loader.reload(model, Weights(whole.tensors, presharded=True))


@pytest.mark.parametrize("each", EACH, ids="-".join)
def test_what_does_not_declare_its_sharding_is_refused_by_name(
    each: tuple[str, str], made: dict[tuple[str, str], Path]
) -> None:
    with pytest.raises(ManifestMismatch, match=r"does not say .* which part|cannot be resharded"):
        fill(ranks(made[each], 2), empty(made[each]))
