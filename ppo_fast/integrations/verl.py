"""verl: advantages, log-probs, entropies, policy losses and the value loss on our kernels.

    # workers.py, on the path of every process
    from ppo_fast.integrations import verl
    verl.enable()

    VERL_USE_EXTERNAL_MODULES=workers python -m verl.trainer.main_ppo ...

verl computes advantages in its driver and losses in Ray workers; that variable makes all of them import the module. Engines
take their functions when they are made: enable before.

Ours, each in place of the function of that name (attribute and registry entry):
`trainer/ppo/core_algos.py`: GAE (theirs loops over tokens), GRPO, RLOO, OPO, REINFORCE++ with and without baseline (theirs loop
over responses or tokens); the policy losses vanilla, dppo_tv, dppo_kl, gspo, sapo, gpg, dro, cispo; `compute_value_loss`.
`utils/torch_functional.py`: `masked_whiten`, `logprobs_from_logits`, `entropy_from_logits`, `entropy_from_logits_with_chunking`.
`utils/kernel/linear_cross_entropy.py` and `FusedLinearForPPO`: log-probs without logits, where the vocabulary is not sharded.

What differs: whitened advantages and returns are 0 at masked tokens (theirs: what the recursion carried there), a GRPO group
of one keeps its score (theirs divides by 1 + epsilon), a batch without any token has loss 0 (theirs: 0/0), an action of logit
-inf adds 0 to the entropy (theirs: NaN), losses are float32 also of bf16 streams, and the floats of a policy loss are read in
one copy from the device.

Theirs still: policy losses "clip_cov" (draws at random), "kl_cov" and "geo_mean", whose definitions ours has with other details;
`agg_loss` and `kl_penalty`, which have neither loops nor copies; Megatron's sharded vocabulary; DTensor and nested tensors;
whatever a call asks for that ours cannot do, as theirs would have done it. Masks are 0 or 1.
"""

from __future__ import annotations

import functools
import inspect
import math
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import LossConfig, categorical_log_prob, discounted_returns, gae, linear_log_prob, ppo_loss, reference, whiten
from .. import advantages as estimators
from ..config import STATS
from ..reductions import token_weights
from . import _seam

_seam.require("verl", "0.9.1", "0.10")
import verl.utils.experimental.torch_functional as fused_linear  # noqa: E402
import verl.utils.kernel.linear_cross_entropy as kernel  # noqa: E402
import verl.utils.torch_functional as functional  # noqa: E402
from verl.trainer.ppo import core_algos  # noqa: E402

#: What verl had when this was imported: for calls that ours cannot answer.
theirs = SimpleNamespace(
    **vars(core_algos),
    masked_whiten=functional.masked_whiten,
    logprobs_from_logits=functional.logprobs_from_logits,
    entropy_from_logits=functional.entropy_from_logits,
    entropy_from_logits_with_chunking=functional.entropy_from_logits_with_chunking,
    linear_cross_entropy=kernel.linear_cross_entropy,
    fused_linear_forward=fused_linear.FusedLinearForPPO.forward,
)


