"""Every op in plain torch: the specification that kernels are held to, and the path for what kernels do not take.

Differentiable, any device, any float dtype: arithmetic in float32, in float64 where an input is float64. Readable
before fast. What an op means, its shapes and its errors stand in `ppo_fast/ops/<op>.py`; here stands only how.
A row that a mask excludes is replaced by a constant *before* any arithmetic, so nothing it holds (NaN, Inf) can reach
a value or a gradient.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .config import LossConfig
from .outputs import PPOLoss, Stats
from .reductions import moments as _moments
from .reductions import normalized, token_weights
from .sequences import sequence_loss

_FAR = 60.0  # exp(60) is finite in float32 and beyond every clip: past it a clipped branch is constant


def _compute_dtype(*tensors: Tensor | None) -> torch.dtype:
    double = any(t is not None and t.dtype == torch.float64 for t in tensors)
    return torch.float64 if double else torch.float32


def _where(keep: Tensor | None, x: Tensor, other: float = 0.0) -> Tensor:
    return x if keep is None else torch.where(keep, x, other)


# --- advantages -------------------------------------------------------------------------------------------------------


class _Steps:
    """Trajectories as [T, N] with everything that an estimator must not read already replaced."""

    def __init__(
        self,
        x: Tensor,
        last_values: Tensor | None,
        terminated: Tensor | None,
        truncated: Tensor | None,
        final_values: Tensor | tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
        time_dim: int,
        dtype: torch.dtype,
        carry: bool = True,
    ) -> None:
        self.shape, self.time_dim, self.dtype = x.shape, time_dim, dtype
        self.n = math.prod(size for d, size in enumerate(x.shape) if d != time_dim % x.ndim)  # 0 columns too

        def rows(flag: Tensor | None) -> Tensor | None:
            return None if flag is None else self.rows(flag != 0)

        never = torch.zeros((x.shape[time_dim], self.n), dtype=torch.bool, device=x.device)
        self.mask = rows(mask)
        self.carry_mask = self.mask if carry else None
        ended = rows(terminated)
        self.terminated = never if ended is None else ended
        cut = rows(truncated)
        self.truncated = never if cut is None else cut & ~self.terminated
        if isinstance(final_values, tuple):
            index, value = final_values
            dense = torch.zeros(x.numel(), dtype=dtype, device=x.device)
            final_values = dense.index_put((index.long(),), value.to(dtype)).view(x.shape)
        if final_values is None:
            self.final = torch.zeros((), dtype=dtype, device=x.device).expand(never.shape)
        else:
            self.final = _where(self.truncated, self.rows(final_values.to(dtype)))
        zeros = torch.zeros(self.n, dtype=dtype, device=x.device)
        self.last = zeros if last_values is None else last_values.to(dtype).reshape(self.n)

    def rows(self, x: Tensor) -> Tensor:
        """[..., T, ...] -> [T, N]."""
        return x.movedim(self.time_dim, 0).reshape(x.shape[self.time_dim], self.n)

    def read(self, x: Tensor) -> Tensor:
        return _where(self.mask, self.rows(x.to(self.dtype)))

    def write(self, rows: list[Tensor]) -> Tensor:
        """The list of [N] rows, latest first, as the caller's shape; masked rows are 0."""
        if not rows:
            return torch.zeros(self.shape, dtype=self.dtype, device=self.last.device)
        out = _where(self.mask, torch.stack(rows[::-1]))
        shape = list(self.shape)
        shape.insert(0, shape.pop(self.time_dim))
        return out.reshape(shape).movedim(0, self.time_dim)

    def scan(self, step: Callable[[int, Tensor, Tensor], tuple[Tensor, Tensor]], values: Tensor) -> list[Tensor]:
        """Backwards over time: step(t, bootstrap, trace) -> (out, trace); masked steps are stepped over."""
        trace = torch.zeros_like(self.last)
        next_value, outs = self.last, []
        for t in range(values.shape[0] - 1, -1, -1):
            cut = self.terminated[t] | self.truncated[t]
            bootstrap = torch.where(cut, self.final[t].expand_as(next_value), next_value)
            out, new_trace = step(t, bootstrap, torch.where(cut, 0.0, trace))
            keep = None if self.carry_mask is None else self.carry_mask[t]
            trace = new_trace if keep is None else torch.where(keep, new_trace, trace)
            next_value = values[t] if keep is None else torch.where(keep, values[t], next_value)
            outs.append(out)
        return outs


