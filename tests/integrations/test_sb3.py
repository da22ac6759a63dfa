"""Stable-Baselines3 and sb3-contrib: the same model trained by theirs and by ours, from the same seed, on real environments."""

from __future__ import annotations

import warnings

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

stable_baselines3 = pytest.importorskip("stable_baselines3")
from stable_baselines3.common.buffers import RolloutBuffer  # noqa: E402
from stable_baselines3.common.policies import ActorCriticPolicy  # noqa: E402

from ppo_fast.integrations import sb3  # noqa: E402


class World(gym.Env):
    """Any action and observation space; rewards depend on the action, episodes end and are cut off."""

    def __init__(self, action_space, observation_space=None):
        self.action_space = action_space
        self.observation_space = observation_space or spaces.Box(-1, 1, (5,), np.float32)
        self.rng, self.t = np.random.default_rng(3), 0

    def observe(self):
        def sample(space):
            if isinstance(space, spaces.Dict):
                return {key: sample(x) for key, x in space.items()}
            return self.rng.uniform(-1, 1, space.shape).astype(np.float32)

        return sample(self.observation_space)

    def reset(self, *, seed=None, options=None):
        self.t = 0
        return self.observe(), {}

    def step(self, action):
        self.t += 1
        reward = float(np.sum(np.asarray(action, dtype=np.float64)) * 0.1 + self.rng.normal())
        return self.observe(), reward, bool(self.rng.random() < 0.05), self.t >= 30, {}

    def action_masks(self):
        n = int(np.sum(self.action_space.nvec)) if hasattr(self.action_space, "nvec") else self.action_space.n
        masks = self.rng.random(n) < 0.6
        masks[0] = True
        if hasattr(self.action_space, "nvec"):
            masks[np.cumsum(self.action_space.nvec)[:-1]] = True
        return masks


BOX = spaces.Box(-1, 1, (3,), np.float32)
DICT = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Box(-1, 1, (2, 2))})


class OwnEvaluation(ActorCriticPolicy):
    def evaluate_actions(self, obs, actions):
        values, log_prob, entropy = super().evaluate_actions(obs, actions)
        return values * 0.5, log_prob * 1.1, entropy


def trained(cls, env, policy="MlpPolicy", steps=128, **arguments):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        arguments = {"n_steps": 64, "batch_size": 48, "n_epochs": 3, "seed": 5, "device": "cpu", **arguments}
        model = cls(policy, env, **arguments)
        return model.learn(steps)


def same(theirs, ours, tolerance=2e-4):
    for (name, x), (other, y) in zip(theirs.policy.state_dict().items(), ours.policy.state_dict().items(), strict=True):
        assert name == other
        torch.testing.assert_close(y, x, rtol=tolerance, atol=tolerance * 0.1, msg=lambda m, name=name: f"{name}: {m}")
    logged = {k: v for k, v in theirs.logger.name_to_value.items() if k.startswith("train/")}
    for key, value in logged.items():
        assert ours.logger.name_to_value[key] == pytest.approx(value, rel=2e-3, abs=2e-5), key
    assert {k for k in ours.logger.name_to_value if k.startswith("train/")} == set(logged)


