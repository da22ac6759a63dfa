"""verl's PPO step on one CPU: its advantages, its losses and its log-probs around a tiny transformer with a critic.

verl's workers need a GPU each, so the loop is here: what is called in it is verl's own, in the order of its trainer. The task
is to write even tokens. `advantages_1024x4096` are GAE's seconds at a size that people train at: verl's driver computes
them on a CPU, whatever the workers have.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from typing import Any

PACKAGE, TASK = "verl", "PPO with GAE, a transformer of 2 layers, reward: the share of even tokens"
PROMPTS, PROMPT, RESPONSE, VOCABULARY = 64, 4, 24, 512


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    import torch
    import transformers
    from verl.trainer.ppo import core_algos
    from verl.utils import torch_functional
    from verl.workers.config.actor import ActorConfig

    from ppo_fast.integrations import verl

    class ActorCritic(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = transformers.GPT2LMHeadModel(
                transformers.GPT2Config(vocab_size=VOCABULARY, n_positions=64, n_embd=64, n_layer=2, n_head=4,
                                        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)
            )  # fmt: skip
            self.value = torch.nn.Linear(64, 1)

        def forward(self, tokens: Any) -> tuple[Any, Any]:
            """Logits and values of the response's tokens."""
            hidden = self.model.transformer(tokens).last_hidden_state[:, PROMPT - 1 : -1]
            return self.model.lm_head(hidden), self.value(hidden).squeeze(-1)

        @torch.no_grad()
        def sample(self, tokens: Any) -> Any:
            for _ in range(RESPONSE):
                logits = self.model(tokens).logits[:, -1]
                tokens = torch.cat([tokens, torch.multinomial(logits.softmax(-1), 1)], 1)
            return tokens

    torch.manual_seed(seed)
    config = ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=16)
    policy = ActorCritic()
    optimizer = torch.optim.AdamW(policy.parameters(), lr=1e-3)
    seconds = dict.fromkeys(("rollout", "advantages", "update", "advantages_1024x4096"), 0.0)
    curve = []
    with verl.enabled() if enabled else nullcontext():
        for step in range(3 if quick else 40):
            clock = time.perf_counter()
            tokens = policy.sample(torch.randint(VOCABULARY, (PROMPTS, PROMPT)))
            responses = tokens[:, PROMPT:]
            lengths = torch.randint(RESPONSE // 2, RESPONSE + 1, (PROMPTS, 1))
            mask = (torch.arange(RESPONSE) < lengths).long()
            rewards = (responses % 2 == 0) * mask / RESPONSE
            with torch.no_grad():
                logits, values = policy(tokens)
                old_log_prob = torch_functional.logprobs_from_logits(logits, responses)
            clock = _lap(seconds, "rollout", clock)
            advantages, returns = core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
            clock = _lap(seconds, "advantages", clock)
            for micro in torch.randperm(PROMPTS).split(16):
                logits, new_values = policy(tokens[micro])
                log_prob = torch_functional.logprobs_from_logits(logits, responses[micro], inplace_backward=False)
                entropy = torch_functional.entropy_from_logits(logits)
                valid = mask[micro].bool()
                loss, _ = core_algos.get_policy_loss_fn("vanilla")(
                    old_log_prob[micro], log_prob, advantages[micro], valid, "token-mean", config
                )
                value_loss, _ = core_algos.compute_value_loss(new_values, returns[micro], values[micro], valid, 0.5)
                bonus = core_algos.agg_loss(entropy, valid, "token-mean")
                (loss + 0.5 * value_loss - 0.001 * bonus).backward()
                torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad()
            _lap(seconds, "update", clock)
            curve.append((step, (rewards.sum(1) * RESPONSE / mask.sum(1)).mean().item()))
        total = seconds["rollout"] + seconds["advantages"] + seconds["update"]
        rows, columns = (64, 512) if quick else (1024, 4096)
        rewards, values = torch.randn(rows, columns), torch.randn(rows, columns)
        mask = (torch.arange(columns) < torch.randint(columns // 2, columns + 1, (rows, 1))).long()
        laps = []
        for _ in range(3):  # the first maps memory
            start = time.perf_counter()
            core_algos.compute_gae_advantage_return(rewards, values, mask, 1.0, 0.95)
            laps.append(time.perf_counter() - start)
        seconds["advantages_1024x4096"] = min(laps)
    return {"seconds": total, "parts": seconds, "curve": curve}


def _lap(seconds: dict[str, float], part: str, start: float) -> float:
    now = time.perf_counter()
    seconds[part] += now - start
    return now
