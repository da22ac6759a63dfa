"""TRL: log-probabilities and entropies of every trainer, from hidden states or from logits, and GRPO's loss, on our kernels.

    from ppo_fast.integrations.trl import GRPOTrainer      # a subclass: nothing else changes

`enable()` is for all trainers of the process:

- The head (`trl.trainer.utils.add_fused_lm_head`) is `pf.linear_log_prob` where log-probs and entropies are asked for: in
  GRPO, RLOO and their experimental kin, and reference models; SFT and KTO ask for more. On a CPU TRL projects prompts and
  padding too and masks afterwards; now, as on a GPU, only tokens that are scored, in every trainer.
- `selective_log_softmax` (of one token or K a position), `entropy_from_logits` and `selective_log_softmax_and_entropy` are
  `pf.categorical_log_prob`. TRL promises the bits of torch's log_softmax for half precision on a CPU, which rounds its
  normaliser too: one in five differs from the rounded log-prob. So those stay its own.
- `GRPOTrainer._compute_loss` is `pf.ppo_loss` on those log-probs for the loss types "grpo", "bnpo", "dr_grpo", "dapo", "luspo",
  "cispo" and "sapo", with TRL's metrics, read from the device once. TRL's own loss, on the log-probs above, computes
  "vespo", an entropy bonus, the auxiliary loss of experts, and ratios of sequences in "cispo", "sapo" or the KL's correction.

Results differ from TRL's in rounding and where TRL's are NaN: at NaNs that are masked, and the entropy of logits of -inf.
TRL's own functions are called for sharded weights (ZeRO-3), tensors of other kinds, dtypes or devices, and a softcap in half
precision.
TRL 1.16 has no PPO trainer any more; `linear_ppo_loss` is not used, as the metrics need the log-probs ahead of the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .. import LossConfig, categorical_log_prob, linear_log_prob, ppo_loss
from ..reference import kl_estimate
from . import _seam

_seam.require("trl", "1.16", "2")
import trl.trainer.grpo_trainer  # noqa: E402
import trl.trainer.utils  # noqa: E402
from trl.kernels import ChunkedLogProbFunction  # noqa: E402

HALF = (torch.bfloat16, torch.float16)
_head = ChunkedLogProbFunction.apply
_on_triton = trl.trainer.utils._use_triton
_on_their_kernel = trl.trainer.utils._supports_trl_loss_kernel
_selective_log_softmax = trl.trainer.utils.selective_log_softmax
_entropy_from_logits = trl.trainer.utils.entropy_from_logits
_both = trl.trainer.utils.selective_log_softmax_and_entropy
_compute_loss = trl.trainer.grpo_trainer.GRPOTrainer._compute_loss


def _plain(*tensors: Tensor | None) -> bool:
    """Tensors that our kernels take: no DTensor and the like, and not a shard that is gathered when needed."""
    return all(
        x is None or (type(x) in (Tensor, torch.nn.Parameter) and x.is_floating_point() and not hasattr(x, "ds_id"))
        for x in tensors
    )


# --- from hidden states ------------------------------------------------------------------------------------------------


def head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, chunk_size: int,
    final_logit_softcapping: float | None = None, logit_scale: float = 1.0, outputs: tuple[str, ...] = ("entropy",),
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """`trl.kernels.ChunkedLogProbFunction.apply`: (log-probs, entropies or None, None, None, None), float32."""
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
    ours = _plain(hidden, weight, bias) and logit_scale > 0 and not set(outputs) - {"log_probs", "entropy"}
    if not ours or (final_logit_softcapping is not None and dtype in HALF):
        return _head(
            hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs
        )
    # softcap·tanh(scale·z/softcap)/T is what ours makes of softcap/scale and T/scale
    log_prob, entropy = linear_log_prob(
        hidden, weight, targets, bias=bias, temperature=temperature / logit_scale,
        softcap=None if final_logit_softcapping is None else final_logit_softcapping / logit_scale,
        entropy="entropy" in outputs,
    )  # fmt: skip
    return log_prob.float(), None if entropy is None else entropy.float(), None, None, None


def scores_only_labels(device: torch.device) -> bool:
    """`trl.trainer.utils._use_triton`, by which its head decides whether it drops positions without a label."""
    return device.type == "cpu" or _on_triton(device)


# --- from logits ------------------------------------------------------------------------------------------------------


def _takes(logits: Tensor, index: Tensor | None = None, row_mask: Tensor | None = None) -> bool:
    """Where results are in our dtype: float32 and float64 on a CPU, and what TRL has its own kernel for, float32 too."""
    if not _plain(logits) or logits.shape[-1] == 0:
        return False
    if logits.device.type != "cpu":
        return _on_triton(logits.device) and _on_their_kernel(logits, index, row_mask)
    if logits.dtype in HALF or index is None:
        return logits.dtype not in HALF
    one = index.shape == logits.shape[:-1]
    many = (
        index.ndim == logits.ndim and index.shape[:-1] == logits.shape[:-1] and index.shape[-1] > 0 and row_mask is None
    )
    masked = row_mask is None or row_mask.shape == index.shape
    return (one or many) and masked and not (index.is_floating_point() or index.dtype is torch.bool)


def _log_prob(
    logits: Tensor, index: Tensor, temperature: float, row_mask: Tensor | None, entropy: bool
) -> tuple[Tensor, Tensor | None]:
    if row_mask is not None:
        index = index.masked_fill(row_mask == 0, -100)
    labels = index.squeeze(-1) if index.ndim == logits.ndim and index.shape[-1] == 1 else index
    ignore_index = None if row_mask is None else -100
    found, h = categorical_log_prob(logits, labels, temperature=temperature, ignore_index=ignore_index, entropy=entropy)
    return found.view(index.shape), h


def selective_log_softmax(
    logits: Tensor, index: Tensor, temperature: float = 1.0, row_mask: Tensor | None = None
) -> Tensor:
    """`trl.trainer.utils.selective_log_softmax`: index [...] or [..., K]."""
    if not _takes(logits, index, row_mask):
        return _selective_log_softmax(logits, index, temperature, row_mask)
    return _log_prob(logits, index, temperature, row_mask, False)[0]


def entropy_from_logits(logits: Tensor, chunk_size: int = 128) -> Tensor:
    """`trl.trainer.utils.entropy_from_logits`."""
    if not _takes(logits):
        return _entropy_from_logits(logits, chunk_size)
    any_token = torch.zeros((), dtype=torch.long, device=logits.device).expand(logits.shape[:-1])
    found = _log_prob(logits, any_token, 1.0, None, True)[1]
    assert found is not None
    return found


def selective_log_softmax_and_entropy(
    logits: Tensor, index: Tensor, entropy_requires_grad: bool = True, temperature: float = 1.0,
    row_mask: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`trl.trainer.utils.selective_log_softmax_and_entropy`: one pass over the logits for both."""
    if not _takes(logits, index, row_mask) or index.ndim == logits.ndim:
        return _both(logits, index, entropy_requires_grad, temperature, row_mask)
    log_prob, entropy = _log_prob(logits, index, temperature, row_mask, True)
    assert entropy is not None
    return log_prob, entropy if entropy_requires_grad else entropy.detach()


