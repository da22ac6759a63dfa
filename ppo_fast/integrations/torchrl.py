"""TorchRL: generalised advantage estimation, and the policy terms of `ClipPPOLoss`, on our kernels.

    from ppo_fast.integrations import torchrl
    torchrl.enable()

replaces `generalized_advantage_estimate` and `vec_generalized_advantage_estimate`, so `GAE`, `MultiAgentGAE` and every loss
that makes its advantages itself use ours, and the `forward` of `ClipPPOLoss`, `MAPPOLoss` and `IPPOLoss`. Theirs:
`objectives/value/functional.py`: a loop over time, and a convolution over padded trajectories whose filter ends where (γλ)^k
falls below 1e-7; ours is one pass, does not end, and takes λ = 0. `objectives/ppo.py`: about forty operations.

γλ must be one number in [0, 1]. Rates of every step, rates that require a gradient, gradients through the estimate, flags
that are not boolean, dtypes that differ, functorch, and rates in tensors under torch.compile are theirs. A value that is NaN
behind the end of an episode does not reach the steps ahead of it.

**The loss.** `loss_objective`, its gradient and the statistics of the ratio are one pass of `pf.ppo_loss`. Of `Categorical`
and `OneHotCategorical` made of logits, log-probability and entropy are one pass of `pf.categorical_log_prob`, and no
distribution is made; where a row is not finite or has no choice left, theirs answers, with its errors. Of every other
distribution they are its own. The terms stay apart, each with its own graph, under their keys. The critic's term is their
`loss_critic`: its explained variance and its clip fraction are not our statistics, and with them left to compute, our kernel
gained nothing on small batches. Forward and backward of the whole loss, 64 to 65,536 samples, one thread: from level with
theirs, on small batches, to several times as fast, on large ones of one-hot actions.

Theirs too: a loss that makes its advantages itself, `reduction="none"`, masks in the batch, `delay_actor`, a cap of the
importance ratio, coefficients per head, composite distributions, float16 and bfloat16, functorch, torch.compile, and
subclasses that override a method which ours would not call. A subclass has the `forward` that its parent had when it was
defined; enable before, or derive from this module's `ClipPPOLoss`. Where the loss or ESS is not finite, theirs answers, and
the network runs twice. TorchRL before 0.14: advantages only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, categorical_log_prob, discounted_returns, ppo_loss
from . import _seam

_version = _seam.require("torchrl", "0.7", "0.15")
from tensordict import TensorDict  # noqa: E402
from tensordict.nn import (  # noqa: E402
    ProbabilisticTensorDictModule,
    ProbabilisticTensorDictSequential,
    dispatch,
)
from torchrl.modules import OneHotCategorical  # noqa: E402
from torchrl.objectives import ppo  # noqa: E402
from torchrl.objectives.value import functional  # noqa: E402


def _rate(x: Any) -> float | None:
    """A rate that is one number and needs no gradient."""
    if not isinstance(x, Tensor):
        return float(x)
    if x.numel() != 1 or x.requires_grad or torch.compiler.is_compiling():
        return None
    return x.item()


def _plain(floats: tuple[Any, ...], flags: tuple[Any, ...]) -> bool:
    """Whether our kernels do what the call asks."""
    first = floats[0]
    if first.ndim < 2 or any(x.shape != first.shape for x in (*floats, *flags)):
        return False
    if any(type(x) is not Tensor or x.dtype != first.dtype for x in floats) or first.dtype not in (
        torch.float32,
        torch.float64,
    ):
        return False
    if any(type(x) is not Tensor or x.dtype != torch.bool for x in flags):
        return False
    if torch.is_grad_enabled() and any(x.requires_grad for x in floats):
        return False
    return torch._C._functorch.peek_interpreter_stack() is None


def in_place_of(theirs: Callable[..., Any]) -> Callable[..., Any]:
    """`pf.discounted_returns` of the TD errors, at γλ; next values are TorchRL's own, not those of the next step."""

    def estimate(
        gamma: float | Tensor,
        lmbda: float | Tensor,
        state_value: Tensor,
        next_state_value: Tensor,
        reward: Tensor,
        done: Tensor,
        terminated: Tensor | None = None,
        *,
        time_dim: int = -2,
    ) -> tuple[Tensor, Tensor]:
        ends = done if terminated is None else terminated
        if _plain((state_value, next_state_value, reward), (done, ends)):
            rate, trace = _rate(gamma), _rate(gamma * lmbda)
            if (
                rate is not None
                and trace is not None
                and 0.0 <= trace <= 1.0
                and -reward.ndim <= time_dim < reward.ndim
            ):
                error = next_state_value * ends.logical_not()
                error = error.mul_(rate).add_(reward).sub_(state_value)
                advantage = discounted_returns(error, terminated=done, gamma=trace, time_dim=time_dim)
                return advantage, advantage + state_value
        return theirs(gamma, lmbda, state_value, next_state_value, reward, done, terminated, time_dim=time_dim)

    return estimate


