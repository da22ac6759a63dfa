"""NeMo-RL: GAE, whitening, policy and value loss, and log-probs of its GRPO and PPO on our kernels.

    from ppo_fast.integrations import nemo_rl
    nemo_rl.enable()        # in the driver for the advantages, in every worker for the rest

`GeneralizedAdvantageEstimator` (`algorithms/advantage_estimator.py`) loops over tokens on a CPU: its recursion and its whitening
are ours, a λ per response too. `ClippedPGLossFn` (`algorithms/loss/loss_functions.py`) is `pf.ppo_loss`: PPO, GSPO, CISPO and
REINFORCE, dual clip, its KL, importance sampling of all its kinds, and VAPO's term; `MseValueLossFn` too. The metrics of each are
read in one copy from the device (theirs: one for each). `get_next_token_logprobs_from_logits` (`distributed/model_utils.py`)
is ours where nothing is sharded or filtered: no float32 copy of the logits and none of their log-softmax.
`SequencePackingLossWrapper` (`algorithms/loss/wrapper.py`) is one call over the packed batch where theirs calls the loss once a
sequence: all that it sums is divided by numbers of the global batch. VAPO's term is not, and keeps their loop.

What differs: returns are 0 at masked tokens (theirs: what the recursion carried there), a single valid token is not whitened
(theirs: NaN), the value loss is float32 also of bf16 values. NaN at masked tokens reaches nothing. Where theirs have NaN of a
weight that overflows or of log-probs of -inf, in the KL's gradient and in the Jensen-Shannon divergence, ours are finite. Masks
are 0 or 1.

Theirs still: GRPO's baselines; DTensor, vocabulary and context parallelism, top-k and top-p; half-precision log-probs; a policy
loss with settings that are not known here, or with a dual clip of log-probs (`disable_ppo_ratio` with `ratio_clip_c`).
"""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, categorical_log_prob, gae, ppo_loss, whiten
from ..reference import kl_estimate
from . import _seam

_seam.require("nemo-rl", "0.6", "0.8", "install NeMo-RL from its repository")
from nemo_rl.algorithms.advantage_estimator import GeneralizedAdvantageEstimator  # noqa: E402
from nemo_rl.algorithms.loss import utils as loss_utils  # noqa: E402
from nemo_rl.algorithms.loss.interfaces import LossType  # noqa: E402
from nemo_rl.algorithms.loss.loss_functions import ClippedPGLossFn, MseValueLossFn  # noqa: E402
from nemo_rl.algorithms.loss.wrapper import SequencePackingLossWrapper  # noqa: E402
from nemo_rl.distributed import model_utils  # noqa: E402

#: What NeMo-RL had when this was imported: for calls that ours cannot answer.
theirs = SimpleNamespace(
    compute_gae=GeneralizedAdvantageEstimator._compute_gae,
    reward_whiten=GeneralizedAdvantageEstimator._reward_whiten,
    policy_loss=ClippedPGLossFn.__call__,
    packing=SequencePackingLossWrapper.__call__,
    value_loss=MseValueLossFn.__call__,
    log_probs=model_utils.get_next_token_logprobs_from_logits,
)
_FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def _plain(*tensors: Any, dtypes: tuple[torch.dtype, ...] = _FLOATS) -> bool:
    return all(type(x) is Tensor and x.dtype in dtypes for x in tensors)


def _estimates(mask: Any, *tensors: Any) -> bool:
    """[B, T], plain, of a dtype that results have too, without a gradient."""
    known = _plain(*tensors, dtypes=(torch.float32, torch.float64)) and type(mask) is Tensor and mask.ndim == 2
    shapes = known and all(x.shape == mask.shape and x.device == mask.device for x in tensors)
    return shapes and not (torch.is_grad_enabled() and any(x.requires_grad for x in tensors))


