"""`DDPGConfig`: every knob of the DDPG baseline with its meaning, its bounds, and its JSON file."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal

from .config import ControlConfig
from .errors import UserError
from .fields import Bounds, RunFields


@dataclass(frozen=True)
class DDPGConfig(RunFields):
    """DDPG on gymnasium environments with Box actions: the baseline that PPO is compared with.

    The defaults are CleanRL's; `--env-id Pendulum-v1` has a preset, then comes `--config FILE`, then the flags that you
    give, later wins. Lillicrap et al. 2015 have noise of the kind ou, tau 0.001, batches of 64, learning rates of 1e-4
    for the actor and 1e-3 for the critic, and a policy frequency of 1.
    """

    FORMAT: ClassVar[str] = "ppo_fast.ddpg/1"
    BOUNDS: ClassVar[Bounds] = {
        **ControlConfig.BOUNDS,
        "learning_starts": (0, 10**15, True),
        "buffer_size": (1, 10**10, True),
        "batch_size": (1, 2**24, True),
        "tau": (0, 1, False),
        "actor_learning_rate": (0, math.inf, False),
        "critic_learning_rate": (0, math.inf, False),
        "policy_frequency": (1, 10**6, True),
        "gradient_steps": (1, 10**6, True),
        "noise_std": (0, math.inf, True),
        "ou_theta": (0, 1, True),
        "log_every": (1, 10**9, True),
    }
    cuda_graph: ClassVar[bool] = False

    algorithm: Literal["ddpg"] = "ddpg"
    """ddpg, or ppo, which has flags of its own."""

    env_id: str = "Pendulum-v1"
    """Gymnasium environment id, of one with Box actions. "module:Id" imports the module that registers it first."""

    run_dir: str = ""
    """Folder for checkpoint, logs and plot; runs/<env-id>-ddpg if empty. A taken one stays as it is: -2, -3, … is added."""

    resume: bool = False
    """Continue the run in --run-dir at its last checkpoint, bit for bit; start it if there is no checkpoint yet."""

    seed: int = 1
    """Decides everything random: initial weights, noise, minibatches, and the seed of every episode."""

    total_timesteps: int = 1_000_000
    """Environment steps over all environments; rounded down to whole steps of all."""

    device: str = "cpu"
    """Where networks, replay buffer and updates are: cpu, cuda or cuda:<number>."""

    num_envs: int = 1
    """Environments that are stepped side by side."""

    vectorization: Literal["sync", "async"] = "sync"
    """sync: all environments in this process. async: a process each, worth it when one step takes over ~0.1 ms."""

    autoreset: Literal["same_step", "next_step"] = "same_step"
    """When a finished episode restarts (gymnasium's AutoresetMode). next_step spends a step on it, which is not stored."""

    learning_starts: int = 25_000
    """Steps with uniformly random actions, before the first update."""

    buffer_size: int = 1_000_000
    """Transitions that are kept, the latest; 4·(2·observation + action + 2) bytes each, in memory and in the checkpoint."""

    batch_size: int = 256
    """Transitions of one update, drawn with replacement."""

    gradient_steps: int = 1
    """Updates of the critic after each step of the environments."""

    policy_frequency: int = 2
    """Updates of the critic to one of the actor and of both target networks."""

    gamma: float = 0.99
    """Discount of future rewards."""

    tau: float = 0.005
    """Target networks move by this share of the way to the trained ones."""

    actor_learning_rate: float = 3e-4
    """Adam's step size for the actor."""

    critic_learning_rate: float = 3e-4
    """Adam's step size for the critic."""

    noise: Literal["gaussian", "ou"] = "gaussian"
    """Exploration: independent Gaussian, or an Ornstein-Uhlenbeck process that starts at 0 with every episode."""

    noise_std: float = 0.1
    """Standard deviation of what is drawn at each step, where the action's bounds are -1 and 1."""

    ou_theta: float = 0.15
    """ou: how much of the noise decays at each step."""

    hidden_sizes: tuple[int, ...] = (256, 256)
    """Widths of the ReLU layers of actor and critic."""

    threads: int = 1
    """CPU threads of torch. Networks this small are fastest with 1."""

    log_every: int = 1000
    """Environment steps between two rows of progress.csv, where a checkpoint may be written; learning is the same."""

    checkpoint_seconds: float = 60.0
    """Seconds between two checkpoints, which hold the replay buffer. One is always written at the end."""

    tensorboard: bool = True
    """Write TensorBoard scalars into <run-dir>/tensorboard."""

    plot: bool = True
    """Draw the learning curve to <run-dir>/curve.png at the end."""

    progress: bool = True
    """Show progress while training; off prints only the summary."""

    def __post_init__(self) -> None:
        self.check_fields()
        if not self.env_id:
            raise UserError("--env-id: expected the id of a gymnasium environment, got ''")
        if not re.fullmatch(r"cpu|cuda(:(0|[1-9][0-9]?))?", self.device):
            raise UserError(f"--device: expected cpu, cuda or cuda:<number>, got {self.device!r}")
        if self.total_timesteps < self.num_envs:
            raise UserError(
                f"--total-timesteps: expected at least a step of each of {self.num_envs} environments, "
                f"got {self.total_timesteps}"
            )
        if self.buffer_size < self.num_envs:
            raise UserError(
                f"--buffer-size: expected room for a step of each of {self.num_envs} environments, got {self.buffer_size}"
            )

    @property
    def planned_steps(self) -> int:
        """Environment steps of the whole run."""
        return self.total_timesteps // self.num_envs * self.num_envs

    @property
    def iteration_steps(self) -> int:
        return -(-self.log_every // self.num_envs) * self.num_envs

    @property
    def num_iterations(self) -> int:
        return -(-self.planned_steps // self.iteration_steps)

    @property
    def folder(self) -> Path:
        name = self.env_id.replace(":", "-").replace("/", "-")
        return Path(self.run_dir) if self.run_dir else Path("runs") / f"{name}-ddpg"


PRESETS: dict[str, dict[str, Any]] = {
    "Pendulum-v1": {
        "total_timesteps": 30_000,
        "learning_starts": 1_000,
        "batch_size": 128,
        "policy_frequency": 1,
        "actor_learning_rate": 1e-3,
        "critic_learning_rate": 1e-3,
        "hidden_sizes": (64, 64),
    },
}
