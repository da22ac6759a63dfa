"""What a PPO loss is made of: `LossConfig`, the presets of other trainers, and the names of the statistics."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

#: Policies that kernels know, in their order: each is a formula of one token.
TOKEN_POLICIES = ("ppo", "cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "reinforce", "cpi")
#: Policies of whole sequences or of the batch, and the token policy that `sequences.py` makes of each.
SEQUENCE_POLICIES = {
    "gspo": "ppo", "gspo_token": "ppo", "gmpo": "cpi", "vespo": "reinforce", "clip_cov": "ppo", "kl_cov": "cpi",
}  # fmt: skip
POLICIES = (*TOKEN_POLICIES, *SEQUENCE_POLICIES)
VALUE_LOSSES = ("mse", "huber")
VALUE_CLIP_MODES = ("max", "replace", "error")
KLS = (None, "k1", "abs", "k2", "k3")
KL_GRADIENTS = (None, "k2")
KL_WEIGHTS = (None, "ratio", "score")
REDUCTIONS = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum")
ROLLOUT_CORRECTIONS = (None, "tis", "icepop")

#: Fields that are numbers and may be annealed from call to call. `None` travels as NaN: "switched off".
NUMBERS = (
    "clip_low", "clip_high", "dual_clip", "ratio_cap", "log_ratio_clamp", "huber_delta", "value_clip", "value_coef",
    "entropy_coef", "kl_coef", "kl_clamp", "kl_value_clamp", "advantage_eps", "rollout_low", "rollout_high",
    "sapo_tau_positive", "sapo_tau_negative", "dro_beta",
)  # fmt: skip
#: Numbers that no kernel reads: those of policies that are put together ahead of it.
SEQUENCE_NUMBERS = (
    "vespo_k_positive", "vespo_k_negative", "vespo_lambda_positive", "vespo_lambda_negative", "cov_ratio", "cov_low",
    "cov_high", "cov_kl_coef",
)  # fmt: skip
#: Fields that choose a formula; each travels as its index in the tuple of allowed values.
CHOICES: dict[str, tuple[Any, ...]] = {
    "value_loss": VALUE_LOSSES,
    "value_half": (False, True),
    "value_clip_mode": VALUE_CLIP_MODES,
    "kl": KLS,
    "normalize_advantages": (False, True),
    "advantage_ddof": (0, 1),
    "rollout_correction": ROLLOUT_CORRECTIONS,
    "policy": TOKEN_POLICIES,
    "kl_gradient": KL_GRADIENTS,
    "kl_weight": KL_WEIGHTS,
}

#: Order of `out.stats`; `csrc/ops.h` has the same list and a test compares them.
STATS = (
    "policy_loss", "value_loss", "entropy", "kl", "approx_kl", "old_approx_kl", "clip_fraction", "clip_fraction_low",
    "clip_fraction_high", "dual_clip_fraction", "value_clip_fraction", "ratio_mean", "ratio_min", "ratio_max", "ess",
    "explained_variance",
)  # fmt: skip


@dataclass(frozen=True)
class LossConfig:
    """Definition of a PPO loss. Frozen: anneal with `dataclasses.replace(config, clip_low=...)`, or `on` a device.

    Per token, with x = log_prob, d = x - old_log_prob, r = exp(d), advantage A and sg a constant for the gradient, all
    minimised:

        value  = f(values - returns), f(e) = e² ("mse") or e² / 2δ|e| - δ² beyond δ = huber_delta ("huber"), times ½ if value_half
        kl     = k(ref_log_prob - x)
        total  = policy + value_coef·value - entropy_coef·entropy + kl_coef·kl, summed with the weights that `reduction` names

    policy, with clip(r) = clamp(r, 1 - clip_low, 1 + clip_high) and cap(r) = min(r, ratio_cap):

        "ppo"        max(-A·cap(r), -A·clip(r)); where A < 0: min(that, -dual_clip·A)                   arXiv 1707.06347
        "cispo"      -sg(clip(r))·A·x; clip_low = 1: no lower bound                                      arXiv 2506.13585
        "sapo"       -σ(τ·(r - 1))·4/τ·A, τ = sapo_tau_positive where A > 0, else sapo_tau_negative      arXiv 2511.20347
        "dppo_tv"    -sg(cap(r))·A·x, 0 where A > 0 and p - q > clip_high, or A <= 0 and p - q < -clip_low,
                     p = exp(x), q = exp(old_log_prob)                                                   arXiv 2602.04879
        "dppo_kl"    the same with the KL of "this token or another", q·log(q/p) + (1-q)·log((1-q)/(1-p)): 0 where it is
                     above clip_high and p > q (A > 0), above clip_low and p < q (A <= 0). Probabilities, not densities
        "dro"        -(x·A - ½·dro_beta·d²)                                                              arXiv 2405.19107
        "reinforce"  -A·x
        "cpi"        -A·r                                                       Kakade & Langford 2002; arXiv 1707.06347, eq. 6

    Of sequences, rows of [B, T] or the pieces that cu_seqlens names, with means over their valid tokens:

        "gspo"       "ppo" with r = exp(mean d), the gradient through the mean                           arXiv 2507.18071
        "gspo_token" "ppo" with r = exp(sg(mean d) + x - sg(x)), the exponent at most 10: verl's "gspo"
        "gmpo"       "cpi" with r = exp(mean of d, held below clip_high where A > 0, above -clip_low where A < 0)
                                                                                                         arXiv 2507.20673
        "vespo"      -sg(φ(w))·A·x, w = exp(Σ d), φ = exp(λ + k·log w - λ·w), log w in [log 1e-8, 20]; k, λ by the sign of A
                                                                                                         TRL's "vespo"
        "clip_cov"   "ppo", 0 for cov_ratio of all tokens, drawn at random from those that "ppo" does not clip and whose
                     cov = (A - mean A)·(x - mean x) is between cov_low and cov_high                     arXiv 2505.22617
        "kl_cov"     "cpi" plus cov_kl_coef·|d| for the cov_ratio of all tokens whose cov is largest     arXiv 2505.22617

    The last two look at the whole batch: micro-batches choose other tokens. "gspo", "gmpo" and their like are losses of
    sequences under reduction="seq-mean-token-mean".

    Units: log-probabilities are natural logarithms (nats); every clip and coefficient is dimensionless.
    """

    policy: Literal[
        "ppo", "cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "reinforce", "cpi", "gspo", "gspo_token", "gmpo", "vespo",
        "clip_cov", "kl_cov",
    ] = "ppo"  # fmt: skip
    #: r is clipped to [1 - clip_low, 1 + clip_high]; "gmpo" clips d to [-clip_low, clip_high].
    clip_low: float = 0.2
    clip_high: float = 0.2
    #: c > 1: where A < 0 the loss is at most -c·A (arXiv 1912.09729).
    dual_clip: float | None = None
    #: δ: the unclipped branch uses min(r, δ) (two-sided clipping, arXiv 2505.07291).
    ratio_cap: float | None = None
    #: d is clamped to ±this before exp; no gradient outside.
    log_ratio_clamp: float | None = None
    sapo_tau_positive: float = 1.0
    sapo_tau_negative: float = 1.05
    dro_beta: float = 1.0
    vespo_k_positive: float = 2.0
    vespo_k_negative: float = 3.0
    vespo_lambda_positive: float = 3.0
    vespo_lambda_negative: float = 2.0
    cov_ratio: float = 0.0002
    cov_low: float = 1.0
    cov_high: float = 5.0
    cov_kl_coef: float = 1.0
    value_loss: Literal["mse", "huber"] = "mse"
    huber_delta: float = 1.0
    value_half: bool = True
    #: c of the value clip; what is clipped depends on the mode:
    #: "max" max(f(v - R), f(v_c - R)), v_c = v_old + clamp(v - v_old, ±c); "replace" f(v_c - R); "error" min(f(v - R), c).
    value_clip: float | None = None
    value_clip_mode: Literal["max", "replace", "error"] = "max"
    value_coef: float = 0.5
    entropy_coef: float = 0.0
    #: With u = ref_log_prob - log_prob: k1 = -u, abs = |u|, k2 = u²/2, k3 = exp(u) - u - 1 (joschu.net/blog/kl-approx.html).
    kl: Literal["k1", "abs", "k2", "k3"] | None = None
    kl_coef: float = 0.0
    #: u is clamped to ±this; no gradient outside.
    kl_clamp: float | None = None
    #: the estimate itself, weight included, is clamped to ±this; no gradient outside.
    kl_value_clamp: float | None = None
    #: "k2": the estimate keeps its value and takes the gradient of an unclamped k2, the one that is unbiased on policy
    #: (verl's "k1+" and "k3+").
    kl_gradient: Literal["k2"] | None = None
    #: "ratio": the estimate times r, with r's gradient, unbiased off policy (arXiv 2512.02556); "score": times
    #: exp(x - sg(x)), which is 1 and adds estimate·∇x to the gradient (arXiv 2506.09477).
    kl_weight: Literal["ratio", "score"] | None = None
    #: (A - mean) / (std + advantage_eps) over the valid elements; a single valid element is left as it is.
    normalize_advantages: bool = False
    advantage_ddof: int = 1
    advantage_eps: float = 1e-8
    #: "token-mean": w = 1/valid; "seq-mean-token-mean": w = 1/(B·valid in the row); "seq-mean-token-sum": w = 1/B; "sum": w = 1.
    reduction: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "sum"] = "token-mean"
    #: The policy term times a constant made of ρ = exp(old_log_prob - rollout_log_prob):
    #: "tis" min(ρ, rollout_high); "icepop" ρ inside [rollout_low, rollout_high], else 0.
    rollout_correction: Literal["tis", "icepop"] | None = None
    rollout_low: float = 0.5
    rollout_high: float = 2.0

    def __post_init__(self) -> None:
        if self.policy not in POLICIES:
            raise ValueError(f"LossConfig: policy must be one of {POLICIES}, got {self.policy!r}")
        if self.reduction not in REDUCTIONS:
            raise ValueError(f"LossConfig: reduction must be one of {REDUCTIONS}, got {self.reduction!r}")
        for name, allowed in CHOICES.items():
            if name != "policy" and getattr(self, name) not in allowed:
                raise ValueError(f"LossConfig: {name} must be one of {allowed}, got {getattr(self, name)!r}")
        optional = {"dual_clip", "ratio_cap", "log_ratio_clamp", "value_clip", "kl_clamp", "kl_value_clamp"}
        for name in (*NUMBERS, *SEQUENCE_NUMBERS):
            value = getattr(self, name)
            if value is None and name in optional:
                continue
            if isinstance(value, bool) or not isinstance(value, (int, float)):
                raise TypeError(f"LossConfig: {name} must be a number, got {type(value).__name__}")
            if not math.isfinite(value):
                raise ValueError(f"LossConfig: {name} must be finite, got {value}")
            if value < 0 and not name.endswith("_coef"):
                raise ValueError(f"LossConfig: {name} must be >= 0, got {value}")
        if self.dual_clip is not None and self.dual_clip <= 1:
            raise ValueError(f"LossConfig: dual_clip must be > 1, got {self.dual_clip}")
        for name in ("huber_delta", "sapo_tau_positive", "sapo_tau_negative"):
            if getattr(self, name) <= 0:
                raise ValueError(f"LossConfig: {name} must be > 0, got {getattr(self, name)}")
        if self.kl_gradient is not None and self.kl_weight is not None:
            raise ValueError("LossConfig: kl_gradient and kl_weight must not both be given")
        if self.rollout_low > self.rollout_high:
            raise ValueError(
                f"LossConfig: rollout_low must be <= rollout_high, got {self.rollout_low} > {self.rollout_high}"
            )

        # torch.compile guards on a tensor's type, not on what it holds: an annealed coefficient recompiles nothing.
        vector = torch.tensor(self.numbers(), dtype=torch.float64, device="cpu")
        self.__dict__["_vector"] = vector
        of_sequences = [getattr(self, name) for name in SEQUENCE_NUMBERS]
        self.__dict__["_sequence_vector"] = torch.tensor(of_sequences, dtype=torch.float64, device="cpu")
        if self.policy in SEQUENCE_POLICIES:
            token: Any = SEQUENCE_POLICIES[self.policy]
            policy = dataclasses.replace(self, policy=token, normalize_advantages=False, kl=None)
            kl = dataclasses.replace(self, policy="reinforce", normalize_advantages=False, rollout_correction=None)
            self.__dict__["_forms"] = policy, kl

    @property
    def forms(self) -> tuple[LossConfig, ...]:
        """Of a sequence policy, what kernels are given: all but the KL term, and the KL term. See `sequences.py`."""
        return self.__dict__.get("_forms", ())

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if not name.startswith("_")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.__post_init__()

    @property
    def numbers_vector(self) -> torch.Tensor:
        """`numbers()` as a float64 tensor on the CPU, for registered ops."""
        return self.__dict__["_vector"]

    @property
    def sequence_numbers_vector(self) -> torch.Tensor:
        """`SEQUENCE_NUMBERS` likewise."""
        return self.__dict__["_sequence_vector"]

    @property
    def device_numbers(self) -> torch.Tensor | None:
        """The same vector in memory of a GPU, which kernels there read in place of `numbers()`; see `on`."""
        return None

    def on(self, device: torch.device | str) -> DeviceLossConfig:
        """The same loss with numbers that can be set, and that a captured CUDA graph reads at each replay."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(LossConfig)}
        return DeviceLossConfig(**fields, device=device)

    def numbers(self) -> tuple[float, ...]:
        """`NUMBERS` in order, absent ones as NaN: what kernels and registered ops take."""
        return tuple(math.nan if (v := getattr(self, name)) is None else v for name in NUMBERS)

    def choices(self) -> tuple[int, ...]:
        """`CHOICES` in order, as indices; of a sequence policy, the token policy that is made of it."""
        chosen = {name: getattr(self, name) for name in CHOICES}
        chosen["policy"] = SEQUENCE_POLICIES.get(self.policy, self.policy)
        return tuple(allowed.index(chosen[name]) for name, allowed in CHOICES.items())

    @staticmethod
    def unpacked(numbers: Sequence[float], choices: Sequence[int]) -> LossConfig:
        """The inverse of `numbers()` and `choices()`. Reductions have become weights by then."""
        fields: dict[str, Any] = {name: None if math.isnan(x) else x for name, x in zip(NUMBERS, numbers, strict=True)}
        for (name, allowed), i in zip(CHOICES.items(), choices, strict=True):
            fields[name] = allowed[i]
        return LossConfig(**fields)

    @staticmethod
    def preset(name: str, **changes: Any) -> LossConfig:
        """The loss of another trainer at its defaults, e.g. `LossConfig.preset("cleanrl", clip_low=0.1, clip_high=0.1)`."""
        if name not in PRESETS:
            raise ValueError(f"LossConfig.preset: name must be one of {sorted(PRESETS)}, got {name!r}")
        return dataclasses.replace(PRESETS[name], **changes)


