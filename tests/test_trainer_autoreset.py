"""Rollout and advantages against a slow oracle that steps every environment alone, episode by episode."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from gymnasium.vector import SyncVectorEnv
from trainer_worlds import Both, Guess, Push, Walk

from ppo_fast.trainer.control import ControlConfig, Trainer
from ppo_fast.trainer.envs import AUTORESET, ReplayEnv, SerialVectorEnv, episode_seed
from ppo_fast.trainer.normalize import RunningMoments

SMALL = {"num_envs": 3, "num_steps": 23, "total_timesteps": 690, "hidden_sizes": (8,), "num_minibatches": 3}
MODES = ("same_step", "next_step")


class Oracle:
    """One environment, alone: no vector, no autoreset. Fed with the actions that the trainer recorded."""

    def __init__(self, make_env, seed: int, index: int) -> None:
        self.env, self.seed, self.index, self.episode = make_env(), seed, index, -1
        self.restart()

    def restart(self) -> None:
        self.episode += 1
        self.obs, _ = self.env.reset(seed=episode_seed(self.seed, self.index, self.episode))

    def play(self, actions):
        """Transitions (obs, reward, terminated, truncated, next_obs), the pieces between episode ends."""
        pieces, piece = [], []
        for action in actions:
            obs = self.obs
            self.obs, reward, terminated, truncated, _ = self.env.step(action)
            piece.append((obs, reward, terminated, truncated, self.obs))
            if terminated or truncated:
                pieces.append(piece)
                piece = []
                self.restart()
        return [*pieces, piece] if piece else pieces


def advantages_by_definition(piece, rewards, value, gamma, lam):
    """A_t = Σ_k (γλ)^k δ_{t+k} inside one piece of an episode; only a terminal state has value 0."""
    v = [value(obs) for obs, *_ in piece]
    after = [0.0 if terminated else value(next_obs) for *_, terminated, _, next_obs in piece]
    delta = [r + gamma * nv - v0 for r, nv, v0 in zip(rewards, after, v, strict=True)]
    return [
        sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(piece))
    ]  # fmt: skip


def trainer(make_env, **changes):
    made = Trainer(ControlConfig(**{**SMALL, **changes}), make_env)
    torch.manual_seed(0)
    with torch.no_grad():
        for x in made.net.parameters():  # values far from 0, so that a leak shows
            x.copy_(torch.randn_like(x) * 0.3)
    return made


def env_actions(t, n):
    """The actions of environment n that were really taken, as the environment got them."""
    taken = t.collector.actions.numpy()[t.collector.valid[:, n], n]
    return list(t.learner.policy.to_env(taken))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("world", [Walk, Both])
def test_advantages_are_those_of_the_episodes_alone(mode, world):
    t = trainer(world, autoreset=mode, gamma=0.9, gae_lambda=0.8)
    oracles = [Oracle(world, t.config.seed, n) for n in range(3)]

    def value(obs):
        return float(t.net.critic(torch.tensor(obs, dtype=torch.float32)[None]))

    ends = {"terminated": 0, "truncated": 0}
    for _ in range(4):  # episodes, and pending resets, reach over the borders of rollouts
        t.collector.collect()
        batch = t.learner.batch(t.collector, None)
        for n, oracle in enumerate(oracles):
            pieces = oracle.play(env_actions(t, n))
            expected = [
                a for p in pieces for a in advantages_by_definition(p, [s[1] for s in p], value, 0.9, 0.8)
            ]  # fmt: skip
            valid = torch.from_numpy(t.collector.valid[:, n])
            got = batch.advantages.view(23, 3)[valid, n]
            np.testing.assert_allclose(got.numpy(), expected, rtol=2e-5, atol=2e-5)
            assert not batch.advantages.view(23, 3)[~valid, n].any()
            obs = batch.obs.view(23, 3, -1)[valid, n]
            np.testing.assert_array_equal(obs.numpy(), [s[0] for p in pieces for s in p])
            returns = batch.returns.view(23, 3)[valid, n]
            np.testing.assert_allclose(returns.numpy(), got.numpy() + [value(o) for o in obs.numpy()], atol=2e-5)
            ends["terminated"] += sum(p[-1][2] for p in pieces)
            ends["truncated"] += sum(p[-1][3] and not p[-1][2] for p in pieces)
    assert ends["terminated"] > 5
    assert ends["truncated"] > 5 or world is Both
    assert (not t.collector.valid.all()) == (mode == "next_step")


@pytest.mark.parametrize("mode", MODES)
def test_logged_episodes_are_those_of_the_environments_alone(mode):
    t = trainer(Walk, autoreset=mode)
    oracles = [Oracle(Walk, t.config.seed, n) for n in range(3)]
    expected = {n: [] for n in range(3)}
    running = {n: [] for n in range(3)}
    logged = []
    for i in range(5):
        t.collector.collect()
        logged += t.collector.episodes(i * 69)
        for n, oracle in enumerate(oracles):
            for piece in oracle.play(env_actions(t, n)):
                running[n] += [s[1] for s in piece]
                if piece[-1][2] or piece[-1][3]:
                    expected[n].append((sum(running[n]), len(running[n])))
                    running[n] = []
    assert len(logged) > 20
    assert [e.step for e in logged] == sorted(e.step for e in logged)
    for n in range(3):
        got = [(e.ret, e.length) for e in logged if e.env == n]
        np.testing.assert_allclose(got, expected[n], rtol=1e-12)


@pytest.mark.parametrize("mode", MODES)
def test_running_statistics_see_each_acted_on_observation_once_and_no_filler(mode):
    t = trainer(Push, autoreset=mode, normalize_observations=True, normalize_rewards=True, gamma=0.9)
    oracles = [Oracle(Push, t.config.seed, n) for n in range(3)]
    seen, fillers = [], 0
    for _ in range(3):
        t.collector.collect()
        fillers += int((~t.collector.valid).sum())
        t.learner.batch(t.collector, t.reward_normalizer)
        for n, oracle in enumerate(oracles):
            pieces = oracle.play(env_actions(t, n))
            seen += [s[0] for p in pieces for s in p]
    moments = t.obs_normalizer.moments
    assert moments.count == len(seen) == 3 * 69 - fillers
    assert (fillers > 0) == (mode == "next_step")
    np.testing.assert_allclose(moments.mean, np.mean(seen, 0, dtype=np.float64), rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(moments.var, np.var(np.array(seen, np.float64), 0), rtol=1e-9)
    assert t.reward_normalizer.moments.count == len(seen)


@pytest.mark.parametrize("mode", MODES)
def test_rewards_are_scaled_by_the_discounted_returns_of_each_episode(mode):
    t = trainer(Push, autoreset=mode, normalize_rewards=True, gamma=0.9)
    t.collector.collect()
    c = t.collector
    done = c.terminated | c.truncated
    scaled = t.reward_normalizer(c.rewards, done, c.valid)
    moments, returns = RunningMoments(()), [0.0] * 3
    for step in range(23):
        fresh = []
        for n in range(3):
            if c.valid[step, n]:
                returns[n] = 0.9 * returns[n] + c.rewards[step, n]
                fresh.append(returns[n])
        moments.update(np.array(fresh))
        for n in range(3):
            expected = np.clip(c.rewards[step, n] / np.sqrt(moments.var + 1e-8), -10, 10) if c.valid[step, n] else 0.0
            assert scaled[step, n] == pytest.approx(expected, rel=1e-9)
            if done[step, n]:
                returns[n] = 0.0
    np.testing.assert_allclose(t.reward_normalizer.returns, returns)


@pytest.mark.parametrize("make_env", [Walk, Push])
def test_nothing_of_a_filler_step_reaches_the_update(make_env):
    """Poisoned fillers: whatever a masked row holds, the new parameters and statistics are the same bits."""
    ends = []
    for poison in (False, True):
        t = trainer(make_env, autoreset="next_step")
        t.collector.collect()
        batch = t.learner.batch(t.collector, None)
        filler = ~torch.from_numpy(t.collector.valid).view(-1)
        assert filler.sum() > 3
        if poison:
            for rows in (batch.obs, batch.log_prob, batch.values, batch.advantages, batch.returns):
                rows[filler] = torch.nan
            batch.actions[filler] = 10**6
        stats, steps = t.learner.update(batch, torch.from_numpy(np.flatnonzero(t.collector.valid)), 1e-2)
        assert steps == 4 * 3
        ends.append((torch.nn.utils.parameters_to_vector(t.net.parameters()).detach().clone(), stats))
    assert torch.isfinite(ends[0][0]).all()
    assert torch.equal(ends[0][0], ends[1][0])
    assert torch.equal(ends[0][1], ends[1][1])


def test_final_value_is_of_the_final_observation_not_of_the_reset():
    """One truncated step by hand: δ = r + γ·V(final) - V(obs)."""
    t = trainer(lambda: Walk(limit=1), num_envs=1, num_steps=4, num_minibatches=1, gamma=0.5, gae_lambda=1.0)
    t.collector.collect()
    batch = t.learner.batch(t.collector, None)
    finals = dict(zip(t.collector.final_index, t.collector.final_obs, strict=True))
    assert sorted(finals) == [i for i in range(4) if not t.collector.terminated[i, 0]]
    for i, final in finals.items():
        v = float(t.net.critic(batch.obs[i][None]))
        after = float(t.net.critic(torch.from_numpy(final)[None]))
        reset = float(t.net.critic(t.collector.obs[i + 1]))
        expected = t.collector.rewards[i, 0] + 0.5 * after - v
        assert float(batch.advantages[i]) == pytest.approx(expected, rel=1e-5)
        assert abs(after - reset) > 1e-3


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("make_env", [Walk, lambda: Guess((3, 2), masked=True)])
def test_the_lean_vector_step_returns_what_gymnasium_returns(mode, make_env):
    lean, gymnasium = (
        kind([lambda i=i: ReplayEnv(make_env(), 5, i) for i in range(3)], autoreset_mode=AUTORESET[mode])
        for kind in (SerialVectorEnv, SyncVectorEnv)
    )
    assert_same(lean.reset(), gymnasium.reset())
    lean.action_space.seed(0)
    for _ in range(60):
        actions = lean.action_space.sample()
        if hasattr(lean.envs[0].unwrapped, "right"):
            actions = np.array([env.unwrapped.right for env in lean.envs])
        assert_same(lean.step(actions), gymnasium.step(actions))


def assert_same(a, b):
    if isinstance(a, tuple):
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    elif isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    elif isinstance(a, np.ndarray) and a.dtype.hasobject:
        for x, y in zip(a, b, strict=True):
            assert_same(x, y)
    else:
        np.testing.assert_array_equal(a, b)