def compute_gae(
    self: Any, token_level_rewards: Tensor, values: Tensor, mask: Tensor, gae_lambda: Tensor | float | None = None
) -> tuple[Tensor, Tensor]:
    lam = self.gae_lambda if gae_lambda is None else gae_lambda
    rates = [x for x in (self.gae_gamma, lam) if not isinstance(x, Tensor)]
    known = all(isinstance(x, (int, float)) and 0.0 <= x <= 1.0 for x in rates)
    if not known or not _estimates(mask, token_level_rewards, values):
        return theirs.compute_gae(self, token_level_rewards, values, mask, gae_lambda)
    advantages, returns = gae(token_level_rewards, values, mask=mask.bool(), gamma=self.gae_gamma, lam=lam, time_dim=1)
    return advantages, returns


def reward_whiten(self: Any, rewards: Tensor, mask: Tensor, shift_mean: bool = True) -> Tensor:
    if not _estimates(mask, rewards):
        return theirs.reward_whiten(self, rewards, mask, shift_mean)
    return whiten(rewards, mask=mask.bool(), eps_in_variance=True, shift_mean=shift_mean)


@functools.lru_cache(maxsize=64)
def _config(**fields: Any) -> LossConfig:
    return LossConfig.preset("nemo_rl", **fields)


# --- policy loss --------------------------------------------------------------------------------------------------------

#: What a `ClippedPGLossFn` is made of; one that has other settings than these is theirs.
_SETTINGS = {
    "use_fused_linear_logprobs", "disable_ppo_ratio", "ratio_clip_min", "ratio_clip_max", "ratio_clip_c",
    "reference_policy_kl_penalty", "reference_policy_kl_type", "kl_input_clamp_value", "kl_output_clamp_value",
    "use_importance_sampling_correction", "truncated_importance_sampling_type", "truncated_importance_sampling_ratio",
    "truncated_importance_sampling_ratio_min", "use_on_policy_kl_approximation", "force_on_policy_ratio",
    "sequence_level_importance_ratios", "positive_example_nll_weight", "loss_type", "use_cispo", "metric_normalizations",
}  # fmt: skip


def _definition(fn: Any, kl_apart: bool = False) -> tuple[LossConfig, LossConfig | None] | None:
    """The policy loss, and its KL where that is a loss of its own: where its weight is not the score, or its log-probs are
    others. None where ours has no such loss."""
    if vars(fn).keys() != _SETTINGS or fn.reference_policy_kl_type not in ("k1", "k2", "k3"):
        return None
    of_log_probs = fn.disable_ppo_ratio and not fn.force_on_policy_ratio
    if of_log_probs and fn.ratio_clip_c is not None:
        return None
    if fn.truncated_importance_sampling_ratio is not None and fn.truncated_importance_sampling_type is None:
        return None
    of_sequences = fn.sequence_level_importance_ratios and not fn.force_on_policy_ratio
    policy = "reinforce" if of_log_probs else "gspo" if of_sequences else "cispo" if fn.use_cispo else "ppo"
    clips = {"clip_low": fn.ratio_clip_min, "clip_high": fn.ratio_clip_max, "dual_clip": fn.ratio_clip_c}
    kl: dict[str, Any] = {"kl": None}
    if fn.reference_policy_kl_penalty != 0:
        kl = {"kl": fn.reference_policy_kl_type, "kl_coef": fn.reference_policy_kl_penalty,
              "kl_clamp": fn.kl_input_clamp_value, "kl_value_clamp": fn.kl_output_clamp_value,
              "kl_weight": "ratio" if fn.use_on_policy_kl_approximation else "score"}  # fmt: skip
    try:
        if kl["kl"] is not None and (kl_apart or fn.use_on_policy_kl_approximation):
            return _config(policy=policy, kl=None, **clips), _config(**kl)
        return _config(policy=policy, **clips, **kl), None
    except (TypeError, ValueError):  # a number that ours refuses: theirs may have a message of its own
        return None


