"""PPO on gymnasium environments: `train(ControlConfig(...))`.

An iteration collects num-envs x num-steps steps, estimates advantages, and takes epochs of minibatch steps. Between two
iterations the whole state is plain data: parameters, optimiser, normalisers, generators, counters, and each
environment as the seed and actions of its unfinished episode. A checkpoint is that state; a run that was killed and
resumed ends with the same bits as one that was not.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import random
import time
import warnings
from collections import deque
from collections.abc import Callable
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
from .distributed import ALONE, Follower, Ranks, joined
from .envs import EnvState, MakeEnv, make_envs, replay_states, reset, restore
from .errors import UserError, one_line
from .fields import flag
from .learner import Learner
from .networks import ActorCritic
from .normalize import ObservationNormalizer, RewardNormalizer
from .policies import Policy, make_policy
from .presets import PRESETS, preset
from .recurrent import RecurrentActorCritic, RecurrentCollector, RecurrentLearner
from .report import PROGRESS_COLUMNS, LiveProgress, Snapshot, Timing, summary
from .rollout import Collector, Episode
from .rundir import RunDir
from .session import (
    Interrupt,
    OnIteration,
    Session,
    announce,
    iterations_of,
    load_checkpoint,
    need_packages,
    resume_command,
)
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


def need_plain(config: Any, where: str) -> None:
    """`UserError` for what is trained by one process alone."""
    for name, plain in (("algorithm", "ppo"), ("recurrent", "none"), ("rollout_policy", "full")):
        if (got := getattr(config, name, plain)) != plain:
            raise UserError(f"{flag(name)}: expected {plain} {where}, got {got}")


class Trainer:
    """The state of a run and one iteration of it; no files, no output."""

    COLUMNS: tuple[str, ...] = PROGRESS_COLUMNS

    def __init__(self, config: Any, make_env: MakeEnv | None = None, ranks: Ranks = ALONE) -> None:
        self.config, self.ranks = config, ranks
        if not ranks.alone:
            need_plain(config, f"on {ranks.size} ranks")
        self.local = ranks.local(config, "num_envs")  # with the environments and the device of this rank
        if config.cuda_graph and not ranks.alone:
            raise UserError(f"--cuda-graph: expected one rank, got {ranks.size}; go without by --no-cuda-graph")
        self.device = find_device(self.local, config.cuda_graph)
        self._seed(ranks.seed(config.seed))
        self.generator = torch.Generator().manual_seed(config.seed)
        self.envs = self._make_envs(make_env)
        try:
            self._build()
        except BaseException:  # worker processes must not outlive us
            self.close()
            raise

    def _make_envs(self, make_env: MakeEnv | None) -> Any:
        return make_envs(self.local, make_env, self.ranks.block(self.config.num_envs).start)

    @staticmethod
    def _seed(seed: int) -> None:
        """The global generators, for environments that use them."""
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)

    def _build(self) -> None:
        config, envs = self.config, self.envs
        check(config)
        codec, policy = ObservationCodec(envs.single_observation_space), make_policy(envs.single_action_space)
        make_net: Any = ActorCritic
        if config.recurrent != "none":
            make_net = functools.partial(RecurrentActorCritic, kind=config.recurrent, size=config.recurrent_size)
        sizes = codec.dim, policy.num_params, policy.num_log_std, config.hidden_sizes
        self.net = make_net(*sizes, config.initial_log_std, self.generator).to(self.device)
        self.obs_normalizer = ObservationNormalizer(codec.dim) if config.normalize_observations else None
        self.reward_normalizer = RewardNormalizer(config.num_envs, config.gamma) if config.normalize_rewards else None
        self.now = Snapshot()
        self._assemble(codec, policy)

    def _assemble(self, codec: ObservationCodec, policy: Policy) -> None:
        kinds: tuple[Any, Any] = Collector, Learner
        if self.config.recurrent != "none":
            kinds = RecurrentCollector, RecurrentLearner
        make_collector, make_learner = kinds
        self.collector = make_collector(
            self.local, self.envs, codec, policy, self.net, self.obs_normalizer, self.generator, self.ranks
        )
        self.learner = make_learner(self.config, policy, self.net, self.generator, self.ranks)
        self._reset()

    def _reset(self) -> None:
        self.collector.begin(*reset(self.envs, self.config))

    def _clock(self) -> float:
        """The time at a border of two phases, where everything that was asked of a GPU is waited for."""
        if self.device.type != "cpu":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _collect(self) -> None:
        """A rollout. Running statistics see this rank's observations at once, and those of the others after it."""
        if self.obs_normalizer is None or self.ranks.alone:
            self.collector.collect()
            return
        moments, rollout = self.obs_normalizer.moments, self.collector
        before = copy.copy(moments)
        rollout.collect()
        self.ranks.merge(moments, before, rollout.raw_obs[:-1].numpy()[rollout.valid])

    def iterate(self) -> tuple[list[Episode], dict[str, Any]]:
        """One rollout and one update; the episodes that ended and a row of `PROGRESS_COLUMNS`."""
        config, now = self.config, self.now
        timing, left = now.timing, 1.0 - now.iteration / config.num_iterations
        learning_rate = config.learning_rate * (left if config.anneal_lr else 1.0)
        start = self._clock()
        self._collect()
        episodes = self.ranks.episodes(self.collector.episodes(now.global_step), now.global_step, self.local.num_envs)
        collected = self._clock()
        batch = self.learner.batch(self.collector, self.reward_normalizer)
        rows = torch.from_numpy(np.flatnonzero(self.collector.valid))
        everywhere = torch.from_numpy(np.flatnonzero(self.ranks.columns(self.collector.valid)))
        estimated = self._clock()
        stats, _ = self.learner.update(batch, everywhere, learning_rate, left)
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

    def _env_states(self) -> list[EnvState]:
        return replay_states(self.envs)

    def _restore(self, states: list[EnvState], collector: dict[str, Any]) -> bool:
        """Environments and collector as they were; whether the last observations came again. `states` of all ranks."""
        obs, info = restore(self.envs, states)
        if not self.ranks.alone:
            block = self.ranks.block(self.config.num_envs)
            collector = {name: x[block] for name, x in collector.items()}
        self.collector.load_state_dict(collector)
        expected = self.collector.raw_obs[-1].clone()
        self.collector.begin(obs, info)
        return torch.equal(expected, self.collector.raw_obs[-1])

    def state_dict(self) -> dict[str, Any]:
        """A snapshot: later training does not change it."""
        now = self.now
        envs = [[episode, torch.from_numpy(actions)] for episode, actions in self._env_states()]
        parts = self.ranks.collect((envs, self.collector.state_dict(), checkpoint.global_rng_state()))
        if parts is None:  # the first rank has it
            return {}
        rollouts, (rng, *rngs) = [part[1] for part in parts], [part[2] for part in parts]
        normalizers = {
            "observations": None if self.obs_normalizer is None else self.obs_normalizer.moments.state_dict(),
            "rewards": None if self.reward_normalizer is None else self.reward_normalizer.state_dict(),
        }
        learned = {"parameters": dict(self.net.state_dict()), "optimizer": self.learner.optimizer.state_dict()}
        return {
            **checkpoint.on_host(learned), "normalizers": normalizers,
            "generator": self.generator.get_state(), "global_rng": rng, **({"other_rngs": rngs} if rngs else {}),
            "envs": [env for part in parts for env in part[0]],
            "collector": rollouts[0] if len(rollouts) == 1 else
            {name: torch.cat([rollout[name] for rollout in rollouts]) for name in rollouts[0]},
            "now": {"global_step": now.global_step, "iteration": now.iteration, "episodes": now.episodes,
                    "recent": list(now.recent), "timing": asdict(now.timing)},
        }  # fmt: skip

    def load_state_dict(self, state: dict[str, Any]) -> bool:
        """Puts everything back; False if the environments did not replay to the observations of the checkpoint.

        The state is that of the run, of however many ranks: each takes its environments. The generators of global use are
        those of the same rank, or seeded anew.
        """
        self.net.load_state_dict(state["parameters"])
        self.learner.load_optimizer(state["optimizer"])
        if self.obs_normalizer is not None:
            self.obs_normalizer.moments.load_state_dict(state["normalizers"]["observations"])
        if self.reward_normalizer is not None:
            self.reward_normalizer.load_state_dict(state["normalizers"]["rewards"])
        now = dict(state["now"])
        self.now = Snapshot(**{**now, "recent": deque(now["recent"], 100), "timing": Timing(**now["timing"])})
        exact = self._restore([(episode, actions.numpy()) for episode, actions in state["envs"]], state["collector"])
        self.generator.set_state(state["generator"])
        rngs = [state["global_rng"], *state.get("other_rngs", [])]
        if self.ranks.rank < len(rngs):
            checkpoint.set_global_rng_state(rngs[self.ranks.rank])
        else:
            self._seed(self.ranks.seed(self.config.seed, self.now.iteration))
        return not self.ranks.any(not exact)

    def close(self) -> None:
        self.envs.close()


