"""RSL-RL: the same algorithm fed the same rollouts by theirs and by ours, from the same seed."""

from __future__ import annotations

import copy

import pytest
import torch

pytest.importorskip("rsl_rl")
import rsl_rl.algorithms
from rsl_rl.models import MLPModel, RNNModel
from rsl_rl.storage import RolloutStorage
from tensordict import TensorDict

from ppo_fast.integrations import rsl_rl as ours

ENVS, STEPS, ACTIONS = 6, 10, 3
GAUSSIAN = {"class_name": "GaussianDistribution", "init_std": 0.7, "std_type": "scalar"}


class OwnAnswer(MLPModel):
    def get_output_log_prob(self, outputs):
        return super().get_output_log_prob(outputs) * 1.1


def observation(generator, envs=ENVS):
    return TensorDict({"policy": torch.randn(envs, 5, generator=generator)}, batch_size=[envs])


def algorithm(cls, actor_class=MLPModel, distribution=GAUSSIAN, envs=ENVS, steps=STEPS, **options):
    torch.manual_seed(0)
    obs = observation(None, envs)
    groups = {"actor": ["policy"], "critic": ["policy"], "rnd_state": ["policy"]}
    rnn = {"rnn_hidden_dim": 8, "rnn_type": "gru"} if actor_class is RNNModel else {}
    critic_class = RNNModel if rnn else MLPModel
    sizes = {"hidden_dims": [16], "obs_normalization": True, **rnn}
    actor = actor_class(obs, groups, "actor", ACTIONS, distribution_cfg=dict(distribution), **sizes)
    critic = critic_class(obs, groups, "critic", 1, **sizes)
    storage = RolloutStorage("rl", envs, steps, obs, [ACTIONS])
    defaults = {"num_learning_epochs": 2, "num_mini_batches": 2, "learning_rate": 3e-3}
    return cls(actor, critic, storage, **(defaults | options))


def trained(ppo, rollouts=3, update=None):
    """Losses of some iterations; rewards depend on the actions, episodes end and are cut off."""
    generator, losses = torch.Generator().manual_seed(1), []
    torch.manual_seed(2)
    storage = ppo.storage
    envs = storage.num_envs
    obs = observation(generator, envs)
    for _ in range(rollouts):
        with torch.inference_mode():
            for _ in range(storage.num_transitions_per_env):
                actions = ppo.act(obs)
                obs = observation(generator, envs)
                rewards = actions.sum(-1) + torch.randn(envs, generator=generator)
                dones = torch.rand(envs, generator=generator) < 0.15
                cut = dones & (torch.rand(envs, generator=generator) < 0.5)
                ppo.process_env_step(obs, rewards, dones, {"time_outs": cut})
            ppo.compute_returns(obs)
        losses.append(ppo.update())
    return losses


def same(theirs, ours, tolerance=3e-4):
    for network in ("actor", "critic"):
        x, y = getattr(theirs, network).state_dict(), getattr(ours, network).state_dict()
        assert x.keys() == y.keys()
        for name in x:
            what = f"{network}.{name}"
            close = {"rtol": tolerance, "atol": tolerance * 0.1}
            torch.testing.assert_close(y[name], x[name], **close, msg=lambda m, what=what: f"{what}: {m}")
    assert ours.learning_rate == theirs.learning_rate
    assert [g["lr"] for g in ours.optimizer.param_groups] == [g["lr"] for g in theirs.optimizer.param_groups]


HETERO = {"class_name": "HeteroscedasticGaussianDistribution", "init_std": 0.8, "std_type": "log"}
CASES = {
    "defaults": {},
    "log deviation": {"distribution": {**GAUSSIAN, "std_type": "log"}},
    "deviation at its bound": {"distribution": {**GAUSSIAN, "std_range": (0.7, 0.9)}},
    "fixed deviation": {"distribution": {**GAUSSIAN, "learn_std": False}},
    "deviation of the state": {"distribution": HETERO},
    "beta": {"distribution": {"class_name": "BetaDistribution"}},
    "recurrent": {"actor_class": RNNModel},
    "a model of the user": {"actor_class": OwnAnswer},
    "no value clip, fixed rate": {"use_clipped_value_loss": False, "schedule": "fixed"},
    "rate goes up": {"desired_kl": 10.0},
    "rate goes down": {"desired_kl": 1e-6, "learning_rate": 1e-3},
    "no desired divergence": {"desired_kl": None},
    "normalised by minibatch": {"normalize_advantage_per_mini_batch": True},
    "other coefficients": {"entropy_coef": 0.1, "value_loss_coef": 0.3, "clip_param": 0.05, "gamma": 1.0, "lam": 1.0},
    "tight gradients": {"max_grad_norm": 0.01, "lam": 0.0},
}