def policy_loss(
    self: Any, next_token_logprobs: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    ours = _clipped(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks)
    return ours or theirs.policy_loss(self, next_token_logprobs, data, global_valid_seqs, global_valid_toks)


def _clipped(
    fn: Any, x: Tensor, data: Any, seqs: Tensor | None, toks: Tensor | None, packed: bool = False
) -> tuple[Tensor, dict[str, Any]] | None:
    """Loss and metrics, `packed`: those that calls for one sequence each would sum to; None where ours has no such loss."""
    penalty = fn.reference_policy_kl_penalty
    unfiltered = data.get("curr_logprobs_unfiltered", x) if penalty != 0 else x
    defined = _definition(fn, unfiltered is not x)
    streams = {"advantages": data["advantages"][:, 1:], "generation": data["generation_logprobs"][:, 1:]}
    if not fn.force_on_policy_ratio:
        streams["old"] = data["prev_logprobs"][:, 1:]
    if penalty != 0:
        streams["reference"] = data["reference_policy_logprobs"][:, 1:]
    known = defined is not None and _plain(x, unfiltered, *streams.values(), dtypes=(torch.float32, torch.float64))
    known = known and all(s.shape == x.shape and s.dtype == x.dtype for s in (unfiltered, *streams.values()))
    mask = data["token_mask"][:, 1:] * data["sample_mask"].unsqueeze(-1)
    if not known or mask.shape != x.shape or any(s.requires_grad for s in streams.values()) or not x.numel():
        return None
    assert defined is not None
    (config, kl_config), reference = defined, streams.get("reference")
    advantages, generation, old = streams["advantages"], streams["generation"], streams.get("old", x.detach())
    batch = _Batch(mask, data, x.dtype, seqs, toks)
    factor, filtered = _importance(fn, torch.where(batch.valid, old - generation, 0.0), batch)
    if fn.use_importance_sampling_correction:
        advantages = advantages * factor
    weights = batch.tokens if fn.loss_type == LossType.TOKEN_LEVEL else batch.sequences
    loss, stats = ppo_loss(
        x, old, advantages, config, ref_log_prob=None if kl_config else reference, mask=batch.valid, weights=weights
    )
    kl, zero = stats.kl, x.new_zeros(())
    if kl_config is not None:
        before, valid = unfiltered.detach(), batch.valid
        if fn.use_on_policy_kl_approximation:  # a weight that overflows counts as 0
            before, valid = generation, valid & (unfiltered.detach() - generation).exp().isfinite()
        nothing = zero.expand(x.shape)
        term = ppo_loss(unfiltered, before, nothing, kl_config, ref_log_prob=reference, mask=valid, weights=weights)
        loss, kl = loss + term.loss, term.stats.kl
    likelihood = zero
    if fn.positive_example_nll_weight > 0 and "rewards" in data:
        correct = mask.to(x.dtype) * (data["rewards"] > 0).unsqueeze(-1)
        likelihood = ppo_loss(
            x, x.detach(), torch.ones_like(zero).expand(x.shape), _config(policy="reinforce", kl=None), mask=correct != 0,
            weights=correct / (correct.sum() + 1e-8),
        ).loss  # fmt: skip
        loss = loss + fn.positive_example_nll_weight * likelihood
    with torch.no_grad():
        if not fn.sequence_level_importance_ratios:
            sampling = batch.mean(factor)
        elif packed:
            sampling = (factor * batch.samples).sum()
        else:  # theirs multiplies [B, 1] by [B]
            sampling = factor.sum() * batch.samples.sum()
        numbers = {
            "loss": loss, **_ratios(config, x, old, stats, batch), "kl_penalty": kl,
            **_mismatch(fn.reference_policy_kl_type, x, old, generation, batch),
            "sampling_importance_ratio": sampling,
            "num_valid_samples": data["sample_mask"].sum(),
            "approx_entropy": -batch.mean((x - generation).exp() * x), **filtered, "positive_nll_loss": likelihood,
            "empty": ~batch.valid.any(),
        }  # fmt: skip
        read = torch.stack([number.to(x.dtype) for number in numbers.values()]).tolist()  # the one copy
    metrics: dict[str, Any] = dict(zip(numbers, read, strict=True))
    if metrics.pop("empty"):
        for name in ("probs_ratio", "probs_ratio_clamped"):
            metrics[f"{name}_min"], metrics[f"{name}_max"] = math.inf, -math.inf
    metrics["kl_penalty"] = metrics["kl_penalty"] or 0
    if not data["sample_mask"].is_floating_point():
        metrics["num_valid_samples"] = int(metrics["num_valid_samples"])
    return loss, metrics


class _Batch:
    """What tokens and sequences count, divided by the numbers of the global batch."""

    def __init__(self, mask: Tensor, data: Any, dtype: torch.dtype, seqs: Any, toks: Any) -> None:
        self.valid, self.seqs = mask != 0, seqs
        self.token_mask, self.sample_mask = data["token_mask"][:, 1:].to(dtype), data["sample_mask"].to(dtype)
        self.tokens = (mask / (toks + 1e-8)).to(dtype)  # [B, T]

    @functools.cached_property
    def samples(self) -> Tensor:  # [B, 1]
        return (self.sample_mask / (self.seqs + 1e-8)).to(self.sample_mask.dtype).unsqueeze(-1)

    @functools.cached_property
    def sequences(self) -> Tensor:
        """Of a mean over each sequence's tokens, [B, T]."""
        return self.token_mask / (self.token_mask.sum(-1, keepdim=True) + 1e-8) * self.samples

    def mean(self, x: Tensor) -> Tensor:
        return (torch.where(self.valid, x, 0.0) * self.tokens).sum()


@torch.no_grad()
def _importance(fn: Any, log_rho: Tensor, batch: _Batch) -> tuple[Tensor, dict[str, Tensor]]:
    """What the engine's sampling changes a token's loss by, [B, T] or of its sequence [B, 1]; and how many are beyond bounds."""
    kind, high = fn.truncated_importance_sampling_type, fn.truncated_importance_sampling_ratio
    low = 0.0 if fn.truncated_importance_sampling_ratio_min is None else fn.truncated_importance_sampling_ratio_min
    of = log_rho.sum(-1, keepdim=True) if fn.sequence_level_importance_ratios else log_rho
    factor = of.exp().nan_to_num_(nan=0.0, posinf=0.0)
    if high is None:
        return factor, {}
    if kind == "seq-mask-tis":
        finite = log_rho.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
        geometric = (finite.sum(-1, keepdim=True) / (batch.token_mask.sum(-1, keepdim=True) + 1e-8)).exp()
        kept = (geometric >= low) & (geometric <= high)
        return factor * kept, {"is_oob_ratio": (~kept * batch.samples).sum()}
    kept = (factor >= low) & (factor <= high)
    out = {"is_oob_ratio": batch.mean((~kept).to(factor.dtype))}
    return (factor.clamp(low, high) if kind == "tis" else torch.where(kept, factor, 0.0)), out


def _ratios(config: LossConfig, x: Tensor, old: Tensor, stats: Any, batch: _Batch) -> dict[str, Tensor]:
    """Mean and bounds of the policy's ratio, and of what is left of it by the clip; of log-probs without a ratio."""
    if config.policy == "reinforce":
        mean = clipped_mean = batch.mean(x)
        bounds = [torch.where(batch.valid, x, math.inf).min(), torch.where(batch.valid, x, -math.inf).max()]
        clipped = bounds
    else:
        low, high = 1.0 - config.clip_low, 1.0 + config.clip_high
        log_ratio = torch.where(batch.valid, x - old, 0.0)
        if config.policy == "gspo":
            log_ratio = log_ratio.sum(-1, keepdim=True) / batch.valid.sum(-1, keepdim=True).clamp(min=1)
        mean, bounds = stats.ratio_mean * batch.tokens.sum(), [stats.ratio_min, stats.ratio_max]
        clipped_mean, clipped = batch.mean(log_ratio.exp().clamp_(low, high)), [b.clamp(low, high) for b in bounds]
    names = ("", "_clamped", "_min", "_max", "_clamped_min", "_clamped_max")
    return {f"probs_ratio{name}": n for name, n in zip(names, (mean, clipped_mean, *bounds, *clipped), strict=True)}


def _mismatch(kind: Any, x: Tensor, old: Tensor, generation: Tensor, batch: _Batch) -> dict[str, Tensor]:
    """How far the engine's log-probs are from the trainer's."""
    log_rho = torch.where(batch.valid, old - generation, 0.0)
    estimate, far = LossConfig(kl=kind), log_rho.abs()
    return {
        "token_mult_prob_error": batch.mean(far.exp()),
        "gen_kl_error": batch.mean(kl_estimate(log_rho, old, log_rho, estimate)),
        "policy_kl_error": batch.mean(kl_estimate(-log_rho, old, log_rho, estimate)),
        # with M the mean of both, its two k3 add up to -log(p/M) - log(q/M), and half of that is log cosh(log ρ/2)
        "js_divergence_error": batch.mean(torch.nn.functional.softplus(-far) + (0.5 * far - math.log(2.0))),
    }


def packed_loss(
    self: Any, next_token_logits: Tensor, data: Any, global_valid_seqs: Tensor | None, global_valid_toks: Tensor | None
) -> tuple[Tensor, dict[str, Any]]:
    """`SequencePackingLossWrapper.__call__`; `next_token_logits`: [1, tokens of all sequences, V]."""
    ids, n = data["input_ids"], self.cu_seqlens_q.numel() - 1
    if not _once(self, next_token_logits, data) or ids.ndim != 2 or len(ids) != n:
        return theirs.packing(self, next_token_logits, data, global_valid_seqs, global_valid_toks)
    padded = self.cu_seqlens_q if self.cu_seqlens_q_padded is None else self.cu_seqlens_q_padded
    device, n_packed, width = next_token_logits.device, next_token_logits.shape[1], ids.shape[1]
    starts, lengths = padded[:-1].long().to(device), self.cu_seqlens_q.diff().to(device)
    step = torch.arange(width, device=device)
    predicts = step[:-1] < lengths[:, None] - 1  # [B, S - 1]: its next token is of its sequence
    place = torch.where(predicts, starts[:, None] + step[:-1], n_packed).flatten()  # beyond the end: nowhere
    targets = ids.new_full((n_packed + 1,), -100, device=device).scatter_(0, place, ids[:, 1:].flatten().to(device))
    log_prob, _ = categorical_log_prob(next_token_logits[0], targets[:-1], ignore_index=-100, entropy=False)
    unpacked = torch.nn.functional.pad(log_prob.float(), (0, 1)).gather(0, place).view(n, width - 1)
    mask = data["token_mask"] * (step < lengths[:, None])
    ours = _clipped(
        self.loss_fn, unpacked, {**data, "token_mask": mask}, global_valid_seqs, global_valid_toks, packed=True
    )
    return ours or theirs.packing(self, next_token_logits, data, global_valid_seqs, global_valid_toks)


def _once(wrapper: Any, logits: Any, data: Any) -> bool:
    """Whether one call over all sequences gives what theirs sums over calls."""
    fn, prepare = wrapper.loss_fn, wrapper.prepare_fn
    given = prepare.keywords if isinstance(prepare, functools.partial) and not prepare.args else {}
    return (
        type(fn).__call__ is policy_loss
        and _definition(fn) is not None
        and not fn.use_fused_linear_logprobs
        and not (fn.positive_example_nll_weight > 0 and "rewards" in data)
        and getattr(prepare, "func", prepare) is loss_utils.prepare_loss_input
        and given.keys() <= {"sampling_params", "d2t", "chunk_size"}
        and not model_utils.need_top_k_or_top_p_filtering(given.get("sampling_params"))
        and wrapper.vocab_parallel_group is None
        and wrapper.context_parallel_group is None
        and _plain(logits)
        and logits.ndim == 3
        and len(logits) == 1
    )


# --- value loss and log-probs -------------------------------------------------------------------------------------------


def value_loss(
    self: Any, logits: Tensor, data: Any, global_valid_seqs: Tensor, global_valid_toks: Tensor
) -> tuple[Tensor, dict[str, Any]]:
    values = logits.squeeze(-1) if logits.ndim > 2 and logits.shape[-1] == 1 else logits
    clip = self.cliprange if self.cliprange and self.cliprange > 0 else None
    returns, old_values = data["returns"], None if clip is None else data["values"]
    mask = data["token_mask"] * data["sample_mask"].unsqueeze(-1)
    streams = [returns] if old_values is None else [returns, old_values]
    known = _plain(values, *streams) and type(mask) is Tensor and mask.shape == values.shape
    if not known or any(x.shape != values.shape or x.requires_grad for x in streams):
        return theirs.value_loss(self, logits, data, global_valid_seqs, global_valid_toks)
    tokens = torch.as_tensor(global_valid_toks, dtype=torch.float32, device=values.device) + 1e-8
    no_policy = values.new_zeros(()).expand(values.shape)
    loss, stats = ppo_loss(
        no_policy, no_policy, no_policy, _config(policy="reinforce", kl=None, value_clip=clip), values=values,
        old_values=old_values, returns=returns, mask=mask, denominator=tokens,
    )  # fmt: skip
    loss = self.scale * loss
    with torch.no_grad():
        valid = mask != 0
        count = valid.sum()
        v, r = (torch.where(valid, x.float(), 0.0) for x in (values, returns))
        lowest, highest = (torch.where(valid, v, bound) for bound in (math.inf, -math.inf))
        sums = torch.stack(
            [stats.value_clip_fraction * count, r.sum(), v.sum(), r.square().sum(), (r - v).square().sum()]
        )
        numbers = torch.cat([torch.stack([loss, lowest.min(), highest.max()]).float(), sums.float() / tokens]).tolist()
    total, low, high, clipped, r_mean, v_mean, r_squared, residual = numbers  # the one copy
    empty = low > high
    return loss, {
        "loss": total, "vf_clipfrac": clipped, "returns_mean": r_mean, "values_mean": v_mean,
        "values_min": 0.0 if empty else low, "values_max": 0.0 if empty else high, "returns_sq_mean": r_squared,
        "residual_sq_mean": residual, "num_valid_samples": int(values.shape[0]),
    }  # fmt: skip


def get_next_token_logprobs_from_logits(
    input_ids: Tensor, next_token_logits: Tensor, seq_index: Tensor | None = None, vocab_parallel_rank: int | None = None,
    vocab_parallel_group: Any = None, context_parallel_group: Any = None, sampling_params: Any = None,
    chunk_size: int | None = None,
) -> Tensor:  # fmt: skip
    filtered = model_utils.need_top_k_or_top_p_filtering(sampling_params)
    if vocab_parallel_group is not None or filtered or not _plain(next_token_logits):
        return theirs.log_probs(
            input_ids, next_token_logits, seq_index, vocab_parallel_rank, vocab_parallel_group, context_parallel_group,
            sampling_params, chunk_size,
        )  # fmt: skip
    tokens = input_ids[:, 1:].to(next_token_logits.device)  # of a packed sequence there may be logits of padding beyond
    return categorical_log_prob(next_token_logits[:, : tokens.shape[1]], tokens, entropy=False)[0].float()


_ALGORITHMS, _UTILS = "nemo_rl.algorithms", "nemo_rl.distributed.model_utils"
_integration = _seam.Integration(
    "nemo_rl",
    "nemo-rl",
    "0.6",
    "0.8",
    [
        _seam.Seam(
            f"{_ALGORITHMS}.advantage_estimator:GeneralizedAdvantageEstimator._compute_gae",
            compute_gae,
            _seam.parameters_of(compute_gae),
        ),
        _seam.Seam(
            f"{_ALGORITHMS}.advantage_estimator:GeneralizedAdvantageEstimator._reward_whiten",
            reward_whiten,
            _seam.parameters_of(reward_whiten),
        ),
        _seam.Seam(
            f"{_ALGORITHMS}.loss.loss_functions:ClippedPGLossFn.__call__", policy_loss, _seam.parameters_of(policy_loss)
        ),
        _seam.Seam(
            f"{_ALGORITHMS}.loss.wrapper:SequencePackingLossWrapper.__call__",
            packed_loss,
            _seam.parameters_of(packed_loss),
        ),
        _seam.Seam(
            f"{_ALGORITHMS}.loss.loss_functions:MseValueLossFn.__call__", value_loss, _seam.parameters_of(value_loss)
        ),
        _seam.Seam(
            f"{_UTILS}:get_next_token_logprobs_from_logits",
            get_next_token_logprobs_from_logits,
            _seam.parameters_of(get_next_token_logprobs_from_logits),
            (f"{_ALGORITHMS}.loss.utils",),
        ),
    ],
)
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