def _loop(trainer: Trainer, session: Session | Follower, console: Console, on_iteration: OnIteration | None) -> bool:
    """Iterations until the end, or until Ctrl-C; whether the run is finished."""
    config, ranks = trainer.config, trainer.ranks
    live = LiveProgress(config, console)
    try:
        with Interrupt(console, ranks) as interrupt:
            while trainer.now.iteration < config.num_iterations:
                episodes, row = trainer.iterate()
                start = time.perf_counter()
                session.log(episodes, row)
                live.update(trainer.now, row)
                if on_iteration is not None:
                    on_iteration(row)
                if ranks.any(interrupt.requested):
                    session.save()
                    return trainer.now.iteration == config.num_iterations
                if ranks.any(session.due):
                    session.save()
                trainer.now.timing.other += time.perf_counter() - start
    finally:
        live.close()
    return True


def train(
    config: Any,
    *,
    make_env: MakeEnv | None = None,
    console: Console | None = None,
    trainer: Callable[[Any, MakeEnv | None, Ranks], Trainer] = Trainer,
    on_iteration: OnIteration | None = None,
) -> TrainResult:
    """Trains as `config`, a `ControlConfig`, says and leaves checkpoint, logs and plot in its folder.

    `make_env` makes one environment and replaces `config.env_id`. Raises `UserError` for wrong input, for an
    environment that fails, and for a folder that cannot be written; what was written before stays whole. Seeds the
    global generators of Python, numpy and torch, for environments that draw from them. `on_iteration` gets the row of
    progress.csv of each iteration, and ends the run by what it raises.

    In a process group, of torchrun or made by the caller, every rank calls this alike: one run on all of them. `trainer`
    makes what holds the state of the run: `ppo_fast.trainer.ddpg` and `ppo_fast.trainer.ray` have others.
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
            with joined(config) as ranks:
                with_ranks = functools.partial(trainer, config, make_env, ranks)
                return _train(config, with_ranks, console if ranks.leads else Console(quiet=True), ranks, on_iteration)
    finally:
        torch.set_num_threads(threads)


def _train(
    config: Any, make: Callable[[], Trainer], console: Console, ranks: Ranks, on_iteration: OnIteration | None
) -> TrainResult:
    need_packages(config, "control")
    state = load_checkpoint(config)
    ranks.agree("--resume: iterations in the checkpoint", iterations_of(state))
    device = find_device(ranks.local(config, "num_envs"), config.cuda_graph)
    current = torch.cuda.device(-1 if device.type == "cpu" else device)  # -1: leaves it
    # before the folder, so that a mistake found here leaves no trace
    with current, contextlib.closing(make()) as trainer, ranks.claim(config) as run:
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
    session = Session(trainer, run, state, say) if trainer.ranks.leads else Follower(trainer, state)
    with contextlib.closing(session):
        finished = _loop(trainer, session, console, on_iteration)
        files = session.finish() if finished else []
    now = trainer.now
    if finished:
        console.print(summary(trainer.config, now, files))
    else:
        say(f"stopped at step {now.global_step:,}; continue with: {resume_command(run.path)}")
    return TrainResult(run.path, finished, now.global_step, now.episodes, now.mean_return, now.timing)
