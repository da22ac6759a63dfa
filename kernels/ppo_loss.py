"""PPO loss from log-probs: two launches, three where the advantages are normalised or a mask is counted.

Every stream is read once and every gradient written once; float32 with values, entropy and all gradients: 7 reads and 3
writes, 40 bytes a token, and a record of 152 bytes a block of 1024. Advantages and mask are read once more where their
mean or count has to come first.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from . import _loss, _reduce
from ._params import LossParams

_BLOCK, _DOUBLE_BLOCK = 1024, 512  # tokens of a program: four a thread, two doubles


@triton.jit(do_not_specialize=["n", "stored", "parts", "blocks"])
def _ppo_loss_kernel(
    log_prob, entropy, grad_log_prob, grad_entropy,
    mask, index, old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, weights,
    grad_values, numbers, moments, records, n, stored, parts, blocks, unit: tl.float64,
    S: tl.constexpr, COUNTED: tl.constexpr, EVEN: tl.constexpr, T: tl.constexpr, INLINE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = i < _reduce.length(n, EVEN)
    p = _reduce.place_of(i, inside, index, stored, mask)
    h = entropy
    if entropy is not None:
        h = _reduce.read(entropy, i, p, T)
    grads = _loss.token_losses(
        _reduce.read(log_prob, i, p, T), h, i, inside, p,
        old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob, weights, grad_values,
        numbers, moments, parts, unit, records, blocks, S, COUNTED, T, INLINE,
    )  # fmt: skip
    if grad_log_prob is not None:
        _reduce.store(grad_log_prob + i, grads.log_prob, inside)
    if grad_entropy is not None:
        _reduce.store(grad_entropy + i, grads.entropy, inside)


def ppo_loss(
    params: LossParams, log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, values: Tensor | None,
    old_values: Tensor | None, returns: Tensor | None, entropy: Tensor | None, ref_log_prob: Tensor | None,
    rollout_log_prob: Tensor | None, mask: Tensor | None, weights: Tensor | None, denominator: float, sum: bool,
    loss: Tensor, stats: Tensor, grad_log_prob: Tensor | None, grad_values: Tensor | None, grad_entropy: Tensor | None,
    resources: object, /,
) -> None:  # fmt: skip
    """As ppo_fast._C.ppo_loss: fills `loss`, `stats` and the gradients that are not None."""
    call = _loss.Loss(
        params, log_prob.numel(), old_log_prob, advantages, values, old_values, returns, ref_log_prob, rollout_log_prob,
        mask, weights, None, denominator, sum, loss, stats, grad_values,
    )  # fmt: skip
    block = _DOUBLE_BLOCK if call.double else _BLOCK
    call.run(_ppo_loss_kernel, block, _reduce.flat(log_prob), _reduce.flat(entropy), grad_log_prob, grad_entropy,
             BLOCK=block, num_warps=8)  # fmt: skip


_OWN = {"log_prob": "*fp32", "entropy": "*fp32", "grad_log_prob": "*fp32", "grad_entropy": "*fp32"}
_HALF = {**_OWN, "log_prob": "*bf16", "grad_log_prob": "*bf16"}
_DOUBLE = dict.fromkeys(_OWN, "*fp64")
AOT = [
    _loss.example(_ppo_loss_kernel, _OWN, "plain", tl.float32, 8, BLOCK=_BLOCK),
    _loss.example(_ppo_loss_kernel, _HALF, "full", tl.float32, 8, BLOCK=_BLOCK),
    _loss.example(_ppo_loss_kernel, _DOUBLE, "full", tl.float64, 8, BLOCK=_DOUBLE_BLOCK),
    _loss.example(_ppo_loss_kernel, _OWN, "sapo", tl.float32, 8, BLOCK=_BLOCK),
    _loss.example(_ppo_loss_kernel, _OWN, "dppo_kl", tl.float32, 8, BLOCK=_BLOCK),
    _loss.example(_ppo_loss_kernel, _DOUBLE, "dro", tl.float64, 8, BLOCK=_DOUBLE_BLOCK),
]
