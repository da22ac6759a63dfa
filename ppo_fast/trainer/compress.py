"""Rollouts by a compressed copy of the policy, made anew from the learner's weights before each.

The copy samples, and its log-probs are recorded as what sampled. The learner's own policy then computes `old_log_prob`,
so the ratio of the loss starts at 1 (decoupled PPO), and `rollout_correction="token"` multiplies the policy term of each
token by min(ρ, rollout_high), ρ = exp(old_log_prob - rollout_log_prob): truncated importance sampling (`LossConfig`'s
"tis", verl's rollout_is). "none" leaves the factor out, and with it a bias that `mismatch` shows. Values, entropy and KL
are the learner's and have no factor; advantages are those of the copy's trajectories.

The copy is a function of the weights, so a checkpoint has nothing of it and a resumed run makes the same one.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable
from typing import Any, Literal, Protocol, TypeVar

import torch
from torch import Tensor, nn

import ppo_fast as pf

from .errors import UserError, one_line
from .networks import without_modules

Module = TypeVar("Module", bound=nn.Module)

#: Names of `mismatch`, columns of progress.csv.
MISMATCH = ("rollout_kl", "rollout_weight_mean", "rollout_weight_max", "rollout_clip_fraction")


class Rollouts(Protocol):
    """What the configurations of both trainers say of it."""

    @property
    def rollout_policy(self) -> Literal["full", "int8", "pruned"]: ...
    @property
    def rollout_sparsity(self) -> float: ...
    @property
    def rollout_correction(self) -> Literal["token", "none"]: ...
    @property
    def rollout_high(self) -> float: ...


def check(config: Rollouts) -> None:
    """`UserError` where what is asked for cannot be had here."""
    if config.rollout_policy != "int8":
        return
    for name, wanted, why in (
        ("device", "cpu", "the kernels of torch's dynamic quantisation are of the CPU"),
        ("dtype", "float32", "dynamic quantisation takes no other activations"),
    ):
        got = getattr(config, name, wanted)
        if got != wanted:
            raise UserError(f"--rollout-policy: expected full or pruned with --{name} {got}, got int8: {why}")
    try:
        _int8(nn.Sequential(nn.Linear(1, 1)))(torch.zeros(1, 1))
    except Exception as error:  # a torch without the module, or without an engine for this processor
        raise UserError(
            f"--rollout-policy: expected full or pruned, as torch {torch.__version__} has no engine for int8 here "
            f"({one_line(error)}), got int8"
        ) from None


def compressed(module: Module, config: Rollouts) -> Module:
    """The module itself ("full"), or a copy for inference whose linear layers, heads included, are

    "int8": weights of 8 bits with a scale for each row, activations quantised at each call by their range;
    "pruned": without the share rollout_sparsity of each one's weights, the smallest. Zeros in dense matrices: as fast.
    """
    if config.rollout_policy == "full":
        return module
    with torch.inference_mode(False), torch.no_grad():
        return _int8(module) if config.rollout_policy == "int8" else _pruned(module, config.rollout_sparsity)


def rollout_actor(actor: nn.Sequential, config: Rollouts) -> Callable[[Tensor], Tensor]:
    """The function of a network of linear layers and tanh that samples."""
    copied = compressed(actor, config)
    return copied if config.rollout_policy == "int8" else without_modules(copied)


def _int8(module: Module) -> Module:
    """The one place that knows the engine: torch's dynamic quantisation. Another one goes here, and into `check`."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls it deprecated and names torchao, which is not a part of torch
        from torch.ao.quantization import per_channel_dynamic_qconfig, quantize_dynamic

        return quantize_dynamic(module, dict.fromkeys(_layers(module), per_channel_dynamic_qconfig))


def _pruned(module: Module, sparsity: float) -> Module:
    from torch.nn.utils import prune

    copied = copy.deepcopy(module)
    for layer in _layers(copied).values():
        prune.l1_unstructured(layer, "weight", amount=float(sparsity))
        prune.remove(layer, "weight")  # the mask goes into the weights
    return copied


def _layers(module: nn.Module) -> dict[str, nn.Linear]:
    """Those that are compressed, by name. Low-rank adapters are small, and peft looks into them."""
    return {name: x for name, x in module.named_modules() if type(x) is nn.Linear and "lora_" not in name}


def correction(config: Rollouts) -> dict[str, Any]:
    """Fields of the `LossConfig`; the loss then needs `rollout_log_prob`."""
    if config.rollout_policy == "full" or config.rollout_correction == "none":
        return {}
    return {"rollout_correction": "tis", "rollout_high": config.rollout_high}


@torch.no_grad()
def mismatch(
    old_log_prob: Tensor, rollout_log_prob: Tensor, config: Rollouts, mask: Tensor | None = None
) -> dict[str, Tensor]:
    """How far the behaviour was from the learner's policy: `MISMATCH`, 0-dim tensors, over the tokens of `mask`.

    KL(behaviour || learner) by its k3 estimate, mean of ρ - 1 - log ρ; mean and largest of the weights min(ρ, rollout_high);
    the share of tokens with ρ above. The same whether the loss is corrected or not.
    """
    u = (old_log_prob - rollout_log_prob).clamp(-20.0, 20.0)  # as rollout_weights
    u = u if mask is None else u[mask]
    stats = pf.rollout_weights(old_log_prob, rollout_log_prob, mask=mask, high=config.rollout_high).stats
    k3 = (torch.expm1(u) - u).mean()
    return dict(zip(MISMATCH, (k3, stats["mean"], stats["max"], stats["fraction_high"]), strict=True))


#: Of rollouts that the learner's policy sampled itself.
NO_MISMATCH = dict.fromkeys(MISMATCH, math.nan)
