"""skrl: the same agent on the same environment by theirs and by ours, from the same seed."""

from __future__ import annotations

import importlib
import inspect

import gymnasium
import pytest
import torch

pytest.importorskip("skrl")
from skrl.agents.torch.ppo import PPO
from skrl.agents.torch.ppo.ppo import compute_gae
from skrl.agents.torch.ppo.ppo_rnn import compute_gae as compute_gae_rnn
from skrl.memories.torch import RandomMemory
from skrl.models.torch import (
    CategoricalMixin,
    DeterministicMixin,
    GaussianMixin,
    Model,
    MultiCategoricalMixin,
    MultivariateGaussianMixin,
)
from skrl.resources.preprocessors.torch import RunningStandardScaler
from skrl.resources.schedulers.torch import KLAdaptiveLR

from ppo_fast.integrations import skrl as ours

ENVS, STEPS, SEEN = 5, 8, 4
BOX = gymnasium.spaces.Box(-1, 1, (3,))
SPACE = gymnasium.spaces.Box(-1, 1, (SEEN,))


class Net(Model):
    def __init__(self, action_space, outputs):
        super().__init__(observation_space=SPACE, action_space=action_space, device="cpu")
        self.net = torch.nn.Sequential(torch.nn.Linear(SEEN, 8), torch.nn.Tanh(), torch.nn.Linear(8, outputs))


class Value(DeterministicMixin, Net):
    def __init__(self, action_space):
        Net.__init__(self, action_space, 1)
        DeterministicMixin.__init__(self)

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {}


class Gaussian(GaussianMixin, Net):
    mixin, per_state = GaussianMixin, False

    def __init__(self, action_space, **options):
        Net.__init__(self, action_space, 3 * (1 + self.per_state))
        self.mixin.__init__(self, **options)
        self.log_std = torch.nn.Parameter(torch.tensor([-0.5, 0.0, 2.5]))

    def compute(self, inputs, role):
        out = self.net(inputs["observations"])
        if self.per_state:
            return out[:, :3], {"log_std": out[:, 3:]}
        return out, {"log_std": self.log_std}


class PerState(Gaussian):
    per_state = True


class OwnEntropy(Gaussian):
    def get_entropy(self, *, role=""):
        return 2 * super().get_entropy(role=role)


class Multivariate(MultivariateGaussianMixin, Gaussian):
    mixin = MultivariateGaussianMixin
    __init__ = Gaussian.__init__


class Categorical(CategoricalMixin, Net):
    def __init__(self, action_space, **options):
        Net.__init__(self, action_space, 4)
        CategoricalMixin.__init__(self, **options)

    def compute(self, inputs, role):
        out = self.net(inputs["observations"])
        return (out if self._c_unnormalized_log_prob else out.softmax(-1)), {}


class MultiCategorical(MultiCategoricalMixin, Net):
    def __init__(self, action_space, **options):
        Net.__init__(self, action_space, 5)
        MultiCategoricalMixin.__init__(self, **options)

    def compute(self, inputs, role):
        return self.net(inputs["observations"]), {}


class Shared(GaussianMixin, DeterministicMixin, Net):
    """Policy and value in one model, told apart by their role."""

    def __init__(self, action_space):
        Net.__init__(self, action_space, 4)
        GaussianMixin.__init__(self)
        DeterministicMixin.__init__(self)
        self.log_std = torch.nn.Parameter(torch.zeros(3))

    def act(self, inputs, *, role=""):
        return (GaussianMixin if role == "policy" else DeterministicMixin).act(self, inputs, role=role)

    def compute(self, inputs, role):
        out = self.net(inputs["observations"])
        return (out[:, :3], {"log_std": self.log_std}) if role == "policy" else (out[:, 3:], {})


