"""`LanguageConfig`: every knob of the language trainer. Groups of fields, which are the groups of its help."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Literal

from ..errors import UserError
from ..fields import Bounds, RunFields

Algorithm = Literal[
    "ppo", "grpo", "dr_grpo", "rloo", "leave_one_out", "opo", "reinforce_plus_plus", "reinforce_plus_plus_baseline", "remax"
]  # fmt: skip


@dataclass(frozen=True)
class ModelFields:
    """The causal language model and what of it is trained."""

    model: str = ""
    """Folder of a Hugging Face causal language model (config.json, weights, tokenizer), or a .json file with a
    transformers configuration, which is built with random weights and a byte tokenizer. Empty: a small Llama. Nothing is
    downloaded."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    """Arithmetic of forward and backward; with bfloat16 parameters and optimiser stay float32 (autocast)."""

    gradient_checkpointing: bool = False
    """Keep only the inputs of layers for the backward and compute the rest again: less memory, a third more time."""

    lora_rank: int = 0
    """Train low-rank adapters of this rank instead of the weights (needs peft); the reference is the model without them.
    0: train all weights."""

    lora_alpha: int = 16
    """Adapters are scaled by lora-alpha / lora-rank."""


@dataclass(frozen=True)
class TaskFields:
    """Prompts, reward, evaluation, and the supervised start of a model with random weights."""

    prompts: str = ""
    """JSON lines, an object with "prompt" each; other keys reach the reward function as columns. Empty: additions of
    numbers below 100, answers included."""

    eval_prompts: str = ""
    """Held-out prompts of the same form, answered greedily. Empty: with --prompts no evaluation, else 512 held-out additions."""

    reward: str = "ppo_fast.trainer.language.rewards:exact_match"
    """Reward function "module:function" or "file.py:function", called as f(prompts=[...], completions=[...], **columns), a
    number for each completion. exact_match: 1 where the completion is the column "answer", else 0."""

    eval_every: int = 20
    """Iterations between two evaluations; one is made before the first and one after the last."""

    warm_start_accuracy: float = 0.3
    """A model built from a configuration first learns from the column "answer" until it gives this share of 256 training
    prompts greedily. 0: no supervised start."""

    warm_start_steps: int = 3000
    """At most this many supervised steps."""

    warm_start_learning_rate: float = 4e-3
    """AdamW's step size in the supervised start; batches of 256."""


@dataclass(frozen=True)
class SamplingFields:
    """Rollouts."""

    num_responses: int = 512
    """Responses per iteration, to num-responses / group-size prompts."""

    group_size: int = 0
    """Responses per prompt, which group baselines compare. 0: 4, but 1 where nothing is compared (ppo, remax,
    reinforce_plus_plus)."""

    max_new_tokens: int = 8
    """Tokens at which a response is cut."""

    max_prompt_tokens: int = 1024
    """A longer prompt is an error."""

    temperature: float = 1.0
    """Divides the logits, when sampling and in all log-probs of training."""

    top_k: int = 0
    """Sample from the k most probable tokens only; 0: from all."""

    top_p: float = 1.0
    """Sample from the most probable tokens that hold this much probability only."""

    sampling_batch: int = 512
    """Responses sampled side by side; bounds the memory of the key-value cache."""

    rollout_policy: Literal["full", "int8", "pruned"] = "full"
    """What samples: the policy, or a copy of it that is made before each rollout, with weights of 8 bits (int8; CPU only, worth
    it where layers are wide) or without the smallest weights (pruned; no faster, as zeros are multiplied like others)."""

    rollout_sparsity: float = 0.5
    """pruned: share of each linear layer's weights that is left out."""

    rollout_correction: Literal["token", "none"] = "token"
    """token: what another policy sampled weighs min(ρ, rollout-high) in the policy loss, ρ the ratio of the learner's
    probability before the update to that of the policy that sampled. none: as if the learner had sampled."""

    rollout_high: float = 2.0
    """Upper bound of that weight."""