def _packed(op: Callable[..., tuple[Tensor, ...]], cu_seqlens: Tensor, streams: dict, per_row: dict, **rest):
    """Runs `op` on every piece of packed 1-D inputs and joins the results."""
    pieces = []
    bounds = cu_seqlens.tolist()
    for s, (a, b) in enumerate(itertools.pairwise(bounds)):
        cut = {k: None if v is None else v[a:b] for k, v in streams.items()}
        rows = {k: v[s] if isinstance(v, Tensor) else v for k, v in per_row.items()}
        pieces.append(op(**cut, **rows, **rest))
    return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


def gae(
    rewards, values, last_values=None, *, terminated=None, truncated=None, final_values=None, mask=None,
    mask_mode="carry", cu_seqlens=None, gamma=0.99, lam=0.95, time_dim=0, moments=False,
):  # fmt: skip
    """δ_t = r_t + γ·V_{t+1} - V_t;  A_t = δ_t + γλ·A_{t+1};  returns = A + V."""
    if moments:
        advantages, returns = gae(
            rewards, values, last_values, terminated=terminated, truncated=truncated, final_values=final_values, mask=mask,
            mask_mode=mask_mode, cu_seqlens=cu_seqlens, gamma=gamma, lam=lam, time_dim=time_dim,
        )  # fmt: skip
        return advantages, returns, moments_of(advantages, mask)
    if cu_seqlens is not None:
        if isinstance(final_values, tuple):
            index, value = final_values
            final_values = torch.zeros_like(values, dtype=value.dtype).index_put((index.long(),), value)
        streams = {"rewards": rewards, "values": values, "terminated": terminated, "truncated": truncated,
                   "final_values": final_values, "mask": mask}  # fmt: skip
        per_row = {"last_values": last_values, "gamma": gamma, "lam": lam}
        if len(cu_seqlens) < 2:
            return torch.zeros_like(rewards), torch.zeros_like(values)
        return _packed(gae, cu_seqlens, streams, per_row, mask_mode=mask_mode)
    dtype = _compute_dtype(rewards, values)
    s = _Steps(
        rewards, last_values, terminated, truncated, final_values, mask, time_dim, dtype, carry=mask_mode == "carry"
    )
    r, v = s.read(rewards), s.read(values)
    gamma, lam = _per_row(gamma, dtype), _per_row(lam, dtype)

    def step(t, bootstrap, trace):
        advantage = (r[t] + gamma * bootstrap - v[t]) + gamma * lam * trace
        return advantage, advantage

    advantages = s.write(s.scan(step, v))
    return advantages, advantages + s.write(list(v.unbind(0))[::-1])


def vtrace(
    log_rhos, rewards, values, last_values=None, *, terminated=None, truncated=None, final_values=None, mask=None,
    gamma=0.99, lam=1.0, rho_clip=1.0, c_clip=1.0, time_dim=0,
):  # fmt: skip
    """V-trace targets and policy-gradient advantages (arXiv 1802.01561, eq. 1; λ as in its remark 2)."""
    dtype = _compute_dtype(log_rhos, rewards, values)
    s = _Steps(rewards, last_values, terminated, truncated, final_values, mask, time_dim, dtype)
    rho, r, v = s.read(log_rhos).exp(), s.read(rewards), s.read(values)
    gamma, lam = _per_row(gamma, dtype), _per_row(lam, dtype)
    clipped_rho, c = rho.clamp(max=rho_clip), lam * rho.clamp(max=c_clip)
    advantages = []

    def step(t, bootstrap, trace):
        td_error = clipped_rho[t] * (r[t] + gamma * bootstrap - v[t])
        advantages.append(clipped_rho[t] * (r[t] + gamma * (bootstrap + trace) - v[t]))
        new_trace = td_error + gamma * c[t] * trace
        return v[t] + new_trace, new_trace

    targets = s.scan(step, v)
    return s.write(targets), s.write(advantages)


