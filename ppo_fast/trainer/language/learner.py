"""From scored responses to new parameters: log-probs, advantages, then epochs of minibatches.

Every mean of the loss is made of weights that are known before the first forward: weights over a whole minibatch, by
`reductions`, of which a micro-batch takes its rows. So gradients add up to the same sum however a minibatch is split.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

import ppo_fast as pf
from ppo_fast import advantages as estimators
from ppo_fast.config import STATS
from ppo_fast.reductions import token_weights

from ..compress import correction
from ..distributed import ALONE, Ranks
from ..errors import UserError
from ..sharding import full
from .config import LanguageConfig
from .model import Policy
from .sampling import Responses

#: Statistics of the loss that are kept: sums over the weights of a minibatch, and means over its tokens.
SUMS, MEANS = ("policy_loss", "value_loss"), ("approx_kl", "clip_fraction")


@dataclass
class Experience:
    """A rollout as the loss reads it; everything [B, R], constants, and 0 where `mask` is False."""

    responses: Responses
    mask: Tensor
    old_log_prob: Tensor
    entropy: Tensor
    ref_log_prob: Tensor | None
    values: Tensor | None
    advantages: Tensor
    returns: Tensor | None
    kl: Tensor | None  # [B], nats of a response


def crop(responses: Responses, index: Tensor) -> tuple[Tensor, Tensor, int, int]:
    """Rows of a rollout without the columns that only pad them: tokens, attention, P and R."""
    tokens, attention, start = responses.tokens[index], responses.attention[index], responses.prompt_length
    used = attention.any(0).nonzero().squeeze(1)
    first, stop = int(used[0]), int(used[-1]) + 1
    return tokens[:, first:stop], attention[:, first:stop], start - first, stop - start


class Learner:
    """Owns the optimiser and the KL controller."""

    def __init__(
        self, config: LanguageConfig, policy: Policy, generator: torch.Generator, ranks: Ranks = ALONE
    ) -> None:
        self.config, self.policy, self.generator, self.ranks = config, policy, generator, ranks
        self.parameters = list(policy.learned().values())
        self.optimizer = torch.optim.AdamW(
            self.parameters, lr=config.learning_rate, weight_decay=config.weight_decay, fused=True
        )
        self.kl: estimators.FixedKL | estimators.AdaptiveKL = estimators.FixedKL(config.kl_coef)
        if config.kl_target is not None:
            self.kl = estimators.AdaptiveKL(config.kl_coef, config.kl_target, config.kl_horizon)
        in_loss = config.kl_coef > 0 and config.kl_in == "loss"
        self.loss_config = pf.LossConfig(
            policy=config.policy, clip_low=config.clip_low, clip_high=config.clip_high, dual_clip=config.dual_clip,
            value_clip=config.value_clip, value_coef=config.value_coef, entropy_coef=config.entropy_coef,
            kl=config.kl_estimator if in_loss else None, kl_coef=config.kl_coef if in_loss else 0.0, **correction(config),
        )  # fmt: skip

    # --- before the update ----------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_probs(self, responses: Responses, values: bool = False) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-prob of each response token, entropy there, and value before it, [B, R]; padding 0."""
        return self.policy.run(self._log_probs, responses, values)

    def _log_probs(self, responses: Responses, values: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        policy, shape = self.policy, responses.mask.shape
        found = [torch.zeros(shape, device=responses.tokens.device) for _ in range(2 + values)]
        for index in torch.arange(shape[0], device=responses.tokens.device).split(self._micro(shape[0])):
            tokens, attention, start, length = crop(responses, index)
            rows = attention[:, start:]
            with policy.autocast():
                hidden = policy.hidden(tokens, attention, start)[rows]
                log_prob, entropy = pf.linear_log_prob(
                    hidden, policy.head.weight, tokens[:, start:][rows], bias=policy.head.bias,
                    temperature=self.config.temperature,
                )  # fmt: skip
                assert entropy is not None
                columns = [log_prob, entropy, *([policy.values(hidden)] if values else [])]
            for i, column in enumerate(columns):
                found[i] = found[i].to(column.dtype)
                found[i][index, :length] = torch.zeros_like(rows, dtype=column.dtype).masked_scatter(rows, column)
        return found[0], found[1], found[2] if values else None

    @torch.no_grad()
    def experience(self, responses: Responses, scores: Tensor, baselines: Tensor | None) -> Experience:
        """What the update needs of scored responses. `scores` [B]; `baselines` [B]: scores of greedy ones, for remax."""
        config, policy = self.config, self.policy
        mask = responses.mask
        if config.mask_truncated:
            mask = mask & responses.finished[:, None]
        if not self.ranks.any(bool(mask.any())):
            raise UserError(
                f"--mask-truncated: expected a response that ends by itself, got {config.num_responses} that were cut at "
                f"--max-new-tokens {config.max_new_tokens}, sample 0 among them: nothing is left to learn from; start a run with "
                "more tokens"
            )
        old_log_prob, entropy, values = self.log_probs(responses, values=policy.value_head is not None)
        ref_log_prob = kl = None
        rewards = torch.zeros_like(old_log_prob)
        if policy.needs_reference(config):
            with policy.as_reference():
                ref_log_prob = self.log_probs(responses)[0]
            kl = torch.where(mask, old_log_prob - ref_log_prob, 0.0).sum(1)
        in_reward = ref_log_prob is not None and config.kl_in == "reward"
        rewards = estimators.token_rewards(
            scores, old_log_prob, old_log_prob if ref_log_prob is None else ref_log_prob, responses.mask,
            self.kl.coef if in_reward else 0.0, config.kl_estimator,
        )  # fmt: skip
        returns = None
        if values is not None:
            alpha = config.length_adaptive_alpha
            lam = config.gae_lambda if alpha is None else estimators.length_adaptive_lambda(mask.sum(1), alpha)
            advantages, returns, moments = pf.gae(
                rewards, values, mask=mask, gamma=config.gamma, lam=lam, time_dim=1, moments=True
            )  # a response that was cut counts as ended: its score is all it gets
            if config.whiten_advantages:
                advantages = pf.whiten(
                    advantages, mask=mask, moments=moments, eps_in_variance=True, group=self.ranks.group
                )
        elif config.algorithm == "remax":
            assert baselines is not None
            advantages = estimators.remax(rewards, baselines, mask)
        else:
            options: dict[str, Any] = {"gamma": config.gamma} if config.algorithm == "reinforce_plus_plus" else {}
            if config.algorithm in ("reinforce_plus_plus", "reinforce_plus_plus_baseline"):
                options["process_group"] = self.ranks.group
            advantages = estimators.ESTIMATORS[config.algorithm](rewards, config.group, mask, **options)
        return Experience(responses, mask, old_log_prob, entropy, ref_log_prob, values, advantages, returns, kl)

    # --- the update -----------------------------------------------------------------------------------------------------

    def _micro(self, n: int) -> int:
        return self.config.micro_batch or n

    def weights(self, mask: Tensor, lengths: Tensor) -> Tensor:
        """w_t of the rows [b, R] that are here of a minibatch of `lengths` [B]: the loss is Σ w_t·l_t over all of it."""
        like, reduction = mask.to(self.policy.head.weight.dtype), self.config.reduction
        if reduction == "token-sum-norm":
            return token_weights(like, mask, "sum", None, float(len(lengths) * self.config.max_new_tokens), None)
        count = lengths.sum() if reduction == "token-mean" else (lengths > 0).sum()
        return token_weights(like, mask, reduction, None, count.clamp(min=1).to(like.dtype), None)

    def backward(self, experience: Experience, whole: Tensor, lengths: Tensor | None = None) -> Tensor:
        """Adds the gradient of the minibatch `whole` to the parameters'; this rank's part of its statistics, in order of
        SUMS and MEANS. `lengths`: tokens in each response of all ranks, into which `whole` points."""
        if lengths is None:
            lengths = self.ranks.rows(experience.mask.sum(1))
        index = self.ranks.mine(whole, len(lengths))
        weights, total = self.weights(experience.mask[index], lengths[whole]), int(lengths[whole].sum())
        stats, micro = torch.zeros(len(SUMS) + len(MEANS), device=index.device), self._micro(len(whole))
        for begin in range(0, self.ranks.most(whole, len(lengths)), micro):
            rows, w = index[begin : begin + micro], weights[begin : begin + micro]
            count = int((w > 0).sum())
            if not count:  # no term of the loss is in a piece that is masked as a whole
                if self.ranks.alone:
                    continue
                # but other ranks wait for its gradients
                rows, w = index.new_zeros(1), weights.new_zeros(1, weights.shape[1])
            loss, vector = self.policy.run(self._piece, experience, rows, w)
            loss.backward()
            if count:
                sums = vector[[STATS.index(name) for name in SUMS]]
                means = vector[[STATS.index(name) for name in MEANS]] * (count / total)
                stats += torch.cat([sums, means]).to(stats.dtype)
        return stats

    def _piece(self, experience: Experience, index: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
        policy, config = self.policy, self.loss_config
        tokens, attention, start, length = crop(experience.responses, index)
        rows = weights[:, :length] > 0

        def stored(x: Any) -> Any:
            return None if x is None else x[index, :length][rows]

        borders = None
        if config.forms:  # a policy of sequences
            borders = torch.nn.functional.pad(rows.sum(1).cumsum(0), (1, 0))
        with policy.autocast():
            # what is not learned from leaves before the head; the logits of a minibatch never exist
            hidden = policy.hidden(tokens, attention, start)[rows]
            out = pf.linear_ppo_loss(
                hidden, policy.head.weight, tokens[:, start:][rows], stored(experience.old_log_prob),
                stored(experience.advantages), config, bias=policy.head.bias, temperature=self.config.temperature,
                values=None if experience.values is None else policy.values(hidden),
                old_values=stored(experience.values), returns=stored(experience.returns),
                ref_log_prob=None if config.kl is None else stored(experience.ref_log_prob),
                rollout_log_prob=stored(experience.responses.log_prob) if config.rollout_correction else None,
                weights=weights[:, :length][rows], cu_seqlens=borders,
            )  # fmt: skip
        return self.ranks.weighted(out.loss, 1.0), out.stats.vector

    def update(self, experience: Experience, learning_rate: float) -> dict[str, float]:
        """Epochs over a rollout; mean statistics."""
        config, lengths = self.config, self.ranks.rows(experience.mask.sum(1))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        if self.loss_config.kl is not None:
            self.loss_config = dataclasses.replace(self.loss_config, kl_coef=self.kl.coef)
        taken = []
        for _ in range(config.epochs):
            order = torch.randperm(len(lengths), generator=self.generator).to(lengths.device)
            for whole in order.tensor_split(config.num_minibatches):
                if not bool(lengths[whole].any()):
                    continue
                self.optimizer.zero_grad()
                stats = self.backward(experience, whole, lengths)
                norm = full(torch.nn.utils.clip_grad_norm_(self.parameters, config.max_grad_norm))
                if not math.isfinite(float(norm)):
                    raise UserError(
                        "training diverged: the gradient is not finite; expected a lower --learning-rate than "
                        f"{config.learning_rate:g}, or rewards of smaller scale"
                    )
                self.optimizer.step()
                taken.append(torch.cat([stats, norm[None]]))
        names, means = (*SUMS, *MEANS, "grad_norm"), torch.stack(taken).mean(0)
        means[:-1] = self.ranks.sum(means[:-1])
        named = dict(zip(names, means.tolist(), strict=True))
        if experience.kl is not None:
            self.kl.update(float(self.ranks.mean(experience.kl)), len(lengths))
        return named
