"""Policies, KL estimates and rollout corrections against the trainers that define them: their own functions are called, with
float64 inputs, and values and gradients compared. Skipped where a trainer is not installed, which needs no GPU:
`pip install --no-deps --target DIR verl trl openrlhf` and what they import, then PYTHONPATH=DIR.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
import types
from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch
from loss_cases import replace

import ppo_fast as pf

LENGTHS = [7, 4, 9, 6, 1, 8]  # no row is empty: TRL and verl differ there among themselves
B, T = len(LENGTHS), 9
MASK = torch.arange(T) < torch.tensor(LENGTHS)[:, None]


def imported(name: str):
    """A module of a trainer, or a skip that says why."""
    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    try:
        return importlib.import_module(name)
    except ImportError as error:
        pytest.skip(f"{name.split('.')[0]} cannot be imported: {error}")


@pytest.fixture
def x():
    g = torch.Generator().manual_seed(0)
    make = lambda scale, mean=0.0: torch.randn(B, T, generator=g, dtype=torch.float64) * scale + mean  # noqa: E731
    return {
        "log_prob": make(0.4, -1.5).requires_grad_(), "old_log_prob": make(0.4, -1.5), "ref_log_prob": make(0.5, -1.5),
        "rollout_log_prob": make(0.4, -1.5), "advantages": make(1.5),
    }  # fmt: skip


@pytest.fixture(params=["cpu", "reference"], autouse=True)
def backend(request):
    """The kernel, and the specification that all kernels are held to."""
    with pf.use_backend(request.param):
        yield


def agree(x, mine: torch.Tensor, theirs: torch.Tensor) -> None:
    assert theirs != 0
    torch.testing.assert_close(mine, theirs, rtol=1e-7, atol=1e-9)  # verl adds 1e-8 to counts
    grads = [torch.autograd.grad(loss, x["log_prob"])[0] for loss in (mine, theirs)]
    assert grads[1].count_nonzero() > 3
    torch.testing.assert_close(*(torch.where(MASK, g, 0.0) for g in grads), rtol=1e-7, atol=1e-9)


def ours(x, config, **rest):
    use = {"ref_log_prob": x["ref_log_prob"]} if config.kl is not None else {}
    return pf.ppo_loss(x["log_prob"], x["old_log_prob"], x["advantages"], config, mask=MASK, **use, **rest).loss


# --- verl -------------------------------------------------------------------------------------------------------------

C = pf.LossConfig
BOUNDS = {"clip_low": 0.1, "clip_high": 0.15}
SEQ_MEAN = "seq-mean-token-mean"
VERL = {
    "vanilla": C.preset("verl", **BOUNDS),
    "dppo_tv": C(policy="dppo_tv", log_ratio_clamp=20.0, ratio_cap=3.0, **BOUNDS),
    "dppo_kl": C(policy="dppo_kl", log_ratio_clamp=20.0, ratio_cap=3.0, clip_low=0.01, clip_high=0.02),
    "gspo": C(policy="gspo_token", reduction=SEQ_MEAN, **BOUNDS),
    "sapo": C(policy="sapo", log_ratio_clamp=20.0, reduction=SEQ_MEAN),
    "gpg": C(policy="reinforce"),
    "clip_cov": C(
        policy="clip_cov", cov_ratio=1.0, cov_low=0.1, cov_high=2.0, **BOUNDS
    ),  # 1: nothing is drawn by chance
    "kl_cov": C(policy="kl_cov", cov_ratio=0.2, cov_kl_coef=0.7),
    "geo_mean": C(policy="gmpo", reduction=SEQ_MEAN, **BOUNDS),
    "dro": C(policy="dro", dro_beta=0.3),
    "cispo": C(policy="cispo", log_ratio_clamp=20.0, **BOUNDS),
}


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("name", sorted(VERL))
def test_verl_policies(name, weighted, x):
    core = imported("verl.trainer.ppo.core_algos")
    configs = imported("verl.workers.config.actor")
    config = VERL[name]
    settings = configs.PolicyLossConfig(
        clip_cov_ratio=config.cov_ratio, clip_cov_lb=config.cov_low, clip_cov_ub=config.cov_high,
        kl_cov_ratio=config.cov_ratio, ppo_kl_coef=config.cov_kl_coef, dro_beta=config.dro_beta,
    )  # fmt: skip
    actor = configs.ActorConfig(
        strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1, clip_ratio=config.clip_low,
        clip_ratio_low=config.clip_low, clip_ratio_high=config.clip_high, policy_loss=settings,
    )  # fmt: skip
    if name == "geo_mean":  # takes one advantage a sequence, and weights to their geometric mean
        x["advantages"] = x["advantages"][:, :1].expand(B, T)
    factor = torch.rand(B, 1, dtype=torch.float64).expand(B, T) if weighted else None
    theirs, metrics = core.get_policy_loss_fn(name)(
        x["old_log_prob"], x["log_prob"], x["advantages"], MASK.double(), config.reduction, actor, factor
    )
    if factor is not None:
        if config.policy in ("dro", "kl_cov"):  # not linear in the advantage: as weights
            rows = MASK.sum(-1, keepdim=True) if config.reduction == SEQ_MEAN else MASK.sum()
            mine = ours(x, config, weights=factor / rows)
            return agree(x, mine, theirs)
        if config.policy == "clip_cov":  # looks at the advantages themselves
            return agree(x, ours(x, config, weights=factor / MASK.sum()), theirs)
        x["advantages"] = x["advantages"] * factor
    out = pf.ppo_loss(x["log_prob"], x["old_log_prob"], x["advantages"], config, mask=MASK)
    agree(x, out.loss, theirs)
    if name in ("dppo_tv", "dppo_kl", "cispo"):
        assert out.stats.clip_fraction.item() == pytest.approx(metrics["actor/pg_clipfrac"], abs=1e-9)
        assert 0 < out.stats.clip_fraction < 1
    if name not in ("gpg", "kl_cov", "clip_cov", "gspo", "geo_mean"):
        assert out.stats.old_approx_kl.item() == pytest.approx(metrics["actor/ppo_kl"], rel=1e-6)


@pytest.mark.parametrize("reduction", ["token-mean", SEQ_MEAN, "seq-mean-token-sum"])
def test_verl_reductions_of_sequence_policies(reduction, x):
    core, configs = imported("verl.trainer.ppo.core_algos"), imported("verl.workers.config.actor")
    actor = configs.ActorConfig(strategy="fsdp", rollout_n=1, ppo_micro_batch_size_per_gpu=1)
    theirs, _ = core.get_policy_loss_fn("gspo")(
        x["old_log_prob"], x["log_prob"], x["advantages"], MASK.double(), reduction, actor
    )
    agree(x, ours(x, C(policy="gspo_token", reduction=reduction)), theirs)


@pytest.mark.parametrize("name", ["k1", "abs", "k2", "k3", "k1+", "k3+"])
def test_verl_kl(name, x):
    core = imported("verl.trainer.ppo.core_algos")
    x["log_prob"] = (x["log_prob"].detach() + 30.0 * (torch.rand(B, T) < 0.2)).requires_grad_()  # beyond their clamps
    clamps = {"kl_clamp": 20.0, "kl_value_clamp": 10.0} if "k3" in name else {}
    config = C(kl=name.rstrip("+"), kl_coef=1.0, kl_gradient="k2" if "+" in name else None, **clamps)
    theirs = (core.kl_penalty(x["log_prob"], x["ref_log_prob"], name) * MASK).sum() / MASK.sum()
    x["advantages"] = torch.zeros(B, T, dtype=torch.float64)
    agree(x, ours(x, replace(config, policy="reinforce")), theirs)


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("bounds", ["1.2", "0.8_1.2"])
@pytest.mark.parametrize("level", ["token", "sequence"])
def test_verl_rollout_weights(level, bounds, normalize, x):
    helper = imported("verl.trainer.ppo.rollout_corr_helper")
    theirs, metrics = helper.compute_rollout_correction_weights(
        x["old_log_prob"] - x["rollout_log_prob"], MASK.double(), level, bounds, normalize
    )
    low, high = map(float, bounds.split("_")) if "_" in bounds else (0.0, float(bounds))
    out = pf.rollout_weights(x["old_log_prob"], x["rollout_log_prob"], mask=MASK, level=level, low=low, high=high,
                             mode="mask" if "_" in bounds else "truncate", normalize=normalize)  # fmt: skip
    torch.testing.assert_close(out.weights, theirs, rtol=1e-7, atol=1e-9)
    assert 0 < out.stats["fraction_high"] < 1
    if not normalize:
        assert out.stats["mean"].item() == pytest.approx(metrics["rollout_is_mean"], rel=1e-6)
        assert out.stats["ess"].item() == pytest.approx(metrics["rollout_is_eff_sample_size"], rel=1e-6)
    if level == "token":
        assert out.stats["fraction_high"].item() == pytest.approx(metrics["rollout_is_ratio_fraction_high"], rel=1e-6)


@pytest.mark.parametrize("option", ["token_k1", "token_k2", "token_k3", "seq_sum_k1", "seq_sum_k2", "seq_sum_k3",
                                    "seq_mean_k1", "seq_mean_k2", "seq_mean_k3", "seq_max_k2", "seq_max_k3"])  # fmt: skip
def test_verl_rejection(option, x):
    helper = imported("verl.trainer.ppo.rollout_corr_helper")
    by, k = ("token", option[-2:]) if option.startswith("token") else option[4:].split("_")
    threshold = {"k1": (0.85, 1.1), "k2": 0.15, "k3": 0.15}[k]
    if by in ("sum", "max") and k != "k1":
        threshold = 0.8
    elif by == "sum":
        threshold = (0.4, 2.0)
    text = "_".join(map(str, threshold)) if k == "k1" else str(threshold)
    keep, metrics = helper.compute_rollout_rejection_mask(
        x["old_log_prob"] - x["rollout_log_prob"], MASK.double(), option, text
    )
    out = pf.rollout_weights(x["old_log_prob"], x["rollout_log_prob"], mask=MASK, reject_on=k, reject_by=by,
                             reject_threshold=threshold)  # fmt: skip
    assert torch.equal(out.keep, keep.bool()) and 0 < out.stats["fraction_rejected"] < 1
    assert out.stats["fraction_rejected"].item() == pytest.approx(metrics["rollout_rs_masked_fraction"], rel=1e-6)
    cu_seqlens = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0)])
    packed = pf.rollout_weights(x["old_log_prob"][MASK], x["rollout_log_prob"][MASK], cu_seqlens=cu_seqlens, reject_on=k,
                                reject_by=by, reject_threshold=threshold)  # fmt: skip
    torch.testing.assert_close(packed.weights, out.weights[MASK])


# --- TRL --------------------------------------------------------------------------------------------------------------


def trl_loss(trainer, x, rollout=None, **settings):
    """`_compute_loss` of a trainer that has what it reads and no model."""
    args = {"delta": None, "use_bias_correction_kl": False, "sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05,
            "vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0,
            "steps_per_generation": 1}  # fmt: skip
    fake = SimpleNamespace(
        aux_loss_enabled=False, top_entropy_quantile=1.0, off_policy_mask_threshold=None, beta=0.0,
        importance_sampling_level="token", epsilon_low=0.1, epsilon_high=0.15, loss_type="grpo", use_vllm=False,
        vllm_importance_sampling_correction=True, current_gradient_accumulation_steps=1, max_completion_length=20,
        _entropy_bonus_enabled=False, model=SimpleNamespace(training=True), get_gamma_weights=None,
        _metrics={"train": defaultdict(list)}, args=SimpleNamespace(**args),
        accelerator=SimpleNamespace(num_processes=1, gather=lambda t: t, reduce=lambda t, reduction: t),
        _get_per_token_logps_and_entropies=lambda *a, **k: (x["log_prob"], torch.ones(B, T), None),
    )  # fmt: skip
    fake.get_gamma_weights = getattr(trainer, "get_gamma_weights", None)
    for name, value in settings.items():
        setattr(fake.args if name in args else fake, name, value)
    ids = torch.zeros(B, T, dtype=torch.long)
    inputs = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids, "completion_mask": MASK.double(),
              "advantages": x["advantages"][:, 0], "old_per_token_logps": x["old_log_prob"],
              "ref_per_token_logps": x["ref_log_prob"], "num_items_in_batch": MASK.sum()}  # fmt: skip
    if rollout is not None:
        inputs["importance_sampling_ratio"] = rollout
    x["advantages"] = x["advantages"][:, :1].expand(B, T)
    return trainer._compute_loss(fake, None, inputs)


TRL_BOUNDS = {"clip_low": 0.1, "clip_high": 0.15}
TRL = {
    "grpo": ({}, C(reduction=SEQ_MEAN, **TRL_BOUNDS)),
    "bnpo": ({}, C(**TRL_BOUNDS)),
    "dapo with a cap": ({"loss_type": "dapo", "delta": 1.3}, C(ratio_cap=1.3, **TRL_BOUNDS)),
    "grpo of sequences": ({"loss_type": "grpo", "importance_sampling_level": "sequence"},
                          C(policy="gspo", reduction=SEQ_MEAN, **TRL_BOUNDS)),
    "cispo": ({"epsilon_high": 1.2}, C(policy="cispo", clip_low=1.0, clip_high=1.2 - 1.0)),
    "sapo": ({"sapo_temperature_neg": 1.25}, C(policy="sapo", sapo_tau_negative=1.25, reduction=SEQ_MEAN)),
    "vespo": ({}, C(policy="vespo")),
    "grpo with a KL": ({"loss_type": "grpo", "beta": 0.3}, C(reduction=SEQ_MEAN, kl="k3", kl_coef=0.3, **TRL_BOUNDS)),
    "dapo with an unbiased KL": ({"loss_type": "dapo", "beta": 0.3, "use_bias_correction_kl": True},
                                 C(kl="k3", kl_coef=0.3, kl_weight="ratio", **TRL_BOUNDS)),
}  # fmt: skip


@pytest.mark.parametrize("name", sorted(TRL))
def test_trl_policies(name, x):
    trainer = imported("trl.trainer.grpo_trainer").GRPOTrainer
    settings, config = TRL[name]
    theirs = trl_loss(trainer, x, **{"loss_type": name, **settings})
    agree(x, ours(x, config), theirs)


def test_trl_gmpo(x):
    trainer = imported("trl.experimental.gmpo.gmpo_trainer").GMPOTrainer
    theirs = trl_loss(trainer, x, beta=0.2)
    agree(x, ours(x, C(policy="gmpo", reduction=SEQ_MEAN, kl="k3", kl_coef=0.2, **TRL_BOUNDS)), theirs)


@pytest.mark.parametrize("loss_type", ["dapo", "sapo", "cispo"])
def test_trl_rollout_weights_multiply_the_advantages(loss_type, x):
    trainer = imported("trl.trainer.grpo_trainer").GRPOTrainer
    out = pf.rollout_weights(
        x["old_log_prob"], x["rollout_log_prob"], mask=MASK, level="sequence", mode="mask", high=3.0
    )
    theirs = trl_loss(trainer, x, out.weights, loss_type=loss_type, use_vllm=True, beta=0.1)
    config = {"dapo": C(**TRL_BOUNDS), "sapo": C(policy="sapo", reduction=SEQ_MEAN),
              "cispo": C(policy="cispo", clip_low=1.0, clip_high=0.0)}[loss_type]  # fmt: skip
    x["advantages"] = x["advantages"] * out.weights
    if loss_type == "cispo":
        theirs = trl_loss(trainer, {**x, "advantages": x["advantages"] / out.weights.clamp(min=1e-300)}, out.weights,
                          loss_type="cispo", epsilon_high=1.0, use_vllm=True, beta=0.1)  # fmt: skip
    agree(x, ours(x, replace(config, kl="k3", kl_coef=0.1)), theirs)


# --- OpenRLHF ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def openrlhf(monkeypatch):
    """Its module of losses, without the package around it, which needs a GPU's libraries."""
    spec = importlib.util.find_spec("openrlhf")
    if spec is None:
        pytest.skip("openrlhf is not installed")
    for name in ("openrlhf", "openrlhf.models"):
        package = types.ModuleType(name)
        package.__path__ = [os.path.join(spec.submodule_search_locations[0], *name.split(".")[1:])]
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setitem(sys.modules, "deepspeed", types.ModuleType("deepspeed"))
    return imported("openrlhf.models.loss").PolicyLoss