# --- the loss of GRPO ---------------------------------------------------------------------------------------------------

CLIPPED = ("grpo", "bnpo", "dr_grpo", "dapo", "luspo")


def config_of(trainer: Any) -> LossConfig | None:
    """The loss that a GRPO trainer is set up for, per token; None where it is more than `LossConfig` says."""
    args, kind, level = trainer.args, trainer.loss_type, trainer.importance_sampling_level
    options: dict[str, Any] = {}
    if trainer.beta != 0.0:
        options = {"kl": "k3", "kl_coef": trainer.beta, "kl_weight": "ratio" if args.use_bias_correction_kl else None}
    if trainer.aux_loss_enabled or trainer._entropy_bonus_enabled or level not in ("token", "sequence"):
        return None
    if level == "sequence" and (kind not in CLIPPED or options.get("kl_weight")):
        return None
    if kind in CLIPPED:
        policy = "ppo" if level == "token" else "gspo"
        bounds = {"clip_low": trainer.epsilon_low, "clip_high": trainer.epsilon_high, "ratio_cap": args.delta}
        return LossConfig.preset("trl_grpo", policy=policy, **bounds, **options)
    if kind == "cispo" and trainer.epsilon_high >= 1:
        return LossConfig.preset(
            "trl_grpo", policy="cispo", clip_low=1.0, clip_high=trainer.epsilon_high - 1, **options
        )
    if kind == "sapo" and min(args.sapo_temperature_pos, args.sapo_temperature_neg) > 0:
        taus = {"sapo_tau_positive": args.sapo_temperature_pos, "sapo_tau_negative": args.sapo_temperature_neg}
        return LossConfig.preset("trl_grpo", policy="sapo", **taus, **options)
    return None