def discounted_returns(
    rewards, last_values=None, *, terminated=None, truncated=None, final_values=None, mask=None, gamma=0.99,
    time_dim=0,
):  # fmt: skip
    """R_t = r_t + γ·R_{t+1}, started from `last_values`."""
    dtype = _compute_dtype(rewards)
    s = _Steps(rewards, last_values, terminated, truncated, final_values, mask, time_dim, dtype)
    r = s.read(rewards)
    gamma = _per_row(gamma, dtype)

    def step(t, bootstrap, trace):  # the trace is the return itself; only a boundary bootstraps from a value
        ret = r[t] + gamma * (bootstrap + trace)
        return ret, ret

    return s.write(s.scan(step, torch.zeros_like(r)))


def _per_row(x: float | Tensor, dtype: torch.dtype) -> float | Tensor:
    return x.to(dtype).reshape(-1) if isinstance(x, Tensor) else x


# --- whitening --------------------------------------------------------------------------------------------------------


def moments_of(x, mask=None):
    """What whitening needs of the valid elements, float64 [3]: their count, mean m and Σ (x - m)²."""
    count, mean, variance = _moments(x.double(), None if mask is None else mask != 0, 0)
    return torch.stack([count, mean, variance * count.clamp(min=1.0)])


def whiten(x, *, mask=None, ddof=1, eps=1e-8, shift_mean=True, eps_in_variance=False, moments=None):
    """(x - mean) / (std + eps) over the valid elements; one element (count <= ddof) is left as it is."""
    x = x.to(_compute_dtype(x))
    valid = None if mask is None else mask != 0
    if moments is None:
        count, mean, var = _moments(x, valid, ddof)
    else:
        count, mean, m2 = moments
        count, mean, var = (y.to(x.dtype) for y in (count, mean, m2 / (count - ddof).clamp(min=1.0)))
    scale = (var + eps).sqrt() if eps_in_variance else var.sqrt() + eps
    y = (_where(valid, x) - mean) / scale
    y = y if shift_mean else y + mean
    return _where(valid, torch.where(count > ddof, y, x))


# --- log-probabilities ------------------------------------------------------------------------------------------------


def categorical_log_prob(
    logits, actions, *, temperature=1.0, action_mask=None, ignore_index=None, entropy=True, inplace_backward=False,
):  # fmt: skip
    """log softmax(logits / temperature)[action] and -Σ p·log p; an action of probability 0 adds 0 to the entropy."""
    z = logits.to(_compute_dtype(logits))
    labels = actions.long() if actions.ndim == z.ndim else actions.long()[..., None]  # K a row, or one
    counts = torch.ones_like(labels, dtype=torch.bool) if ignore_index is None else labels != ignore_index
    live = counts.any(-1)
    z = torch.where(live[..., None], z, 0.0)
    z = z / (temperature[..., None] if isinstance(temperature, Tensor) and temperature.ndim else temperature)
    if action_mask is not None:
        z = torch.where(action_mask != 0, z, -math.inf)
    possible = z != -math.inf
    live = live & possible.any(-1)
    z = torch.where(live[..., None], z, 0.0)
    log_p = z.log_softmax(-1)
    counts = counts & live[..., None]
    log_prob = torch.where(counts, log_p.gather(-1, torch.where(counts, labels, 0)), 0.0)
    log_prob = log_prob if actions.ndim == z.ndim else log_prob.squeeze(-1)
    if not entropy:
        return log_prob, None
    log_p = torch.where(possible, log_p, 0.0)
    plogp = torch.where(possible, log_p.exp() * log_p, 0.0)
    return log_prob, torch.where(live, -plogp.sum(-1), 0.0)


