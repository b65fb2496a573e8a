"""Greedy generation: every rank calls it with the same prompts and gets the same tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from weightwire.errors import ConfigError
from weightwire.runtime.models.llama import LlamaForCausalLM


def _check(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
    if max_new_tokens < 1:
        raise ConfigError(f"max_new_tokens is {max_new_tokens}", "ask for at least one token")
    vocab, room = model.config.vocab_size, model.config.max_position
    for index, prompt in enumerate(prompts):
        if not prompt:
            raise ConfigError(f"prompt {index} is empty", "give it at least one token")
        if len(prompt) + max_new_tokens > room:
            raise ConfigError(
                f"prompt {index}: {len(prompt)} tokens and {max_new_tokens} more exceed the model's {room} positions",
                "shorten it or ask for fewer",
            )
        if not all(0 <= token < vocab for token in prompt):
            raise ConfigError(f"prompt {index} has a token outside 0..{vocab - 1}", "use this model's own tokenizer")


def _prefill(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Run all prompts at once, padded on the right; hidden states of each one's last token, (batch, hidden).

    What padding writes to the cache lies behind every real token and is overwritten before anything looks at it.
    """
    device = model.model.embed_tokens.weight.device
    longest = max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    hidden = model(tokens, positions, longest)
    last = torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)
    selected: torch.Tensor = hidden[torch.arange(len(prompts), device=device), last]
    return selected


@torch.no_grad()
def prompt_logits(model: LlamaForCausalLM, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits of the token that follows each prompt: (batch, vocab), on every rank. Leaves no cache behind."""
    if not prompts:
        raise ConfigError("there is no prompt", "give at least one")
    _check(model, prompts, 1)
    model.allocate_cache(len(prompts), max(map(len, prompts)))
    local = model.lm_head(_prefill(model, prompts))
    model.release_cache()
    return model.lm_head.gather(local)


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    eos_token_ids: Collection[int] = (),
) -> list[list[int]]:
    """The greedy continuation of each prompt, without the prompt.

    Ends at ``max_new_tokens`` or, for each prompt by itself, after a token of ``eos_token_ids`` (which is included).
    Deterministic: equal weights in one layout on equally many ranks give equal tokens. The cache stays allocated
    until ``release_cache``.

    Raises:
        ConfigError: an empty or too long prompt, or a token id outside the vocabulary.
    """
    if not prompts:
        return []
    _check(model, prompts, max_new_tokens)
    longest = max(map(len, prompts))
    model.allocate_cache(len(prompts), longest + max_new_tokens)
    hidden = _prefill(model, prompts)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=hidden.device)
    outputs: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    for produced in range(max_new_tokens):
        tokens = model.lm_head.greedy(model.lm_head(hidden))
        for row, token in enumerate(tokens.tolist()):
            if not finished[row]:
                outputs[row].append(token)
                finished[row] = token in eos_token_ids
        if all(finished) or produced + 1 == max_new_tokens:
            break
        positions = (lengths + produced).unsqueeze(1)
        hidden = model(tokens.unsqueeze(1), positions, longest + produced + 1).squeeze(1)
    return outputs