def weights_of(trainer: Any, mask: Tensor, inputs: dict[str, Any], training: bool) -> Tensor:
    """What a token's loss is multiplied by: the mean that the loss type names, over the steps that are accumulated."""
    kind, steps = trainer.loss_type, trainer.current_gradient_accumulation_steps if training else 1.0
    mask = mask.float()
    if kind in ("grpo", "sapo"):
        return mask / (mask.sum(-1, keepdim=True).clamp(min=1.0) * (len(mask) * steps))
    if kind == "bnpo":
        return mask / (mask.sum().clamp(min=1.0) * steps)
    if kind == "dr_grpo":
        return mask / (len(mask) * trainer.max_completion_length * steps)
    if kind == "luspo":
        return mask / (len(mask) * steps)
    items = inputs["num_items_in_batch"].clamp(min=1.0) / trainer.accelerator.num_processes
    return mask / (items * steps / trainer.args.steps_per_generation if training else items)


#: Inputs of a batch that `_get_per_token_logps_and_entropies` hands to the model.
OF_THE_MODEL = (
    "pixel_values", "image_grid_thw", "num_images", "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes",
    "token_type_ids", "mm_token_type_ids", "image_position_ids",
)  # fmt: skip


def compute_loss(self: Any, model: Any, inputs: dict[str, Any]) -> Tensor:
    """`GRPOTrainer._compute_loss`."""
    config = config_of(self)
    if config is None:
        return _compute_loss(self, model, inputs)
    completion, attended = inputs["completion_ids"], inputs["completion_mask"]
    mask = attended * inputs["tool_mask"] if "tool_mask" in inputs else attended
    log_prob, entropy, _ = self._get_per_token_logps_and_entropies(
        model, torch.cat([inputs["prompt_ids"], completion], 1), torch.cat([inputs["prompt_mask"], attended], 1),
        completion.size(1), compute_entropy=True, compute_aux_loss=False, **{x: inputs.get(x) for x in OF_THE_MODEL},
    )  # fmt: skip
    current, entropy = log_prob.detach(), entropy.detach()
    old = inputs.get("old_per_token_logps")
    old = current if old is None else old
    advantages = inputs["advantages"]
    advantages = advantages.unsqueeze(1) if advantages.dim() == 1 else advantages

    scaled = advantages  # all that multiplies a token's policy term; every term is proportional to its advantage
    if self.off_policy_mask_threshold is not None:
        scaled = scaled * self.get_off_policy_mask(
            advantages=advantages, per_token_logps=current, mask=mask,
            sampling_per_token_logps=inputs.get("sampling_per_token_logps", old),
            off_policy_threshold=self.off_policy_mask_threshold,
        )  # fmt: skip
    if self.top_entropy_quantile < 1.0:
        scaled = scaled * self.get_high_entropy_mask(entropy, mask, 1 - self.top_entropy_quantile)
    if self.use_vllm and self.vllm_importance_sampling_correction:
        scaled = scaled * inputs["importance_sampling_ratio"]

    training = self.model.training
    ref = inputs["ref_per_token_logps"] if config.kl is not None else None
    loss = ppo_loss(
        log_prob, old, scaled.expand_as(log_prob), config, ref_log_prob=ref, mask=mask,
        weights=weights_of(self, mask, inputs, training),
    ).loss  # fmt: skip
    metrics = self._metrics["train" if training else "eval"]
    log_metrics(self, metrics, config, current, old, ref, entropy, advantages, mask)
    return loss