CASES = {
    "discrete": (World, (spaces.Discrete(4),), {}),
    "gaussian": (World, (BOX,), {}),
    "gaussian, expln, entropy": (World, (BOX,), {"ent_coef": 0.02, "policy_kwargs": {"log_std_init": -1.0}}),
    "several heads": (World, (spaces.MultiDiscrete([3, 2, 4]),), {"ent_coef": 0.01}),
    "binary": (World, (spaces.MultiBinary(3),), {}),
    "value clip": (World, (spaces.Discrete(4),), {"clip_range_vf": 0.1, "clip_range": 0.1}),
    "schedules": (
        World,
        (spaces.Discrete(4),),
        {"clip_range": lambda left: 0.1 + 0.2 * left, "learning_rate": lambda left: 1e-3 * left},
    ),
    "not normalised": (World, (spaces.Discrete(4),), {"normalize_advantage": False, "vf_coef": 1.0}),
    "batches of one": (World, (spaces.Discrete(4),), {"batch_size": 7, "n_steps": 36}),
    "early stop": (World, (spaces.Discrete(4),), {"target_kl": 1e-4, "learning_rate": 3e-3}),
    "dictionary": (World, (spaces.Discrete(4), DICT), {"policy": "MultiInputPolicy"}),
    "state-dependent noise": (World, (BOX,), {"use_sde": True}),
    "separate features": (World, (BOX,), {"policy_kwargs": {"share_features_extractor": False}}),
    "a policy of the user": (World, (spaces.Discrete(4),), {"policy": OwnEvaluation}),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_training_is_theirs(case):
    make, arguments, options = CASES[case]
    theirs = trained(stable_baselines3.PPO, make(*arguments), **options)
    ours = trained(sb3.PPO, make(*arguments), **options)
    assert isinstance(ours.rollout_buffer, sb3.RolloutBuffer | sb3.DictRolloutBuffer)
    same(theirs, ours)
    with sb3.enabled():
        patched = trained(stable_baselines3.PPO, make(*arguments), **options)
    for x, y in zip(ours.policy.parameters(), patched.policy.parameters(), strict=True):
        assert torch.equal(x, y)  # the subclass and enable() are one thing
    assert type(patched.policy.action_dist) is type(theirs.policy.action_dist)


@pytest.mark.filterwarnings("ignore")
def test_large_rollouts_are_gathered_a_minibatch_at_a_time(monkeypatch):
    expected = trained(sb3.PPO, World(spaces.Discrete(4)))
    monkeypatch.setattr(sb3, "WHOLE_ROLLOUT_BYTES", 0)
    got = trained(sb3.PPO, World(spaces.Discrete(4)))
    assert all(torch.equal(x, y) for x, y in zip(expected.policy.parameters(), got.policy.parameters(), strict=True))


@pytest.mark.parametrize("envs", [1, 3])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_advantages_of_a_buffer(envs, gamma, lam):
    rng, steps = np.random.default_rng(0), 37
    found = {}
    for cls in (RolloutBuffer, sb3.RolloutBuffer):
        rng = np.random.default_rng(0)
        buffer = cls(steps, BOX, spaces.Discrete(2), "cpu", lam, gamma, envs)
        for _ in range(steps):
            one = [torch.from_numpy(rng.normal(size=envs).astype(np.float32)) for _ in range(2)]
            buffer.add(np.zeros((envs, 3)), np.zeros((envs, 1)), rng.normal(size=envs), rng.random(envs) < 0.1, *one)
        last = torch.from_numpy(rng.normal(size=(envs, 1)).astype(np.float32))
        buffer.compute_returns_and_advantage(last, rng.random(envs) < 0.5)
        found[cls] = buffer
    theirs, ours = found.values()
    for name in ("advantages", "returns"):
        x, y = getattr(theirs, name), getattr(ours, name)
        assert isinstance(y, np.ndarray) and y.dtype == np.float32 and y.shape == x.shape
        np.testing.assert_allclose(y, x, rtol=1e-5, atol=1e-5)
    for batch_theirs, batch_ours in zip(theirs.get(None), ours.get(None), strict=True):
        assert batch_ours.advantages.shape == batch_theirs.advantages.shape


def test_an_exception_in_an_update_leaves_the_policy_its_distribution(monkeypatch):
    model = trained(sb3.PPO, World(spaces.Discrete(4)), steps=64)
    kind = type(model.policy.action_dist)
    model.policy.optimizer.step = lambda: 1 / 0
    with pytest.raises(ZeroDivisionError):
        model.train()
    assert type(model.policy.action_dist) is kind


# --- sb3-contrib ------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", [spaces.Discrete(5), spaces.MultiDiscrete([3, 2])], ids=["discrete", "several heads"])
@pytest.mark.parametrize(
    "options", [{}, {"ent_coef": 0.05, "clip_range_vf": 0.2}], ids=["plain", "entropy, value clip"]
)
def test_masked_actions(space, options):
    pytest.importorskip("sb3_contrib")
    from sb3_contrib import MaskablePPO

    from ppo_fast.integrations import sb3_contrib as ours

    theirs = trained(MaskablePPO, World(space), **options)
    same(theirs, trained(ours.MaskablePPO, World(space), **options))
    with ours.enabled(), sb3.enabled():
        same(theirs, trained(MaskablePPO, World(space), **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("space", [spaces.Discrete(3), BOX], ids=["discrete", "gaussian"])
def test_recurrent_policies(space):
    pytest.importorskip("sb3_contrib")
    from sb3_contrib import RecurrentPPO

    from ppo_fast.integrations import sb3_contrib as ours

    small = {"policy": "MlpLstmPolicy", "policy_kwargs": {"lstm_hidden_size": 16}}
    theirs = trained(RecurrentPPO, World(space), **small)
    same(theirs, trained(ours.RecurrentPPO, World(space), **small))
