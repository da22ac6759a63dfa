"""Batched sampling over the model's key-value cache."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

import ppo_fast as pf

from .model import Policy


@dataclass
class Responses:
    """Prompts, padded on the left to P, and what was sampled after them, padded on the right to R."""

    tokens: Tensor  # [B, P + R]
    attention: Tensor  # [B, P + R], bool: not padding
    prompt_length: int  # P
    log_prob: Tensor  # [B, R], nats, as sampled: of softmax(logits / temperature), before top-k and top-p
    finished: Tensor  # [B], bool: ended by itself, not cut

    @property
    def mask(self) -> Tensor:
        """[B, R], bool: tokens of responses, the end token included."""
        return self.attention[:, self.prompt_length :]

    @property
    def targets(self) -> Tensor:
        return self.tokens[:, self.prompt_length :]


def left_pad(prompts: list[list[int]], pad: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Tokens and mask, [B, P]."""
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=device)
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    return tokens, torch.arange(longest, device=device) >= longest - lengths[:, None]


def truncate(scaled: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [B, V] with -inf outside the k most probable, and outside the fewest that hold `top_p` of the probability."""
    if top_k and top_k < scaled.shape[-1]:
        scaled = scaled.masked_fill(scaled < scaled.topk(top_k).values[:, -1:], float("-inf"))
    if top_p < 1.0:
        ordered, order = scaled.sort(dim=-1, descending=True, stable=True)
        p = ordered.softmax(-1)
        surplus = p.cumsum(-1) - p >= top_p  # enough before it; never the first
        scaled = scaled.masked_fill(torch.zeros_like(surplus).scatter(-1, order, surplus), float("-inf"))
    return scaled


@torch.no_grad()
def sample(
    policy: Policy,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    pad: int,
    ends: Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> Responses:
    """One response a prompt, of at most `max_new_tokens`; greedy without a generator. `ends` [E]: tokens that end one."""
    policy.eval()
    device = ends.device
    tokens, attention = left_pad(prompts, pad, device)
    length = tokens.shape[1]
    fresh, cache, running = tokens, None, torch.ones(len(prompts), dtype=torch.bool, device=device)
    drawn, log_probs, masks = [], [], []
    for _ in range(max_new_tokens):
        with policy.autocast():
            out = policy.states(fresh, attention, cache, use_cache=True)
            logits = policy.head(out.last_hidden_state[:, -1])
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        cache = out.past_key_values
        if generator is None:
            token = logits.argmax(-1)
        else:
            p = truncate(logits / temperature, top_k, top_p).softmax(-1)
            token = torch.multinomial(p, 1, generator=generator).squeeze(-1)
        token = torch.where(running, token, pad)
        log_probs.append(pf.categorical_log_prob(logits, token, temperature=temperature, entropy=False)[0] * running)
        drawn.append(token)
        masks.append(running)
        running = running & ~torch.isin(token, ends)
        # what follows an end is attended by padding only
        attention = torch.cat([attention, torch.ones_like(attention[:, :1])], 1)
        fresh = token[:, None]
        if not bool(running.any()):
            break
    attention = torch.cat([attention[:, :length], torch.stack(masks, 1)], 1)
    return Responses(
        torch.cat([tokens, torch.stack(drawn, 1)], 1), attention, length, torch.stack(log_probs, 1), ~running
    )


def joined(parts: list[Responses], pad: int) -> Responses:
    """Batches of one, padded to the longest prompt and response."""
    left, right = max(r.prompt_length for r in parts), max(r.mask.shape[1] for r in parts)

    def wide(x: Tensor, r: Responses, value: float) -> Tensor:
        before = left - r.prompt_length if x.shape[1] > r.mask.shape[1] else 0
        return torch.nn.functional.pad(x, (before, right - r.mask.shape[1]), value=value)

    return Responses(
        torch.cat([wide(r.tokens, r, pad) for r in parts]), torch.cat([wide(r.attention, r, False) for r in parts]), left,
        torch.cat([wide(r.log_prob, r, 0.0) for r in parts]), torch.cat([r.finished for r in parts]),
    )  # fmt: skip
