"""Random losses: every switch of LossConfig, every optional stream, views and dtypes; shared by the three loss ops."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field

import torch
from conftest import as_double, assert_as_good
from hypothesis import strategies as st

import ppo_fast as pf
from ppo_fast.config import TOKEN_POLICIES

DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
optional = lambda *values: st.sampled_from([None, *values])  # noqa: E731


def _with_bounds(config: pf.LossConfig) -> pf.LossConfig:
    """KL of a token against its old self is small: so are the bounds that it may meet. And one KL option at a time."""
    if config.policy == "dppo_kl":
        config = dataclasses.replace(config, clip_low=0.01, clip_high=0.02)
    return config


configs = st.builds(
    lambda kl_how, **fields: _with_bounds(pf.LossConfig(**fields, **kl_how)),
    policy=st.sampled_from([*["ppo"] * len(TOKEN_POLICIES), *TOKEN_POLICIES]),
    sapo_tau_positive=st.sampled_from([1.0, 0.3]),
    sapo_tau_negative=st.sampled_from([1.05, 5.0]),
    dro_beta=st.sampled_from([1.0, 0.3]),
    kl_how=st.sampled_from([{}, {}, {"kl_gradient": "k2"}, {"kl_weight": "ratio"}, {"kl_weight": "score"}]),
    clip_low=st.sampled_from([0.0, 0.1, 0.2]),
    clip_high=st.sampled_from([0.0, 0.2, 0.28]),
    dual_clip=optional(1.5, 3.0),
    ratio_cap=optional(1.31, 4.0),
    log_ratio_clamp=optional(0.7, 20.0),
    value_loss=st.sampled_from(["mse", "huber"]),
    huber_delta=st.sampled_from([0.3, 1.0]),
    value_half=st.booleans(),
    value_clip=optional(0.21, 1.1),
    value_clip_mode=st.sampled_from(["max", "replace", "error"]),
    value_coef=st.sampled_from([0.0, 0.5, 1.3]),
    entropy_coef=st.sampled_from([0.0, 0.01, -0.3]),
    kl=optional("k1", "abs", "k2", "k3"),
    kl_coef=st.sampled_from([0.0, 0.2]),
    kl_clamp=optional(0.9),
    kl_value_clamp=optional(0.31),
    normalize_advantages=st.booleans(),
    advantage_ddof=st.sampled_from([0, 1]),
    reduction=st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"]),
    rollout_correction=optional("tis", "icepop"),
)


@dataclass
class Streams:
    """What the rollout stored, and how the loss is weighted."""

    config: pf.LossConfig
    stored: dict[str, torch.Tensor | None]
    rest: dict = field(default_factory=dict)

    def double(self) -> Streams:
        return Streams(self.config, {k: as_double(v) for k, v in self.stored.items()}, self.rest)


#: Where the log-probs of ppo_loss lie: what DPPO reads are probabilities.
CENTER = -1.2


def log_probs(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> torch.Tensor:
    return (torch.randn(shape, generator=generator) * 0.3 + CENTER).to(dtype)


@st.composite
def streams(draw, shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype, center=0.0) -> Streams:
    """Streams of `shape`; each by itself a plain tensor, a strided view or a broadcast. Log-probs lie around `center`."""

    def tensor(scale=1.0, mean=0.0):
        kind = draw(st.sampled_from(["plain", "plain", "strided", "broadcast"]))
        if kind == "strided":
            wide = torch.randn(*shape[:-1], 2 * shape[-1] + 1, generator=generator)
            return (wide[..., 1::2] * scale + mean).to(dtype)
        if kind == "broadcast" and len(shape) > 1:
            return (torch.randn(1, *shape[1:], generator=generator) * scale + mean).to(dtype).expand(shape)
        return (torch.randn(shape, generator=generator) * scale + mean).to(dtype)

    config = draw(configs)
    stored = {"old_log_prob": tensor(0.3, center), "advantages": tensor(2.0)}
    if draw(st.booleans()):
        stored |= {"returns": tensor(), "old_values": tensor()}
    if config.kl is not None:
        stored["ref_log_prob"] = tensor(0.5, center)
    if config.rollout_correction is not None:
        stored["rollout_log_prob"] = tensor(0.4, center)
    if draw(st.booleans()):
        stored["mask"] = (torch.rand(shape, generator=generator) < 0.7).to(
            draw(st.sampled_from([torch.bool, torch.uint8, torch.float32]))
        )
    rest = {}
    how = draw(st.sampled_from(["reduction", "reduction", "weights", "denominator", "tensor denominator"]))
    if how == "weights":
        stored["weights"] = torch.rand(shape, generator=generator).to(dtype)
    elif how == "denominator":
        rest["denominator"] = 37.5
    elif how == "tensor denominator":
        rest["denominator"] = torch.tensor(12.0)
    return Streams(config, stored, rest)


def compare(op, specification, inputs: dict[str, torch.Tensor], s: Streams, size_of_log_prob=1.0, **rest) -> None:
    """Loss, statistics and every gradient of `op` against the specification in float64, judged by eager's own error.

    A ratio is exp of a difference of log-probs: its relative error is theirs, an ulp of `size_of_log_prob`.
    """

    def run(function, double: bool):
        mine = {k: as_double(v) if double else v for k, v in inputs.items()}
        streams = s.double() if double else s
        mine = {k: v.detach().requires_grad_(v.is_floating_point()) for k, v in mine.items()}
        stored = dict(streams.stored)
        out = function(**mine, config=streams.config, **stored, **streams.rest, **rest)
        leaves = [v for v in mine.values() if v.requires_grad]
        grads = torch.autograd.grad(out.loss, leaves, allow_unused=True)
        names = [k for k, v in mine.items() if v.requires_grad]
        zeros = [torch.zeros_like(v) if g is None else g for g, v in zip(grads, leaves, strict=True)]
        return out, dict(zip(names, zeros, strict=True))

    actual, actual_grads = run(op, False)
    eager, eager_grads = run(specification, False)
    truth, true_grads = run(specification, True)
    # a loss is a difference of terms: its error is judged by their size
    size = sum(x.abs().item() for x in truth.stats.vector[:4]) + truth.loss.abs().item()
    extra = 8.0 * max(1.0, size / max(truth.loss.abs().item(), 1e-30))
    assert_as_good(actual.loss, eager.loss, truth.loss, "loss", ulps=min(extra, 1e6))
    for name, value in actual.stats.to_dict().items():
        true, plain = getattr(truth.stats, name), getattr(eager.stats, name)
        ulps = 4000.0 if name in ("explained_variance", "ess") else 64.0 * max(1.0, size_of_log_prob)
        scale = 1e-6 if name in ("approx_kl", "old_approx_kl", "policy_loss", "entropy", "kl") else 0.0
        close = abs(value - true.item()) <= scale * torch.finfo(actual.loss.dtype).eps * 1e7
        if not close:
            assert_as_good(getattr(actual.stats, name), plain, true, name, ulps=ulps)
    for name, grad in actual_grads.items():
        assert grad.dtype == inputs[name].dtype
        assert_as_good(grad, eager_grads[name], true_grads[name], f"gradient of {name}",
                       ulps=8.0 * max(1.0, size_of_log_prob))  # fmt: skip


def compare_policy(op, specification, policy: str, dtype=torch.float32) -> None:
    """Every switch that a policy reads, one after the other, on tokens of both signs, both sides of every bound and masked."""
    g = torch.Generator().manual_seed(0)
    inputs = {"log_prob": log_probs((613,), g, dtype)}
    stored = {k: log_probs((613,), g, dtype) for k in ("old_log_prob", "ref_log_prob", "rollout_log_prob")}
    stored |= {
        "advantages": (torch.randn(613, generator=g) + 0.7).to(dtype),
        "mask": torch.rand(613, generator=g) < 0.8,
    }
    plain = pf.LossConfig(policy=policy, clip_low=0.1, clip_high=0.15, sapo_tau_negative=3.0, dro_beta=0.7)
    plain = _with_bounds(plain)
    kl = {"kl": "k3", "kl_coef": 0.6}
    for config in (
        plain,
        dataclasses.replace(plain, log_ratio_clamp=0.2, rollout_correction="icepop"),
        dataclasses.replace(plain, ratio_cap=1.2, dual_clip=1.3),
        dataclasses.replace(plain, **kl, kl_weight="ratio", log_ratio_clamp=0.2, kl_clamp=0.6, kl_value_clamp=0.1),
        dataclasses.replace(plain, **kl, kl_weight="score", kl_clamp=0.6, kl_value_clamp=0.1),
        dataclasses.replace(plain, **kl, kl_gradient="k2", kl_clamp=0.6),
    ):
        used = {k: v for k, v in stored.items() if k != "ref_log_prob" or config.kl is not None}
        compare(op, specification, inputs, Streams(config, used, {}))


def bits(out, inputs) -> list[torch.Tensor]:
    """Everything a loss call produced, for comparisons to the bit."""
    grads = torch.autograd.grad(out.loss, inputs, allow_unused=True)
    return [out.loss.detach(), out.stats.vector, *(g for g in grads if g is not None)]


replace = dataclasses.replace
