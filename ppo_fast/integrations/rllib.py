"""RLlib: value targets, and the loss of PPO's learner, on our kernels.

    from ppo_fast.integrations.rllib import PPOTorchLearner
    config.training(learner_class=PPOTorchLearner)         # a subclass: nothing else changes

`enable()` puts `compute_value_targets` in place of the loop that the connector `GeneralAdvantageEstimation` runs, and our
`compute_loss_for_module` into RLlib's own learner. Both are the new API stack. In a cluster, actors are processes of their own
and must call `enable()` too; a `learner_class` travels by itself, for the loss only.

Theirs: `utils/postprocessing/value_predictions.py`, `algorithms/ppo/torch/ppo_torch_learner.py`. Categorical and diagonal
Gaussian actions go into the fused loss, of other distributions the log-probabilities that they answer. The divergence is the
analytic one of RLlib's distributions. A coefficient of the entropy that lies on a GPU is read once a minibatch. A minibatch
whose mask leaves nothing has loss 0 where theirs is NaN.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import LossConfig, categorical_ppo_loss, gae, normal_ppo_loss, ppo_loss
from ..outputs import PPOLoss
from . import _seam

_seam.require("ray", "2.60", "2.61", "pip install 'ray[rllib]>=2.60,<2.61'")
from ray.rllib.algorithms.ppo.torch import ppo_torch_learner as learner  # noqa: E402
from ray.rllib.core.columns import Columns  # noqa: E402
from ray.rllib.core.distribution.torch.torch_distribution import TorchCategorical, TorchDiagGaussian  # noqa: E402
from ray.rllib.evaluation.postprocessing import Postprocessing  # noqa: E402
from ray.rllib.utils.postprocessing import value_predictions  # noqa: E402

_theirs = value_predictions.compute_value_targets


def compute_value_targets(
    values: np.ndarray,
    rewards: np.ndarray,
    terminateds: np.ndarray,
    truncateds: np.ndarray,
    gamma: float,
    lambda_: float,
) -> np.ndarray:
    """RLlib's function of this name: episodes one after the other, each longer by a step that holds its bootstrap value.

    Added up in double precision, as RLlib's loop does; the result is float32.
    """
    arrays = values, rewards, terminateds, truncateds
    if any(x.ndim != 1 or x.shape != values.shape for x in arrays) or len(values) == 0:
        return _theirs(values, rewards, terminateds, truncateds, gamma, lambda_)
    ends: dict[str, Any] = {
        "terminated": torch.from_numpy(terminateds != 0),
        "truncated": torch.from_numpy(truncateds != 0),
    }
    exact = torch.from_numpy(values.astype(np.float64))
    after = torch.cat([exact[1:], exact.new_zeros(1)])
    rewards_ = torch.from_numpy(rewards.astype(np.float64))
    advantages, _ = gae(rewards_, exact, **ends, final_values=after, gamma=gamma, lam=lambda_)
    return (advantages.numpy().astype(np.float32) + values).astype(np.float32)


@lru_cache(maxsize=64)
def _config(clip: float, value_clip: float, value_coef: float, entropy_coef: float) -> LossConfig:
    return LossConfig.preset(
        "rllib", clip_low=clip, clip_high=clip, value_clip=value_clip, value_coef=value_coef, entropy_coef=entropy_coef
    )


def loss_of(
    kind: type, inputs: Tensor, actions: Tensor, rollout: tuple[Tensor, Tensor, LossConfig], critic: Any
) -> PPOLoss:
    """The loss of a minibatch; `kind` is the class of the action distribution that takes `inputs`."""
    if kind is TorchCategorical:
        return categorical_ppo_loss(inputs, actions.long(), *rollout, **critic)
    if kind is TorchDiagGaussian:
        mean, log_std = inputs.chunk(2, dim=-1)
        return normal_ppo_loss(mean, log_std, actions, *rollout, **critic)
    current = kind.from_logits(inputs)  # type: ignore[attr-defined]
    return ppo_loss(current.logp(actions), *rollout, entropy=current.entropy(), **critic)


def compute_loss_for_module(
    self: Any, *, module_id: str, config: Any, batch: dict[str, Any], fwd_out: dict[str, Tensor]
) -> Tensor:
    """`PPOTorchLearner.compute_loss_for_module`."""
    module = self.module[module_id].unwrapped()
    mask = batch.get(Columns.LOSS_MASK)
    kind, inputs = module.get_train_action_dist_cls(), fwd_out[Columns.ACTION_DIST_INPUTS]
    entropy_coef = float(self.entropy_coeff_schedulers_per_module[module_id].get_current_value())
    of = _config(config.clip_param, config.vf_clip_param, config.vf_loss_coeff, entropy_coef)
    critic: dict[str, Any] = {"mask": mask}
    if config.use_critic:
        targets = batch[Postprocessing.VALUE_TARGETS]
        values = module.compute_values(batch, embeddings=fwd_out.get(Columns.EMBEDDINGS))
        critic |= {"values": values, "returns": targets}
    rollout = batch[Columns.ACTION_LOGP], batch[Postprocessing.ADVANTAGES], of
    loss, stats = loss_of(kind, inputs, batch[Columns.ACTIONS], rollout, critic)

    def mean(x: Tensor) -> Tensor:
        return x.mean() if mask is None else x[mask].mean()

    zero = loss.new_zeros(())
    divergence = zero
    if config.use_kl_loss:
        before = module.get_exploration_action_dist_cls().from_logits(batch[Columns.ACTION_DIST_INPUTS])
        divergence = mean(before.kl(kind.from_logits(inputs)))
        loss = loss + self.curr_kl_coeffs_per_module[module_id] * divergence
    logged: dict[str, Any] = {learner.POLICY_LOSS_KEY: stats.policy_loss, learner.ENTROPY_KEY: stats.entropy}
    if config.use_critic:
        with torch.no_grad():
            logged[learner.LEARNER_RESULTS_VF_LOSS_UNCLIPPED_KEY] = mean((values - targets).square())
            explained = learner.explained_variance(targets, values)
        logged |= {learner.VF_LOSS_KEY: stats.value_loss, learner.LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY: explained}
    else:
        names = learner.VF_LOSS_KEY, learner.LEARNER_RESULTS_VF_LOSS_UNCLIPPED_KEY
        explained = learner.explained_variance(batch[Postprocessing.VALUE_TARGETS], zero)
        logged |= dict.fromkeys(names, zero) | {learner.LEARNER_RESULTS_VF_EXPLAINED_VAR_KEY: explained}
    logged[learner.LEARNER_RESULTS_KL_KEY] = divergence
    self.metrics.log_dict(logged, key=module_id, window=1)
    return loss


class PPOTorchLearner(learner.PPOTorchLearner):
    """`ray.rllib.algorithms.ppo.torch.ppo_torch_learner.PPOTorchLearner` with our loss."""

    compute_loss_for_module = compute_loss_for_module  # type: ignore[assignment]  # tensors where RLlib says arrays of any kind


_integration = _seam.Integration(
    "rllib",
    "ray",
    "2.60",
    "2.61",
    [
        _seam.Seam(
            "ray.rllib.utils.postprocessing.value_predictions:compute_value_targets",
            compute_value_targets,
            "values, rewards, terminateds, truncateds, gamma, lambda_",
            ("ray.rllib.connectors.learner.general_advantage_estimation",),
        ),
        _seam.Seam(
            "ray.rllib.algorithms.ppo.torch.ppo_torch_learner:PPOTorchLearner.compute_loss_for_module",
            compute_loss_for_module,
            "self, *, module_id, config, batch, fwd_out",
        ),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
