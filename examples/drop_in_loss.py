"""The loss of a PPO minibatch: as trainers write it today, and as one call. Same loss, same gradients, less time.

python examples/drop_in_loss.py
"""

import time

import torch

import ppo_fast as pf

ROWS, ACTIONS, MINIBATCH = 2048, 6, 512
CLIP, VALUE_COEF, ENTROPY_COEF = 0.2, 0.5, 0.01
CONFIG = pf.LossConfig(
    clip_low=CLIP, clip_high=CLIP, value_clip=CLIP, value_coef=VALUE_COEF, entropy_coef=ENTROPY_COEF,
    normalize_advantages=True,
)  # fmt: skip


def written_out(logits, values, rollout, index):
    """What a page of torch computes: distribution, ratio, clipping, value clipping, entropy."""
    distribution = torch.distributions.Categorical(logits=logits)
    log_ratio = distribution.log_prob(rollout["actions"][index]) - rollout["old_log_prob"][index]
    ratio = log_ratio.exp()
    advantages = rollout["advantages"][index]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    policy_loss = torch.max(-advantages * ratio, -advantages * ratio.clamp(1 - CLIP, 1 + CLIP)).mean()
    old_values, returns = rollout["old_values"][index], rollout["returns"][index]
    near = old_values + (values - old_values).clamp(-CLIP, CLIP)
    value_loss = 0.5 * torch.max((values - returns).square(), (near - returns).square()).mean()
    loss = policy_loss + VALUE_COEF * value_loss - ENTROPY_COEF * distribution.entropy().mean()
    with torch.no_grad():
        approx_kl = (ratio - 1 - log_ratio).mean()
    return loss, approx_kl


def one_call(logits, values, rollout, index):
    """The same: the op gathers the minibatch by itself, and returns every statistic with the loss."""
    out = pf.categorical_ppo_loss(logits, config=CONFIG, values=values, index=index, **rollout)
    return out.loss, out.stats.approx_kl


def main() -> None:
    torch.manual_seed(0)
    torch.set_num_threads(1)
    rollout = {
        "actions": torch.randint(ACTIONS, (ROWS,)), "old_log_prob": -torch.rand(ROWS) - 1, "advantages": torch.randn(ROWS),
        "old_values": torch.randn(ROWS), "returns": torch.randn(ROWS),
    }  # fmt: skip
    index = torch.randperm(ROWS)[:MINIBATCH]
    logits = torch.randn(MINIBATCH, ACTIONS, requires_grad=True)
    values = torch.randn(MINIBATCH, requires_grad=True)

    results = {}
    for loss in (written_out, one_call):
        for call in range(300):
            if call == 100:  # warm
                start = time.perf_counter()
            total, approx_kl = loss(logits, values, rollout, index)
            gradients = torch.autograd.grad(total, (logits, values))
        results[loss] = total.detach(), approx_kl, *gradients
        print(f"{loss.__name__:<12} {(time.perf_counter() - start) / 200 * 1e6:7.1f} µs, loss {total.item():.6f}")
    for a, b in zip(*results.values(), strict=True):
        torch.testing.assert_close(a, b)
    print("loss, approx_kl and all gradients agree")


if __name__ == "__main__":
    main()
