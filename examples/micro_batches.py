"""One optimiser step from many small backward passes: with the whole batch's denominator, in any pieces, the same gradient.

python examples/micro_batches.py
"""

import torch

import ppo_fast as pf

B, T = 8, 16
CONFIG = pf.LossConfig(clip_high=0.28)  # reduction="token-mean"


def main() -> None:
    torch.manual_seed(0)
    log_prob = torch.randn(B, T, requires_grad=True)
    old_log_prob, advantages = log_prob.detach() + 0.3 * torch.randn(B, T), torch.randn(B, T)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 1))

    whole = pf.ppo_loss(log_prob, old_log_prob, advantages, CONFIG, mask=mask)
    (expected,) = torch.autograd.grad(whole.loss, log_prob)

    tokens = mask.sum()  # of the whole batch; over data parallel ranks: all-reduced, divided by their number
    for size in (1, 3, 8):
        log_prob.grad = None
        for rows in torch.arange(B).split(size):
            part = pf.ppo_loss(
                log_prob[rows], old_log_prob[rows], advantages[rows], CONFIG, mask=mask[rows], denominator=tokens
            )  # fmt: skip
            part.loss.backward()  # each part is its share of the sum, so gradients add up
        torch.testing.assert_close(log_prob.grad, expected)
        print(f"pieces of {size}: the same gradient")

    wrong = torch.zeros_like(expected)  # what a mean of means gives: short responses count for more
    for row in range(B):
        part = pf.ppo_loss(log_prob[[row]], old_log_prob[[row]], advantages[[row]], CONFIG, mask=mask[[row]])
        wrong += torch.autograd.grad(part.loss / B, log_prob)[0]
    print(f"a mean of means is another gradient: off by {(wrong - expected).norm() / expected.norm():.0%}")


if __name__ == "__main__":
    main()
