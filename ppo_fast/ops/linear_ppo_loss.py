"""PPO loss of a language model from the hidden states, without the logits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _library, reference
from .._autograd import attach
from ..config import SEQUENCE_NUMBERS, SEQUENCE_POLICIES, STATS, LossConfig
from ..outputs import PPOLoss, Stats
from ..reductions import token_weights
from . import _linear, _loss
from .ppo_loss import ppo_loss
from .whiten import whiten

_OP = "linear_ppo_loss"
#: Policies that look at the whole batch before any token has a gradient.
OF_THE_BATCH = ("clip_cov", "kl_cov")


def linear_ppo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    old_log_prob: Tensor,
    advantages: Tensor,
    config: LossConfig | None = None,
    *,
    values: Tensor | None = None,
    old_values: Tensor | None = None,
    returns: Tensor | None = None,
    ref_log_prob: Tensor | None = None,
    rollout_log_prob: Tensor | None = None,
    mask: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
    bias: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    softcap: float | None = None,
    group: Any = None,
    logits_memory: int | None = None,
) -> PPOLoss:
    """`ppo_loss` of `linear_log_prob`'s log-probs and entropy, with gradients made while a chunk's logits are there:
    three matrix products in all, no logits kept, none computed twice.

    Formula: logits = hidden·Wᵀ + bias; log_prob and entropy as `linear_log_prob`; loss and statistics as `ppo_loss`.

    Args:
        hidden: [..., H], weight: [V, H], targets: [...], bias, temperature, softcap, group, logits_memory: as of
            `linear_log_prob`. Gradients: hidden, weight, bias.
        old_log_prob, advantages and everything else: as of `ppo_loss`, [...] as targets. Gradient: values.
        mask: tokens where it is 0 are not read, cost nothing on a CPU, and their target may be anything.

    Returns:
        PPOLoss(loss, stats), the same numbers as `ppo_loss` of the log-probs.

    A token's gradient needs its own log-prob, its weight and, for policies over sequences, those of its sequence: a chunk is
    made of whole sequences then. So it is known while the chunk's logits are alive, and is written over them. ("clip_cov"
    and "kl_cov" need the whole batch: logits of more than one chunk are computed twice.) Tokens whose gradient is exactly 0
    (masked, clipped on the bad side, A = 0) leave both products of the backward on a CPU, where to find them costs no wait; an
    entropy or KL term gives every valid token one.

    Gradient: dW is summed in float32 at least. All are made in the forward for a grad_output of 1 and scaled by it in the
    backward, on the device. A second backward over a retained graph computes them again; double backward goes through the
    reference, which has all logits.

    Errors: those of `linear_log_prob` and `ppo_loss`. Under torch.compile `group` is refused.

    Cost: 6·M·H·V FLOPs (frozen weight: 4), less 4·H·V for each token without a gradient and 6 for each one masked (CPU).
    Memory: logits_memory; d_hidden; dW in float32. The loss itself: `ppo_loss` twice, on a chunk and on all tokens.
    """
    config = _loss.check_config(_OP, config)
    _linear.check(_OP, hidden, weight, targets, bias, temperature, softcap, group, logits_memory)
    rollout = (old_log_prob, advantages, old_values, returns, ref_log_prob, rollout_log_prob, mask, weights)
    _loss.constants(_OP, ("targets", *_loss.ROLLOUT), (targets, *rollout))
    for name, x in zip(_loss.ROLLOUT, rollout, strict=True):
        if isinstance(x, Tensor) and x.shape != targets.shape:
            raise ValueError(f"{_OP}: {name} must be the shape of targets = {list(targets.shape)}, got {list(x.shape)}")
    if denominator is not None:
        _loss.check_denominator(_OP, denominator)
    head_options = (temperature, softcap)
    compiling = torch.compiler.is_compiling()
    if compiling and _backend.compiles_kernel(hidden):
        number, rows = _linear.compiled_temperature(_OP, temperature, targets, group)
        if isinstance(denominator, (int, float)):
            denominator = torch.full((), denominator, dtype=torch.float64, device=targets.device)
        loss, stats, *_ = _op(
            hidden, weight, bias, values, targets, *rollout, cu_seqlens, denominator, rows, number, softcap,
            logits_memory, config.policy, config.reduction, config.sequence_numbers_vector,
            config.numbers_vector, *config.choices(),
        )  # fmt: skip
        return PPOLoss(loss, Stats(stats))
    backend = None if compiling else _linear.pick(_OP, hidden, weight, targets, bias, values)
    if backend is None:
        return reference.linear_ppo_loss(
            hidden, weight, targets, config, rollout, bias, *head_options, values, cu_seqlens, denominator
        )
    with_grad = torch.is_grad_enabled()
    inputs = (hidden, weight, bias, values)
    needed = [with_grad and x is not None and x.requires_grad for x in inputs]
    call = _Call(backend, needed, config, targets, rollout, head_options, cu_seqlens, denominator, group, logits_memory)
    out, call.grads = call.run(inputs)
    call.loss = out.loss
    return out._replace(loss=attach(call, inputs)) if True in needed else out


class _Call:
    """See `_autograd.Call`."""

    def __init__(
        self, backend, needed, config, targets, rollout, head_options, cu_seqlens, denominator, group, logits_memory
    ) -> None:
        self.backend, self.needed, self.config, self.targets, self.rollout = backend, needed, config, targets, rollout
        self.temperature, self.softcap = head_options
        self.cu_seqlens, self.denominator = cu_seqlens, denominator
        self.group, self.logits_memory = group, logits_memory
        self.loss: Any = None
        self.grads: list[Tensor | None] | None = None

    @torch.no_grad()
    def run(self, inputs) -> tuple[PPOLoss, list[Tensor | None]]:
        """Loss and statistics, and the gradients that are wanted."""
        hidden, weight, bias, values = detached(inputs)
        streams: dict[str, Any] = dict(zip(_loss.ROLLOUT, self.rollout, strict=True))
        head = _linear.Head(
            _OP, hidden, weight, self.targets, bias, self.temperature, self.softcap, None, streams["mask"], self.group,
            self.logits_memory,
        )  # fmt: skip
        dtype = torch.float64 if head.dtype is torch.float64 else torch.float32
        log_prob = torch.zeros(head.n, dtype=dtype, device=hidden.device)
        entropy = torch.zeros_like(log_prob)
        grads = _linear.Gradients(head, tuple(self.needed[:3]))
        policy, with_gradient = self.config.policy, any(self.needed[:3])
        by_sequence = with_gradient and policy in SEQUENCE_POLICIES and policy not in OF_THE_BATCH
        ends = self._sequence_ends(head.n) if by_sequence else None
        of_chunk: Any = None
        found = None

        def of_all(rows: slice, *_: Tensor) -> list[Tensor | None]:
            nonlocal found
            if found is None:
                found = self._loss_of_all(head, log_prob, entropy, values, streams, True)
            return [None if g is None else g.reshape(-1)[rows] for g in found[1]]

        if with_gradient:
            one_chunk, of_the_batch = head.is_one_chunk(ends), policy in OF_THE_BATCH
            if of_the_batch and not one_chunk:  # every log-prob first, and then the logits once more
                for _, live, chunk in head.chunks(self.backend, ends):
                    log_prob[live], entropy[live] = chunk.log_prob, chunk.entropy  # type: ignore[assignment]
            of_chunk = of_all if one_chunk or of_the_batch else _ChunkLoss(self, streams, log_prob)
        for rows, live, chunk in head.chunks(self.backend, ends):
            log_prob[live], entropy[live] = chunk.log_prob, chunk.entropy  # type: ignore[assignment]
            if of_chunk is not None:
                d_log_prob, d_entropy = of_chunk(rows, log_prob[rows], entropy[rows])
                if not isinstance(live, slice):
                    d_log_prob = d_log_prob[live - rows.start]
                    d_entropy = None if d_entropy is None else d_entropy[live - rows.start]
                head.backward(self.backend, chunk, d_log_prob, d_entropy, grads)
        if found is None:
            found = self._loss_of_all(head, log_prob, entropy, values, streams, False)
        out, _, d_values = found
        return out._replace(loss=out.loss.detach()), [*grads.results(head, hidden.shape), d_values]

    @torch.enable_grad()
    def _loss_of_all(self, head, log_prob, entropy, values, streams, with_tokens: bool):
        """(ppo_loss of all tokens, its gradients of log_prob and entropy where wanted, that of values)."""
        log_prob, entropy = log_prob.view(head.lead).detach(), entropy.view(head.lead).detach()
        leaves = {"values": values.requires_grad_()} if self.needed[3] else {}
        if with_tokens:
            leaves["log_prob"] = log_prob.requires_grad_()
            if self.config.entropy_coef != 0:
                leaves["entropy"] = entropy.requires_grad_()
        out = ppo_loss(
            log_prob, config=self.config, values=values, entropy=entropy, cu_seqlens=self.cu_seqlens,
            denominator=self.denominator, **streams,
        )  # fmt: skip
        grads = dict(zip(leaves, torch.autograd.grad(out.loss, list(leaves.values())), strict=True)) if leaves else {}
        return out, (grads.get("log_prob"), grads.get("entropy")), grads.get("values")

    def _sequence_ends(self, n: int) -> list[int]:
        if self.cu_seqlens is not None:
            return self.cu_seqlens.tolist()[1:]
        length = self.targets.shape[-1]
        return list(range(length, n + 1, length)) if length else []

    def recompute(self, inputs):
        return self.run(inputs)[1]

    def scale(self, grads, grad_loss):
        if grad_loss.is_cpu:
            if grad_loss.item() == 1.0:
                return grads
            return [None if g is None else g.mul_(grad_loss) for g in grads]
        self.backend.ops.scale(grad_loss, *[g for g in grads if g is not None])  # looks at grad_loss on the device
        return grads

    def specification(self, *inputs: Any) -> Tensor:
        hidden, weight, bias, values = inputs
        return reference.linear_ppo_loss(
            hidden, weight, self.targets, self.config, self.rollout, bias, self.temperature, self.softcap, values,
            self.cu_seqlens, self.denominator,
        ).loss  # fmt: skip


def detached(inputs: Sequence[Any]) -> list[Any]:
    return [None if x is None else x.detach() for x in inputs]


class _ChunkLoss:
    """d loss / d (log_prob, entropy) of a block of tokens; what all tokens must agree on is settled before."""

    def __init__(self, call: _Call, streams: dict[str, Any], like: Tensor) -> None:
        config, mask, shape = call.config, streams["mask"], call.targets.shape
        valid = None if mask is None else mask != 0
        element = like.new_empty(()).expand(shape)
        weights = token_weights(element, valid, config.reduction, streams["weights"], call.denominator, call.cu_seqlens)
        if config.normalize_advantages:
            streams = dict(streams)
            streams["advantages"] = whiten(
                streams["advantages"].to(like.dtype), mask=mask, ddof=config.advantage_ddof, eps=config.advantage_eps
            )
            config = dataclasses.replace(config, normalize_advantages=False)
        self.config, self.with_entropy = config, config.entropy_coef != 0
        self.by_sequence = config.policy in SEQUENCE_POLICIES
        self.cu_seqlens, self.length = call.cu_seqlens, shape[-1] if shape else 1
        wanted = ("old_log_prob", "advantages", "ref_log_prob", "rollout_log_prob", "mask")
        flat = {name: None if (x := streams[name]) is None else x.reshape(-1) for name in wanted}
        self.flat: dict[str, Any] = {**flat, "weights": weights.reshape(-1)}

    def __call__(self, rows: slice, log_prob: Tensor, entropy: Tensor) -> tuple[Tensor, Tensor | None]:
        shape, cu_seqlens = torch.Size([len(log_prob)]), None
        if self.by_sequence and self.cu_seqlens is not None:
            inside = (self.cu_seqlens >= rows.start) & (self.cu_seqlens <= rows.stop)
            cu_seqlens = self.cu_seqlens[inside] - rows.start
        elif self.by_sequence:
            shape = torch.Size([len(log_prob) // self.length, self.length])
        streams: dict[str, Any] = {name: None if x is None else x[rows].view(shape) for name, x in self.flat.items()}
        leaves = [log_prob.view(shape).requires_grad_()]
        if self.with_entropy:
            leaves.append(entropy.view(shape).requires_grad_())
        with torch.enable_grad():
            loss = ppo_loss(
                leaves[0], config=self.config, entropy=leaves[1] if self.with_entropy else None, cu_seqlens=cu_seqlens,
                **streams,
            ).loss  # fmt: skip
            found = torch.autograd.grad(loss, leaves)
        return found[0].reshape(-1), found[1].reshape(-1) if self.with_entropy else None


# --- under torch.compile ----------------------------------------------------------------------------------------------

_N_INPUTS, _N_ROLLOUT = 4, len(_loss.ROLLOUT)


def _kernel(*args):
    inputs, (targets, *rest) = args[:_N_INPUTS], args[_N_INPUTS:]
    rollout, rest = tuple(rest[:_N_ROLLOUT]), rest[_N_ROLLOUT:]
    cu_seqlens, denominator, rows, temperature, softcap, logits_memory, policy, reduction, *rest = rest
    of_sequences, numbers, *choices = rest
    config = dataclasses.replace(
        LossConfig.unpacked(numbers.tolist(), choices), policy=policy, reduction=reduction,
        **dict(zip(SEQUENCE_NUMBERS, of_sequences.tolist(), strict=True)),
    )  # fmt: skip
    hidden, weight, bias, values = inputs
    backend = _linear.pick(_OP, hidden, weight, targets, bias, values)
    if backend is None:
        raise RuntimeError(f"{_OP}: compiled for kernels that take no tensor on {hidden.device} any more")
    needed = [x is not None for x in inputs]
    options = (temperature if rows is None else rows, softcap)
    call = _Call(backend, needed, config, targets, rollout, options, cu_seqlens, denominator, None, logits_memory)
    with _library.autograd_again():  # the loss of a chunk is differentiated in here
        out, grads = call.run(inputs)
    return out.loss, out.stats.vector, *(_library.placeholder(hidden) if g is None else g for g in grads)


def _fake(hidden, weight, bias, values, targets, *_):
    dtype = _loss.compute_dtype(hidden, weight, values)
    grads = (hidden.new_empty(0) if x is None else x.new_empty(x.shape) for x in (hidden, weight, bias, values))
    return targets.new_empty((), dtype=dtype), targets.new_empty(len(STATS), dtype=dtype), *grads


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*output[2:])
    ctx.absent = [x is None for x in inputs[:_N_INPUTS]]
    ctx.n_rest = len(inputs) - _N_INPUTS
    ctx.mark_non_differentiable(*output[1:])


def _backward(ctx, grad_loss, *_):
    pairs = zip(ctx.absent, ctx.saved_tensors, strict=True)
    return *(None if absent else g * grad_loss.to(g.dtype) for absent, g in pairs), *([None] * ctx.n_rest)


_STREAMS = ", ".join(f"Tensor{'' if i < 2 else '?'} {name}" for i, name in enumerate(_loss.ROLLOUT))
_op = _library.define(
    _OP,
    f"(Tensor hidden, Tensor weight, Tensor? bias, Tensor? values, Tensor targets, {_STREAMS}, Tensor? cu_seqlens, "
    "Tensor? denominator, Tensor? temperatures, float temperature, float? softcap, int? logits_memory, str policy, "
    f"str reduction, Tensor sequence_numbers, {_library.CONFIG_SCHEMA}) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _kernel, _fake, _setup_context, _backward,
)  # fmt: skip