def linear_logits(hidden, weight, bias=None, softcap=None):
    """softcap(hidden·Wᵀ + bias), in the wider dtype of both, or autocast's."""
    kind = hidden.device.type
    if not (torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)):  # "meta" has none to ask about
        dtype = torch.promote_types(hidden.dtype, weight.dtype)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    logits = torch.nn.functional.linear(hidden, weight, bias)
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def linear_log_prob(
    hidden, weight, targets, *, bias=None, temperature=1.0, softcap=None, ignore_index=None, entropy=True,
):  # fmt: skip
    """`categorical_log_prob` of all logits at once."""
    if ignore_index is not None:
        hidden = torch.where((targets != ignore_index)[..., None], hidden, 0.0)
    logits = linear_logits(hidden, weight, bias, softcap)
    return categorical_log_prob(
        logits, targets, temperature=temperature, ignore_index=ignore_index, entropy=entropy
    )  # fmt: skip


def multi_categorical_log_prob(logits, actions, nvec: Sequence[int], *, action_mask=None, entropy=True):
    """Independent categoricals side by side: sums over the heads."""
    masks = [None] * len(nvec) if action_mask is None else action_mask.split(list(nvec), -1)
    heads = [
        categorical_log_prob(z, a, action_mask=m, entropy=entropy)
        for z, a, m in zip(logits.split(list(nvec), -1), actions.unbind(-1), masks, strict=True)
    ]
    return sum(h[0] for h in heads), sum(h[1] for h in heads) if entropy else None


def _softplus(x: Tensor) -> Tensor:
    """log(1 + e^x); torch's own turns into x at 20, which float64 notices."""
    return -torch.nn.functional.logsigmoid(-x)


def bernoulli_log_prob(logits, actions, *, entropy=True):
    """Σ_d a·z - softplus(z); the entropy of one is σ(z)·softplus(-z) + σ(-z)·softplus(z), and 0 where z = ±inf."""
    z = logits.to(_compute_dtype(logits))
    one = actions != 0
    # log σ(z) and log σ(-z), each chosen before it is multiplied: 0·inf cannot happen
    log_prob = torch.where(one, -_softplus(-z), -_softplus(z)).sum(-1)
    if not entropy:
        return log_prob, None
    certain = z.isinf()
    z = torch.where(certain, 0.0, z)
    h = z.sigmoid() * _softplus(-z) + (-z).sigmoid() * _softplus(z)
    return log_prob, torch.where(certain, 0.0, h).sum(-1)


_HALF_LOG_2PI = 0.5 * math.log(2 * math.pi)


def normal_log_prob(mean, log_std, actions, *, squash=False, entropy=True):
    """Σ_d -z²/2 - log_std - ½·log 2π, z = (a - mean)·exp(-log_std); squash subtracts log(1 - tanh² a) in its stable form."""
    dtype = _compute_dtype(mean, log_std, actions)
    mean, log_std, actions = mean.to(dtype), log_std.to(dtype), actions.to(dtype)
    z = (actions - mean) * (-log_std).exp()
    log_prob = -0.5 * z.square() - log_std - _HALF_LOG_2PI
    if squash:
        log_prob = log_prob - 2.0 * (math.log(2.0) - actions - _softplus(-2.0 * actions))
    log_prob = log_prob.sum(-1)
    if not entropy:
        return log_prob, None
    if squash:  # no closed form: the one-sample estimate
        return log_prob, -log_prob
    return log_prob, (log_std + (0.5 + _HALF_LOG_2PI)).expand(mean.shape).sum(-1)


