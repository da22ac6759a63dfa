"""ppo_fast: fused kernels for PPO as torch autograd ops.

    import ppo_fast as pf
    adv, ret = pf.gae(rewards, values, last_values, terminated=terminated, truncated=truncated, final_values=final)
    out = pf.categorical_ppo_loss(logits, actions, old_log_prob, adv, pf.LossConfig.preset("cleanrl"), values=values,
                                  old_values=old_values, returns=ret)
    out.loss.backward()

Public names are those of `__all__`; `help(pf.<name>)` gives formula, shapes, gradient, errors and cost.
"""

from . import advantages
from ._backend import explain, use_backend
from .config import LossConfig
from .corrections import RolloutWeights, rollout_weights
from .ops.bernoulli_log_prob import bernoulli_log_prob
from .ops.beta_log_prob import beta_log_prob
from .ops.categorical_log_prob import categorical_log_prob
from .ops.categorical_ppo_loss import categorical_ppo_loss
from .ops.discounted_returns import discounted_returns
from .ops.gae import gae
from .ops.linear_log_prob import linear_log_prob
from .ops.linear_ppo_loss import linear_ppo_loss
from .ops.multi_categorical_log_prob import multi_categorical_log_prob
from .ops.normal_log_prob import normal_log_prob
from .ops.normal_ppo_loss import normal_ppo_loss
from .ops.ppo_loss import ppo_loss
from .ops.vtrace import vtrace
from .ops.whiten import whiten
from .outputs import PPOLoss, Stats

__version__ = "0.1.0"
__all__ = [
    "LossConfig", "PPOLoss", "RolloutWeights", "Stats", "advantages", "bernoulli_log_prob", "beta_log_prob",
    "categorical_log_prob", "categorical_ppo_loss", "discounted_returns", "explain", "gae", "linear_log_prob",
    "linear_ppo_loss", "multi_categorical_log_prob", "normal_log_prob", "normal_ppo_loss", "ppo_loss",
    "rollout_weights", "use_backend", "vtrace", "whiten",
]  # fmt: skip
