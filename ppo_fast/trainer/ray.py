"""The trainers on a Ray cluster: `train` with rollout workers for control, `fit` with ranks for either trainer.

**Rollout workers** step blocks of the environments in processes of their own, anywhere in the cluster, for one learner. The
rollout of iteration u is made with the parameters of iteration u - max_staleness: so many rollouts of each worker wait or
are under way while the learner updates, never more, and none is dropped. With 0 workers and learner take turns, and the
run is that of one process: only the rounding of a network's outputs depends on how many rows it sees. Else V-trace
corrects the advantages for the parameters that have changed since, and the run still depends on nothing but its seed.

A worker that dies is replaced: its environments are replayed to where the learner last took a rollout, and what was under
way is asked for again with the same parameters and the same random numbers. Nothing is lost, and nothing changes.

**Ranks** are the processes of `torchrun`, started by Ray Train, which starts them again at the last checkpoint when one dies.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging
import os
import platform
import socket
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

import ppo_fast as pf

from . import control, learner
from .config import ControlConfig
from .device import Twin
from .distributed import Ranks, check_versions, versions
from .envs import EnvState, MakeEnv, make_envs, replay_states, reset, restore
from .errors import UserError, one_line
from .fields import flag
from .networks import ActorCritic
from .normalize import ObservationNormalizer, RunningMoments
from .policies import make_policy
from .rollout import Collector
from .rundir import claim
from .spaces import ObservationCodec

try:
    import ray
    from ray.exceptions import GetTimeoutError, ObjectLostError, RayActorError, RayError
except ImportError as error:
    raise UserError(f'ray: not installed ({one_line(error)}): pip install "ppo_fast[ray]"') from None

#: Deaths of a worker during one rollout after which the run gives up.
MAX_DEATHS = 3
#: Seconds in which a worker has to start.
START_SECONDS = 180


class Rollout(NamedTuple):
    """What a worker sends; [T, n, ...] of its n environments, observations with one row more."""

    raw_obs: np.ndarray
    seen: np.ndarray | None  # what the networks saw, where that differs
    params: np.ndarray
    actions: np.ndarray
    masks: np.ndarray | None
    rewards: np.ndarray
    terminated: np.ndarray
    truncated: np.ndarray
    valid: np.ndarray
    final_index: list[int]
    final_obs: list[np.ndarray]
    state: State


class State(NamedTuple):
    """Where the environments of a worker stand."""

    envs: list[EnvState]
    collector: dict[str, Tensor]


class Request(NamedTuple):
    """What a rollout is made with."""

    version: int
    parameters: Any  # a reference into Ray's object store
    moments: dict[str, Any] | None
    generator: Tensor  # state, alike for all workers: each takes its columns of the noise


@dataclasses.dataclass(frozen=True)
class RayOptions:
    """The cluster, and what runs where on it."""

    workers: int = 2
    """Control: processes that step the environments for one learner, which is here; num-envs / workers of them each."""

    ranks: int = 0
    """Instead of workers: processes that each collect and learn, as under torchrun, started by Ray Train. With --device cuda
    each takes a GPU."""

    max_staleness: int = 0
    """Workers: iterations that a rollout may lag behind the parameters. 0: workers wait for the learner, and the run is that of
    one process. More: they work while it learns, and V-trace corrects for it; nothing is dropped."""

    max_failures: int = 3
    """Ranks: how often the run starts again at its last checkpoint after a rank died."""

    address: str = ""
    """The cluster's head, host:port or ray://host:port. Empty: that of RAY_ADDRESS, else a new cluster on this machine."""

    def __post_init__(self) -> None:
        for name in ("workers", "ranks", "max_staleness", "max_failures"):
            if getattr(self, name) < 0:
                raise UserError(f"{flag(name)}: expected an integer >= 0, got {getattr(self, name)}")
        if not self.workers and not self.ranks:
            raise UserError("--workers: expected at least 1, or --ranks, got 0 of both")


class _FixedMoments(RunningMoments):
    def update(self, batch: np.ndarray) -> None:
        """The learner does, with the rollouts of all."""


