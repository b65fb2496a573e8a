"""One rank of a replica under test: ``python runtime_ranks.py TASK WORKDIR``, told its rank by the environment."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

TESTS = Path(__file__).parent


def start_ranks(task: str, workdir: Path, environments: Sequence[Mapping[str, str]]) -> list[subprocess.Popen[bytes]]:
    """A process for each environment."""
    command = [sys.executable, str(Path(__file__)), task, str(workdir)]
    return [subprocess.Popen(command, env={**child_environment(), **env}) for env in environments]


def child_environment() -> dict[str, str]:
    """The parent's environment with the package on the path and one thread for each process."""
    source = str(TESTS.parent / "src")
    return {**os.environ, "PYTHONPATH": f"{source}{os.pathsep}{TESTS}", "OMP_NUM_THREADS": "1"}


def wait_all(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> list[int]:
    """Exit codes; all processes are gone afterwards, also when one hangs or fails."""
    end = time.monotonic() + seconds
    try:
        return [process.wait(max(0.1, end - time.monotonic())) for process in processes]
    finally:
        for process in processes:
            process.kill()
            process.wait(10)


def _small(group: Any, workdir: Path) -> dict[str, Any]:
    from runtime_models import CASES, NEW_TOKENS, PROMPTS

    from weightwire.runtime import KernelLayout, LoaderSettings, ModelLoader, SafetensorsLoader, generate, prompt_logits

    results: dict[str, Any] = {}
    for case in CASES:
        for layout in KernelLayout:
            bf16 = [torch.bfloat16] if case == "gqa_llama3" and layout is KernelLayout.PLAIN else []
            for dtype in (torch.float32, *bf16):
                loader = ModelLoader(group, LoaderSettings(dtype=dtype, kernel_layout=layout), SafetensorsLoader())
                model = loader.load(workdir / case).model
                tokens = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS)
                results[f"{case}/{layout.value}/{dtype}"] = (prompt_logits(model, PROMPTS), tokens)
        staged = LoaderSettings(dtype=torch.float32, pp_size=2)
        model = ModelLoader(group, staged, SafetensorsLoader()).load(workdir / case).model
        tokens = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS)
        results[f"{case}/staged"] = (prompt_logits(model, PROMPTS), tokens)
    again = ModelLoader(group, LoaderSettings(), SafetensorsLoader()).load(workdir / "gqa_llama3").model
    results["again"] = (prompt_logits(again, PROMPTS), generate(again, PROMPTS, max_new_tokens=NEW_TOKENS))
    return results


def _smollm2(group: Any, workdir: Path) -> dict[str, Any]:
    from weightwire.runtime import LoaderSettings, ModelLoader, SafetensorsLoader, generate

    job = torch.load(workdir / "job.pt", weights_only=True)
    settings = LoaderSettings(dtype=torch.float32)
    model = ModelLoader(group, settings, SafetensorsLoader()).load(Path(job["checkpoint"])).model
    return {"tokens": generate(model, job["prompts"], max_new_tokens=job["max_new_tokens"])}


def _layouts(size: int, *, experts: bool) -> dict[str, dict[str, Any]]:
    """Every way in which so many ranks can share a model of three layers, as fields of ``LoaderSettings``."""
    found: dict[str, dict[str, Any]] = {"tp": {}, "pp": {"pp_size": 2}}
    if experts:
        found |= {f"ep{ep}": {"ep_size": ep} for ep in (2, 4) if size % ep == 0}
        found["adp+ep2"] = {"ep_size": 2, "attention_dp": True}
        found |= {"ep2+pp": {"ep_size": 2, "pp_size": 2}} if size > 2 else {"adp": {"attention_dp": True}}
    return found


def _families(group: Any, workdir: Path) -> dict[str, Any]:
    """Every family, shared in every way."""
    from runtime_families import FAMILIES, FEW_TOKENS, NEW_TOKENS, PROMPTS

    from weightwire.runtime import LoaderSettings, ModelLoader, SafetensorsLoader, generate, prompt_logits, read_config

    results: dict[str, Any] = {}
    for family in FAMILIES:
        directory = workdir / "families" / family
        for layout, fields in _layouts(group.size, experts=read_config(directory).moe is not None).items():
            settings = LoaderSettings(dtype=torch.float32, **fields)
            model = ModelLoader(group, settings, SafetensorsLoader()).load(directory).model
            count = NEW_TOKENS if layout == "tp" else FEW_TOKENS
            # batches that ranks cannot share evenly, and one that is smaller than they are many
            batches = [PROMPTS[:3], PROMPTS[3:]] if "adp" in layout else [PROMPTS]
            tokens = [row for batch in batches for row in generate(model, batch, max_new_tokens=count)]
            results[f"{family}/{layout}"] = (prompt_logits(model, PROMPTS), tokens)
    return results


def _quantized(group: Any, workdir: Path) -> dict[str, Any]:
    """Families with quantized experts, without rounding activations, so that cuts alone decide what is computed."""
    from runtime_families import NEW_TOKENS, PROMPTS
    from runtime_quantized import leave_activations

    from weightwire.runtime import LoaderSettings, ModelLoader, SafetensorsLoader, generate, prompt_logits

    results: dict[str, Any] = {}
    for name in [made.name for made in workdir.iterdir() if made.is_dir()]:
        for ep_size in (group.size // 2, group.size):
            settings = LoaderSettings(dtype=torch.float32, ep_size=ep_size)
            model = ModelLoader(group, settings, SafetensorsLoader()).load(workdir / name).model
            leave_activations(model)
            tokens = generate(model, PROMPTS, max_new_tokens=NEW_TOKENS)
            results[f"{name}/ep{ep_size}"] = (prompt_logits(model, PROMPTS), tokens)
    return results


def main() -> None:
    from weightwire.runtime import TpGroup, discover_rank

    torch.set_num_threads(1)
    workdir = Path(sys.argv[2])
    env = discover_rank(os.environ)
    with TpGroup.connect(env, timeout_s=60) as group:
        tasks = {"small": _small, "smollm2": _smollm2, "families": _families, "quantized": _quantized}
        results = tasks[sys.argv[1]](group, workdir)
        torch.save(results, workdir / f"rank{group.rank}.pt")
        # nobody leaves while another one still gathers
        group.all_gather(torch.zeros(1))


if __name__ == "__main__":
    main()