@pytest.mark.parametrize("case", CASES)
def test_training_is_theirs(case):
    theirs = algorithm(rsl_rl.algorithms.PPO, **CASES[case])
    expected = trained(theirs)
    mine = algorithm(ours.PPO, **CASES[case])
    got = trained(mine)
    same(theirs, mine)
    for x, y in zip(expected, got, strict=True):
        assert x.keys() == y.keys()
        assert y == {key: pytest.approx(value, rel=2e-3, abs=2e-5) for key, value in x.items()}
    with ours.enabled():
        patched = algorithm(rsl_rl.algorithms.PPO, **CASES[case])
        trained(patched)
    for x, y in zip(mine.actor.parameters(), patched.actor.parameters(), strict=True):
        assert torch.equal(x, y)  # the subclass and enable() are one thing


def test_mixed_precision_stays_near():
    theirs, mine = (
        algorithm(cls, use_mixed_precision=True, schedule="fixed", learning_rate=1e-4)
        for cls in (rsl_rl.algorithms.PPO, ours.PPO)
    )
    for x, y in zip(trained(theirs, 1), trained(mine, 1), strict=True):
        assert y == {key: pytest.approx(value, rel=5e-2, abs=2e-2) for key, value in x.items()}


def test_large_rollouts_are_gathered_in_every_epoch(monkeypatch):
    expected, got = algorithm(ours.PPO), algorithm(ours.PPO)
    trained(expected)
    monkeypatch.setattr(ours, "WHOLE_ROLLOUT_BYTES", 0)
    trained(got)
    assert all(torch.equal(x, y) for x, y in zip(expected.actor.parameters(), got.actor.parameters(), strict=True))


@pytest.mark.parametrize("envs, steps", [(1, 7), (5, 1), (33, 24)])
@pytest.mark.parametrize("per_minibatch", [True, False])
@pytest.mark.parametrize("gamma, lam", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_returns(envs, steps, per_minibatch, gamma, lam):
    found = []
    for cls in (rsl_rl.algorithms.PPO, ours.PPO):
        options = {"normalize_advantage_per_mini_batch": per_minibatch, "gamma": gamma, "lam": lam}
        ppo = algorithm(cls, envs=envs, steps=steps, **options)
        generator = torch.Generator().manual_seed(3)
        storage = ppo.storage
        for x in (storage.rewards, storage.values):
            x.normal_(generator=generator)
        storage.dones.bernoulli_(0.2, generator=generator)
        storage.dones[-1, 0] = 1
        kept = storage.returns
        ppo.compute_returns(observation(generator, envs))
        assert storage.returns is kept and storage.returns.shape == storage.advantages.shape == (steps, envs, 1)
        found.append((storage.returns, storage.advantages))
    for x, y in zip(*found, strict=True):
        torch.testing.assert_close(y, x, rtol=1e-5, atol=2e-5)


def test_the_hidden_state_of_the_critic_is_kept():
    ppo = algorithm(ours.PPO, RNNModel)
    trained(ppo, 1)
    before = copy.deepcopy(ppo.critic.get_hidden_state())
    with torch.inference_mode():
        ppo.compute_returns(observation(None))
    torch.testing.assert_close(ppo.critic.get_hidden_state(), before)


def test_minibatches_of_one_step():
    """A minibatch [1, 1] keeps its dimensions apart from batches of one action."""
    options = {"envs": 2, "steps": 1, "num_mini_batches": 2}
    theirs, mine = algorithm(rsl_rl.algorithms.PPO, **options), algorithm(ours.PPO, **options)
    trained(theirs), trained(mine)
    same(theirs, mine)


def test_extreme_ratios_and_equal_advantages():
    """Old log-probabilities far away and advantages that are all the same."""
    losses, algorithms = [], []
    for cls in (rsl_rl.algorithms.PPO, ours.PPO):
        ppo = algorithm(cls, schedule="fixed", normalize_advantage_per_mini_batch=False)
        trained(ppo, 1)
        storage = ppo.storage
        storage.advantages = torch.empty_like(storage.advantages)
        generator = torch.Generator().manual_seed(4)
        storage.actions_log_prob.uniform_(-60, 20, generator=generator)
        storage.advantages.fill_(0.25)
        torch.manual_seed(5)
        losses.append(ppo.update())
        algorithms.append(ppo)
    same(*algorithms)
    assert losses[1] == {key: pytest.approx(value, rel=1e-4, abs=1e-5) for key, value in losses[0].items()}


def test_rnd_takes_their_update(monkeypatch):
    called = []
    monkeypatch.setattr(ours, "_theirs", lambda self: called.append(self) or {})
    ppo = algorithm(ours.PPO)
    ppo.rnd = object()
    assert ppo.update() == {} and called == [ppo]


def test_the_runner_takes_it_by_name():
    from rsl_rl.utils import resolve_callable

    assert resolve_callable("ppo_fast.integrations.rsl_rl:PPO") is ours.PPO