@dataclass(frozen=True, eq=False)
class DeviceLossConfig(LossConfig):
    """A `LossConfig` whose numbers `set` changes in place; made by `config.on(device)`, for losses on that device.

    They lie in its memory too, so kernels captured in a CUDA graph read at each replay what was set last. A call whose
    backend is the reference, or that torch.compile traced, reads the host's numbers: right too, but for a graph, where
    they stay as they were captured. It has a state, so it equals nothing but itself.
    """

    device: torch.device | str = "cpu"

    __eq__ = object.__eq__
    __hash__ = object.__hash__

    def __post_init__(self) -> None:
        super().__post_init__()
        self.__dict__["_on_device"] = self.numbers_vector.to(self.device)
        for form in self.forms:
            form.__dict__.update(_vector=self.numbers_vector, _on_device=self.device_numbers)

    @property
    def device_numbers(self) -> torch.Tensor:
        return self.__dict__["_on_device"]

    def set(self, **numbers: float | None) -> None:
        """Changes fields of `NUMBERS`, e.g. `set(clip_low=0.1, clip_high=0.1)`; the device is not waited for.

        In the order of its current stream: later calls and replays there see the new values, earlier ones do not.
        Switching a feature on or off would change the kernels themselves: ValueError, as for a value out of range.
        """
        before = {field.name: getattr(self, field.name) for field in dataclasses.fields(LossConfig)}
        for name, value in numbers.items():
            if name not in NUMBERS:
                raise ValueError(f"DeviceLossConfig: set takes the fields {NUMBERS}, got {name!r}")
            if (value is None) != (before[name] is None):
                state = "off" if value is not None else "on"
                raise ValueError(f"DeviceLossConfig: {name} is {state} and must stay so, got {value}")
        LossConfig(**{**before, **numbers})  # its checks, before anything changes
        for config in (self, *self.forms):
            config.__dict__.update(numbers)
            config.__dict__.pop("_packed", None)
        for name, value in numbers.items():
            if value is not None:
                for vector in (self.numbers_vector, self.device_numbers):
                    vector[NUMBERS.index(name)].fill_(value)