def trained(cls, policy=Gaussian, space=BOX, options=None, envs=ENVS, rollouts=2, **cfg):
    """The agent after some updates; rewards depend on the actions, episodes end and are cut off."""
    torch.manual_seed(0)
    model = policy(space, **(options or {}))
    models = {"policy": model, "value": model if policy is Shared else Value(space)}
    silent = {"write_interval": 0, "checkpoint_interval": 0}
    defaults = {
        "rollouts": STEPS,
        "learning_epochs": 3,
        "mini_batches": 2,
        "entropy_loss_scale": 0.01,
        "value_clip": 0.2,
    }
    memory = RandomMemory(memory_size=STEPS, num_envs=envs, device="cpu")
    agent = cls(
        models=models, memory=memory, observation_space=SPACE, action_space=space, device="cpu",
        cfg=defaults | cfg | {"experiment": silent},
    )  # fmt: skip
    agent.init()
    agent.enable_training_mode(True)
    generator = torch.Generator().manual_seed(1)
    new = lambda: torch.randn(envs, SEEN, generator=generator)  # noqa: E731
    seen = new()
    for step in range(rollouts * STEPS):
        with torch.no_grad():
            actions, _ = agent.act(seen, None, timestep=step, timesteps=100)
        after = new()
        reward = actions.float().sum(-1, keepdim=True) + torch.randn(envs, 1, generator=generator)
        ends = torch.rand(2, envs, 1, generator=generator) < 0.1
        agent.record_transition(
            observations=seen, states=None, actions=actions, rewards=reward, next_observations=after, next_states=None,
            terminated=ends[0], truncated=ends[1] & ~ends[0], infos={}, timestep=step, timesteps=100,
        )  # fmt: skip
        agent.post_interaction(timestep=step, timesteps=100)
        seen = after
    return agent


def same(theirs, mine, tolerance=3e-4):
    for model in ("policy", "value"):
        x, y = theirs.models[model].state_dict(), mine.models[model].state_dict()
        for name in x:
            close = {"rtol": tolerance, "atol": tolerance * 0.1}
            torch.testing.assert_close(y[name], x[name], **close, msg=lambda m, name=name: f"{name}: {m}")
    tracked = {key: values for key, values in theirs.tracking_data.items() if "time" not in key}
    assert tracked.keys() == {key for key in mine.tracking_data if "time" not in key}
    for key, values in tracked.items():
        assert mine.tracking_data[key] == pytest.approx(values, rel=2e-3, abs=2e-5, nan_ok=True), key


SCALED = {"observation_preprocessor": RunningStandardScaler, "observation_preprocessor_kwargs": {"size": SPACE},
          "value_preprocessor": RunningStandardScaler, "value_preprocessor_kwargs": {"size": 1}}  # fmt: skip


def adaptive(threshold):
    return {"learning_rate_scheduler": KLAdaptiveLR, "learning_rate_scheduler_kwargs": {"kl_threshold": threshold}}


