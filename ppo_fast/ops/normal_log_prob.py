"""Log-probability and entropy of a diagonal normal distribution, with or without a tanh on top."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from . import _checks
from ._log_prob import LogProbOp, empty_gradient, empty_results


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
    return _op((mean, log_std, actions), (squash,), entropy)


class _Normal(LogProbOp):
    name = "normal_log_prob"
    inputs = ("mean", "log_std")
    constants = ("actions",)
    options = "bool squash"

    def check(self, mean, log_std, actions, squash):
        _checks.floating(self.name, mean=mean, log_std=log_std, actions=actions)
        _checks.same_device(self.name, mean, log_std=log_std, actions=actions)
        _checks.same_shape(self.name, mean.shape, "the shape of mean", actions=actions)

    def reference(self, mean, log_std, actions, squash, entropy):
        return reference.normal_log_prob(mean, log_std, actions, squash=squash, entropy=entropy)

    def forward(self, backend, mean, log_std, actions, squash, entropy):
        log_prob, h = empty_results(entropy, mean, log_std, actions)
        backend.ops.normal_log_prob(mean, log_std, actions, squash, log_prob, h, backend.resources())
        return log_prob, h, None

    def backward(self, backend, needs, mean, log_std, actions, squash, saved, d_log_prob, d_entropy):
        d_mean, d_log_std, width = empty_gradient(mean, needs[0]), None, mean.shape[-1]
        if needs[1] and log_std.shape == mean.shape:
            d_log_std = empty_gradient(log_std)
        elif needs[1] and log_std.numel() == width and log_std.ndim > 0 and log_std.shape[-1] == width:
            d_log_std = log_std.new_empty(width)
        elif needs[1]:  # neither one for all rows nor one for each: summed afterwards
            d_log_std = mean.new_empty(mean.shape, dtype=_checks.compute_dtype(mean, log_std, actions))
        backend.ops.normal_log_prob_backward(
            mean, log_std, actions, squash, d_log_prob, d_entropy, d_mean, d_log_std, backend.resources()
        )
        if needs[1] and d_log_std.shape != log_std.shape:
            summed = d_log_std.numel() == log_std.numel()
            d_log_std = d_log_std.view(log_std.shape) if summed else d_log_std.sum_to_size(log_std.shape)
            d_log_std = d_log_std.to(log_std.dtype)
        return d_mean, d_log_std


_op = _Normal()