@torch.no_grad()
def log_metrics(
    trainer: Any, metrics: Any, config: LossConfig, log_prob: Tensor, old: Tensor, ref: Tensor | None, entropy: Tensor,
    advantages: Tensor, mask: Tensor,
) -> None:  # fmt: skip
    """TRL's metrics, over all processes: one reduction, one gathering, one read."""
    valid = mask != 0
    tokens = valid.sum(-1)
    log_ratio = torch.where(valid, log_prob - old, 0.0)
    sums = {"entropy": torch.where(valid, entropy, 0.0).sum()}
    if ref is not None:
        kl = kl_estimate(ref - log_prob, log_prob, log_ratio, config)
        sums = {"kl": torch.where(valid, kl, 0.0).sum(), **sums}
    counts = dict.fromkeys(sums, tokens.sum())

    if config.policy == "gspo":  # one ratio a sequence
        log_ratio = (log_ratio.sum(-1) / tokens.clamp(min=1)).unsqueeze(-1)
        valid = torch.ones_like(log_ratio, dtype=torch.bool)
    ratio = log_ratio.exp()
    of_rows = {}
    if trainer.loss_type in CLIPPED:
        capped = ratio if config.ratio_cap is None else ratio.clamp(max=config.ratio_cap)
        low = (capped < 1 - config.clip_low) & (advantages < 0) & valid
        high = (capped > 1 + config.clip_high) & (advantages > 0) & valid
        clipped = {"low_mean": low, "high_mean": high, "region_mean": low | high}
        sums |= {f"clip_ratio/{name}": x.sum() for name, x in clipped.items()}
        share = [x.sum(-1) / valid.sum(-1) for x in (low, high)]  # NaN where a sequence has no token
        of_rows = dict(zip(("clip_ratio/low_min", "clip_ratio/high_max"), share, strict=True))
    elif trainer.loss_type == "cispo":
        sums["cispo_clip_ratio"] = ((ratio > trainer.epsilon_high) & (advantages > 0) & valid).sum()
    for name in sums:
        counts.setdefault(name, valid.sum())

    reduce, gather = trainer.accelerator.reduce, trainer.accelerator.gather
    numbers = [x.float() for x in (*sums.values(), *counts.values())]
    totals = reduce(torch.stack(numbers), reduction="sum").view(2, -1)
    read = [totals[0] / totals[1].clamp(min=1.0)]
    if of_rows:
        low, high = gather(torch.stack(list(of_rows.values()), 1)).unbind(1)
        read += [trl.trainer.utils.nanmin(low).view(1), trl.trainer.utils.nanmax(high).view(1)]
    for name, value in zip((*sums, *of_rows), torch.cat(read).tolist(), strict=True):
        metrics[name].append(value)


class GRPOTrainer(trl.GRPOTrainer):
    """`trl.GRPOTrainer` with our loss; its head is ours where the integration is enabled."""

    _compute_loss = compute_loss


_EXPERIMENTS = "trl.experimental"
_integration = _seam.Integration(
    "trl",
    "trl",
    "1.16",
    "2",
    [
        _seam.Seam(
            "trl.kernels.chunked_logprob:ChunkedLogProbFunction.apply",
            staticmethod(head),
            "ctx, hidden, weight, bias, targets, temperature, chunk_size, final_logit_softcapping, logit_scale, outputs",
            parameters_in="forward",
        ),
        _seam.Seam("trl.trainer.utils:_use_triton", scores_only_labels, "device"),
        _seam.Seam(
            "trl.trainer.utils:selective_log_softmax",
            selective_log_softmax,
            "logits, index, temperature, row_mask",
            tuple(
                f"{_EXPERIMENTS}.{name}"
                for name in (
                    "sdpo.sdpo_trainer", "sdpo.loss_utils", "a2po.a2po_trainer", "orpo.orpo_trainer",
                    "sdft.sdft_trainer", "sdft.loss_utils", "cpo.cpo_trainer",
                )
            ),
        ),
        _seam.Seam("trl.trainer.utils:entropy_from_logits", entropy_from_logits, "logits, chunk_size"),
        _seam.Seam(
            "trl.trainer.utils:selective_log_softmax_and_entropy",
            selective_log_softmax_and_entropy,
            "logits, index, entropy_requires_grad, temperature, row_mask",
            (f"{_EXPERIMENTS}.tpo.tpo_trainer",),
        ),
        _seam.Seam("trl.trainer.grpo_trainer:GRPOTrainer._compute_loss", compute_loss, "self, model, inputs"),
    ],
)  # fmt: skip
enable, disable, enabled = _integration.enable, _integration.disable, _integration.enabled