LINEAR = {
    "learning_rate_scheduler": torch.optim.lr_scheduler.ConstantLR,
    "learning_rate_scheduler_kwargs": {"factor": 0.5},
}
CASES = {
    "gaussian": {},
    "deviation of the state": {"policy": PerState},
    "clipped": {"options": {"clip_mean_actions": True, "clip_actions": True, "max_log_std": 1.0}},
    "log_std not clipped": {"options": {"clip_log_std": False}},
    "mean over actions": {"options": {"reduction": "mean"}},
    "product over actions": {"options": {"reduction": "prod"}},
    "entropy of the user": {"policy": OwnEntropy, "entropy_loss_scale": 0.1},
    "multivariate": {"policy": Multivariate, "options": {}},
    "categorical": {"policy": Categorical, "space": gymnasium.spaces.Discrete(4)},
    "probabilities": {
        "policy": Categorical, "space": gymnasium.spaces.Discrete(4), "options": {"unnormalized_log_prob": False}},
    "several heads": {"policy": MultiCategorical, "space": gymnasium.spaces.MultiDiscrete([2, 3])},
    "one model": {"policy": Shared},
    "no value clip, no entropy": {"value_clip": 0, "entropy_loss_scale": 0},
    "early stop": {"kl_threshold": 1e-4, "learning_rate": 1e-2},
    "early stop at once": {"kl_threshold": 1e-12, "learning_rate": 1e-2},
    **{f"rate of the divergence, {kl}": adaptive(kl) for kl in (0.0005, 0.001, 0.002, 0.004, 0.008, 0.016)},
    "another scheduler": LINEAR,
    "preprocessors": SCALED,
    "time limits": {"time_limit_bootstrap": True},
    "unclipped gradients": {"grad_norm_clip": 0, "ratio_clip": 0.05, "value_loss_scale": 0.7},
    "uneven minibatches": {"mini_batches": 7},
    "other rates": {"discount_factor": 1.0, "gae_lambda": 0.0},
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_training_is_theirs(case):
    theirs = trained(PPO, **CASES[case])
    mine = trained(ours.PPO, **CASES[case])
    same(theirs, mine)
    with ours.enabled():
        patched = trained(PPO, **CASES[case])
    for x, y in zip(mine.policy.parameters(), patched.policy.parameters(), strict=True):
        assert torch.equal(x, y)  # the subclass and enable() are one thing


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("policy", [Gaussian, Categorical, Multivariate])
def test_mixed_precision_stays_near(policy):
    space = gymnasium.spaces.Discrete(4) if policy is Categorical else BOX
    options = {"policy": policy, "space": space, "mixed_precision": True, "learning_rate": 1e-4, "rollouts": 1}
    theirs, mine = (trained(cls, **options).tracking_data for cls in (PPO, ours.PPO))
    for key in ("Loss / Policy loss", "Loss / Value loss", "Loss / Entropy loss"):
        assert mine[key] == pytest.approx(theirs[key], rel=2e-2, abs=5e-3), key


@pytest.mark.filterwarnings("ignore")
def test_unreduced_log_probabilities_take_their_update(monkeypatch):
    called = []
    monkeypatch.setattr(ours, "_theirs", lambda self, **_: called.append(self))
    agent = trained(ours.PPO, rollouts=0, options={"reduction": "none"})
    agent.update(timestep=0, timesteps=1)
    assert called == [agent]


@pytest.mark.parametrize("envs, steps", [(1, 9), (4, 1), (33, 17)])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
@pytest.mark.parametrize("bootstrap", [None, False, True])
def test_advantages(envs, steps, gamma, lam, bootstrap):
    """`None`: the signature of recurrent agents, and of every agent in skrl 2.0."""
    generator = torch.Generator().manual_seed(0)
    x = {name: torch.randn(steps, envs, 1, generator=generator) for name in ("rewards", "values")}
    flags = torch.rand(2, steps, envs, 1, generator=generator) < 0.2
    x |= {"terminated": flags[0], "discount_factor": gamma, "lambda_coefficient": lam}
    last = torch.randn(envs, 1, generator=generator)
    if bootstrap is None:
        function = compute_gae_rnn
        x |= {"next_values": last}
    else:
        function = compute_gae
        if "truncated" not in inspect.signature(function).parameters:
            pytest.skip("skrl 2.0 has the other signature only")
        x |= {"truncated": flags[1], "last_values": last, "time_limit_bootstrap": bootstrap}
    for expected, got in zip(function(**x), ours.compute_gae(**x), strict=True):
        assert got.shape == expected.shape and got.dtype == expected.dtype
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_theirs(dtype):
    x = {"rewards": torch.randn(6, 2, 1).to(dtype), "values": torch.randn(6, 2, 1).to(dtype)}
    x |= {"terminated": torch.zeros(6, 2, 1, dtype=torch.bool), "next_values": torch.randn(2, 1).to(dtype)}
    for expected, got in zip(compute_gae_rnn(**x), ours.in_place_of(compute_gae_rnn)(**x), strict=True):
        assert got.dtype == expected.dtype and torch.equal(got, expected)


def test_last_values_of_mixed_precision():
    x = {"rewards": torch.randn(6, 2, 1), "values": torch.randn(6, 2, 1), "next_values": torch.randn(2, 1).bfloat16()}
    x |= {"terminated": torch.zeros(6, 2, 1, dtype=torch.bool)}
    for expected, got in zip(compute_gae_rnn(**x), ours.in_place_of(compute_gae_rnn)(**x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=2e-5)


def test_every_agent_with_advantages_is_covered():
    import pathlib

    import skrl

    root = pathlib.Path(skrl.__file__).parent
    found = {
        ".".join(("skrl", *path.relative_to(root).with_suffix("").parts))
        for folder in ("agents/torch", "multi_agents/torch")
        for path in (root / folder).rglob("*.py")
        if "\ndef compute_gae(" in path.read_text()
    }
    seams = {seam.where.split(":")[0] for seam in ours._seams if seam.name == "compute_gae"}
    assert seams == found and all(importlib.import_module(name) for name in found)
