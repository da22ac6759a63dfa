"""PPO on gymnasium environments: `train(ControlConfig(...))`.

An iteration collects num-envs x num-steps steps, estimates advantages, and takes epochs of minibatch steps. Between two
iterations the whole state is plain data: parameters, optimiser, normalisers, generators, counters, and each
environment as the seed and actions of its unfinished episode. A checkpoint is that state; a run that was killed and
resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import functools
import random
import time
import warnings
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from . import checkpoint
from .compress import check
from .config import ControlConfig
from .device import find_device
from .envs import MakeEnv, make_envs, replay_states, restore
from .errors import UserError, one_line
from .learner import Learner
from .networks import ActorCritic
from .normalize import ObservationNormalizer, RewardNormalizer
from .policies import make_policy
from .presets import PRESETS, preset
from .recurrent import RecurrentActorCritic, RecurrentCollector, RecurrentLearner
from .report import PROGRESS_COLUMNS, LiveProgress, Snapshot, Timing, summary
from .rollout import Collector, Episode
from .rundir import RunDir, claim
from .session import Interrupt, OnIteration, Session, announce, load_checkpoint, need_packages, resume_command
from .spaces import ObservationCodec

__all__ = ["PRESETS", "ControlConfig", "TrainResult", "UserError", "preset", "train"]


@dataclass(frozen=True)
class TrainResult:
    """How a call of `train` ended."""

    run_dir: Path
    finished: bool  # False: interrupted with Ctrl-C, after writing a checkpoint
    global_step: int
    episodes: int
    mean_return: float  # of the last 100 episodes
    timing: Timing


class Trainer:
    """The state of a run and one iteration of it; no files, no output."""

    COLUMNS: tuple[str, ...] = PROGRESS_COLUMNS

    def __init__(self, config: ControlConfig, make_env: MakeEnv | None = None) -> None:
        self.config, self.device = config, find_device(config, config.cuda_graph)
        random.seed(config.seed)  # the global generators are for environments that use them
        np.random.seed(config.seed % 2**32)
        torch.manual_seed(config.seed)
        self.generator = torch.Generator().manual_seed(config.seed)
        self.envs = make_envs(config, make_env)
        try:
            self._build()
        except BaseException:  # worker processes must not outlive us
            self.close()
            raise

    def _build(self) -> None:
        config, envs = self.config, self.envs
        check(config)
        codec, policy = ObservationCodec(envs.single_observation_space), make_policy(envs.single_action_space)
        kinds: tuple[Any, Any, Any] = ActorCritic, Collector, Learner
        if config.recurrent != "none":
            net = functools.partial(RecurrentActorCritic, kind=config.recurrent, size=config.recurrent_size)
            kinds = net, RecurrentCollector, RecurrentLearner
        make_net, make_collector, make_learner = kinds
        sizes = codec.dim, policy.num_params, policy.num_log_std, config.hidden_sizes
        self.net = make_net(*sizes, config.initial_log_std, self.generator).to(self.device)
        self.obs_normalizer = ObservationNormalizer(codec.dim) if config.normalize_observations else None
        self.reward_normalizer = RewardNormalizer(config.num_envs, config.gamma) if config.normalize_rewards else None
        self.collector = make_collector(config, envs, codec, policy, self.net, self.obs_normalizer, self.generator)
        self.learner = make_learner(config, policy, self.net, self.generator)
        self.now = Snapshot()
        self._reset()

    def _reset(self) -> None:
        try:
            obs, info = self.envs.reset()
        except Exception as error:  # an environment may raise anything; it stays attached as the cause
            raise UserError(f"environment {self.config.env_id} failed to reset: {one_line(error)}") from error
        self.collector.begin(obs, info)

    def _clock(self) -> float:
        """The time at a border of two phases, where everything that was asked of a GPU is waited for."""
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def iterate(self) -> tuple[list[Episode], dict[str, Any]]:
        """One rollout and one update; the episodes that ended and a row of `PROGRESS_COLUMNS`."""
        config, now = self.config, self.now
        timing, left = now.timing, 1.0 - now.iteration / config.num_iterations
        learning_rate = config.learning_rate * (left if config.anneal_lr else 1.0)
        start = self._clock()
        self.collector.collect()
        episodes = self.collector.episodes(now.global_step)
        collected = self._clock()
        batch = self.learner.batch(self.collector, self.reward_normalizer)
        rows = torch.from_numpy(np.flatnonzero(self.collector.valid))
        estimated = self._clock()
        stats, _ = self.learner.update(batch, rows, learning_rate, left)
        named: dict[str, Any] = {**self.learner.named_statistics(stats, batch, rows)}
        updated = self._clock()
        timing.rollout += collected - start
        timing.advantage += estimated - collected
        timing.update += updated - estimated

        now.iteration += 1
        now.global_step += config.batch_size
        now.episodes += len(episodes)
        now.recent.extend(episode.ret for episode in episodes)
        named.update(
            global_step=now.global_step, iteration=now.iteration, episodes=now.episodes, mean_return=now.mean_return,
            learning_rate=learning_rate, steps_per_second=config.batch_size / (updated - start),
        )  # fmt: skip
        return episodes, {name: named[name] for name in self.COLUMNS}

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: later training does not change it."""
        now = self.now
        envs = [[episode, torch.from_numpy(actions)] for episode, actions in replay_states(self.envs)]
        normalizers = {
            "observations": None if self.obs_normalizer is None else self.obs_normalizer.moments.state_dict(),
            "rewards": None if self.reward_normalizer is None else self.reward_normalizer.state_dict(),
        }
        learned = {"parameters": dict(self.net.state_dict()), "optimizer": self.learner.optimizer.state_dict()}
        return {
            **checkpoint.on_host(learned), "normalizers": normalizers,
            "generator": self.generator.get_state(), "global_rng": checkpoint.global_rng_state(),
            "envs": envs, "collector": self.collector.state_dict(),
            "now": {"global_step": now.global_step, "iteration": now.iteration, "episodes": now.episodes,
                    "recent": list(now.recent), "timing": asdict(now.timing)},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Puts everything back; False if the environments did not replay to the observations of the checkpoint."""
        self.net.load_state_dict(state["parameters"])
        self.learner.load_optimizer(state["optimizer"])
        if self.obs_normalizer is not None:
            self.obs_normalizer.moments.load_state_dict(state["normalizers"]["observations"])
        if self.reward_normalizer is not None:
            self.reward_normalizer.load_state_dict(state["normalizers"]["rewards"])
        now = dict(state["now"])
        self.now = Snapshot(**{**now, "recent": deque(now["recent"], 100), "timing": Timing(**now["timing"])})
        obs, info = restore(self.envs, [(episode, actions.numpy()) for episode, actions in state["envs"]])
        self.collector.load_state_dict(state["collector"])
        expected = self.collector.raw_obs[-1].clone()
        self.collector.begin(obs, info)
        self.generator.set_state(state["generator"])
        checkpoint.set_global_rng_state(state["global_rng"])
        return torch.equal(expected, self.collector.raw_obs[-1])

    def close(self) -> None:
        self.envs.close()


def _loop(session: Session, console: Console, on_iteration: OnIteration | None) -> bool:
    """Iterations until the end, or until Ctrl-C; whether the run is finished."""
    trainer, config = session.trainer, session.config
    live = LiveProgress(config, console)
    try:
        with Interrupt(console) as interrupt:
            while trainer.now.iteration < config.num_iterations:
                episodes, row = trainer.iterate()
                start = time.perf_counter()
                session.log(episodes, row)
                live.update(trainer.now, row)
                if on_iteration is not None:
                    on_iteration(row)
                if interrupt.requested:
                    session.save()
                    return trainer.now.iteration == config.num_iterations
                session.save_if_due()
                trainer.now.timing.other += time.perf_counter() - start
    finally:
        live.close()
    return True


def train(
    config: Any,
    *,
    make_env: MakeEnv | None = None,
    console: Console | None = None,
    trainer: type[Trainer] = Trainer,
    on_iteration: OnIteration | None = None,
) -> TrainResult:
    """Trains as `config`, a `ControlConfig`, says and leaves checkpoint, logs and plot in its folder.

    `make_env` makes one environment and replaces `config.env_id`. Raises `UserError` for wrong input, for an
    environment that fails, and for a folder that cannot be written; what was written before stays whole. Seeds the
    global generators of Python, numpy and torch, for environments that draw from them. `on_iteration` gets the row of
    progress.csv of each iteration, and ends the run by what it raises.
    """
    console = Console() if console is None else console
    threads = torch.get_num_threads()
    torch.set_num_threads(config.threads)
    try:
        with warnings.catch_warnings():
            # torch's, of steps without a graph: ours warm up for one
            warnings.filterwarnings("ignore", "This instance was constructed with capturable=True", UserWarning)
            # a failing worker's traceback, printed by gymnasium; its error reaches us as an exception as well
            warnings.filterwarnings("ignore", r"(?s).*ERROR: ", UserWarning, "gymnasium")
            return _train(config, make_env, console, trainer, on_iteration)
    finally:
        torch.set_num_threads(threads)


def _train(
    config: Any,
    make_env: MakeEnv | None,
    console: Console,
    kind: type[Trainer],
    on_iteration: OnIteration | None,
) -> TrainResult:
    need_packages(config, "control")
    state, device = load_checkpoint(config), find_device(config, config.cuda_graph)
    current = torch.cuda.device(-1 if device.type == "cpu" else device)  # -1: leaves it
    # before the folder, so that a mistake found here leaves no trace
    with current, contextlib.closing(kind(config, make_env)) as trainer, claim(config) as run:
        try:
            return _train_in(run, trainer, state, console, on_iteration)
        except OSError as error:
            raise UserError(f"--run-dir: {run.path} cannot be written ({one_line(error)})") from error


def _train_in(
    run: RunDir,
    trainer: Trainer,
    state: dict[str, Any] | None,
    console: Console,
    on_iteration: OnIteration | None,
) -> TrainResult:
    def say(text: str) -> None:
        console.print(text, soft_wrap=True, highlight=False, markup=False)

    announce(run, trainer.config, state, say, "control")
    session = Session(trainer, run, state, say)
    with contextlib.closing(session):
        finished = _loop(session, console, on_iteration)
        files = session.finish() if finished else []
    now = trainer.now
    if finished:
        console.print(summary(trainer.config, now, files))
    else:
        say(f"stopped at step {now.global_step:,}; continue with: {resume_command(run.path)}")
    return TrainResult(run.path, finished, now.global_step, now.episodes, now.mean_return, now.timing)
