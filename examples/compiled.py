"""Inside torch.compile: the ops are registered with torch, so networks and loss become one graph without a break.

python examples/compiled.py
"""

import dataclasses

import torch

import ppo_fast as pf


class Policy(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.Tanh())
        self.actor, self.critic = torch.nn.Linear(32, 5), torch.nn.Linear(32, 1)

    def forward(self, obs):
        features = self.body(obs)
        return self.actor(features), self.critic(features).squeeze(-1)


def main() -> None:
    torch.manual_seed(0)
    policy, config = Policy(), pf.LossConfig.preset("cleanrl")

    def loss(config, obs, actions, old_log_prob, advantages, returns):
        logits, values = policy(obs)
        out = pf.categorical_ppo_loss(
            logits, actions, old_log_prob, advantages, config, values=values, old_values=returns, returns=returns
        )  # fmt: skip
        return out.loss, out.stats.approx_kl

    def batch(size):
        return (
            torch.randn(size, 8),
            torch.randint(5, (size,)),
            -torch.rand(size) - 1,
            torch.randn(size),
            torch.randn(size),
        )

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for size, clip in ((64, 0.2), (96, 0.2), (96, 0.1)):  # other sizes and an annealed clip: nothing is compiled anew
        config = dataclasses.replace(config, clip_low=clip, clip_high=clip)
        data = batch(size)
        with torch.compiler.set_stance("default" if (size, clip) == (64, 0.2) else "fail_on_recompile"):
            total, approx_kl = compiled(config, *data)
        gradients = torch.autograd.grad(total, policy.parameters())
        expected, _ = loss(config, *data)
        for ours, eager in zip(gradients, torch.autograd.grad(expected, policy.parameters()), strict=True):
            torch.testing.assert_close(ours, eager, rtol=1e-4, atol=1e-6)
        print(f"{size} rows, clip {clip}: loss {total.item():.4f}, approx_kl {approx_kl.item():.4f}")


if __name__ == "__main__":
    main()
