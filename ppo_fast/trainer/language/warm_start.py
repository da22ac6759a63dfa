"""A short supervised start for models with random weights: answers given, next-token loss on them."""

from __future__ import annotations

import time
from collections.abc import Callable

import torch

import ppo_fast as pf

from ..errors import UserError
from .model import Policy
from .prompts import Prompts
from .sampling import left_pad
from .trainer import Trainer

BATCH, PROBE, PROBE_EVERY = 256, 256, 25


def warm_start(trainer: Trainer, say: Callable[[str], None]) -> None:
    """Trains the policy on the column "answer" until it gives `warm_start_accuracy` of a sample of training prompts."""
    config, policy, prompts = trainer.config, trainer.policy, trainer.task.train
    missing = next((i for i, record in enumerate(prompts.records) if "answer" not in record), None)
    if missing is not None:
        raise UserError(
            f'--warm-start-accuracy: expected a column "answer" for the supervised start, prompt {missing} of {config.prompts} '
            "has none; add it, or start from a --model folder, or without by --warm-start-accuracy 0"
        )
    generator = torch.Generator().manual_seed(config.seed)
    ends = trainer.tokenizer.eos_token_id
    encoded = trainer.tokenizer([str(r["answer"]) for r in prompts.records], add_special_tokens=False)["input_ids"]
    answers = [[*ids, ends] for ids in encoded]
    optimizer = torch.optim.AdamW(
        policy.learned().values(), lr=config.warm_start_learning_rate, weight_decay=0.01, fused=True
    )
    probe = torch.randperm(len(prompts), generator=generator)[:PROBE].tolist()
    start, accuracy = time.perf_counter(), 0.0
    for step in range(config.warm_start_steps):
        if step % PROBE_EVERY == 0:
            right = trainer.completions(trainer.respond(prompts, probe, greedy=True))
            accuracy = sum(
                c.strip() == str(prompts.records[i]["answer"]) for c, i in zip(right, probe, strict=True)
            ) / len(probe)
            if accuracy >= config.warm_start_accuracy:
                break
            if step % (8 * PROBE_EVERY) == 0 and config.progress:
                say(f"supervised start: step {step}, accuracy {accuracy:.0%} on training prompts")
        index = torch.randint(len(prompts), (BATCH,), generator=generator).tolist()
        loss = supervised_loss(policy, prompts, answers, index, trainer)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.learned().values(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = config.warm_start_learning_rate * min(1.0, (step + 1) / 50)
        optimizer.step()
    trainer.now.seconds["warm start"] = time.perf_counter() - start
    say(
        f"supervised start: done after {step} steps, {trainer.now.seconds['warm start']:.0f} s, accuracy {accuracy:.0%}"
    )


def supervised_loss(
    policy: Policy, prompts: Prompts, answers: list[list[int]], index: list[int], trainer: Trainer
) -> torch.Tensor:
    """Mean negative log-prob of the answers' tokens."""
    device, pad = trainer.device, int(trainer.tokenizer.pad_token_id or 0)
    before, before_mask = left_pad([prompts.tokens[i] for i in index], pad, device)
    chosen = [answers[i] for i in index]
    longest = max(map(len, chosen))
    after = torch.tensor([ids + [pad] * (longest - len(ids)) for ids in chosen], device=device)
    rows = torch.arange(longest, device=device) < torch.tensor([len(ids) for ids in chosen], device=device)[:, None]
    with policy.autocast():
        hidden = policy.hidden(
            torch.cat([before, after], 1), torch.cat([before_mask, rows], 1), before.shape[1]
        )[rows]  # fmt: skip
        log_prob, _ = pf.linear_log_prob(hidden, policy.head.weight, after[rows], bias=policy.head.bias, entropy=False)
    return -log_prob.mean()
