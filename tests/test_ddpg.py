"""DDPG against an independent float64 computation, the laws of its buffer, and one run however it is interrupted."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import random
import signal
import subprocess
import sys
import time

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rich.console import Console
from test_cli import assert_one_line, run
from test_trainer_resume import assert_equal_states
from trainer_worlds import Aim, Broken, Push

from ppo_fast.trainer import checkpoint
from ppo_fast.trainer.control import ControlConfig, UserError
from ppo_fast.trainer.ddpg import PRESETS, ActionScale, DDPGConfig, DDPGTrainer, Learner, Networks, train
from ppo_fast.trainer.envs import episode_seed
from ppo_fast.trainer.replay_buffer import ReplayBuffer, Transitions

QUIET = {"tensorboard": False, "plot": False, "progress": False}
SMALL = {
    "num_envs": 3, "total_timesteps": 300, "log_every": 60, "learning_starts": 30, "batch_size": 8, "buffer_size": 100,
    "hidden_sizes": (8,), **QUIET,
}  # fmt: skip
CPU = torch.device("cpu")
COMMAND = ["train", "control", "--algorithm", "ddpg"]


class Tilted(Push):
    """Push with a box that is not symmetric, of other units in each direction."""

    action_space = spaces.Box(np.array([-0.5, 0.0], np.float32), np.array([0.1, 0.25], np.float32))


# One update by hand: forward and backward of ReLU networks, Adam and the targets, in NumPy.


class Net:
    """Weights [(w, b), ...] with ReLU between; `tanh` on the way out for an actor."""

    def __init__(self, module, tanh: bool) -> None:
        linear = [m for m in module if isinstance(m, torch.nn.Linear)]
        self.layers = [
            (m.weight.detach().double().numpy().copy(), m.bias.detach().double().numpy().copy()) for m in linear
        ]
        self.tanh = tanh

    def forward(self, x):
        self.inputs = []
        for i, (w, b) in enumerate(self.layers):
            self.inputs.append(x)
            x = x @ w.T + b
            if i < len(self.layers) - 1:
                x = np.maximum(x, 0)
        self.out = np.tanh(x) if self.tanh else x
        return self.out

    def backward(self, grad):
        """d out -> [(dw, db), ...] and dx."""
        grad = grad * (1 - self.out**2) if self.tanh else grad
        grads = []
        for i in reversed(range(len(self.layers))):
            grads.append((grad.T @ self.inputs[i], grad.sum(0)))
            grad = grad @ self.layers[i][0]
            if i:
                grad = grad * (self.inputs[i] > 0)
        return grads[::-1], grad


class Adam:
    def __init__(self, lr: float) -> None:
        self.lr, self.t, self.m, self.v = lr, 0, None, None

    def step(self, net, grads) -> None:
        flat = [g for pair in grads for g in pair]
        self.m = self.m or [np.zeros_like(g) for g in flat]
        self.v = self.v or [np.zeros_like(g) for g in flat]
        self.t += 1
        for x, g, m, v in zip([x for pair in net.layers for x in pair], flat, self.m, self.v, strict=True):
            m += 0.1 * (g - m)
            v += 0.001 * (g * g - v)
            x -= self.lr * (m / (1 - 0.9**self.t)) / (np.sqrt(v / (1 - 0.999**self.t)) + 1e-8)


class ByHand:
    def __init__(self, config, net) -> None:
        self.config = config
        self.actor, self.actor_target = Net(net.actor, True), Net(net.actor_target, True)
        self.critic, self.critic_target = Net(net.critic, False), Net(net.critic_target, False)
        self.adam = {"actor": Adam(config.actor_learning_rate), "critic": Adam(config.critic_learning_rate)}

    def update(self, batch, with_actor: bool):
        s, a, r, d, s2 = (x.double().numpy() for x in batch)
        after = self.critic_target.forward(np.hstack([s2, self.actor_target.forward(s2)]))[:, 0]
        y = np.array([r[i] if d[i] else r[i] + self.config.gamma * after[i] for i in range(len(r))])
        q = self.critic.forward(np.hstack([s, a]))[:, 0]
        grads, _ = self.critic.backward((2 * (q - y) / len(y))[:, None])
        self.adam["critic"].step(self.critic, grads)
        stats = [np.mean((q - y) ** 2), q.mean(), math.nan]
        if with_actor:
            actions = self.actor.forward(s)
            stats[2] = -self.critic.forward(np.hstack([s, actions])).mean()
            _, dx = self.critic.backward(np.full((len(s), 1), -1 / len(s)))
            grads, _ = self.actor.backward(dx[:, s.shape[1] :])
            self.adam["actor"].step(self.actor, grads)
            for slow, fast in ((self.actor_target, self.actor), (self.critic_target, self.critic)):
                for pair, new in zip(slow.layers, fast.layers, strict=True):
                    for x, y in zip(pair, new, strict=True):
                        x += self.config.tau * (y - x)
        return stats

    def parameters(self):
        nets = (self.actor, self.critic, self.actor_target, self.critic_target)
        return [x for net in nets for pair in net.layers for x in pair]


def random_batch(rows, generator):
    obs, next_obs = torch.randn(rows, 5, generator=generator), torch.randn(rows, 5, generator=generator)
    terminated = (torch.rand(rows, generator=generator) < 0.3).float()
    actions = torch.rand(rows, 2, generator=generator) * 2 - 1
    return Transitions(obs, actions, torch.randn(rows, generator=generator), terminated, next_obs)


@pytest.mark.parametrize("frequency", [1, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-11), (torch.float32, 2e-4)])
def test_updates_are_those_computed_by_hand(frequency, dtype, tolerance):
    config = DDPGConfig(
        actor_learning_rate=3e-3, critic_learning_rate=1e-2, tau=0.1, gamma=0.9, policy_frequency=frequency
    )
    generator = torch.Generator().manual_seed(0)
    net = Networks(5, 2, (7, 6), generator)
    with torch.no_grad():
        for x in net.parameters():  # far from the small last layers, targets far from their networks
            x.copy_(torch.randn(x.shape, generator=generator) * 0.5)
    net = net.to(dtype)
    learner, oracle = Learner(config, net), ByHand(config, net)
    before = [x.copy() for x in oracle.parameters()]
    for i in range(4):
        batch = random_batch(16, generator)
        stats = learner.update(Transitions(*(x.to(dtype) for x in batch)))
        expected = oracle.update(batch, with_actor=(i + 1) % frequency == 0)
        np.testing.assert_allclose(stats.double().numpy(), expected, rtol=tolerance * 100)
        for got, want in zip(net.parameters(), oracle.parameters(), strict=True):
            np.testing.assert_allclose(got.detach().double().numpy(), want, rtol=tolerance, atol=tolerance)
    assert all(np.abs(x - y).max() > 1e-4 for x, y in zip(before, oracle.parameters(), strict=True))


def test_targets_start_as_copies_and_learn_only_slowly():
    net = Networks(3, 1, (8,), torch.Generator().manual_seed(1))
    for fast, slow in ((net.actor, net.actor_target), (net.critic, net.critic_target)):
        assert_equal_states(dict(fast.state_dict()), dict(slow.state_dict()))
        assert not any(x.requires_grad for x in slow.parameters())
    assert float(net.act(torch.randn(50, 3)).detach().abs().max()) < 0.05  # the last layer starts small
    hidden = net.critic[0]
    assert 0.3 < float(hidden.weight.detach().abs().max()) <= 0.5  # fan-in 4


# The buffer.


def rows_of(values):
    x = torch.tensor(values, dtype=torch.float32)
    return Transitions(x[:, None].expand(-1, 2) * 1.0, -x[:, None], x * 10, (x % 2), x[:, None].expand(-1, 2) + 0.5)


def test_the_buffer_holds_the_latest_transitions_whatever_the_chunks():
    generator = random.Random(0)
    for size in (1, 5, 8):
        buffer, written = ReplayBuffer(size, 2, 1, CPU), []
        for _ in range(30):
            new = [len(written) + i for i in range(generator.randint(0, size))]
            buffer.add(rows_of(new)) if new else buffer.add(Transitions(*(x[:0] for x in rows_of([0]))))
            written += new
            assert len(buffer) == min(len(written), size)
            held = buffer[torch.arange(len(buffer))]
            kept = torch.tensor(sorted(written[-size:]))
            order = held.rewards.argsort()
            for got, want in zip(held, rows_of(kept.tolist()), strict=True):
                assert torch.equal(got[order], want)


def test_samples_are_uniform_over_what_is_held_and_nothing_else():
    buffer = ReplayBuffer(50, 2, 1, CPU)
    buffer.add(rows_of(range(1, 21)))
    batch = buffer.sample(40_000, torch.Generator().manual_seed(0))
    counts = torch.bincount((batch.rewards / 10).long(), minlength=21)
    assert counts[0] == 0  # rows that were never written
    expected = 40_000 / 20
    assert ((counts[1:] - expected).square().sum() / expected) < 43.8  # χ² with 19 degrees, 0.1 %
    assert torch.equal(batch.obs[:, 0] * 10, batch.rewards)  # rows stay together
    assert torch.equal(batch.next_obs[:, 1], batch.obs[:, 1] + 0.5)
    assert torch.equal(batch.terminated, (batch.rewards / 10) % 2)


def test_the_state_of_a_buffer_is_what_is_filled():
    buffer = ReplayBuffer(1000, 2, 1, CPU)
    buffer.add(rows_of(range(7)))
    state = buffer.state_dict()
    assert state["rows"].shape == (7, 7)
    assert state["rows"].untyped_storage().nbytes() == 7 * 7 * 4  # not the whole ring
    other = ReplayBuffer(1000, 2, 1, CPU)
    other.load_state_dict(state)
    buffer.add(rows_of([7])), other.add(rows_of([7]))
    assert torch.equal(buffer.rows, other.rows)
    with pytest.raises(ValueError, match="expected"):
        ReplayBuffer(5, 2, 1, CPU).load_state_dict(state)


def test_a_buffer_that_does_not_fit_is_named():
    with pytest.raises(UserError, match=r"--buffer-size: expected what fits into memory, got \d+ \(.* GB\)"):
        ReplayBuffer(10**15, 20, 5, CPU)


# What is stored.


@pytest.mark.parametrize("vectorization", ["sync", "async"])
@pytest.mark.parametrize("autoreset", ["same_step", "next_step"])
def test_stored_transitions_are_those_of_the_environments_alone(autoreset, vectorization):
    """An oracle steps each environment alone, with the actions that were stored."""
    changes = {"autoreset": autoreset, "vectorization": vectorization, "buffer_size": 1000, "noise": "ou"}
    trainer = DDPGTrainer(DDPGConfig(**{**SMALL, **changes}), Tilted)
    episodes = [e for _ in range(5) for e in trainer.iterate()[0]]
    trainer.close()
    buffer = trainer.collector.buffer
    stored = buffer[torch.arange(len(buffer))]
    scale = ActionScale(Tilted.action_space)
    ends, used = {"terminated": 0, "truncated": 0}, 0
    for n in range(3):
        env, episode, obs, returns = Tilted(), -1, None, []
        rows = []
        while True:  # the rows of environment n are the chain that starts at its first observation
            if obs is None:
                episode += 1
                obs, _ = env.reset(seed=episode_seed(trainer.config.seed, n, episode))
                returns.append([])
            found = [i for i in torch.where((stored.obs == torch.from_numpy(obs)).all(1))[0].tolist() if i not in rows]
            if not found:
                break
            rows.append(found[0])
            action = scale.to_env(stored.actions[found[0]][None].numpy())[0]
            obs, reward, terminated, truncated, _ = env.step(action)
            np.testing.assert_array_equal(stored.next_obs[found[0]].numpy(), obs)
            assert stored.rewards[found[0]] == np.float32(reward)
            assert stored.terminated[found[0]] == terminated  # cut episodes go on being worth something
            returns[-1].append(reward)
            ends["terminated"] += terminated
            ends["truncated"] += truncated and not terminated
            obs = None if terminated or truncated else obs
        used += len(rows)
        mine = [(e.ret, e.length) for e in episodes if e.env == n]
        np.testing.assert_allclose(mine, [(sum(r), len(r)) for r in returns[: len(mine)]])
        assert len(returns) - len(mine) in (0, 1)
    assert used == len(buffer)  # no filler and nothing twice
    assert (len(buffer) < 300) == (autoreset == "next_step")
    assert min(ends.values()) > 2


def test_actions_fill_the_box_and_stay_in_it():
    scale = ActionScale(Tilted.action_space)
    corners = np.array([[-1, -1], [1, 1], [0, 0]], np.float32)
    np.testing.assert_allclose(scale.to_env(corners), [[-0.5, 0], [0.1, 0.25], [-0.2, 0.125]], atol=1e-7)
    assert scale.to_env(corners).dtype == np.float32
    many = np.random.default_rng(0).uniform(-1, 1, (2000, 2)).astype(np.float32)
    assert all(Tilted.action_space.contains(a) for a in scale.to_env(np.vstack([many, corners])))
    huge = spaces.Box(np.float32(-3e38), np.float32(3e38), (1,))
    assert huge.contains(ActionScale(huge).to_env(np.ones((1, 1), np.float32))[0])


@pytest.mark.parametrize("noise", ["gaussian", "ou"])
def test_noise_has_its_law_and_starts_anew_with_an_episode(noise):
    config = DDPGConfig(num_envs=500, total_timesteps=10**6, noise=noise, noise_std=0.1, hidden_sizes=(4,), **QUIET)
    trainer = DDPGTrainer(config, lambda: Push(limit=10**6))
    explorer, series = trainer.collector, []
    for _ in range(60):
        explorer._actions(at_random=False)
        series.append(explorer.noise.numpy().copy())
    x = np.array(series)
    decay = 0.85 if noise == "ou" else 0.0
    assert x[0].std() == pytest.approx(0.1, rel=0.1)
    assert x[-1].std() == pytest.approx(0.1 / math.sqrt(1 - decay**2), rel=0.1)  # stationary
    assert np.mean(x[-1] * x[-2]) / x[-2].var() == pytest.approx(decay, abs=0.1)
    explorer.step(0, at_random=False)
    ended = np.abs(explorer.noise.numpy()).sum(1) == 0
    trainer.close()
    short = DDPGTrainer(dataclasses.replace(config, num_envs=4), lambda: Push(limit=1))
    short.collector.step(0, at_random=False)
    assert not short.collector.noise.any()
    short.close()
    assert ended.mean() < 0.5  # Push may also end by leaving the line


def test_learning_starts_with_uniform_actions_and_no_update():
    trainer = DDPGTrainer(DDPGConfig(**{**SMALL, "learning_starts": 120, "buffer_size": 1000}), Push)
    before = {k: v.clone() for k, v in trainer.net.state_dict().items()}
    rows = [trainer.iterate()[1] for _ in range(2)]
    assert_equal_states(before, dict(trainer.net.state_dict()))
    assert all(math.isnan(row["critic_loss"]) for row in rows)
    actions = trainer.collector.buffer[torch.arange(120)].actions.flatten()
    assert actions.abs().max() <= 1 and actions.std() == pytest.approx(1 / math.sqrt(3), rel=0.1)
    row = trainer.iterate()[1]
    assert not torch.equal(before["critic.0.weight"], trainer.net.critic[0].weight)
    assert trainer.learner.updates == 20  # 60 steps of 3 environments
    assert math.isfinite(row["critic_loss"]) and math.isfinite(row["actor_loss"]) and row["buffer"] == 180
    trainer.close()


# One run.

VARIANTS = [
    {},
    {"autoreset": "next_step", "noise": "ou", "policy_frequency": 3},
    {"vectorization": "async", "gradient_steps": 2, "noise": "ou"},
]


@pytest.mark.parametrize("changes", VARIANTS)
def test_state_of_a_trainer_goes_into_a_fresh_one_at_every_iteration(changes, tmp_path):
    config = DDPGConfig(**{**SMALL, **changes})
    straight = DDPGTrainer(config, Push)
    logs, states = [], []
    for i in range(5):
        episodes, row = straight.iterate()
        logs.append((episodes, {k: v for k, v in row.items() if k != "steps_per_second"}))
        checkpoint.save(tmp_path / f"{i}.pt", straight.state_dict(), "test")
        states.append(straight.state_dict())
    straight.close()
    assert states[-1]["now"]["global_step"] == 300 and states[-1]["collector"]["buffer"]["added"] > 200
    for at in (0, 1, 3):  # before and after the ring is full
        resumed = DDPGTrainer(config, Push)
        resumed.iterate()  # a used one: everything must be put back
        assert resumed.load_state_dict(checkpoint.load(tmp_path / f"{at}.pt", "test"))
        for i in range(at + 1, 5):
            episodes, row = resumed.iterate()
            del row["steps_per_second"]
            assert repr((episodes, row)) == repr(logs[i])
            assert_equal_states(resumed.state_dict(), states[i])
        resumed.close()


def test_how_often_is_logged_changes_nothing_that_is_learned():
    ends = []
    for log_every in (60, 7, 1000):
        trainer = DDPGTrainer(DDPGConfig(**{**SMALL, "log_every": log_every}), Push)
        steps = [trainer.iterate()[1]["global_step"] for _ in range(trainer.config.num_iterations)]
        assert steps[-1] == 300 and all(x < y for x, y in itertools.pairwise(steps))
        state = trainer.state_dict()
        trainer.close()
        del state["now"]["iteration"]
        ends.append(state)
    assert_equal_states(ends[0], ends[1])
    assert_equal_states(ends[0], ends[2])


def test_who_else_draws_from_the_global_generators_changes_nothing():
    ends = []
    for draws in (0, 7):
        trainer = DDPGTrainer(DDPGConfig(**SMALL, noise="ou"), Push)
        for _ in range(2):
            torch.rand(draws), np.random.rand(draws)
            trainer.iterate()
        state = trainer.state_dict()
        trainer.close()
        del state["global_rng"]
        ends.append(state)
    assert_equal_states(*ends)


def test_killed_and_resumed_is_as_if_never_killed(capsys, tmp_path):
    """Through the command line, which finds the algorithm in the folder."""
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "900", "--learning-starts", "200", "--hidden-sizes", "8"]
    flags += ["--batch-size", "16", "--buffer-size", "700", "--log-every", "50", "--no-plot", "--no-tensorboard"]
    flags += ["--checkpoint-seconds", "0"]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"}
    straight, killed = tmp_path / "straight", tmp_path / "killed"
    command = [sys.executable, "-m", "ppo_fast.cli", *COMMAND, *flags, "--run-dir", str(killed)]
    with subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline and not (killed / "checkpoint.pt").exists() and process.poll() is None:
            time.sleep(0.01)
        time.sleep(random.Random(os.getpid()).uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = checkpoint.load(killed / "checkpoint.pt", "ppo_fast.ddpg")["now"]["global_step"]
    code, output, _ = run(capsys, "train", "control", "--run-dir", str(killed), "--resume")
    assert code == 0 and f"at step {before:,}" in output and "step 900/900" in output
    assert run(capsys, *COMMAND, *flags, "--run-dir", str(straight))[0] == 0
    a, b = (checkpoint.load(folder / "checkpoint.pt", "ppo_fast.ddpg") for folder in (straight, killed))
    for state in (a, b):
        del state["config"]["run_dir"], state["config"]["resume"], state["logs"]["progress"]
    assert 0 < before < 900 == a["now"]["global_step"]
    assert a["collector"]["buffer"]["rows"].shape == (700, 3 + 1 + 1 + 1 + 3)
    assert_equal_states(a, b)
    assert (straight / "episodes.csv").read_bytes() == (killed / "episodes.csv").read_bytes()


def test_it_learns(tmp_path):
    config = DDPGConfig(
        num_envs=8, total_timesteps=4000, learning_starts=400, hidden_sizes=(32,), actor_learning_rate=3e-3,
        critic_learning_rate=3e-3, gamma=0.0, policy_frequency=1, run_dir=str(tmp_path / "run"), **QUIET,
    )  # fmt: skip
    result = train(config, make_env=Aim, console=Console(quiet=True))
    assert result.mean_return > -0.1  # acting at random: -1.3


@pytest.mark.slow
@pytest.mark.parametrize("seed", [1, 2, 3])
def test_pendulum_is_solved(tmp_path, seed):
    config = DDPGConfig(**{**PRESETS["Pendulum-v1"], "seed": seed, "run_dir": str(tmp_path / "run"), **QUIET})
    assert train(config, console=Console(quiet=True)).mean_return >= -200


# Mistakes.


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--env-id", "CartPole-v1"], ["--algorithm ddpg", "Box actions", "Discrete(2)"]),
        (["--algorithm", "sac"], ["--algorithm", "ppo, ddpg", "sac"]),
        (["--tau", "0"], ["--tau", "> 0 and <= 1"]),
        (["--tau", "1.5"], ["--tau", "1.5"]),
        (["--noise", "pink"], ["--noise", "pink", "gaussian", "ou"]),
        (["--noise-std", "-1"], ["--noise-std", ">= 0"]),
        (["--batch-size", "0"], ["--batch-size", ">= 1"]),
        (["--num-envs", "4", "--buffer-size", "3"], ["--buffer-size", "4", "3"]),
        (["--num-envs", "4", "--total-timesteps", "3"], ["--total-timesteps", "4", "3"]),
        (["--clip-coef", "0.1"], ["--clip-coef"]),
        (["--device", "gpu"], ["--device", "gpu"]),
    ],
)
def test_bad_flags_are_one_line_and_leave_nothing(capsys, tmp_path, monkeypatch, flags, parts):
    monkeypatch.chdir(tmp_path)
    assert_one_line(run(capsys, *COMMAND, *flags), *parts)
    assert list(tmp_path.iterdir()) == []


def test_unbounded_actions_are_named():
    class Unbounded(Push):
        action_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)

    with pytest.raises(UserError, match=r"--algorithm ddpg: expected Box actions with finite bounds"):
        DDPGTrainer(DDPGConfig(**SMALL), Unbounded)


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("raise", "failed in a step: RuntimeError: the motor is on fire"),
        ("observation", "returned a non-finite observation"),
        ("reward", "returned a non-finite reward"),
    ],
)
def test_a_broken_environment_is_named_and_the_last_checkpoint_stays(tmp_path, how, message):
    class BrokenPush(Broken):
        action_space = Push.action_space

        def step(self, action):
            return super().step(1.0 + float(action.sum()))

    config = DDPGConfig(**{**SMALL, "run_dir": str(tmp_path / "run"), "checkpoint_seconds": 0.0})
    with pytest.raises(UserError, match=message):
        train(config, make_env=lambda: BrokenPush(how, 50), console=Console(quiet=True))
    state = checkpoint.load(tmp_path / "run" / "checkpoint.pt", "ppo_fast.ddpg")
    assert state["now"]["global_step"] == 120  # the third iteration meets the fault
    assert bool(torch.isfinite(state["collector"]["buffer"]["rows"]).all())


def test_divergence_is_named(tmp_path):
    class Huge(Aim):
        def step(self, action):
            obs, _, terminated, truncated, info = super().step(action)
            return obs, 1e30, terminated, truncated, info

    with pytest.raises(UserError, match="training diverged: the critic's loss is not finite"):
        train(DDPGConfig(**SMALL, run_dir=str(tmp_path / "run")), make_env=Huge, console=Console(quiet=True))


def test_runs_of_the_two_algorithms_are_not_mixed_up(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--env-id", "Pendulum-v1", "--total-timesteps", "256", "--hidden-sizes", "4", "--no-tensorboard"]
    assert run(capsys, "train", "control", *flags, "--num-envs", "1", "--num-steps", "128", "--run-dir", "p")[0] == 0
    code, out, _ = run(capsys, *COMMAND, *flags, "--run-dir", "d")
    assert code == 0
    assert "DDPG on Pendulum-v1" in out and "step 256/256 (100%)" in out and "checkpoint.pt (0." in out
    assert (tmp_path / "d/curve.png").read_bytes().startswith(b"\x89PNG")
    assert (
        (tmp_path / "d/progress.csv").read_text().startswith("global_step,iteration,episodes,mean_return,critic_loss")
    )
    assert_one_line(run(capsys, *COMMAND, "--run-dir", "p", "--resume"), "ppo_fast.ddpg/1", "ppo_fast.control/1")
    assert_one_line(run(capsys, "train", "control", "--algorithm", "ppo", "--run-dir", "d", "--resume"), "ddpg")
    for kind, folder, name in ((DDPGConfig, "p", "ppo_fast.ddpg"), (ControlConfig, "d", "ppo_fast.control")):
        from ppo_fast.trainer import session

        with pytest.raises(UserError, match=f"expected a checkpoint of format '{name}'"):
            session.load_checkpoint(kind(run_dir=folder, resume=True))
    code, out, _ = run(capsys, "train", "control", "--run-dir", "d", "--resume")
    assert code == 0 and "resuming d at step 256" in out
    assert_one_line(
        run(capsys, "train", "control", "--run-dir", "d", "--resume", "--tau", "0.5"), "--tau: 0.005 -> 0.5"
    )


def test_a_damaged_buffer_is_named(tmp_path):
    config = DDPGConfig(**SMALL, run_dir=str(tmp_path / "run"))
    train(config, make_env=Push, console=Console(quiet=True))
    path = tmp_path / "run" / "checkpoint.pt"
    state = torch.load(path, weights_only=True)
    state["collector"]["buffer"]["rows"] = state["collector"]["buffer"]["rows"][:50]
    torch.save(state, path)
    with pytest.raises(UserError, match=r"checkpoint\.pt: expected a checkpoint of this run.*replay buffer of shape"):
        train(dataclasses.replace(config, resume=True), make_env=Push, console=Console(quiet=True))


# The picture.


def test_plot_draws_runs_and_names_what_is_none(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    assert_one_line(run(capsys, "plot"), "plot: expected the folders of runs")
    assert_one_line(run(capsys, "plot", "empty"), "expected the folder of a run", "empty")
    for name, algorithm in (("a", "ppo"), ("b", "ddpg"), ("c", "ddpg")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(f'{{"env_id": "Pendulum-v1", "algorithm": "{algorithm}"}}')
        rows = "".join(f"{200 * i},0,{-1000 + i},200\n" for i in range(1, 151))
        (tmp_path / name / "episodes.csv").write_text("global_step,env,return,length\n" + rows)
    code, out, _ = run(capsys, "plot", "a", "b", "c", "--out", "x/two.png")
    assert code == 0
    assert "c  ddpg on Pendulum-v1  150 episodes  -899.5 over the last 100" in out
    assert (tmp_path / "x" / "two.png").read_bytes().startswith(b"\x89PNG")
    assert_one_line(run(capsys, "plot", "a", "--out", "a/config.json/x.png"), "--out", "config.json")
    (tmp_path / "a" / "episodes.csv").write_text("step\n1\n")
    assert_one_line(run(capsys, "plot", "a"), "a/episodes.csv", "expected the episodes of a run")
    (tmp_path / "b" / "episodes.csv").write_text("global_step,env,return,length\n")
    assert_one_line(run(capsys, "plot", "b"), "expected finished episodes, got none yet")


def test_gymnasium_knows_pendulum_as_the_preset_means_it():
    space = gym.make("Pendulum-v1").action_space
    np.testing.assert_allclose(ActionScale(space).to_env(np.array([[-1.0], [0.5]], np.float32)), [[-2.0], [1.0]])
