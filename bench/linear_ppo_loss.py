"""PPO loss of a language model from hidden states [M, H] and a head [V, H]: shape (M, H, V). All tokens alive, or half of
them without a gradient (advantage 0, as in a group of equal rewards), or half of them masked (a prompt).

Floor: three products, 2·M·H·V FLOPs each; a token without a gradient leaves two of them, a masked one all.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

import ppo_fast as pf

from . import peers, vocabulary_peers
from .harness import OURS, PRODUCTS, Case, Target, Workload, backward, compiled, double_leaf, gradients, left_out
from .linear_log_prob import formula, head, products

CONFIG = pf.LossConfig()
ALIVE, HALF_DEAD, HALF_MASKED = "", "half dead", "half masked"
_LIGER_ROWS = 2048  # its own step over tokens


def loss_of(log_prob, entropy, old_log_prob, advantages, mask):
    """From log-probs on, as language-model trainers write it, with the statistics that they log."""
    count = mask.sum()
    ratio = (log_prob - old_log_prob).exp()
    clipped = ratio.clamp(1 - CONFIG.clip_low, 1 + CONFIG.clip_high)
    policy = torch.maximum(-advantages * ratio, -advantages * clipped)
    loss = torch.where(mask, policy, 0.0).sum() / count
    with torch.no_grad():
        outside = (ratio < 1 - CONFIG.clip_low) | (ratio > 1 + CONFIG.clip_high)
        logged = (entropy, ratio - 1 - (log_prob - old_log_prob), outside)
        statistics = [(x * mask).sum() / count for x in logged if x is not None]
    return loss, statistics


def eager_loss(hidden, weight, targets, *rollout):
    return loss_of(*formula(hidden, weight, targets), *rollout)


Loss = Callable[..., Tensor]


def losses_of_peers() -> dict[str, tuple[Loss | None, str]]:
    """By provider: the loss of (hidden, weight, targets, old_log_prob, advantages, mask), or None; and what it leaves out, or
    why it is not here. But for Liger's they are log-probs by the peer and `loss_of` them."""
    found: dict[str, tuple[Loss | None, str]] = {"liger": _liger()}
    for name in ("torch-chunked", "trl", "verl"):
        with_entropy = name != "torch-chunked"
        log_prob, why = vocabulary_peers.from_hidden(with_entropy)[name]
        if log_prob is None:
            found[name] = None, why
            continue

        def loss(hidden, weight, targets, *rollout, log_prob=log_prob):
            return loss_of(*log_prob(hidden, weight, targets), *rollout)[0]

        found[name] = loss, "" if with_entropy else "no entropy among the statistics"
    return found


def _liger() -> tuple[Loss | None, str]:
    """GRPO's loss, which has an advantage a sequence: every token is one."""
    module, why = peers.function("liger_kernel.chunked_loss", "LigerFusedLinearGRPOLoss")
    if module is None:
        return None, why
    # the products are what it has to do: without its compilation of the rest
    grpo = module(beta=0.0, use_ref_model=False, chunk_size=_LIGER_ROWS, compiled=False)

    def loss(hidden, weight, targets, old_log_prob, advantages, mask):
        return grpo(hidden[:, None], weight, targets[:, None], mask[:, None], advantages,
                    old_per_token_logps=old_log_prob[:, None])[0]  # fmt: skip

    return loss, "its loss of GRPO, a token a sequence; statistics: the clipped share alone"


def build(case: Case) -> Workload:
    m = case.shape[0]
    leaves, targets = head(case)
    hidden, weight = leaves["hidden"], leaves["weight"]
    with torch.no_grad():
        old_log_prob = formula(hidden, weight, targets)[0] + 0.05 * torch.randn(m)  # nothing near a clip's edge
    advantages, mask = torch.randn(m), torch.ones(m, dtype=torch.bool)
    if case.variant == HALF_DEAD:
        advantages[::2] = 0
    elif case.variant == HALF_MASKED:
        mask[::2] = False
    data = (targets, old_log_prob, advantages)
    fast = compiled(eager_loss)

    def ours() -> dict[str, Tensor]:
        return {"loss": pf.linear_ppo_loss(hidden, weight, *data, CONFIG, mask=mask).loss}

    providers = [
        backward(OURS, ours, leaves),
        backward("eager", lambda: {"loss": eager_loss(hidden, weight, *data, mask)[0]}, leaves),
        backward("compile", lambda: {"loss": fast(hidden, weight, *data, mask)[0]}, leaves),
        products(hidden, weight),
    ]
    for name, (loss, note) in losses_of_peers().items():
        call = lambda loss=loss: {"loss": loss(hidden, weight, *data, mask)}  # noqa: E731
        providers.append(left_out(name, note) if loss is None else backward(name, call, leaves, note=note))

    def truth() -> dict[str, Tensor]:
        wide = {k: double_leaf(x) for k, x in leaves.items()}
        rollout = (old_log_prob.double(), advantages.double(), None, None, None, None, mask, None)
        out = pf.reference.linear_ppo_loss(wide["hidden"], wide["weight"], targets, CONFIG, rollout)
        out.loss.backward()
        return {"loss": out.loss.detach(), **gradients(wide)}

    scales = {"loss": advantages.abs().mean().item()}
    return Workload(providers, truth, "eager", [hidden, weight, *data, mask], scales=scales)


def _case(m: int, h: int, v: int, variant: str, *targets: Target, quick: bool = False) -> Case:
    n_bytes = 4 * 2 * (m * h + v * h) + 17 * m + 4
    share = {ALIVE: 3.0, HALF_DEAD: 2.0, HALF_MASKED: 1.5}[variant]
    return Case("linear_ppo_loss", (m, h, v), "float32", "forward + backward", n_bytes, int(share * 2 * m * h * v), build,
                targets, quick, variant=variant)  # fmt: skip


CASES = [
    _case(2048, 1024, 32_000, ALIVE, Target(1 / 1.15, (PRODUCTS,))),
    _case(2048, 1024, 32_000, HALF_DEAD, Target(1 / (1.15 * 0.75), (PRODUCTS,))),
    _case(512, 512, 32_000, HALF_MASKED),
    _case(64, 64, 500, ALIVE, quick=True),
]