generalized_advantage_estimate = in_place_of(functional.generalized_advantage_estimate)
vec_generalized_advantage_estimate = in_place_of(functional.vec_generalized_advantage_estimate)


_theirs = ppo.ClipPPOLoss.forward
#: What ours does in place of calling them: a class or a loss with others of these keeps its forward.
_BYPASSED = {
    name: getattr(ppo.ClipPPOLoss, name)
    for name in ("_clip_bounds", "_get_cur_log_prob", "_get_entropy", "_log_weight", "_reduce_loss", "_weighted_loss_entropy")
    if hasattr(ppo.ClipPPOLoss, name)
}  # fmt: skip


@lru_cache(maxsize=64)
def _config(low: float, high: float, reduction: str) -> LossConfig:
    return LossConfig.preset(
        "torchrl", clip_low=low, clip_high=high, reduction="token-mean" if reduction == "mean" else "sum"
    )


def _config_of(self: Any) -> LossConfig | None:
    """The options of a loss, where ours has them."""
    if any(name in vars(self) or getattr(type(self), name) is not method for name, method in _BYPASSED.items()):
        return None
    if self.delay_actor or self.max_importance_ratio is not None or self.reduction not in ("mean", "sum"):
        return None
    if self._entropy_coeff_map is not None or not isinstance(self.tensor_keys.sample_log_prob, (str, tuple)):
        return None
    names = ("clip_epsilon_low", "clip_epsilon_high") if self._asymmetric_clip else ("clip_epsilon", "clip_epsilon")
    low, high = (float(getattr(self, name)) for name in names)
    return _config(low, high, self.reduction) if 0.0 <= low < 1.0 and high >= 0.0 else None


def _rollout(self: Any, tensordict: Any) -> tuple[Tensor, Tensor] | None:
    """Old log-probabilities and advantages, [...], where ours takes them."""
    advantage = tensordict.get(self.tensor_keys.advantage, None, as_padded_tensor=True)
    if advantage is None or any(tensordict.get(key, None) is not None for key in self._loss_mask_keys()):
        return None
    old = tensordict.get(self.tensor_keys.sample_log_prob, None, as_padded_tensor=True, padding_side="left")
    if type(old) is not Tensor or type(advantage) is not Tensor:
        return None
    advantage = self._maybe_normalize_advantage(advantage, tensordict, update_norm=False)
    known = (
        old.dtype == advantage.dtype and old.dtype in (torch.float32, torch.float64) and old.device == advantage.device
    )
    if not known or old.requires_grad or advantage.requires_grad or not old.ndim or not old.numel():
        return None
    return (old, advantage.squeeze(-1)) if advantage.shape == (*old.shape, 1) else None


def _categorical_head(actor: Any) -> Any:
    """The module of an actor that makes a categorical distribution of logits and of nothing else."""
    kind = type(actor)
    if not isinstance(actor, ProbabilisticTensorDictSequential) or actor.return_composite:
        return None
    for name in ("get_dist", "build_dist_from_params"):
        if getattr(kind, name) is not getattr(ProbabilisticTensorDictSequential, name):
            return None
    head = next((x for x in reversed(list(actor.modules())) if isinstance(x, ProbabilisticTensorDictModule)), None)
    if head is None or type(head).get_dist is not ProbabilisticTensorDictModule.get_dist:
        return None
    plain = head.distribution_class in (torch.distributions.Categorical, OneHotCategorical)
    return head if plain and not head.distribution_kwargs and list(head.dist_keys) == ["logits"] else None