def _ours(*tensors: Any, wide: bool = False) -> bool:
    """Plain tensors of our dtypes: no DTensor, no nested ones; `wide`: those whose results have our dtype too."""
    floats = (torch.float32, torch.float64) if wide else (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    return all(type(x) in (Tensor, torch.nn.Parameter) and x.dtype in floats for x in tensors)


def _is_mask(mask: Any, like: Tensor) -> bool:
    return type(mask) is Tensor and mask.shape == like.shape and mask.device == like.device


def _constant(*tensors: Tensor) -> bool:
    return not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def _streams(first: Any, constants: tuple[Tensor | None, ...], mask: Any) -> bool:
    """[B, T] of a loss: one that gets a gradient, those that get none, and the mask."""
    given = [x for x in constants if x is not None]
    known = _ours(first, *given) and first.ndim == 2 and _is_mask(mask, first) and _constant(*given)
    return known and all(x.shape == first.shape and x.device == first.device for x in given)


# --- advantages -------------------------------------------------------------------------------------------------------


def _valid(x: Any, mask: Any) -> Tensor | None:
    """The mask as our kernels read it fastest; None where theirs is asked: of one valid element and of none it raises."""
    if not (_ours(x, wide=True) and _constant(x) and _is_mask(mask, x)):
        return None
    valid = mask.bool()
    return valid if valid.count_nonzero() > 1 else None


def masked_whiten(values: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    valid = _valid(values, mask)
    if valid is None:
        return theirs.masked_whiten(values, mask, shift_mean)
    return whiten(values, mask=valid, eps_in_variance=True, shift_mean=shift_mean)


def compute_gae_advantage_return(
    token_level_rewards: Tensor, values: Tensor, response_mask: Tensor, gamma: Any, lam: Any
) -> tuple[Tensor, Tensor]:
    rates = all(isinstance(x, (int, float)) and 0.0 <= x <= 1.0 for x in (gamma, lam))
    shapes = values.shape == token_level_rewards.shape and values.ndim == 2
    valid = None
    if rates and shapes and _ours(values, wide=True):
        valid = _valid(token_level_rewards, response_mask)
    if valid is None:
        return theirs.compute_gae_advantage_return(token_level_rewards, values, response_mask, gamma, lam)
    estimates, returns = gae(token_level_rewards, values, mask=valid, gamma=gamma, lam=lam, time_dim=1)
    return whiten(estimates, mask=valid, eps_in_variance=True), returns


def compute_reinforce_plus_plus_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, config: Any = None, **kwargs: Any
) -> tuple[Tensor, Tensor]:
    valid = None
    if config is not None and token_level_rewards.ndim == 2 and 0.0 <= config.gamma <= 1.0:
        valid = _valid(token_level_rewards, response_mask)
    if valid is None:
        return theirs.compute_reinforce_plus_plus_outcome_advantage(
            token_level_rewards, response_mask, config, **kwargs
        )
    returns = discounted_returns(token_level_rewards, mask=valid, gamma=config.gamma, time_dim=1)
    return whiten(returns, mask=valid, eps_in_variance=True), returns


def _scores(rewards: Tensor, mask: Tensor, index: Any) -> tuple[Tensor, Tensor] | None:
    """Scores of responses, in double (groups' sums cancel), and the numbers of their groups; None where theirs is asked."""
    if isinstance(index, Tensor) or not (_ours(rewards, wide=True) and _constant(rewards) and _is_mask(mask, rewards)):
        return None
    numbers: dict[Any, int] = {}
    group = [numbers.setdefault(uid, len(numbers)) for uid in index]
    return rewards.sum(-1).double(), torch.tensor(group, device=rewards.device)


def _at_tokens(scores: Tensor, rewards: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    spread = scores.to(rewards.dtype).unsqueeze(-1) * mask
    return spread, spread


def compute_grpo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6,
    norm_adv_by_std_in_grpo: bool = True, config: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    known = _scores(token_level_rewards, response_mask, index)
    if known is None:
        return theirs.compute_grpo_outcome_advantage(
            token_level_rewards, response_mask, index, epsilon, norm_adv_by_std_in_grpo, config
        )
    grpo = functools.partial(estimators.grpo, eps=epsilon) if norm_adv_by_std_in_grpo else estimators.dr_grpo
    return _at_tokens(grpo(*known), token_level_rewards, response_mask)


def compute_rloo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6, config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    known = _scores(token_level_rewards, response_mask, index)
    if known is None:
        return theirs.compute_rloo_outcome_advantage(
            token_level_rewards, response_mask, index, epsilon, config, **kwargs
        )
    return _at_tokens(estimators.rloo(*known), token_level_rewards, response_mask)


def compute_opo_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: np.ndarray, epsilon: float = 1e-6, config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    known = _scores(token_level_rewards, response_mask, index)
    if known is None:
        return theirs.compute_opo_outcome_advantage(
            token_level_rewards, response_mask, index, epsilon, config, **kwargs
        )
    return _at_tokens(estimators.opo(*known, lengths=response_mask.sum(-1)), token_level_rewards, response_mask)


def compute_reinforce_plus_plus_baseline_outcome_advantage(
    token_level_rewards: Tensor, response_mask: Tensor, index: Any, epsilon: float = 1e-6, config: Any = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    known, valid = _scores(token_level_rewards, response_mask, index), _valid(token_level_rewards, response_mask)
    if known is None or valid is None:
        return theirs.compute_reinforce_plus_plus_baseline_outcome_advantage(
            token_level_rewards, response_mask, index, epsilon, config, **kwargs
        )
    spread = estimators.dr_grpo(*known).to(token_level_rewards.dtype).unsqueeze(-1).expand(valid.shape)
    whitened = whiten(spread, mask=valid, eps_in_variance=True)
    return whitened, whitened


# --- log-probs and entropies ------------------------------------------------------------------------------------------


def _flash() -> bool:
    """Whether verl's own function takes flash-attn's kernel, which answers in float32 and writes gradients in place."""
    return (
        functional.FLAH_ATTN_CROSS_ENTROPY_LOSS_AVAILABLE and os.environ.get("VERL_DISABLE_FLASH_ATTN_CE", "0") != "1"
    )


def logprobs_from_logits(logits: Tensor, labels: Tensor, inplace_backward: bool = True) -> Tensor:
    if not _ours(logits) or type(labels) is not Tensor or labels.shape != logits.shape[:-1]:
        return theirs.logprobs_from_logits(logits, labels, inplace_backward)
    flash = _flash()
    source = logits if logits._base is None else logits._base
    inplace = flash and inplace_backward and not (logits.is_leaf or (source.is_leaf and source.requires_grad))
    log_prob, _ = categorical_log_prob(
        logits, labels, ignore_index=-100 if flash else None, entropy=False, inplace_backward=inplace
    )
    return log_prob if flash else log_prob.to(logits.dtype)


def _entropy(logits: Tensor) -> Tensor:
    nothing = torch.zeros((), dtype=torch.long, device=logits.device).expand(logits.shape[:-1])
    return categorical_log_prob(logits, nothing)[1]  # type: ignore[return-value]


def entropy_from_logits(logits: Tensor) -> Tensor:
    return _entropy(logits).to(logits.dtype) if _ours(logits) else theirs.entropy_from_logits(logits)


def entropy_from_logits_with_chunking(logits: Tensor, chunk_size: int = 2048) -> Tensor:
    if not _ours(logits):
        return theirs.entropy_from_logits_with_chunking(logits, chunk_size)
    return _entropy(logits).float()


def _linear(hidden: Tensor, weight: Tensor, labels: Tensor, temperature: Any) -> bool:
    plain = _ours(hidden, weight) and type(labels) is Tensor and labels.shape == hidden.shape[:-1]
    return plain and isinstance(temperature, (int, float)) and temperature > 0


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, labels: Tensor, temperature: float = 1.0, reduction: str = "none",
    dist_process_group: Any = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`LinearCrossEntropy.apply`: log-probs and entropies of all tokens, [M]."""
    if dist_process_group is not None or reduction != "none" or not _linear(hidden, weight, labels, temperature):
        return theirs.linear_cross_entropy(hidden, weight, labels, temperature, reduction, dist_process_group)
    log_prob, entropy = linear_log_prob(hidden.flatten(0, -2), weight, labels.flatten(), temperature=temperature)
    return log_prob.float(), entropy.float()  # type: ignore[union-attr]


def fused_linear_forward(
    self: Any, hidden_states: Tensor, vocab_weights: Tensor, input_ids: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    if self.impl_backend != "torch" or not _linear(hidden_states, vocab_weights, input_ids, temperature):
        return theirs.fused_linear_forward(self, hidden_states, vocab_weights, input_ids, temperature)
    log_prob, entropy = linear_log_prob(hidden_states, vocab_weights, input_ids, temperature=temperature)
    return log_prob.float(), entropy.to(hidden_states.dtype)  # type: ignore[union-attr]


# --- losses -----------------------------------------------------------------------------------------------------------


def _reduction(
    mask: Tensor, mode: str, dp_size: int = 1, batch_num_tokens: Any = None, global_batch_size: Any = None,
    loss_scale_factor: Any = None,
) -> tuple[str, Any] | None:  # fmt: skip
    """`agg_loss`'s arguments as our reduction and denominator; None where it raises."""
    if mode == "token-sum":
        return "sum", 1.0 / dp_size
    whole = {
        "token-mean": batch_num_tokens, "seq-mean-token-sum": global_batch_size,
        "seq-mean-token-sum-norm": global_batch_size, "seq-mean-token-mean": global_batch_size,
    }  # fmt: skip
    if mode not in whole or (whole[mode] is None and dp_size > 1) or isinstance(whole[mode], Tensor):
        return None
    count = whole[mode]
    if count is not None and not count > 0:
        return None
    denominator = None if count is None else count / dp_size
    if mode == "seq-mean-token-sum-norm":
        horizon = mask.shape[-1] if loss_scale_factor is None else loss_scale_factor
        if denominator is None:
            denominator = (mask.sum(-1) > 0).sum().clamp(min=1)
        denominator = denominator * horizon
    return mode.removesuffix("-norm"), denominator


@functools.lru_cache(maxsize=256)
def _config(**fields: Any) -> LossConfig:
    return LossConfig.preset("verl", **fields)


@dataclass(frozen=True)
class Policy:
    """One of verl's policy losses in our terms."""

    policy: str
    #: verl's config -> fields of LossConfig beside its bounds
    fields: Callable[[Any], dict[str, Any]]
    #: verl's names of our statistics; None: it reports 0
    metrics: Mapping[str, str | None]
    #: what verl counts and the kernel does not: (log_prob, old_log_prob, advantages, mask, config) -> statistics
    extra: Callable[..., dict[str, Tensor]] = lambda *streams: {}
    reduction: str | None = None


def _share(tokens: Tensor, mask: Tensor) -> Tensor:
    return (tokens & mask).sum() / mask.sum().clamp(min=1)


def _clipped(log_ratio: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig) -> Tensor:
    """The share of tokens whose clipped branch is the larger one: our clip_fraction counts all outside the bounds."""
    ratio = log_ratio.exp()
    return _share((ratio - ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)) * advantages > 0, mask)


def _of_tokens(
    log_prob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    return {"clipped": _clipped(log_prob - old, advantages, mask, config)}


def _of_sequences(
    log_prob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    d = torch.where(mask, log_prob - old, 0.0)
    mean = d.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    clipped = _clipped(mean.clamp(max=10.0), advantages, mask, config)
    return {"clipped": clipped, "old_approx_kl": -d.sum() / mask.sum().clamp(min=1)}


def _of_capped(
    log_prob: Tensor, old: Tensor, advantages: Tensor, mask: Tensor, config: LossConfig
) -> dict[str, Tensor]:
    low, high = reference._too_far(log_prob, old, advantages, config)
    return {"capped": _share((log_prob - old > math.log(config.ratio_cap or math.inf)) & ~(low | high), mask)}


def _dppo(policy: str) -> Policy:
    metrics = {_CLIP: "clip_fraction", _KL: "old_approx_kl", _LOWER: "capped"}
    return Policy(policy, lambda c: {"dual_clip": None, "ratio_cap": c.get("clip_ratio_c", 20.0)}, metrics, _of_capped)


_KL, _CLIP, _LOWER = "actor/ppo_kl", "actor/pg_clipfrac", "actor/pg_clipfrac_lower"
POLICIES = {
    "vanilla": Policy("ppo", lambda c: {"dual_clip": c.get("clip_ratio_c", 3.0)},
                      {_CLIP: "clipped", _KL: "old_approx_kl", _LOWER: "dual_clip_fraction"}, _of_tokens),
    "dppo_tv": _dppo("dppo_tv"),
    "dppo_kl": _dppo("dppo_kl"),
    "gspo": Policy("gspo_token", lambda c: {"dual_clip": None, "log_ratio_clamp": None},
                   {_CLIP: "clipped", _KL: "old_approx_kl", _LOWER: None}, _of_sequences),
    "sapo": Policy("sapo", lambda c: {"sapo_tau_positive": c.tau_pos, "sapo_tau_negative": c.tau_neg},
                   {_CLIP: None, _KL: "old_approx_kl", _LOWER: None}, reduction="seq-mean-token-mean"),
    "gpg": Policy("reinforce", lambda c: {}, {}),
    "dro": Policy("dro", lambda c: {"dro_beta": c.policy_loss.dro_beta, "log_ratio_clamp": None}, {_KL: "old_approx_kl"}),
    "cispo": Policy("cispo", lambda c: {}, {_CLIP: "clip_fraction", _KL: "old_approx_kl", _LOWER: None}),
}  # fmt: skip


def policy_loss(mode: str) -> Callable[..., tuple[Tensor, dict[str, Any]]]:
    """Our form of verl's policy loss `mode`."""
    form, original = POLICIES[mode], f"compute_policy_loss_{mode}"
    default = inspect.signature(getattr(theirs, original)).parameters["loss_agg_mode"].default

    def loss(
        old_log_prob: Tensor, log_prob: Tensor, advantages: Tensor, response_mask: Tensor, loss_agg_mode: str = default,
        config: Any = None, rollout_is_weights: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Any]]:  # fmt: skip
        made = None
        if config is not None and _streams(log_prob, (old_log_prob, advantages, rollout_is_weights), response_mask):
            made = _definition(form, response_mask, loss_agg_mode, config)
        if made is None:
            return getattr(theirs, original)(
                old_log_prob, log_prob, advantages, response_mask, loss_agg_mode, config, rollout_is_weights
            )
        ours, denominator = made
        weights, mask = None, response_mask != 0
        if rollout_is_weights is not None:
            weights = token_weights(rollout_is_weights, mask, ours.reduction, None, denominator, None)
            weights, denominator = weights * rollout_is_weights, None
        total, stats = ppo_loss(
            log_prob, old_log_prob, advantages, ours, mask=response_mask, weights=weights, denominator=denominator
        )
        if not form.metrics:
            return total, {}
        with torch.no_grad():
            extra = form.extra(log_prob, old_log_prob, advantages, mask, ours)
            numbers = torch.cat([stats.vector, *(x[None] for x in extra.values())]).tolist()  # the one copy
        read = dict(zip((*STATS, *extra), numbers, strict=True))
        return total, {key: 0.0 if name is None else read[name] for key, name in form.metrics.items()}

    return loss


def _definition(form: Policy, mask: Tensor, mode: str, config: Any) -> tuple[LossConfig, Any] | None:
    reduced = _reduction(mask, form.reduction or mode, **config.global_batch_info)
    low = config.clip_ratio if config.clip_ratio_low is None else config.clip_ratio_low
    high = config.clip_ratio if config.clip_ratio_high is None else config.clip_ratio_high
    if reduced is None:
        return None
    try:
        fields = {"dual_clip": None, **form.fields(config)}
        return _config(policy=form.policy, clip_low=low, clip_high=high, reduction=reduced[0], **fields), reduced[1]
    except (TypeError, ValueError):  # a number that ours refuses: theirs may have a message of its own
        return None


def compute_value_loss(
    vpreds: Tensor, returns: Tensor, values: Tensor, response_mask: Tensor, cliprange_value: float,
    loss_agg_mode: str = "token-mean", dp_size: int = 1, batch_num_tokens: int | None = None,
    global_batch_size: int | None = None, loss_scale_factor: int | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    whole = dp_size, batch_num_tokens, global_batch_size, loss_scale_factor
    reduced = None
    if isinstance(cliprange_value, (int, float)) and _streams(vpreds, (returns, values), response_mask):
        reduced = _reduction(response_mask, loss_agg_mode, *whole)
    if reduced is None or not 0.0 <= cliprange_value < math.inf:
        return theirs.compute_value_loss(vpreds, returns, values, response_mask, cliprange_value, loss_agg_mode, *whole)
    config = _config(policy="reinforce", value_clip=float(cliprange_value), reduction=reduced[0])
    no_policy = vpreds.new_zeros(()).expand(vpreds.shape)
    loss, stats = ppo_loss(
        no_policy, no_policy, no_policy, config, values=vpreds, old_values=values, returns=returns, mask=response_mask,
        denominator=reduced[1],
    )  # fmt: skip
    return loss, stats.value_clip_fraction


_CORE, _FUNCTIONAL = "verl.trainer.ppo.core_algos", "verl.utils.torch_functional"
_ENGINES = "verl.workers.engine"
_LOGPROB_IMPORTERS = (
    "verl.trainer.ppo.prefix_grouper_utils", "verl.workers.rollout.naive.naive_rollout",
    f"{_ENGINES}.automodel.transformer_impl", f"{_ENGINES}.torchtitan.transformer_impl", f"{_ENGINES}.fsdp.transformer_impl",
)  # fmt: skip
_MCORE = ("verl.models.mcore.model_forward_fused", "verl.models.mcore.model_forward_1f1b_overlap")


def _registered(registry: str, key: str, ours: Callable[..., Any]) -> Iterator[_seam.Seam]:
    """The attribute and the entry of one function."""
    function = getattr(core_algos, registry)[key]
    for where in (function.__name__, f"{registry}[{key}]"):
        yield _seam.Seam(f"{_CORE}:{where}", ours, _seam.parameters_of(ours))


_integration = _seam.Integration(
    "verl",
    "verl",
    "0.9.1",
    "0.10",
    [
        *_registered("ADV_ESTIMATOR_REGISTRY", "gae", compute_gae_advantage_return),
        *_registered("ADV_ESTIMATOR_REGISTRY", "grpo", compute_grpo_outcome_advantage),
        *_registered("ADV_ESTIMATOR_REGISTRY", "rloo", compute_rloo_outcome_advantage),
        *_registered("ADV_ESTIMATOR_REGISTRY", "opo", compute_opo_outcome_advantage),
        *_registered("ADV_ESTIMATOR_REGISTRY", "reinforce_plus_plus", compute_reinforce_plus_plus_outcome_advantage),
        *_registered(
            "ADV_ESTIMATOR_REGISTRY",
            "reinforce_plus_plus_baseline",
            compute_reinforce_plus_plus_baseline_outcome_advantage,
        ),
        *(seam for mode in POLICIES for seam in _registered("POLICY_LOSS_REGISTRY", mode, policy_loss(mode))),
        _seam.Seam(
            f"{_CORE}:compute_value_loss",
            compute_value_loss,
            _seam.parameters_of(compute_value_loss),
            ("verl.workers.utils.losses",),
        ),
        _seam.Seam(f"{_FUNCTIONAL}:masked_whiten", masked_whiten, "values, mask, shift_mean"),
        _seam.Seam(
            f"{_FUNCTIONAL}:logprobs_from_logits",
            logprobs_from_logits,
            "logits, labels, inplace_backward",
            _LOGPROB_IMPORTERS,
        ),
        _seam.Seam(f"{_FUNCTIONAL}:entropy_from_logits", entropy_from_logits, "logits"),
        _seam.Seam(
            f"{_FUNCTIONAL}:entropy_from_logits_with_chunking", entropy_from_logits_with_chunking, "logits, chunk_size"
        ),
        _seam.Seam(
            "verl.utils.kernel.linear_cross_entropy:linear_cross_entropy",
            linear_cross_entropy,
            "*args, **kwargs",
            _MCORE,
        ),
        _seam.Seam(
            "verl.utils.experimental.torch_functional:FusedLinearForPPO.forward",
            fused_linear_forward,
            "self, hidden_states, vocab_weights, input_ids, temperature",
        ),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
