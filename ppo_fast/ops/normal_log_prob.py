"""Log-probability and entropy of a diagonal normal distribution, with or without a tanh on top."""

from __future__ import annotations

import torch
from torch import Tensor

from .. import _backend, _library, reference
from . import _checks

_OP = "normal_log_prob"


def normal_log_prob(
    mean: Tensor, log_std: Tensor, actions: Tensor, *, squash: bool = False, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-density of actions under a diagonal normal, summed over its dimensions, and its entropy.

    Formula, with z = (actions - mean)·exp(-log_std)::

        log_prob = Σ_d -z²/2 - log_std - ½·log 2π        entropy = Σ_d log_std + ½·log 2πe

        squash: log_prob = ... - Σ_d log(1 - tanh² actions)      entropy = -log_prob, the one-sample estimate

    Args:
        mean: [..., D], float32, float64, bfloat16 or float16, any strides. Gradient.
        log_std: broadcasts to mean: [D] for one that all rows share, or [..., D]. Natural logarithm. Gradient.
        actions: [..., D], floating; no gradient. With squash the samples before tanh.
        squash: whether the action is tanh(actions) (Haarnoja et al. 2018, arXiv 1801.01290, appendix C); its log-slope
            is taken as 2·(log 2 - a - softplus(-2a)), which does not cancel.
        entropy: False returns None in its place.

    Returns:
        (log_prob, entropy): [...], nats, float32 (float64 if an input is).

    Gradient, for incoming g of log_prob and h of entropy (squash: g - h and 0)::

        d mean = g·z·exp(-log_std)        d log_std = g·(z² - 1) + h

    in the dtype of the input; of a shared log_std summed over all rows in float64, in an order that depends on the shape
    only. Rows whose g and h are 0 give 0 whatever they hold. Double backward goes through the reference.

    Errors: TypeError for a dtype; ValueError for a shape, or for actions that require a gradient.

    Cost: reads mean, actions (and a log_std of full shape) once forward and once backward, writes each gradient once.
    """
    _checks.constants(_OP, actions=actions)
    if torch.compiler.is_compiling():
        log_prob, h = _op(mean, log_std, actions, squash, entropy)
        return log_prob, h if entropy else None
    if not _checks.takes_kernel(_OP, mean, log_std, actions):
        _checks.same_shape(_OP, mean.shape, "the shape of mean", actions=actions)
        return reference.normal_log_prob(mean, log_std, actions, squash=squash, entropy=entropy)
    if not _checks.needs_grad(mean, log_std):
        return _forward(mean, log_std, actions, squash, entropy)
    return _Function.apply(mean, log_std, actions, squash, entropy)


def _forward(mean, log_std, actions, squash, entropy):
    dtype, lead = _checks.compute_dtype(mean, log_std, actions), mean.shape[:-1]
    log_prob = torch.empty(lead, dtype=dtype)
    h = torch.empty(lead, dtype=dtype) if entropy else None
    _backend._C.normal_log_prob(mean, log_std, actions, squash, log_prob, h, torch.get_num_threads())
    return log_prob, h


def _backward(mean, log_std, actions, squash, d_log_prob, d_entropy, needs_mean=True, needs_log_std=True):
    """(d mean, d log_std), None where not needed."""
    d_mean = torch.empty(mean.shape, dtype=mean.dtype) if needs_mean else None
    sums = d_log_std = None
    width = mean.shape[-1]
    if needs_log_std and log_std.shape == mean.shape:
        d_log_std = torch.empty(log_std.shape, dtype=log_std.dtype)
    elif needs_log_std and log_std.numel() == width and log_std.ndim > 0:
        d_log_std = torch.empty(width, dtype=log_std.dtype)
        sums = torch.empty((_backend._C.MAX_ROW_BLOCKS, width), dtype=torch.float64)
    elif needs_log_std:  # neither one for all rows nor one for each: summed afterwards
        d_log_std = torch.empty(mean.shape, dtype=_checks.compute_dtype(mean, log_std, actions))
    _backend._C.normal_log_prob_backward(
        mean, log_std, actions, squash, d_log_prob, d_entropy, d_mean, d_log_std, sums, torch.get_num_threads()
    )
    if needs_log_std and d_log_std.shape != log_std.shape:
        d_log_std = d_log_std.sum_to_size(log_std.shape) if sums is None else d_log_std.view(log_std.shape)
        d_log_std = d_log_std.to(log_std.dtype)
    return d_mean, d_log_std


class _Function(torch.autograd.Function):
    @staticmethod
    def forward(ctx, mean, log_std, actions, squash, entropy):
        ctx.save_for_backward(mean, log_std, actions)
        ctx.options = (squash, entropy)
        ctx.set_materialize_grads(False)
        return _forward(mean, log_std, actions, squash, entropy)

    @staticmethod
    def backward(ctx, d_log_prob, d_entropy):
        mean, log_std, actions = ctx.saved_tensors
        squash, entropy = ctx.options
        rest = (None,) * 3
        if d_log_prob is None and d_entropy is None:
            return None, None, *rest
        if torch.is_grad_enabled():  # create_graph: only the reference can be differentiated once more

            def specification(mean, log_std):
                return reference.normal_log_prob(mean, log_std, actions, squash=squash, entropy=entropy)

            return *_checks.gradients_by_reference(specification, (mean, log_std), (d_log_prob, d_entropy)), *rest
        return *_backward(mean, log_std, actions, squash, d_log_prob, d_entropy, *ctx.needs_input_grad[:2]), *rest


# --- under torch.compile ----------------------------------------------------------------------------------------------


def _kernel(mean, log_std, actions, squash, entropy):
    if _checks.takes_kernel(_OP, mean, log_std, actions):
        log_prob, h = _forward(mean, log_std, actions, squash, entropy)
    else:
        log_prob, h = reference.normal_log_prob(mean, log_std, actions, squash=squash, entropy=entropy)
        h = h.clone() if squash and entropy else h
    return log_prob, _library.placeholder(log_prob) if h is None else h


def _fake(mean, log_std, actions, squash, entropy):
    dtype, lead = _checks.compute_dtype(mean, log_std, actions), mean.shape[:-1]
    return mean.new_empty(lead, dtype=dtype), mean.new_empty(lead if entropy else 0, dtype=dtype)


def _backward_kernel(mean, log_std, actions, squash, entropy, d_log_prob, d_entropy):
    grads = (d_log_prob, d_entropy if entropy else None)
    if _checks.takes_kernel(_OP, mean, log_std, actions):
        return _backward(mean, log_std, actions, squash, *grads)

    def specification(mean, log_std):
        return reference.normal_log_prob(mean, log_std, actions, squash=squash, entropy=entropy)

    return _checks.detached_gradients(specification, (mean, log_std), grads)


def _backward_fake(mean, log_std, *_):
    return mean.new_empty(mean.shape), log_std.new_empty(log_std.shape)


def _setup_context(ctx, inputs, output):
    mean, log_std, actions, *ctx.options = inputs
    ctx.save_for_backward(mean, log_std, actions)


def _autograd(ctx, d_log_prob, d_entropy):
    return *_backward_op(*ctx.saved_tensors, *ctx.options, d_log_prob, d_entropy), None, None, None


_INPUTS = "Tensor mean, Tensor log_std, Tensor actions, bool squash, bool entropy"
_backward_op = _library.define(
    f"{_OP}_backward",
    f"({_INPUTS}, Tensor? d_log_prob, Tensor? d_entropy) -> (Tensor, Tensor)",
    _backward_kernel,
    _backward_fake,
)
_op = _library.define(_OP, f"({_INPUTS}) -> (Tensor, Tensor)", _kernel, _fake, _setup_context, _autograd)