def _log_prob(self: Any, tensordict: Any, old: Tensor) -> tuple[Any, Any, bool, Tensor | None]:
    """What `_get_cur_log_prob` returns, and the entropy, [...], with None for the distribution where none was made."""
    actor = self.actor_network
    head = _categorical_head(actor)
    if head is None:
        return (*self._get_cur_log_prob(tensordict), None)
    if self.functional:
        with self.actor_network_params.to_module(actor, preserve_module_state=False):
            outputs = actor.get_dist_params(tensordict)
    else:
        outputs = actor.get_dist_params(tensordict)
    logits, actions = outputs.get(head.in_keys[0]), tensordict.get(self.tensor_keys.action, as_padded_tensor=True)
    one_hot = head.distribution_class is OneHotCategorical
    plain = type(logits) is Tensor and type(actions) is Tensor and not actions.requires_grad
    fits = plain and logits.dtype == old.dtype and logits.shape[:-1] == old.shape and logits.shape[-1] > 1
    if (
        fits
        and actions.shape == (logits.shape if one_hot else old.shape)
        and (one_hot or not actions.is_floating_point())
    ):
        log_prob, entropy = categorical_log_prob(logits, actions.argmax(-1) if one_hot else actions)
        assert entropy is not None
        # 0 and 0 is what we give a row of -inf, which their distribution refuses, and a row of one certain action
        if (entropy.isfinite() & ((entropy != 0) | (log_prob != 0))).all():
            return log_prob, None, False, entropy
    if actions.requires_grad:
        raise RuntimeError(f"tensordict stored {self.tensor_keys.action} requires grad.")
    dist = head.get_dist(outputs)
    return dist.log_prob(actions), dist, False, None


class ClipPPOLoss(ppo.ClipPPOLoss):
    """`torchrl.objectives.ClipPPOLoss` with our policy terms, enabled or not."""

    @dispatch
    def forward(self, tensordict: Any) -> Any:
        enabled = _integration.is_enabled or isinstance(self, ClipPPOLoss)
        foreign = torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None
        config = _config_of(self) if enabled and not foreign else None
        rollout = _rollout(self, tensordict) if config is not None else None
        if config is None or rollout is None:
            return _theirs(self, tensordict)
        old, advantages = rollout
        copy = tensordict.clone(False)  # the networks write into it
        log_prob, dist, composite, entropy = _log_prob(self, copy, old)
        if composite or type(log_prob) is not Tensor or log_prob.dtype != old.dtype or log_prob.shape != old.shape:
            self.__dict__["_get_cur_log_prob"] = lambda *_, **__: (
                log_prob,
                dist,
                composite,
            )  # the network is not run again
            try:
                return _theirs(self, tensordict)
            finally:
                del self.__dict__["_get_cur_log_prob"]
        loss, stats = ppo_loss(log_prob, old, advantages, config)
        if not (loss.detach() + stats.ess).isfinite():
            return _theirs(self, tensordict)
        out = TensorDict(
            {"loss_objective": loss, "clip_fraction": stats.clip_fraction, "kl_approx": stats.old_approx_kl}
        )
        if self.entropy_bonus:
            if entropy is None:
                entropy = self._get_entropy(dist, adv_shape=old.shape)
            mean = entropy.mean()
            out["entropy"] = mean.detach()
            total = mean if self.reduction == "mean" else entropy.sum()
            out["loss_entropy"] = self._weighted_loss_entropy(total).to(entropy.dtype)
        if self._has_critic:
            critic, clipped, explained = self.loss_critic(copy)
            out["loss_critic"] = self._reduce_loss(critic, copy).squeeze(-1)
            if clipped is not None:
                out["value_clip_fraction"] = clipped
            if explained is not None:
                out["explained_variance"] = explained
        if old.ndim == 1:
            out["ESS"] = stats.ess
        else:  # theirs is of the first dimension, one for each of the rest
            with torch.no_grad():
                log_ratio = log_prob - old
                out["ESS"] = (2 * log_ratio.logsumexp(0) - (2 * log_ratio).logsumexp(0)).exp() / len(old)
        out["max_ratio"], out["mean_ratio"] = stats.ratio_max, stats.ratio_mean
        return out


_PARAMETERS = "gamma, lmbda, state_value, next_state_value, reward, done, terminated, *, time_dim"
_IMPORTERS = ("torchrl.objectives.value.advantages",)
_seams = [
    _seam.Seam(f"{functional.__name__}:{name}", ours, _PARAMETERS, _IMPORTERS)
    for name, ours in (
        ("generalized_advantage_estimate", generalized_advantage_estimate),
        ("vec_generalized_advantage_estimate", vec_generalized_advantage_estimate),
    )
]
if _seam._release(_version) >= (0, 14):  # every class has a forward of its own, a wrapper around its parent's
    _seams += [
        _seam.Seam(f"torchrl.objectives.{name}.forward", ClipPPOLoss.forward, "self, tensordict")
        for name in ("ppo:ClipPPOLoss", "multiagent.mappo:MAPPOLoss", "multiagent.mappo:IPPOLoss")
    ]
_integration = _seam.Integration("torchrl", "torchrl", "0.7", "0.15", _seams)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