def _presets() -> dict[str, LossConfig]:
    """Each trainer's defaults; where a trainer leaves a choice to its user, the default of its own PPO config."""
    C = LossConfig
    return {
        # cleanrl/ppo.py: ½·max value clip with the policy's ε, minibatch normalisation (ddof 1, + 1e-8). The entropy
        # coefficient is 0 in ppo_continuous_action.py, and ε is 0.1 in ppo_atari.py.
        "cleanrl": C(value_clip=0.2, entropy_coef=0.01, normalize_advantages=True),
        # stable_baselines3/ppo/ppo.py: mse without ½. clip_range_vf is None; given, it replaces: value_clip=clip_range_vf.
        "sb3": C(value_half=False, value_clip_mode="replace", normalize_advantages=True),
        # rsl_rl/algorithms/ppo.py: value max-clip without ½. Advantages are normalised (ddof 1, + 1e-8) over the whole
        # rollout before, unless normalize_advantage_per_mini_batch: then normalize_advantages=True.
        "rsl_rl": C(value_half=False, value_clip=0.2, value_coef=1.0, entropy_coef=0.01),
        # skrl/agents/torch/ppo/ppo.py, ppo_cfg.py: mse without ½, value_loss_scale 2.5, the clipped value replaces.
        # Advantages are normalised (ddof 1, + 1e-8) over the whole memory before.
        "skrl": C(value_half=False, value_clip=0.2, value_clip_mode="replace", value_coef=2.5),
        # torchrl/objectives/ppo.py, ClipPPOLoss: smooth-l1 critic, which is ½·huber with δ = 1; clip_value is None, and
        # given takes the maximum. Its normalize_advantage (off) has another epsilon than ours where a mask is used.
        "torchrl": C(value_loss="huber", value_coef=1.0, entropy_coef=0.01),
        # rllib/algorithms/ppo/torch/ppo_torch_learner.py: squared error clamped to [0, vf_clip_param]. Not expressible:
        # kl_coeff 0.2 times the analytic KL(old || new), a function of both distributions' parameters; add it outside.
        "rllib": C(clip_low=0.3, clip_high=0.3, value_half=False, value_clip=10.0, value_clip_mode="error", value_coef=1.0),
        # verl/trainer/ppo/core_algos.py: d clamped to ±20, dual clip 3; the critic's ½·max loss with cliprange 0.5 is a
        # loss of its own. use_kl_loss is off; on: kl="k3", kl_coef=0.001, "k1+" and "k3+" with kl_gradient="k2". The KL
        # clamps are verl's for k3 only: None for the others. loss_mode: its "gspo" is policy="gspo_token", "geo_mean" is
        # "gmpo", "gpg" is "reinforce", the others have our names; dual_clip is of "vanilla" alone, and DPPO has its
        # clip_ratio_c as ratio_cap=3.0. "sapo" and "geo_mean" take reduction="seq-mean-token-mean", and "dro", "kl_cov",
        # "clip_cov", "gspo", "geo_mean" no log_ratio_clamp. Rollout correction: `rollout_weights`.
        "verl": C(dual_clip=3.0, log_ratio_clamp=20.0, value_clip=0.5, value_coef=1.0, kl_clamp=20.0, kl_value_clamp=10.0),
        # trl/experimental/ppo/ppo_trainer.py, gone in 1.16: ½·max value clip, vf_coef 0.1; KL goes into the reward. Not
        # expressible: its value term is a mean over one token a sequence more than its policy term.
        "trl_ppo": C(value_clip=0.2, value_coef=0.1),
        # trl/trainer/grpo_trainer.py, loss_type "dapo" with beta 0: Σ over tokens divided by
        # denominator=num_items_in_batch/num_processes (1.16: one step's
        # share of the generated batch). loss_type "grpo": reduction="seq-mean-token-mean"; "bnpo":
        # "token-mean"; "dr_grpo": denominator=B·max_completion_length. beta: kl="k3", kl_coef=beta, no clamp, and
        # use_bias_correction_kl: kl_weight="ratio" (of tokens; under importance_sampling_level "sequence" TRL takes the
        # sequence's ratio, which is not expressible). delta: ratio_cap. importance_sampling_level "sequence": policy="gspo".
        # "cispo": policy="cispo", clip_low=1, clip_high=epsilon_high - 1; "sapo", "vespo", GMPOTrainer: policy="sapo" and
        # "gmpo" with reduction="seq-mean-token-mean", "vespo". vllm_importance_sampling_mode: `rollout_weights`.
        "trl_grpo": C(),
        # openrlhf/models/loss.py, cli/train_ppo_ray.py: d clamped to ±20, ½·max value clip 0.5 as a loss of its own, KL in
        # the reward; with --algo.kl.use_loss: kl=estimator, kl_coef=0.01, clamped after. policy_loss_type "gspo":
        # policy="gspo", reduction="seq-mean-token-mean", no log_ratio_clamp. Its is_correction clamps on both sides or masks
        # by token or sequence: `rollout_weights`; gated by a divergence of probabilities (tv, binary_kl): not expressible.
        "openrlhf": C(log_ratio_clamp=20.0, value_clip=0.5, value_coef=1.0, kl_value_clamp=10.0),
        # nemo_rl/algorithms/loss/loss_functions.py, ClippedPGLossConfig and MseValueLossConfig (no value clip; its PPO
        # recipe sets 0.2, scale 0.4, dual_clip 10, clip_high 0.28, KL 0). use_on_policy_kl_approximation: its KL weight is
        # the ratio to the engine's log-probs; kl_weight="ratio" is that where old_log_prob holds them. use_cispo:
        # policy="cispo"; sequence_level_importance_ratios: policy="gspo"; truncated importance sampling: `rollout_weights`.
        "nemo_rl": C(value_coef=1.0, kl="k3", kl_coef=0.01, kl_clamp=20.0, kl_value_clamp=10.0, kl_weight="score"),
        # slime/utils/ppo_utils.py, backends/megatron_utils/loss.py: value max-clip without ½ as a loss of its own; means
        # over sequences. use_kl_loss is off; on: kl="k1", or "k3" for low_var_kl, the only one that slime clamps (±10).
        # Its k3 and k1 have no clamp (None); use_unbiased_kl: kl_weight="ratio". advantage_estimator "gspo": policy="gspo";
        # "cispo": policy="cispo"; tis and icepop: `rollout_weights`.
        "slime": C(value_half=False, value_clip=0.2, value_coef=1.0, kl_value_clamp=10.0, reduction="seq-mean-token-mean"),
    }  # fmt: skip


PRESETS = _presets()
