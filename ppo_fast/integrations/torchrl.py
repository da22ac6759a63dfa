"""TorchRL: generalised advantage estimation on our kernels.

    from ppo_fast.integrations import torchrl
    torchrl.enable()

replaces `generalized_advantage_estimate` and `vec_generalized_advantage_estimate`, so `GAE`, `MultiAgentGAE` and every loss
that makes its advantages itself use ours. Theirs: `objectives/value/functional.py`: a loop over time, and a convolution over
padded trajectories whose filter ends where (γλ)^k falls below 1e-7; ours is one pass, does not end, and takes λ = 0.

γλ must be one number in [0, 1]. Rates of every step, rates that require a gradient, gradients through the estimate, flags
that are not boolean, dtypes that differ, functorch, and rates in tensors under torch.compile are theirs. A value that is NaN
behind the end of an episode does not reach the steps ahead of it. `ClipPPOLoss` is untouched: its three terms are separate
losses with hooks between; `LossConfig.preset("torchrl")` is its definition for `pf.ppo_loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .. import discounted_returns
from . import _seam

_seam.require("torchrl", "0.7", "0.15")
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

_PARAMETERS = "gamma, lmbda, state_value, next_state_value, reward, done, terminated, *, time_dim"
_IMPORTERS = ("torchrl.objectives.value.advantages",)
_integration = _seam.Integration(
    "torchrl",
    "torchrl",
    "0.7",
    "0.15",
    [
        _seam.Seam(f"{functional.__name__}:{name}", ours, _PARAMETERS, _IMPORTERS)
        for name, ours in (
            ("generalized_advantage_estimate", generalized_advantage_estimate),
            ("vec_generalized_advantage_estimate", vec_generalized_advantage_estimate),
        )
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
