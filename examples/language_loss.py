"""The loss of a language model's PPO, with a mask: as trainers write it, from logits, and from hidden states without them.

python examples/language_loss.py
"""

import torch
from torch.nn.functional import linear

import ppo_fast as pf

B, T, HIDDEN, VOCABULARY = 4, 32, 64, 5000
CONFIG = pf.LossConfig(clip_low=0.2, clip_high=0.28, kl="k3", kl_coef=0.01)


def written_out(hidden, weight, tokens, old_log_prob, ref_log_prob, advantages, mask):
    logits = linear(hidden, weight)  # [B, T, V]: what costs the memory
    log_prob = logits.log_softmax(-1).gather(-1, tokens[..., None]).squeeze(-1)
    ratio = (log_prob - old_log_prob).exp()
    policy = torch.max(-advantages * ratio, -advantages * ratio.clamp(0.8, 1.28))
    u = ref_log_prob - log_prob
    return ((policy + 0.01 * (u.exp() - u - 1)) * mask).sum() / mask.sum()


def one_call(hidden, weight, tokens, old_log_prob, ref_log_prob, advantages, mask):
    out = pf.linear_ppo_loss(
        hidden, weight, tokens, old_log_prob, advantages, CONFIG, ref_log_prob=ref_log_prob, mask=mask
    )  # fmt: skip
    print("statistics:", {name: round(value, 4) for name, value in out.stats.to_dict().items() if abs(value) > 0})
    return out.loss


def main() -> None:
    torch.manual_seed(0)
    hidden = torch.randn(B, T, HIDDEN, requires_grad=True)
    weight = (torch.randn(VOCABULARY, HIDDEN) / HIDDEN**0.5).requires_grad_()
    tokens = torch.randint(VOCABULARY, (B, T))
    mask = torch.arange(T) < torch.tensor([[32], [20], [9], [27]])  # responses of different lengths, [B, T]
    with torch.no_grad():
        sampled, _ = pf.linear_log_prob(hidden, weight, tokens, entropy=False)
        old_log_prob, ref_log_prob = (sampled + 0.2 * torch.randn(B, T) for _ in range(2))
    # Per response one advantage, as GRPO has it; what lies beyond a response may be anything.
    advantages = torch.randn(B, 1).expand(B, T)
    arguments = hidden, weight, tokens, old_log_prob, ref_log_prob, advantages, mask
    gradients = [torch.autograd.grad(loss(*arguments), (hidden, weight)) for loss in (written_out, one_call)]
    for theirs, ours in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-6)
    print("gradients of hidden states and head agree")


if __name__ == "__main__":
    main()