@pytest.mark.parametrize("policy", ["ppo", "gspo"])
def test_openrlhf_policies(openrlhf, policy, x):
    theirs = openrlhf(0.1, 0.15, dual_clip=1.3, policy_loss_type=policy)(
        x["log_prob"], x["old_log_prob"], x["advantages"], MASK.double()
    )[0]
    config = {"ppo": C.preset("openrlhf", dual_clip=1.3), "gspo": C(policy="gspo", dual_clip=1.3, reduction=SEQ_MEAN)}[
        policy
    ]
    agree(x, ours(x, replace(config, **BOUNDS)), theirs)


@pytest.mark.parametrize(("level", "mode"), [("token", "clip"), ("token", "mask"), ("seq", "mask")])
def test_openrlhf_rollout_weights(openrlhf, level, mode, x):
    theirs = openrlhf(
        0.1, 0.15, is_correction_level=level, is_correction_mode=mode, is_correction_threshold=(0.8, 1.5)
    )(x["log_prob"], x["old_log_prob"], x["advantages"], MASK.double(), x["rollout_log_prob"])[0]
    how = {"low": 0.8, "high": 1.5, "mode": "truncate" if mode == "clip" else "mask"}
    if level == "seq":  # tokens keep their ratio where the sequence's geometric mean is inside
        how = {"high": float("inf"), "reject_on": "k1", "reject_by": "mean", "reject_threshold": (1 / 1.5, 1 / 0.8)}
    out = pf.rollout_weights(x["old_log_prob"], x["rollout_log_prob"], mask=MASK, **how)
    assert 0 < out.stats["fraction_zero" if mode == "mask" else "fraction_high"] < 1
    x["advantages"] = x["advantages"] * out.weights
    agree(x, ours(x, C.preset("openrlhf", **BOUNDS)), theirs)