class Worker:
    """A block of the environments; a Ray actor."""

    def versions(self) -> tuple[str, dict[str, str]]:
        return platform.node(), versions()

    def start(self, config: ControlConfig, make_env: MakeEnv | None, index: int, count: int) -> Any:
        """Makes the environments; their spaces."""
        torch.set_num_threads(config.threads)
        ranks = Ranks(index, count)
        config = dataclasses.replace(config, device="cpu", cuda_graph=False)
        local = ranks.local(config, "num_envs")
        self.first, self.config = ranks.block(config.num_envs).start, local
        self.envs = make_envs(local, make_env, self.first)
        codec, policy = ObservationCodec(self.envs.single_observation_space), make_policy(self.envs.single_action_space)
        self.generator, sizes = torch.Generator(), (codec.dim, policy.num_params, policy.num_log_std)
        self.net = ActorCritic(*sizes, local.hidden_sizes, local.initial_log_std, self.generator)
        normalizer = ObservationNormalizer(codec.dim) if local.normalize_observations else None
        if normalizer is not None:
            normalizer.moments = _FixedMoments((codec.dim,))
        self.collector = Collector(local, self.envs, codec, policy, self.net, normalizer, self.generator, ranks)
        self.collector.begin(*reset(self.envs, local))
        return self.envs.single_observation_space, self.envs.single_action_space

    def restore(self, state: State) -> bool:
        """Brings the environments to `state`; whether they show the same observations again."""
        everyone = [(0, np.array([]))] * self.first + state.envs  # an environment looks up its number in the run
        begin = restore(self.envs, everyone)
        self.collector.load_state_dict(state.collector)
        expected = self.collector.raw_obs[-1].clone()
        self.collector.begin(*begin)
        return torch.equal(expected, self.collector.raw_obs[-1])

    def state(self) -> State:
        return State(replay_states(self.envs), self.collector.state_dict())

    def collect(self, request: Request, parameters: dict[str, np.ndarray]) -> Rollout:
        rollout = self.collector
        self.net.load_state_dict({name: torch.tensor(x) for name, x in parameters.items()})
        if rollout.normalizer is not None:
            assert request.moments is not None
            rollout.normalizer.moments.load_state_dict(request.moments)
        self.generator.set_state(request.generator)
        rollout.collect()
        return Rollout(
            rollout.raw_obs.numpy(), None if rollout.normalizer is None else rollout.seen.host.numpy(),
            rollout.params.numpy(), rollout.actions.numpy(), None if rollout.masks is None else rollout.masks.numpy(),
            rollout.rewards, rollout.terminated, rollout.truncated, rollout.valid, rollout.final_index, rollout.final_obs,
            self.state(),
        )  # fmt: skip


def _actor() -> Any:
    return ray.remote(Worker).options(num_cpus=1).remote()


