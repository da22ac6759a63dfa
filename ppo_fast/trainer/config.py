"""`ControlConfig`: every knob of the control trainer with its meaning, its bounds, and its JSON file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from .errors import UserError
from .fields import Bounds, RunFields

_BOUNDS: Bounds = {
    "seed": (0, 2**63 - 1, True),
    "total_timesteps": (1, 10**15, True),
    "num_envs": (1, 2**20, True),
    "num_steps": (1, 2**24, True),
    "learning_rate": (0, math.inf, False),
    "gamma": (0, 1, True),
    "gae_lambda": (0, 1, True),
    "num_minibatches": (1, 2**24, True),
    "update_epochs": (1, 10**6, True),
    "clip_coef": (0, math.inf, False),
    "entropy_coef": (-math.inf, math.inf, False),
    "value_coef": (0, math.inf, True),
    "max_grad_norm": (0, math.inf, False),
    "target_kl": (0, math.inf, False),
    "adam_eps": (0, math.inf, False),
    "recurrent_size": (1, 2**16, True),
    "sequence_length": (1, 2**24, True),
    "initial_log_std": (-20, 20, True),
    "rollout_sparsity": (0, 1, True),
    "rollout_high": (0, math.inf, False),
    "threads": (1, 4096, True),
    "checkpoint_seconds": (0, math.inf, True),
}


@dataclass(frozen=True)
class ControlConfig(RunFields):
    """PPO on gymnasium vector environments.

    The defaults are CleanRL's for discrete actions; `--env-id` picks a preset where there is one (CartPole-v1,
    Acrobot-v1, Pendulum-v1, HalfCheetah-v5, Hopper-v5, ppo_fast/CartPoleNoVelocity-v1), then `--config FILE`, then the
    flags that you give, later wins.
    """

    FORMAT: ClassVar[str] = "ppo_fast.control/1"
    BOUNDS: ClassVar[Bounds] = _BOUNDS

    algorithm: Literal["ppo"] = "ppo"
    """ppo, or ddpg, a baseline for Box actions that has flags of its own (--algorithm ddpg --help)."""

    env_id: str = "CartPole-v1"
    """Gymnasium environment id. "module:Id" imports the module that registers it first."""

    run_dir: str = ""
    """Folder for checkpoint, logs and plot; runs/<env-id> if empty. A taken one stays as it is: -2, -3, … is added."""

    resume: bool = False
    """Continue the run in --run-dir at its last checkpoint, bit for bit; start it if there is no checkpoint yet."""

    seed: int = 1
    """Decides everything random: initial weights, sampled actions, minibatches, and the seed of every episode."""

    total_timesteps: int = 500_000
    """Environment steps over all environments; rounded down to whole iterations of num-envs x num-steps."""

    device: str = "cpu"
    """Where networks, rollout and updates are: cpu, cuda or cuda:<number>."""

    cuda_graph: bool = False
    """With --device cuda: record the step on a minibatch once, as a CUDA graph, and replay it: same arithmetic."""

    num_envs: int = 4
    """Environments that are stepped side by side."""

    num_steps: int = 128
    """Steps per environment between two updates. More: less biased advantages and rarer, larger updates."""

    vectorization: Literal["sync", "async"] = "sync"
    """sync: all environments in this process. async: a process each, worth it when one step takes over ~0.1 ms."""

    autoreset: Literal["same_step", "next_step"] = "same_step"
    """When a finished episode restarts (gymnasium's AutoresetMode). next_step spends a step on it, which is masked."""

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

    learning_rate: float = 2.5e-4
    """Adam's step size at the start."""

    anneal_lr: bool = True
    """Lower the learning rate linearly to 0 over the run."""

    gamma: float = 0.99
    """Discount of future rewards."""

    gae_lambda: float = 0.95
    """GAE's trade between bias (0: one-step TD) and variance (1: Monte Carlo)."""

    num_minibatches: int = 4
    """Pieces that a rollout is split into; every piece is one gradient step."""

    update_epochs: int = 4
    """Passes over each rollout."""

    normalize_advantages: bool = True
    """Bring the advantages of each minibatch to mean 0 and standard deviation 1."""

    clip_coef: float = 0.2
    """How far the probability ratio may move from 1 before its gradient stops."""

    anneal_clip: bool = False
    """Lower clip-coef linearly to 0 over the run."""

    clip_value_loss: bool = True
    """Also keep new values within clip-coef of the old ones."""

    entropy_coef: float = 0.01
    """Weight of the entropy bonus, which keeps the policy exploring."""

    value_coef: float = 0.5
    """Weight of the value loss."""

    max_grad_norm: float = 0.5
    """Gradients longer than this are scaled down to it."""

    target_kl: float | None = None
    """Skip the remaining epochs of an update once the approximate KL divergence of its last minibatch exceeds this."""

    adam_eps: float = 1e-5
    """Adam's epsilon."""

    hidden_sizes: tuple[int, ...] = (64, 64)
    """Widths of the tanh layers of policy and value network."""

    recurrent: Literal["none", "lstm", "gru"] = "none"
    """Put a memory in front of both networks, for observations that do not tell everything: an LSTM or a GRU."""

    recurrent_size: int = 64
    """Width of the memory."""

    sequence_length: int | None = None
    """How many steps a gradient goes back through the memory; by default to where the episode or the rollout began."""

    initial_log_std: float = 0.0
    """Box actions: logarithm of the exploration noise at the start; learned, the same in every state."""

    normalize_observations: bool = False
    """Bring observations to mean 0 and variance 1 by running statistics, and clip them to ±10."""

    normalize_rewards: bool = False
    """Divide rewards by the running standard deviation of the discounted return, and clip them to ±10."""

    threads: int = 1
    """CPU threads of torch. Networks this small are fastest with 1."""

    checkpoint_seconds: float = 15.0
    """Seconds between two checkpoints; 0 writes one after every iteration. One is always written at the end."""

    tensorboard: bool = True
    """Write TensorBoard scalars into <run-dir>/tensorboard."""

    plot: bool = True
    """Draw the learning curve to <run-dir>/curve.png at the end."""

    progress: bool = True
    """Show progress while training; off prints only the summary."""

    def __post_init__(self) -> None:
        validate(self)

    @property
    def batch_size(self) -> int:
        return self.num_envs * self.num_steps

    @property
    def num_strips(self) -> int:
        """Pieces of a rollout that a minibatch of sequences is made of: `sequence_length` steps of one environment."""
        return self.num_envs * -(-self.num_steps // (self.sequence_length or self.num_steps))

    @property
    def num_iterations(self) -> int:
        return self.total_timesteps // self.batch_size

    @property
    def planned_steps(self) -> int:
        """Environment steps of the whole run."""
        return self.num_iterations * self.batch_size

    @property
    def folder(self) -> Path:
        return Path(self.run_dir) if self.run_dir else Path("runs") / self.env_id.replace(":", "-").replace("/", "-")


def validate(config: ControlConfig) -> None:
    """Raises `UserError` for the first field that is out of range, or that does not fit the others."""
    config.check_fields()
    if not config.env_id:
        raise UserError("--env-id: expected the id of a gymnasium environment, got ''")
    if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", config.device):
        raise UserError(f"--device: expected cpu, cuda or cuda:<number>, got {config.device!r}")
    if config.cuda_graph and config.device == "cpu":
        raise UserError("--cuda-graph: expected --device cuda, got cpu")
    if config.cuda_graph and config.autoreset != "same_step":
        raise UserError(
            "--cuda-graph: expected --autoreset same_step, got next_step, whose minibatches vary in length: they leave out "
            "the steps that it spends on resets"
        )
    if config.recurrent == "none" and config.sequence_length is not None:
        raise UserError(
            f"--sequence-length: expected --recurrent lstm or gru, got none, and {config.sequence_length} steps"
        )
    if config.recurrent != "none" and config.rollout_policy != "full":
        raise UserError(
            f"--rollout-policy: expected full with --recurrent {config.recurrent}, got {config.rollout_policy}"
        )
    if config.recurrent != "none" and config.cuda_graph:
        raise UserError(
            f"--cuda-graph: expected --recurrent none, got {config.recurrent}, whose sequences vary in length"
        )
    if config.recurrent != "none" and config.num_minibatches > config.num_strips:
        raise UserError(
            f"--num-minibatches: expected at most num-envs x num-steps / sequence-length = {config.num_strips} with "
            f"--recurrent {config.recurrent}, got {config.num_minibatches}; a shorter --sequence-length allows more"
        )
    if config.num_minibatches > config.batch_size:
        raise UserError(
            f"--num-minibatches: expected at most num-envs x num-steps = {config.batch_size}, "
            f"got {config.num_minibatches}"
        )
    if config.total_timesteps < config.batch_size:
        raise UserError(
            f"--total-timesteps: expected at least one iteration, num-envs x num-steps = {config.batch_size}, "
            f"got {config.total_timesteps}"
        )


to_dict, dumps = ControlConfig.to_dict, ControlConfig.dumps
load_fields = ControlConfig.load_fields


def from_dict(fields: dict[str, Any], source: str) -> ControlConfig:
    """The inverse of `to_dict`; `source` names the file in messages."""
    return ControlConfig.from_dict(fields, source)
