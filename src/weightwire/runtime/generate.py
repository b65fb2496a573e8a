"""Greedy generation: every rank calls it with the same prompts and gets the same tokens."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from weightwire.errors import ConfigError
from weightwire.runtime.models.decoder import DecoderForCausalLM
from weightwire.runtime.models.deepseek_v3 import DeepseekV3ForCausalLM


def _check(model: DecoderForCausalLM, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
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


def _padded(
    model: DecoderForCausalLM, prompts: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Prompts padded on the right, and their positions, each (batch, length); where each one ends, (batch)."""
    device, longest = model.device, max(map(len, prompts))
    tokens = torch.zeros(len(prompts), longest, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        tokens[row, : len(prompt)] = torch.tensor(prompt, device=device)
    positions = torch.arange(longest, device=device).expand(len(prompts), -1)
    return tokens, positions, torch.tensor([len(prompt) - 1 for prompt in prompts], device=device)


def _prefill(model: DecoderForCausalLM, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """Run all prompts at once, padded on the right; hidden states of each one's last token, (batch, hidden).

    They mean something on the last stage of a pipeline only, which is where logits are made. What padding writes to the
    cache lies behind every real token and is overwritten before anything looks at it.
    """
    tokens, positions, last = _padded(model, prompts)
    selected: torch.Tensor = model(tokens, positions, tokens.shape[1])[torch.arange(len(prompts)), last]
    return selected


@torch.no_grad()
def prompt_logits(model: DecoderForCausalLM, prompts: Sequence[Sequence[int]]) -> torch.Tensor:
    """The logits of the token that follows each prompt: (batch, vocab), on every rank. Leaves no cache behind."""
    if not prompts:
        raise ConfigError("there is no prompt", "give at least one")
    _check(model, prompts, 1)
    model.allocate_cache(len(prompts), max(map(len, prompts)))
    logits = model.logits(_prefill(model, prompts))
    model.release_cache()
    return logits


@torch.no_grad()
def mtp_logits(model: DecoderForCausalLM, prompts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """What layers for multi-token prediction say of the tokens behind the next one: (batch, vocab) for each depth.

    Each depth is given the greedy token of the one before it. The same on every rank; leaves no cache behind.

    Raises:
        ConfigError: the model has no such layers, or as ``prompt_logits``.
    """
    if not isinstance(model, DeepseekV3ForCausalLM) or not model.config.runs_mtp:
        raise ConfigError("the model was loaded without layers for multi-token prediction", "load it with mtp")
    _check(model, prompts, 1)
    longest = max(map(len, prompts))
    model.allocate_cache(len(prompts), longest)
    tokens, positions, last = _padded(model, prompts)
    rows = torch.arange(len(prompts), device=model.device)
    hidden = model(tokens, positions, longest)
    following, found = model.greedy(hidden[rows, last]), []
    for depth in range(model.config.mtp_layers):
        tokens = tokens.roll(-1, dims=1)
        tokens[rows, last] = following
        hidden = model.draft(depth, tokens, hidden, positions)
        found.append(model.draft_logits(depth, hidden[rows, last]))
        following = found[-1].argmax(-1)
    model.release_cache()
    return found


@torch.no_grad()
def generate(
    model: DecoderForCausalLM,
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
        tokens = model.greedy(hidden)
        for row, token in enumerate(tokens.tolist()):
            if not finished[row]:
                outputs[row].append(token)
                finished[row] = token in eos_token_ids
        if all(finished) or produced + 1 == max_new_tokens:
            break
        positions = (lengths + produced).unsqueeze(1)
        hidden = model(tokens.unsqueeze(1), positions, longest + produced + 1).squeeze(1)
    return outputs