@dataclass(frozen=True)
class AlgorithmFields:
    """Advantages and loss."""

    algorithm: Algorithm = "ppo"
    """ppo: a value head and GAE. The others have no critic: group baselines, REINFORCE++ and ReMax (ppo_fast.advantages)."""

    gamma: float = 1.0
    """Discount per token."""

    gae_lambda: float = 0.95
    """ppo: GAE's trade between bias (0) and variance (1)."""

    length_adaptive_alpha: float | None = None
    """ppo: λ = 1 - 1/(alpha·length) for each response instead of gae-lambda (VAPO has 0.05)."""

    whiten_advantages: bool = True
    """ppo: bring the advantages of a rollout to mean 0 and standard deviation 1, over all valid tokens."""

    policy: Literal[
        "ppo", "cispo", "sapo", "dppo_tv", "dppo_kl", "dro", "reinforce", "cpi", "gspo", "gspo_token", "gmpo", "vespo"
    ] = "ppo"  # not those of the whole batch: no micro-batch has it
    """Policy loss; ppo_fast.LossConfig has the formulas."""

    clip_low: float = 0.2
    """The probability ratio has no gradient below 1 - clip-low …"""

    clip_high: float = 0.2
    """… nor above 1 + clip-high, where that would improve the loss."""

    dual_clip: float | None = None
    """c > 1: where the advantage is negative the loss is at most c·|advantage|."""

    value_clip: float | None = None
    """ppo: keep new values within this of the old ones."""

    value_coef: float = 0.1
    """ppo: weight of the value loss."""

    entropy_coef: float = 0.01
    """Weight of the entropy bonus."""

    reduction: Literal["token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "token-sum-norm"] = "token-mean"
    """How tokens become a loss, over a whole minibatch however it is split: mean over tokens; mean over responses of each
    one's mean or sum; sum divided by responses x max-new-tokens (Dr. GRPO)."""

    mask_truncated: bool = False
    """Responses that were cut at max-new-tokens do not count in the loss."""


@dataclass(frozen=True)
class KLFields:
    """KL divergence to the frozen reference."""

    kl_coef: float = 0.001
    """Weight of the KL divergence to the model that training started from; 0: no reference is held."""

    kl_in: Literal["reward", "loss"] = "reward"
    """reward: subtracted from each token's reward. loss: added to the loss, with its gradient."""

    kl_estimator: Literal["k1", "abs", "k2", "k3"] = "k1"
    """Per token, u = log reference/policy: -u, |u|, u²/2, exp(u) - u - 1. In the loss take k2 or k3: k1 has no useful
    gradient there."""

    kl_target: float | None = None
    """Steer kl-coef so that the KL of a response comes to this many nats (Ziegler et al. 2019)."""

    kl_horizon: float = 10_000.0
    """Responses over which kl-target takes effect."""


@dataclass(frozen=True)
class UpdateFields:
    """Gradient steps."""

    learning_rate: float = 7e-4
    """AdamW's step size at the start."""

    warmup_iterations: int = 10
    """Iterations over which the learning rate rises from 0: Adam's first steps are as long as any and know the least."""

    anneal_lr: bool = True
    """Lower the learning rate linearly to 0 over the run."""

    weight_decay: float = 0.0
    """AdamW's weight decay."""

    epochs: int = 2
    """Passes over each rollout."""

    num_minibatches: int = 4
    """Pieces that a rollout's responses are split into; every piece is one gradient step."""

    micro_batch: int = 0
    """Responses per forward and backward; gradients add up to those of the minibatch. 0: the whole minibatch."""

    max_grad_norm: float = 1.0
    """Gradients longer than this are scaled down to it."""


@dataclass(frozen=True)
class OutputFields:
    """The run and what it leaves."""

    run_dir: str = ""
    """Folder of checkpoint, logs, plot and models; runs/language-<algorithm> if empty. A taken one stays: -2, -3, … is added."""

    resume: bool = False
    """Continue the run in --run-dir at its last checkpoint, bit for bit; start it if there is no checkpoint yet."""

    seed: int = 1
    """Decides everything random: initial weights, order of prompts, sampled tokens, minibatches."""

    iterations: int = 500
    """Rollouts, each followed by an update."""

    stop_at_reward: float | None = None
    """Stop early once the evaluation's mean reward reaches this."""

    device: str = "cpu"
    """cpu, cuda or cuda:<number>."""

    threads: int = 2
    """CPU threads of torch."""

    checkpoint_seconds: float = 15.0
    """Seconds between two checkpoints; 0 writes one after every iteration. One is always written at the end."""

    logged_responses: int = 16
    """Responses of each iteration that go to rollouts.jsonl."""

    tensorboard: bool = True
    """Write TensorBoard scalars into <run-dir>/tensorboard."""

    plot: bool = True
    """Draw the learning curve to <run-dir>/curve.png at the end."""

    progress: bool = True
    """Show progress and sampled responses while training; off prints only the summary."""


GROUPS = (ModelFields, TaskFields, SamplingFields, AlgorithmFields, KLFields, UpdateFields, OutputFields)


@dataclass(frozen=True)
class LanguageConfig(
    RunFields, OutputFields, UpdateFields, KLFields, AlgorithmFields, SamplingFields, TaskFields, ModelFields
):
    """PPO and its kin for causal language models.

    With no flag at all: a transformer of 99,000 parameters learns to add, on two CPU cores in minutes.
    """

    FORMAT: ClassVar[str] = "ppo_fast.language/1"
    BOUNDS: ClassVar[Bounds] = {
        "lora_rank": (0, 2**16, True),
        "lora_alpha": (0, math.inf, False),
        "eval_every": (1, 10**9, True),
        "warm_start_accuracy": (0, 1, True),
        "warm_start_steps": (1, 10**9, True),
        "warm_start_learning_rate": (0, math.inf, False),
        "num_responses": (1, 2**24, True),
        "group_size": (0, 2**24, True),
        "max_new_tokens": (1, 2**24, True),
        "max_prompt_tokens": (1, 2**24, True),
        "temperature": (0, math.inf, False),
        "top_k": (0, 2**31, True),
        "top_p": (0, 1, False),
        "sampling_batch": (1, 2**24, True),
        "rollout_sparsity": (0, 1, True),
        "rollout_high": (0, math.inf, False),
        "gamma": (0, 1, True),
        "gae_lambda": (0, 1, True),
        "length_adaptive_alpha": (0, math.inf, False),
        "clip_low": (0, 1, True),
        "clip_high": (0, math.inf, True),
        "dual_clip": (1, math.inf, False),
        "value_clip": (0, math.inf, False),
        "value_coef": (0, math.inf, True),
        "entropy_coef": (-math.inf, math.inf, False),
        "kl_coef": (0, math.inf, True),
        "kl_target": (0, math.inf, False),
        "kl_horizon": (0, math.inf, False),
        "learning_rate": (0, math.inf, False),
        "warmup_iterations": (0, 10**12, True),
        "weight_decay": (0, math.inf, True),
        "epochs": (1, 10**6, True),
        "num_minibatches": (1, 2**24, True),
        "micro_batch": (0, 2**24, True),
        "max_grad_norm": (0, math.inf, False),
        "seed": (0, 2**63 - 1, True),
        "iterations": (1, 10**12, True),
        "stop_at_reward": (-math.inf, math.inf, False),
        "threads": (1, 4096, True),
        "checkpoint_seconds": (0, math.inf, True),
        "logged_responses": (0, 2**24, True),
    }

    def __post_init__(self) -> None:
        self.check_fields()
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", self.device):
            raise UserError(f"--device: expected cpu, cuda or cuda:<number>, got {self.device!r}")
        if not re.fullmatch(r"[^:]+(:[^:]+)?:[A-Za-z_]\w*", self.reward):
            raise UserError(f"--reward: expected module:function or file.py:function, got {self.reward!r}")
        if self.num_responses % self.group:
            raise UserError(
                f"--num-responses: expected a multiple of the {self.group} responses to a prompt (--group-size), "
                f"got {self.num_responses}"
            )
        if self.num_minibatches > self.num_responses:
            raise UserError(
                f"--num-minibatches: expected at most num-responses = {self.num_responses}, got {self.num_minibatches}"
            )
        if self.kl_target is not None and self.kl_coef == 0:
            raise UserError("--kl-target: expected --kl-coef > 0, where the steering starts, got 0")

    @property
    def group(self) -> int:
        """Responses to a prompt."""
        return self.group_size or (1 if self.algorithm in ("ppo", "remax", "reinforce_plus_plus") else 4)

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) if self.run_dir else Path("runs") / f"language-{self.algorithm}"