def beta_log_prob(alpha, beta, actions, *, low=0.0, high=1.0, entropy=True):
    """Σ_d (α-1)·log x + (β-1)·log(1-x) - log B(α, β) - log(high - low), x = (a - low)/(high - low)."""
    dtype = _compute_dtype(alpha, beta, actions)
    alpha, beta = alpha.to(dtype), beta.to(dtype)
    width = high - low
    log_width = width.to(dtype).log() if isinstance(width, Tensor) else math.log(width)
    x = (actions.to(dtype) - low) / width
    total = alpha + beta
    log_norm = alpha.lgamma() + beta.lgamma() - total.lgamma() + log_width
    log_prob = (torch.xlogy(alpha - 1, x) + torch.special.xlog1py(beta - 1, -x) - log_norm).sum(-1)
    if not entropy:
        return log_prob, None
    h = log_norm - (alpha - 1) * alpha.digamma() - (beta - 1) * beta.digamma() + (total - 2) * total.digamma()
    return log_prob, h.sum(-1)


# --- losses -----------------------------------------------------------------------------------------------------------


def surrogate(d: Tensor, advantages: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Clipped policy loss per token and where its dual clip is at work."""
    bounded = (advantages > 0) | (config.ratio_cap is not None) | (config.dual_clip is not None)
    ratio = torch.where(bounded & (d > _FAR), _FAR, d).exp()  # constant there anyway; keeps 0·inf out of the backward
    unclipped = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
    clipped = ratio.clamp(1.0 - config.clip_low, 1.0 + config.clip_high)
    loss = torch.maximum(-advantages * unclipped, -advantages * clipped)
    if config.dual_clip is None:
        return loss, torch.zeros_like(loss, dtype=torch.bool)
    ceiling = -config.dual_clip * advantages
    active = (advantages < 0) & (loss > ceiling)
    return torch.where(advantages < 0, torch.minimum(loss, ceiling), loss), active


class PolicyTerm(NamedTuple):
    """Of each token: the loss, where its ratio is clipped (DPPO: where it is left out), where its dual clip is at work."""

    loss: Tensor
    low: Tensor
    high: Tensor
    dual_clipped: Tensor


def policy_term(
    log_prob: Tensor, old_log_prob: Tensor, d: Tensor, advantages: Tensor, config: LossConfig
) -> PolicyTerm:
    """Loss per token of a token policy; d = log_prob - old_log_prob, inside its clamp."""
    ratio = d.exp()
    constant = ratio.detach()
    low, high = constant < 1.0 - config.clip_low, constant > 1.0 + config.clip_high
    dual_clipped = torch.zeros_like(low)
    if config.policy == "ppo":
        loss, dual_clipped = surrogate(d, advantages, config)
    elif config.policy == "cispo":
        loss = -advantages * constant.clamp(1.0 - config.clip_low, 1.0 + config.clip_high) * log_prob
    elif config.policy == "sapo":
        tau = torch.full_like(d, config.sapo_tau_negative).masked_fill(advantages > 0, config.sapo_tau_positive)
        near = torch.where(d > _FAR, _FAR, d).exp()  # the sigmoid is 1 there and beyond
        loss = -advantages * (torch.sigmoid(tau * (near - 1.0)) * 4.0 / tau)
    elif config.policy in ("dppo_tv", "dppo_kl"):
        low, high = _too_far(log_prob.detach(), old_log_prob, advantages, config)
        capped = constant if config.ratio_cap is None else constant.clamp(max=config.ratio_cap)
        loss = torch.where(low | high, 0.0, -advantages * capped * log_prob)
    elif config.policy == "dro":
        loss = -(log_prob * advantages - 0.5 * config.dro_beta * d.square())
    elif config.policy == "reinforce":
        loss = -advantages * log_prob
    else:
        loss = -advantages * ratio
    return PolicyTerm(loss, low, high, dual_clipped)


def _too_far(log_prob: Tensor, old_log_prob: Tensor, advantages: Tensor, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Where DPPO leaves a token out because its probability p went too far from q, below and above; NaN nowhere."""
    p, q = log_prob.exp(), old_log_prob.exp()
    up, down = advantages > 0, advantages <= 0
    if config.policy == "dppo_tv":
        return down & (p - q < -config.clip_low), up & (p - q > config.clip_high)
    kl = q * (old_log_prob - log_prob) + (1.0 - q) * torch.log((1.0 - q + 1e-8) / (1.0 - p + 1e-8))
    return down & (kl > config.clip_low) & (p < q), up & (kl > config.clip_high) & (p > q)


def value_penalty(error: Tensor, config: LossConfig) -> Tensor:
    """f(e), which `value_half` halves as a whole."""
    squared = error.square()
    if config.value_loss == "huber":
        delta = config.huber_delta
        squared = torch.where(error.abs() <= delta, squared, 2.0 * delta * error.abs() - delta * delta)
    return squared


def value_loss(values, old_values, returns, config: LossConfig) -> tuple[Tensor, Tensor]:
    """Value loss per token and where its clip is at work."""
    loss = value_penalty(values - returns, config)
    clipped = torch.zeros_like(loss, dtype=torch.bool)
    clip = config.value_clip
    if clip is not None and config.value_clip_mode == "error":
        loss, clipped = loss.clamp(max=clip), loss > clip
    elif clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        near_loss = value_penalty(near - returns, config)
        if config.value_clip_mode == "max":
            outside = (values - old_values).abs() > clip  # inside, the two differ by rounding only
            loss, clipped = torch.maximum(loss, near_loss), (near_loss > loss) & outside
        else:
            loss, clipped = near_loss, (values - old_values).abs() > clip
    return (0.5 * loss if config.value_half else loss), clipped


def kl_estimate(u: Tensor, log_prob: Tensor, d: Tensor, config: LossConfig) -> Tensor:
    """Per-token estimate of KL(policy || reference) from u = ref_log_prob - log_prob."""
    unclamped = u
    if config.kl_clamp is not None:
        u = u.clamp(-config.kl_clamp, config.kl_clamp)
    cap = config.kl_value_clamp
    if config.kl == "k1":
        k = -u
    elif config.kl == "abs":
        k = u.abs()
    elif config.kl == "k2":
        k = 0.5 * u.square()
    else:
        if cap is not None and config.kl_weight != "ratio":
            # beyond, the clamp below holds; without this its zero gradient meets exp(u) = inf
            u = u.clamp(max=math.log(2.0 * cap + 100.0))
        k = torch.expm1(u) - u
    if config.kl_weight is not None:
        weight = d.exp() if config.kl_weight == "ratio" else (log_prob - log_prob.detach()).exp()
        if config.kl_clamp is not None:  # outside, there is no gradient at all
            weight = torch.where(unclamped.abs() > config.kl_clamp, weight.detach(), weight)
        k = weight * k
    if cap is not None:
        k = k.clamp(-cap, cap)
    if config.kl_gradient == "k2":
        half_square = 0.5 * unclamped.square()
        k = k.detach() + (half_square - half_square.detach())
    return k


def ppo_loss(
    log_prob, old_log_prob, advantages, config=None, *, values=None, old_values=None, returns=None, entropy=None,
    ref_log_prob=None, rollout_log_prob=None, mask=None, cu_seqlens=None, weights=None, denominator=None,
) -> PPOLoss:  # fmt: skip
    """Σ_t w_t·(policy + value_coef·value - entropy_coef·entropy + kl_coef·kl), and all statistics."""
    config = LossConfig() if config is None else config
    if config.forms:
        return sequence_loss(
            "ppo_loss", ppo_loss, log_prob, old_log_prob, advantages, config, values=values, old_values=old_values,
            returns=returns, entropy=entropy, ref_log_prob=ref_log_prob, rollout_log_prob=rollout_log_prob, mask=mask,
            cu_seqlens=cu_seqlens, weights=weights, denominator=denominator,
        )  # fmt: skip
    dtype = _compute_dtype(log_prob, values, entropy)
    valid = None if mask is None else mask != 0

    def read(x: Tensor | None, constant: bool = True) -> Tensor | None:
        if x is None:
            return None
        return _where(valid, (x.detach() if constant else x).to(dtype))

    log_prob, values, entropy = read(log_prob, False), read(values, False), read(entropy, False)
    old_log_prob, advantages, returns, old_values = map(read, (old_log_prob, advantages, returns, old_values))
    ref_log_prob, rollout_log_prob = read(ref_log_prob), read(rollout_log_prob)
    w = token_weights(log_prob, valid, config.reduction, weights, denominator, cu_seqlens)

    if config.normalize_advantages:
        advantages = normalized(advantages, valid, config.advantage_ddof, config.advantage_eps)

    d = log_prob - old_log_prob
    if config.log_ratio_clamp is not None:
        d = d.clamp(-config.log_ratio_clamp, config.log_ratio_clamp)
    policy, low, high, dual_clipped = policy_term(log_prob, old_log_prob, d, advantages, config)
    if config.rollout_correction is not None:
        rho = (old_log_prob - rollout_log_prob).exp()
        if config.rollout_correction == "tis":
            rho = rho.clamp(max=config.rollout_high)
        else:
            rho = torch.where((rho >= config.rollout_low) & (rho <= config.rollout_high), rho, 0.0)
        policy = policy * rho

    def total(x: Tensor) -> Tensor:
        return (w * _where(valid, x)).sum()

    zero = torch.zeros((), dtype=dtype, device=log_prob.device)
    policy_loss, value_term, entropy_term, kl_term = total(policy), zero, zero, zero
    value_clipped = torch.zeros_like(dual_clipped)
    if values is not None:
        per_token, value_clipped = value_loss(values, old_values, returns, config)
        value_term = total(per_token)
    if entropy is not None:
        entropy_term = total(entropy)
    if config.kl is not None:
        kl_term = total(kl_estimate(ref_log_prob - log_prob, log_prob, d, config))
    loss = policy_loss + config.value_coef * value_term - config.entropy_coef * entropy_term + config.kl_coef * kl_term

    with torch.no_grad():
        ratio = d.exp()
        count = zero + d.numel() if valid is None else valid.sum().to(dtype)
        empty = count == 0

        def mean_of(x: Tensor) -> Tensor:
            return _where(valid, x.to(dtype)).sum() / count.clamp(min=1.0)

        padded = torch.cat([_where(valid, ratio, math.inf).flatten(), zero[None] + math.inf])
        ratio_min = torch.where(empty, 0.0, padded.amin())
        padded = torch.cat([_where(valid, ratio, -math.inf).flatten(), zero[None] - math.inf])
        ratio_max = torch.where(empty, 0.0, padded.amax())
        ratio_mean = mean_of(ratio)
        ess = torch.where(empty, 0.0, ratio_mean.square() / mean_of(ratio.square()))
        explained = zero + math.nan
        if values is not None and returns is not None:
            variance = _moments(returns, valid, 0)[2]
            residual = _moments(returns - values, valid, 0)[2]
            explained = torch.where(variance > 0, 1.0 - residual / variance, math.nan)
        stats = [
            policy_loss, value_term, entropy_term, kl_term, mean_of(torch.expm1(d) - d), mean_of(-d), mean_of(low | high),
            mean_of(low), mean_of(high), mean_of(dual_clipped), mean_of(value_clipped), ratio_mean, ratio_min, ratio_max,
            ess, explained,
        ]  # fmt: skip
        vector = torch.stack([s.detach().to(dtype) for s in stats])
    return PPOLoss(loss, Stats(vector))


def linear_ppo_loss(
    hidden, weight, targets, config, rollout, bias=None, temperature=1.0, softcap=None, values=None, cu_seqlens=None,
    denominator=None,
) -> PPOLoss:  # fmt: skip
    """`linear_log_prob`, then `ppo_loss`. rollout: (old_log_prob, advantages, old_values, returns, ref_log_prob,
    rollout_log_prob, mask, weights)."""
    old_log_prob, advantages, old_values, returns, ref_log_prob, rollout_log_prob, mask, weights = rollout
    hidden, targets = _valid_rows(mask, hidden, targets)
    log_prob, h = linear_log_prob(hidden, weight, targets, bias=bias, temperature=temperature, softcap=softcap)
    return ppo_loss(
        log_prob, old_log_prob, advantages, config, values=values, old_values=old_values, returns=returns, entropy=h,
        ref_log_prob=ref_log_prob, rollout_log_prob=rollout_log_prob, mask=mask, cu_seqlens=cu_seqlens, weights=weights,
        denominator=denominator,
    )  # fmt: skip


def _minibatch(rows: torch.Size, index: Tensor | None, action_ndim: int, stored: dict[str, Any]) -> dict[str, Any]:
    """What the rollout stored, as rows of the minibatch: gathered by `index` if there is one."""
    if index is None:
        return stored
    event_ndim = {"actions": action_ndim, "action_mask": 1}
    out = {}
    for name, x in stored.items():
        event = () if x is None else x.shape[x.ndim - event_ndim.get(name, 0) :]
        out[name] = None if x is None else x.reshape(-1, *event)[index.long()].reshape(*rows, *event)
    return out


def _valid_rows(mask: Tensor | None, *params: Tensor) -> tuple[Tensor, ...]:
    """Distribution parameters and actions with the rows that the mask excludes replaced by 0."""
    if mask is None:
        return params
    keep = mask != 0
    return tuple(torch.where(keep[..., None] if p.ndim > keep.ndim else keep, p, 0) for p in params)


def categorical_ppo_loss(
    logits, actions, old_log_prob, advantages, config=None, *, values=None, old_values=None, returns=None,
    ref_log_prob=None, rollout_log_prob=None, mask=None, cu_seqlens=None, weights=None, denominator=None,
    action_mask=None, index=None, parts=None,
) -> PPOLoss:  # fmt: skip
    """`categorical_log_prob`, then `ppo_loss`; `parts`: other implementations of the two."""
    log_prob_of, loss_of = parts or (categorical_log_prob, ppo_loss)
    stored = {"actions": actions, "action_mask": action_mask, "old_log_prob": old_log_prob, "advantages": advantages,
              "old_values": old_values, "returns": returns, "ref_log_prob": ref_log_prob,
              "rollout_log_prob": rollout_log_prob, "mask": mask, "weights": weights}  # fmt: skip
    stored = _minibatch(logits.shape[:-1], index, 0, stored)
    logits, actions = _valid_rows(stored["mask"], logits, stored.pop("actions"))
    log_prob, h = log_prob_of(logits, actions, action_mask=stored.pop("action_mask"))
    return loss_of(
        log_prob, config=config, values=values, entropy=h, cu_seqlens=cu_seqlens, denominator=denominator, **stored
    )


def normal_ppo_loss(
    mean, log_std, actions, old_log_prob, advantages, config=None, *, values=None, old_values=None, returns=None,
    ref_log_prob=None, rollout_log_prob=None, mask=None, cu_seqlens=None, weights=None, denominator=None, index=None,
    squash=False, parts=None,
) -> PPOLoss:  # fmt: skip
    """`normal_log_prob`, then `ppo_loss`; `parts`: other implementations of the two."""
    log_prob_of, loss_of = parts or (normal_log_prob, ppo_loss)
    stored = {"actions": actions, "old_log_prob": old_log_prob, "advantages": advantages, "old_values": old_values,
              "returns": returns, "ref_log_prob": ref_log_prob, "rollout_log_prob": rollout_log_prob, "mask": mask,
              "weights": weights}  # fmt: skip
    stored = _minibatch(mean.shape[:-1], index, 1, stored)
    mask = stored["mask"]
    mean, actions = _valid_rows(mask, mean, stored.pop("actions").to(_compute_dtype(mean, log_std, values)))
    if log_std.ndim == mean.ndim and log_std.shape[:-1] == mean.shape[:-1]:
        (log_std,) = _valid_rows(mask, log_std)
    log_prob, h = log_prob_of(mean, log_std, actions, squash=squash)
    return loss_of(
        log_prob, config=config, values=values, entropy=h, cu_seqlens=cu_seqlens, denominator=denominator, **stored
    )
