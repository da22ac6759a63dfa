"""Log-probability and entropy of independent Betas, for actions with bounds."""

from __future__ import annotations

from torch import Tensor

from .. import reference
from . import _checks
from ._log_prob import LogProbOp, empty_gradient, empty_results


def beta_log_prob(
    alpha: Tensor, beta: Tensor, actions: Tensor, *, low: float = 0.0, high: float = 1.0, entropy: bool = True
) -> tuple[Tensor, Tensor | None]:
    """Log-density of actions in [low, high] under independent Betas, summed over the last dimension, and their entropy.

    Formula, with x = (actions - low)/(high - low), B the Beta function, ψ the digamma function (Chou, Maturana and
    Scherer 2017, for control)::

        log_prob = Σ_d (α - 1)·log x + (β - 1)·log(1 - x) - log B(α, β) - log(high - low)
        entropy = Σ_d log B(α, β) + log(high - low) - (α - 1)·ψ(α) - (β - 1)·ψ(β) + (α + β - 2)·ψ(α + β)

    Args:
        alpha, beta: [..., D], > 0, float32, float64, bfloat16 or float16, any strides. Gradient.
        actions: [..., D], floating, in [low, high]; outside the result is NaN, as the logarithm's. No gradient.
        low, high: the bounds, low < high.
        entropy: False returns None in its place.

    Returns:
        (log_prob, entropy): [...], nats, float32 (float64 if an input is).

    Gradient: that of the formula, in the dtype of each input. Double backward goes through the reference.

    Errors: TypeError for a dtype; ValueError for a shape, for bounds, or for actions that require a gradient.

    Cost: arithmetic, not bytes: two logarithms, three lgamma and three digamma an element forward, three digamma and
    three trigamma backward, in float64, since lgamma(α) + lgamma(β) - lgamma(α + β) cancels.
    """
    if not low < high:
        raise ValueError(f"beta_log_prob: low must be less than high, got {low!r} and {high!r}")
    return _op((alpha, beta, actions), (float(low), float(high)), entropy)


class _Beta(LogProbOp):
    name = "beta_log_prob"
    inputs = ("alpha", "beta")
    constants = ("actions",)
    options = "float low, float high"

    def check(self, alpha, beta, actions, low, high):
        _checks.floating(self.name, alpha=alpha, beta=beta, actions=actions)
        _checks.same_device(self.name, alpha, beta=beta, actions=actions)
        _checks.same_shape(self.name, alpha.shape, "the shape of alpha", beta=beta, actions=actions)

    def reference(self, alpha, beta, actions, low, high, entropy):
        return reference.beta_log_prob(alpha, beta, actions, low=low, high=high, entropy=entropy)

    def forward(self, backend, alpha, beta, actions, low, high, entropy):
        log_prob, h = empty_results(entropy, alpha, beta, actions)
        backend.ops.beta_log_prob(alpha, beta, actions, low, high, log_prob, h, backend.resources())
        return log_prob, h, None

    def backward(self, backend, needs, alpha, beta, actions, low, high, saved, d_log_prob, d_entropy):
        grads = (empty_gradient(alpha, needs[0]), empty_gradient(beta, needs[1]))
        backend.ops.beta_log_prob_backward(
            alpha, beta, actions, low, high, d_log_prob, d_entropy, *grads, backend.resources()
        )
        return grads


_op = _Beta()