class Fleet:
    """The workers, each with a queue of requests; in the place of a vector environment."""

    def __init__(self, config: ControlConfig, make_env: MakeEnv | None, count: int, max_staleness: int) -> None:
        if config.num_envs % count:
            raise UserError(f"--num-envs: expected a multiple of the {count} rollout workers, got {config.num_envs}")
        self.config, self.make_env, self.count, self.max_staleness = config, make_env, count, max_staleness
        self.blocks = [Ranks(i, count).block(config.num_envs) for i in range(count)]
        self.pending: deque[tuple[Request, list[Any]]] = deque()
        self.deaths = 0
        self.actors = [_actor() for _ in range(count)]
        try:
            for node, there in self._get([actor.versions.remote() for actor in self.actors]):
                check_versions("--workers", node, there)
            starts = self._get([self._start(i) for i in range(count)])
            self.states: list[State] = self._get([actor.state.remote() for actor in self.actors])
        except BaseException:
            self.close()
            raise
        self.single_observation_space, self.single_action_space = starts[0]

    def _start(self, index: int) -> Any:
        return self.actors[index].start.remote(self.config, self.make_env, index, self.count)

    @staticmethod
    def _get(refs: list[Any]) -> list[Any]:
        """What workers return while they start."""
        try:
            return ray.get(refs, timeout=START_SECONDS)
        except GetTimeoutError:
            free = ray.available_resources().get("CPU", 0)
            raise UserError(
                f"--workers: {len(refs)} did not start within {START_SECONDS} s, with {free:g} CPUs free; wait for other jobs "
                "of the cluster (ray status shows them), or ask for fewer"
            ) from None
        except UserError as error:
            raise _unwrapped(error) from error
        except RayError as error:  # it died, or lacks a module that is here
            raise UserError(f"--workers: one failed while it started ({_last_line(error)})") from error

    def submit(self, request: Request) -> None:
        refs = [actor.collect.remote(request, request.parameters) for actor in self.actors]
        self.pending.append((request, refs))

    def take(self) -> tuple[Request, list[Rollout]]:
        """The oldest rollouts, in the order of the environments."""
        request, refs = self.pending[0]
        found, deaths = [], 0
        for i in range(self.count):
            while True:
                try:
                    found.append(ray.get(refs[i]))
                    break
                except UserError as error:
                    raise _unwrapped(error) from error
                except (RayActorError, ObjectLostError) as error:
                    deaths += 1
                    if deaths > MAX_DEATHS:
                        raise UserError(
                            f"--workers: rollout worker {i} died {deaths} times in one rollout, last by {one_line(error)}; the "
                            "run goes on from its last checkpoint with --resume"
                        ) from error
                    self._replace(i)
        self.pending.popleft()
        self.states = [rollout.state for rollout in found]
        return request, found

    def _replace(self, i: int) -> None:
        """A new worker at the state after the last rollout that was taken, and its requests again."""
        self.deaths += 1
        ray.kill(self.actors[i])
        self.actors[i] = actor = _actor()
        self._get([self._start(i), actor.restore.remote(self.states[i])])
        for request, refs in self.pending:
            refs[i] = actor.collect.remote(request, request.parameters)

    def restore(self, states: list[EnvState], collector: dict[str, Tensor]) -> bool:
        self.pending.clear()
        self.states = [State(states[b], {name: x[b] for name, x in collector.items()}) for b in self.blocks]
        return all(self._get([a.restore.remote(s) for a, s in zip(self.actors, self.states, strict=True)]))

    def close(self) -> None:
        for actor in self.actors:
            ray.kill(actor)


def _last_line(error: Exception) -> str:
    """What went wrong over there, below Ray's traceback of it."""
    return next((line.strip() for line in reversed(str(error).splitlines()) if line.strip()), type(error).__name__)


def _unwrapped(error: UserError) -> UserError:
    """What a worker raised, without Ray's traceback around it."""
    return UserError(str(getattr(error, "cause", error)))


