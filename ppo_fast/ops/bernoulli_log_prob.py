"""Log-probability and entropy of independent Bernoullis (gymnasium's MultiBinary)."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from . import _checks
from ._log_prob import LogProbOp, empty_gradient, empty_results


def bernoulli_log_prob(logits: Tensor, actions: Tensor, *, entropy: bool = True) -> tuple[Tensor, Tensor | None]:
    """Log-probability of bits under independent Bernoullis, summed over the last dimension, and their entropy.

    Formula, with z = logits and σ the logistic function::

        log_prob = Σ_d log σ(z) where the action is 1, log σ(-z) where it is 0
        entropy = Σ_d softplus(z) - z·σ(z),  0 where z = ±inf

    Args:
        logits: [..., D], float32, float64, bfloat16 or float16, any strides. Gradient.
        actions: [..., D], any dtype; 0, or anything else for 1.
        entropy: False returns None in its place.

    Returns:
        (log_prob, entropy): [...], nats, float32 (float64 for float64 logits).

    Gradient, for incoming g of log_prob and h of entropy: g·(action - σ(z)) - h·z·σ(z)·σ(-z), in the dtype of the logits.
    Rows whose g and h are 0 give 0 whatever they hold. Double backward goes through the reference.

    Errors: TypeError for a dtype, ValueError for a shape.

    Cost: reads logits and actions once forward and once backward, writes the gradient once.
    """
    return _op((logits, actions), (), entropy)


class _Bernoulli(LogProbOp):
    name = "bernoulli_log_prob"
    inputs = ("logits",)
    constants = ("actions",)
    options = ""

    def check(self, logits, actions):
        _checks.floating(self.name, logits=logits)
        _checks.same_device(self.name, logits, actions=actions)
        _checks.same_shape(self.name, logits.shape, "the shape of logits", actions=actions)

    def reference(self, logits, actions, entropy):
        return reference.bernoulli_log_prob(logits, actions, entropy=entropy)

    def forward(self, backend, logits, actions, entropy):
        log_prob, h = empty_results(entropy, logits)
        backend.ops.bernoulli_log_prob(logits, actions, log_prob, h, backend.resources())
        return log_prob, h, None

    def backward(self, backend, needs, logits, actions, saved, d_log_prob, d_entropy):
        d_logits = empty_gradient(logits)
        backend.ops.bernoulli_log_prob_backward(logits, actions, d_log_prob, d_entropy, d_logits, backend.resources())
        return (d_logits,)


_op = _Bernoulli()
