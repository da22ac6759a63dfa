"""ppo_fast for JAX: the same kernels as XLA custom calls, under jit, grad, vmap and scan.

    import ppo_fast.jax as pfj
    advantages, returns = pfj.gae(rewards, values, last_values, terminated=terminated)
    def loss(params, batch):
        logits, values = network(params, batch.obs)
        return pfj.categorical_ppo_loss(logits, batch.actions, batch.log_prob, batch.advantages, config, values=values, ...)
    (loss, stats), grads = jax.value_and_grad(loss, has_aux=True)(params, batch)

What differs from torch: docs/jax.md.
"""

from . import _call  # noqa: F401 (first: it says what is missing)
from ._log_prob import (
    bernoulli_log_prob,
    beta_log_prob,
    categorical_log_prob,
    multi_categorical_log_prob,
    normal_log_prob,
)
from ._loss import PPOLoss, Stats, categorical_ppo_loss, normal_ppo_loss, ppo_loss
from ._scan import discounted_returns, gae, vtrace
from ._whiten import whiten

__all__ = [
    "PPOLoss", "Stats", "bernoulli_log_prob", "beta_log_prob", "categorical_log_prob", "categorical_ppo_loss",
    "discounted_returns", "gae", "multi_categorical_log_prob", "normal_log_prob", "normal_ppo_loss", "ppo_loss", "vtrace",
    "whiten",
]  # fmt: skip