class RemoteCollector(Collector):
    """The buffers of all environments, filled by workers."""

    def __init__(self, fleet: Fleet, *args: Any) -> None:
        super().__init__(*args)
        self.fleet, self.version, self.staleness = fleet, 0, 0

    def collect(self) -> None:
        while len(self.fleet.pending) <= self.fleet.max_staleness:
            self.fleet.submit(self._request())
        request, rollouts = self.fleet.take()
        self.staleness, self.version = self.version - request.version, self.version + 1
        self.final_index, self.final_obs = [], []
        for block, rollout in zip(self.fleet.blocks, rollouts, strict=True):
            self._write(block, rollout)
        if self.normalizer is None:
            self.seen.upload()
        else:
            self.normalizer.moments.update(self.raw_obs[:-1].numpy()[self.valid])
        for twin in (self.seen, self.acted, self.allowed):
            if twin is not None:
                twin.upload()
        self._check()

    def _request(self) -> Request:
        generator = self.generator.get_state()
        self.policy.noise(self.noise.host, self.generator)  # what the workers draw from it
        parameters = ray.put({name: x.cpu().numpy() for name, x in self.net.state_dict().items()})
        moments = None if self.normalizer is None else self.normalizer.moments.state_dict()
        return Request(self.version, parameters, moments, generator)

    def _write(self, block: slice, rollout: Rollout) -> None:
        self.raw_obs[:, block] = torch.tensor(rollout.raw_obs)
        if rollout.seen is not None:
            self.seen.host[:, block] = torch.tensor(rollout.seen)
        self.params[:, block] = torch.tensor(rollout.params).to(self.device)
        self.acted.host[:, block] = torch.tensor(rollout.actions)
        if rollout.masks is not None:
            if self.allowed is None:
                shape = (len(self.raw_obs), self.config.num_envs, rollout.masks.shape[-1])
                self.allowed = Twin(shape, self.device, torch.bool)
            self.allowed.host[:, block] = torch.tensor(rollout.masks)
        for name in ("rewards", "terminated", "truncated", "valid"):
            getattr(self, name)[:, block] = getattr(rollout, name)
        width, n = self.config.num_envs, block.stop - block.start
        self.final_index += [i // n * width + block.start + i % n for i in rollout.final_index]
        self.final_obs += rollout.final_obs
        self.resetting[block] = rollout.state.collector["resetting"].numpy()


class Learner(learner.Learner):
    """Corrects for parameters that have changed since a rollout was asked for."""

    def estimate(
        self, rollout: Any, obs: Tensor, actions: Tensor, action_mask: Tensor | None, log_prob: Tensor,
        trajectory: tuple[Tensor, Tensor, Tensor], **borders: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        """V-trace (Espeholt et al. 2018) between the policy that acted and the one that learns, where they differ."""
        if rollout.staleness == 0:
            return super().estimate(rollout, obs, actions, action_mask, log_prob, trajectory, **borders)
        current = self.policy.log_prob(self.net.actor(obs), self.net.log_std, actions, action_mask)
        log_rhos = (current - log_prob).view_as(trajectory[0])
        targets, advantages = pf.vtrace(log_rhos, *trajectory, **borders)
        return current, advantages, targets


class Trainer(control.Trainer):
    """The control trainer with its environments elsewhere."""

    def __init__(
        self, config: ControlConfig, make_env: MakeEnv | None, ranks: Ranks, workers: int, max_staleness: int
    ) -> None:
        self.workers, self.max_staleness = workers, max_staleness
        control.need_plain(config, "with rollout workers")
        if not ranks.alone:
            raise UserError(f"--workers: expected one learner, got {ranks.size} ranks")
        super().__init__(config, make_env, ranks)

    def _make_envs(self, make_env: MakeEnv | None) -> Fleet:
        return Fleet(self.config, make_env, self.workers, self.max_staleness)

    def _assemble(self, codec: ObservationCodec, policy: Any) -> None:
        self.learner = Learner(self.config, policy, self.net, self.generator)
        self.collector = RemoteCollector(
            self.envs, self.config, self.envs, codec, policy, self.net, self.obs_normalizer, self.generator
        )

    def _env_states(self) -> list[EnvState]:
        return [(episode, actions.copy()) for worker in self.envs.states for episode, actions in worker.envs]

    def _restore(self, states: list[EnvState], collector: dict[str, Any]) -> bool:
        self.collector.load_state_dict(collector)
        return self.envs.restore(states, collector)


# --- the cluster ------------------------------------------------------------------------------------------------------


def _knock(address: str) -> None:
    """`OSError` where nothing listens; Ray itself tries for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdecimal():
        socket.create_connection((host, int(port)), timeout=10).close()


@contextlib.contextmanager
def cluster(address: str | None, cpus: int = 0, gpus: int = 0) -> Iterator[None]:
    """A connection to the Ray cluster at `address`, else to that of RAY_ADDRESS, else a new one on this machine."""
    started = not ray.is_initialized()
    if started:
        where = address or os.environ.get("RAY_ADDRESS") or ""
        try:
            _knock(where)
            ray.init(address=address, logging_level=logging.ERROR)
        except (OSError, RuntimeError, ValueError) as error:
            raise UserError(
                f"--address: expected a Ray cluster, none answers at {where} ({one_line(error)}); start one there with: "
                "ray start --head --port 6379, or leave out --address to use this machine"
            ) from None
    try:
        resources = ray.cluster_resources()
        for name, wanted, option in (
            ("CPU", cpus, "--workers or --ranks"),
            ("GPU", gpus, "--ranks with --device cuda"),
        ):
            if resources.get(name, 0) < wanted:
                raise UserError(
                    f"{option}: expected at most the {resources.get(name, 0):g} {name}s of the cluster, got {wanted}; ask for "
                    "fewer, or add a machine with: ray start --address <head>:6379"
                )
        yield
    finally:
        if started:
            ray.shutdown()


def train(
    config: ControlConfig, *, workers: int, max_staleness: int = 0, address: str | None = None,
    make_env: MakeEnv | None = None, console: Console | None = None,
) -> control.TrainResult:  # fmt: skip
    """`control.train` with `workers` rollout workers, of which each has as many of the environments.

    Folder, logs and checkpoints are those of `control.train`: either continues a run of the other. With `max_staleness` 0 a
    resumed run is exact; else the rollouts that were under way are made again, with the parameters of the checkpoint.
    """

    def trainer(config: ControlConfig, make_env: MakeEnv | None, ranks: Ranks) -> Trainer:
        return Trainer(config, make_env, ranks, workers, max_staleness)

    with cluster(address, cpus=workers):
        return control.train(config, make_env=make_env, console=console, trainer=trainer)


def fit(config: Any, *, ranks: int, address: str | None = None, max_failures: int = 3) -> Path:
    """Either trainer on `ranks` processes of Ray Train; the folder of the run, which every machine has to see.

    A rank that dies stops all; they start again at the last checkpoint, at most `max_failures` times.
    """
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    field, of = ("num_envs", 1) if isinstance(config, ControlConfig) else ("num_responses", config.group)
    Ranks(0, ranks).local(
        dataclasses.replace(config, device="cpu"), field, of
    )  # what does not divide, before anything starts
    on_gpu = config.device != "cpu"
    with cluster(address, cpus=ranks, gpus=ranks if on_gpu else 0):
        with claim(config) as run:
            folder = run.path.resolve()
        trainer = TorchTrainer(
            _rank,
            train_loop_config={"config": dataclasses.replace(config, run_dir=str(folder), resume=True)},
            scaling_config=ScalingConfig(num_workers=ranks, use_gpu=on_gpu),
            run_config=RunConfig(
                name=f".{folder.name}.ray", storage_path=str(folder.parent),
                failure_config=FailureConfig(max_failures=max_failures),
            ),
        )  # fmt: skip
        try:
            trainer.fit()
        except Exception as error:  # Ray wraps what a rank raised in types of its own
            raise UserError(
                f"--ranks: the run failed more than {max_failures} times ({_root(error)}); what was reached is in {folder} and "
                "goes on with --run-dir and --resume"
            ) from error
    return folder


def run(config: Any, options: RayOptions) -> int:
    """What the command line asks for; the exit code."""
    address = options.address or None
    if hasattr(config, "num_envs"):
        control.need_plain(config, "on Ray")
    if options.ranks:
        fit(config, ranks=options.ranks, address=address, max_failures=options.max_failures)
        return 0
    if not isinstance(config, ControlConfig):
        raise UserError("--workers: expected --ranks for a language model, whose responses the learner's GPUs sample")
    done = train(config, workers=options.workers, max_staleness=options.max_staleness, address=address)
    return 0 if done.finished else 130


def _root(error: BaseException) -> str:
    """The innermost message, of the many that Ray puts around it."""
    failures = getattr(error, "worker_failures", None)
    if failures:
        return _root(next(iter(failures.values())))
    cause = getattr(error, "cause", None) or error.__cause__
    return one_line(error) if cause is None else _root(cause)


def _rank(loop: dict[str, Any]) -> None:
    """A rank of `fit`."""
    import ray.train

    config = loop["config"]
    if isinstance(config, ControlConfig):
        done = control.train(config)
        reached = {"global_step": done.global_step, "mean_return": done.mean_return}
    else:
        from .language import run

        told = run.train(config)
        reached = {"iteration": told.iteration, "eval_reward": told.last_eval}
    ray.train.report(reached)
