"""OpenRLHF's actor, losses and advantages in the loop of its PPO, on a Llama of two layers made from a config. Its own loop needs
DeepSpeed and vLLM, hence a GPU: generation and the optimizer are transformers' and torch's here.
"""

from __future__ import annotations

import sys
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

PACKAGE, TASK = (
    "openrlhf",
    "PPO, its actor and losses, Llama of 2 layers, vocabulary 32,000, 8 sequences of 32 + 96 tokens",
)
VOCABULARY, PROMPT, COMPLETION, BATCH = 32_000, 32, 96, 8
STAND_INS = Path(__file__).resolve().parents[2] / "tests/peers/stubs/openrlhf"


def measure(enabled: bool, seed: int, quick: bool) -> dict[str, Any]:
    sys.path.append(str(STAND_INS))
    import stand_ins  # of DeepSpeed and the like, which it imports
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    with stand_ins.mocked():
        from openrlhf.models import Actor, PolicyLoss, ValueLoss
        from openrlhf.models import actor as functions
        from openrlhf.trainer.ppo_utils.experience_maker import RemoteExperienceMaker

        from ppo_fast.integrations import openrlhf as ours
    from bench.harness import OURS, Provider, peak_memory

    from . import timed

    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=256, pad_token_id=0, eos_token_id=None, bos_token_id=1,
    )  # fmt: skip
    seconds: dict[str, float] = {}
    curve = []
    with ours.enabled() if enabled else nullcontext(), ExitStack() as stack:
        actor = Actor(LlamaForCausalLM(config))
        actor.packing_samples = False  # set where it loads a model by name
        critic = torch.nn.Linear(256, 1)
        optimizer = torch.optim.AdamW([*actor.parameters(), *critic.parameters()], 1e-3)
        policy_loss, value_loss = PolicyLoss(), ValueLoss(0.5)
        action_mask = torch.ones(BATCH, COMPLETION, dtype=torch.long)
        attended = torch.ones(BATCH, PROMPT + COMPLETION, dtype=torch.long)

        def generate() -> torch.Tensor:
            prompts = torch.randint(2, VOCABULARY, (BATCH, PROMPT))
            return actor.model.generate(
                prompts, attention_mask=attended[:, :PROMPT], do_sample=True, max_new_tokens=COMPLETION, top_k=0
            )

        def evaluate(sequences: torch.Tensor) -> Any:
            hidden = actor.model.get_input_embeddings()(sequences[:, -COMPLETION - 1 : -1]).detach()
            log_probs, output = actor(sequences, action_mask, attended, return_output=True, return_entropy=True)
            return log_probs, critic(hidden).squeeze(-1), output.entropy

        def loss_of(sequences: torch.Tensor, old: Any, advantages: torch.Tensor, returns: torch.Tensor) -> torch.Tensor:
            log_probs, values, _ = evaluate(sequences)
            loss = policy_loss(log_probs, old[0], advantages, action_mask)[0]
            return loss + value_loss(values, old[1], returns, action_mask)

        def advantages_of(sequences: torch.Tensor, old: Any, reward: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
            rewards = torch.zeros(BATCH, COMPLETION)
            rewards[:, -1] = reward
            return RemoteExperienceMaker.get_advantages_and_returns(None, old[1], rewards, action_mask, 1.0, 0.95)

        with torch.no_grad():
            evaluate(generate())  # theirs compiles the entropy at its first call
        evaluate(generate())[0].sum().backward()
        for owner, name, part in (
            (RemoteExperienceMaker, "get_advantages_and_returns", "advantages"),
            (functions, "log_probs_from_logits", "log-probs"), (functions, "compute_entropy", "entropies"),
            (policy_loss, "forward", "losses"), (value_loss, "forward", "losses"),
        ):  # fmt: skip
            stack.enter_context(timed(owner, name, seconds, part))
        total = 0.0
        for step in range(2 if quick else 10):
            sequences = generate()
            reward = (sequences[:, PROMPT:] % 2 == 0).float().mean(-1)
            start = time.perf_counter()
            with torch.no_grad():
                old = [x.clone() for x in evaluate(sequences)[:2]]
            advantages, returns = advantages_of(sequences, old, reward)
            for _ in range(2):
                optimizer.zero_grad()
                loss_of(sequences, old, advantages, returns).backward()
                optimizer.step()
            total += time.perf_counter() - start
            curve.append((step + 1, reward.mean().item()))

        def once() -> dict[str, Any]:
            loss_of(sequences, old, advantages, returns).backward()
            return {}

        optimizer.zero_grad()
        peak = peak_memory(Provider(OURS, once))
    return {"seconds": total, "parts": seconds, "peak_bytes": peak, "curve": curve}
