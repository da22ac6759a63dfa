"""Policies with a memory: what it holds when, sequences and their fillings, and that it is of use."""

from __future__ import annotations

import functools

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from rich.console import Console
from test_trainer_autoreset import MODES, Oracle, env_actions
from trainer_worlds import Guess, Push, Walk

import ppo_fast as pf
from ppo_fast import cli
from ppo_fast.trainer.control import ControlConfig, Trainer, UserError, preset, train
from ppo_fast.trainer.networks import ActorCritic
from ppo_fast.trainer.policies import Batch, make_policy
from ppo_fast.trainer.recurrent import (
    Padded,
    RecurrentActorCritic,
    RecurrentBatch,
    RecurrentLearner,
    find_sequences,
    pad,
)  # fmt: skip

KINDS = ("lstm", "gru")
SMALL = {
    "num_envs": 3, "num_steps": 23, "total_timesteps": 690, "hidden_sizes": (8,), "num_minibatches": 3,
    "recurrent_size": 5,
}  # fmt: skip


def masked_guess():
    return Guess((3, 2), masked=True)


def trainer(make_env, **changes):
    made = Trainer(ControlConfig(**{**SMALL, "recurrent": "lstm", **changes}), make_env)
    torch.manual_seed(0)
    with torch.no_grad():
        for x in made.net.parameters():  # far from 0, so that a leak shows
            x.copy_(torch.randn_like(x) * 0.4)
    return made


def alone(net, obs, state):
    """Values, parameters and last state of one sequence, by torch's layer; `state` None is the empty memory."""
    with torch.no_grad():
        seen, state = net.memory(torch.as_tensor(np.array(obs), dtype=torch.float32)[:, None], state)
        params, values = ActorCritic.forward(net, seen[:, 0])
    return values.numpy(), params, state


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_advantages_are_those_of_the_episodes_alone(kind, mode):
    """The memory is empty at the start of an episode, goes over borders of rollouts, and values a cut from before it."""
    t = trainer(Walk, recurrent=kind, autoreset=mode, gamma=0.9, gae_lambda=0.8)
    oracles, states = [Oracle(Walk, t.config.seed, n) for n in range(3)], [None] * 3
    ends = {"terminated": 0, "truncated": 0, "carried": 0}
    for _ in range(4):
        t.collector.collect()
        batch = t.learner.batch(t.collector, None)
        columns = {name: getattr(batch, name).view(23, 3) for name in ("values", "advantages", "returns")}
        for n, oracle in enumerate(oracles):
            valid = torch.from_numpy(t.collector.valid[:, n])
            got = {name: x[valid, n].numpy() for name, x in columns.items()}
            params, start = t.collector.params[valid, n], 0
            for piece in oracle.play(env_actions(t, n)):
                ends["carried"] += states[n] is not None
                obs = [step[0] for step in piece]
                v, expected_params, after = alone(t.net, obs, states[n])
                last, _, _ = alone(t.net, [piece[-1][4]], after)
                *_, terminated, truncated, _ = piece[-1]
                following = np.append(v[1:], 0.0 if terminated else last)
                delta = np.array([step[1] for step in piece]) + 0.9 * following - v
                advantages = [np.sum(0.72 ** np.arange(len(delta) - i) * delta[i:]) for i in range(len(delta))]
                rows = slice(start, start + len(piece))
                np.testing.assert_allclose(got["values"][rows], v, rtol=2e-5, atol=2e-5)
                np.testing.assert_allclose(got["advantages"][rows], advantages, rtol=2e-5, atol=4e-5)
                np.testing.assert_allclose(got["returns"][rows], advantages + v, rtol=2e-5, atol=4e-5)
                torch.testing.assert_close(params[rows], expected_params, rtol=2e-5, atol=2e-5)
                start += len(piece)
                states[n] = None if terminated or truncated else after
                ends["terminated"] += terminated
                ends["truncated"] += truncated and not terminated
            assert start == len(params)
    assert min(ends.values()) >= 4


VARIANTS = [
    (Walk, {}),
    (Walk, {"sequence_length": 5, "num_minibatches": 4}),
    (Walk, {"sequence_length": 1, "num_minibatches": 30}),
    (Push, {"normalize_observations": True, "normalize_rewards": True}),
    (masked_guess, {"sequence_length": 7}),
    (Guess, {}),
]


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("make_env", "changes"), VARIANTS)
def test_before_the_first_step_the_update_sees_the_rollout_s_probabilities(make_env, changes, kind, mode):
    """Ratios of 1, and every real step in one minibatch of an epoch, once."""
    t = trainer(make_env, recurrent=kind, autoreset=mode, **changes)
    for _ in range(3):
        t.collector.collect()
        batch = t.learner.batch(t.collector, t.reward_normalizer)
        valid, seen = np.flatnonzero(t.collector.valid), []
        for piece, _ in t.learner.pieces(batch, torch.from_numpy(valid)):
            with torch.no_grad():
                params, values, rows = t.learner.forward(batch, piece)
                mask = None if batch.action_mask is None else batch.action_mask[rows]
                log_prob = t.learner.policy.log_prob(params, t.net.log_std, batch.actions[rows], mask)
            torch.testing.assert_close(log_prob, batch.log_prob[rows], rtol=1e-5, atol=2e-6)
            torch.testing.assert_close(values, batch.values[rows], rtol=1e-5, atol=1e-5)
            seen.append(rows.numpy())
        np.testing.assert_array_equal(np.sort(np.concatenate(seen)), valid)
    stats, _ = t.learner.update(batch, torch.from_numpy(valid), 1e-3)
    assert torch.isfinite(stats[-1])


def test_sequences_by_hand():
    begins = np.zeros((7, 2), bool)
    begins[3, 0] = begins[5, 1] = True
    valid = np.ones((7, 2), bool)
    valid[4, 1] = False  # the filler before the second environment's new episode
    found = find_sequences(begins, valid, 4)
    assert found.first.tolist() == [0, 6, 8, 1, 11]
    assert found.length.tolist() == [3, 1, 3, 4, 2]
    assert found.strip.tolist() == [0, 0, 2, 1, 3]
    states = torch.arange(5.0)[:, None]
    piece = pad(found, np.array([1, 3]), states)
    assert piece.grid.tolist() == [[6, 1], [6, 3], [6, 5], [6, 7]]
    assert piece.rows.tolist() == [6, 1, 3, 5, 7]
    assert piece.state.tolist() == [[1.0], [3.0]]


def doubles(kind, mask):
    """A learner in float64, a batch of its policy with sequences of many lengths, and what it was made of."""
    torch.manual_seed(1)
    config = ControlConfig(
        recurrent=kind, num_envs=2, num_steps=40, num_minibatches=1, update_epochs=1, max_grad_norm=1e9, gamma=0.9
    )
    policy = make_policy(spaces.Discrete(4))
    net = RecurrentActorCritic(3, 4, 0, (8,), 0.0, torch.Generator().manual_seed(3), kind=kind, size=6).double()
    learner = RecurrentLearner(config, policy, net, torch.Generator().manual_seed(4))
    begins = np.zeros((40, 2), bool)
    begins[[3, 4, 9, 30], 0] = begins[[17], 1] = True
    sequences = find_sequences(begins, np.ones((40, 2), bool), 40)
    states = torch.randn(len(sequences.first), net.state_size, dtype=torch.float64)

    def column(*shape):
        return torch.randn(80, *shape, dtype=torch.float64)

    action_mask = (torch.rand(80, 4) < 0.7) if mask else None
    actions = torch.randint(4, (80,))
    if mask:
        action_mask[torch.arange(80), actions] = True
    rows = Batch(column(3), actions, action_mask, column() * 0.1 - 1.4, column(), column(), column())
    return learner, RecurrentBatch(rows, sequences, states)


@pytest.mark.parametrize("mask", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_padded_minibatch_gives_the_parameters_of_the_same_sequences_one_by_one(kind, mask):
    learner, batch = doubles(kind, mask)
    learner.update(batch, torch.arange(80), 1e-2)
    padded = [p.detach() for p in learner.net.parameters()]

    plain, _ = doubles(kind, mask)
    net, outputs, rows = plain.net, [], []
    for first, length, state in zip(batch.sequences.first, batch.sequences.length, batch.states, strict=True):
        index = torch.arange(length) * 2 + first
        h, *c = state.view(-1, 1, 1, 6)
        seen, _ = net.memory(batch.obs[index][:, None], (h, *c) if kind == "lstm" else h)
        outputs.append(ActorCritic.forward(net, seen[:, 0]))
        rows.append(index)
    params, values = (torch.cat(x) for x in zip(*outputs, strict=True))
    index = torch.cat(rows)
    with pf.use_backend("reference"):
        out = plain.policy.loss(params, net.log_std, values, batch, index, plain.loss_config)
    out.loss.backward()
    plain.learning_rate.fill_(1e-2)
    plain.optimizer.step()
    for ours, theirs, before in zip(padded, net.parameters(), doubles(kind, mask)[0].net.parameters(), strict=True):
        torch.testing.assert_close(ours, theirs.detach(), rtol=1e-9, atol=1e-12)
        assert not before.numel() or not torch.equal(ours, before)


@pytest.mark.parametrize("kind", KINDS)
def test_what_fills_a_minibatch_up_is_of_no_consequence(kind):
    ends = []
    for other in (False, True):
        learner, batch = doubles(kind, False)
        piece = pad(batch.sequences, np.arange(len(batch.sequences.first)), batch.states)
        grid = piece.grid.clone().view(-1)
        exists = torch.zeros(len(grid), dtype=torch.bool)
        exists[piece.there] = True
        assert (~exists).sum() > 20
        if other:
            batch.obs = torch.cat([batch.obs, torch.full((1, 3), 1e3, dtype=torch.float64)])
            grid[~exists] = 80
        stats, norm = learner.step(batch, Padded(grid.view_as(piece.grid), piece.there, piece.state))
        ends.append([*(p.detach() for p in learner.net.parameters()), stats, norm])
    assert all(torch.equal(a, b) for a, b in zip(*ends, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_before_the_start_of_an_episode_reaches_what_follows(kind):
    learner, batch = doubles(kind, False)
    piece, _ = next(learner.pieces(batch, torch.arange(80)))
    batch.obs.requires_grad_()
    params, values, rows = learner.forward(batch, piece)
    after = (rows >= 9 * 2) & (rows < 30 * 2) & (rows % 2 == 0)  # the first environment's steps 9 ... 29
    (gradient,) = torch.autograd.grad((params.sum(-1) + values)[after].sum(), batch.obs)
    reached = gradient.ne(0).all(-1).nonzero().view(-1)
    assert reached.tolist() == rows[after].sort().values.tolist()


@pytest.mark.parametrize("mode", MODES)
def test_the_memory_is_empty_where_an_episode_begins_and_nowhere_else(mode):
    t, started = trainer(Walk, autoreset=mode), 0
    for _ in range(8):
        t.collector.collect()
        begins, memory = t.collector.begins, t.collector.before(slice(None))
        done = t.collector.terminated | t.collector.truncated
        expected = done if mode == "same_step" else ~t.collector.valid
        np.testing.assert_array_equal(begins[1:], expected)
        assert expected.sum() > 5
        np.testing.assert_array_equal(memory[1:].eq(0).all(-1).numpy(), begins[1:])
        with torch.no_grad():
            last = t.collector.values()[-1].numpy()
        for n in np.flatnonzero(begins[-1]):
            np.testing.assert_allclose(alone(t.net, t.collector.obs[-1:, n].numpy(), None)[0], last[n], rtol=1e-5)
            started += 1
    assert started > 0


class Recall(gym.Env):
    """The first observation names the action of the fifth step; between them nothing is to be seen."""

    observation_space = spaces.Box(-1, 1, (2,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.right, self.t = int(self.np_random.integers(2)), 0
        return np.array([1, 2 * self.right - 1], np.float32), {}

    def step(self, action):
        self.t += 1
        end = self.t == 5
        return np.array([0, 0], np.float32), float(end and action == self.right), end, False, {}


@pytest.mark.parametrize("recurrent", ["lstm", "gru", "none"])
def test_who_remembers_wins(tmp_path, recurrent):
    config = ControlConfig(
        recurrent=recurrent, recurrent_size=16, run_dir=str(tmp_path / "run"), num_envs=16, num_steps=20,
        total_timesteps=320 * 25, learning_rate=1e-2, hidden_sizes=(16,), tensorboard=False, plot=False, progress=False,
    )  # fmt: skip
    result = train(config, make_env=Recall, console=Console(quiet=True))
    if recurrent == "none":
        assert 0.3 < result.mean_return < 0.7
    else:
        assert result.mean_return > 0.95


@pytest.mark.slow
@pytest.mark.parametrize(("recurrent", "low", "high"), [("lstm", 450, 500), ("none", 0, 200)])
def test_cart_pole_without_velocity_needs_a_memory(tmp_path, recurrent, low, high):
    changes = {"recurrent": recurrent, "run_dir": str(tmp_path / "run"), "tensorboard": False, "plot": False}
    result = train(preset("ppo_fast/CartPoleNoVelocity-v1", **changes), console=Console(quiet=True))
    assert low <= result.mean_return <= high


def test_cart_pole_without_velocity_is_cart_pole_seen_in_part():
    part, whole = gym.make("ppo_fast/CartPoleNoVelocity-v1"), gym.make("CartPole-v1")
    assert part.spec.max_episode_steps == whole.spec.max_episode_steps
    assert part.spec.reward_threshold == whole.spec.reward_threshold
    assert part.observation_space.shape == (2,)
    for seed in range(5):
        (a, _), (b, _) = part.reset(seed=seed), whole.reset(seed=seed)
        done = False
        while not done:
            np.testing.assert_array_equal(a, b[[0, 2]])
            assert part.observation_space.contains(a)
            action = int(b[2] + b[3] > 0)
            a, *rest = part.step(action)
            b, *expected, _ = whole.step(action)
            assert rest[:3] == expected
            done = expected[1] or expected[2]


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--recurrent", "rnn"], ["--recurrent", "lstm", "gru", "rnn"]),
        (["--recurrent", "lstm", "--recurrent-size", "0"], ["--recurrent-size: expected an integer >= 1", "got 0"]),
        (["--recurrent", "gru", "--sequence-length", "0"], ["--sequence-length: expected an integer >= 1", "got 0"]),
        (["--sequence-length", "16"], ["--sequence-length: expected --recurrent lstm or gru, got none"]),
        (
            ["--recurrent", "lstm", "--num-envs", "1", "--num-minibatches", "4"],
            ["--num-minibatches: expected at most", "= 1 with --recurrent lstm", "got 4", "--sequence-length"],
        ),
        (
            ["--recurrent", "gru", "--rollout-policy", "int8"],
            ["--rollout-policy: expected full with --recurrent gru, got int8"],
        ),
        (
            ["--recurrent", "lstm", "--device", "cuda", "--cuda-graph"],
            ["--cuda-graph: expected --recurrent none, got lstm"],
        ),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, flags, parts):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "control", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert list(tmp_path.iterdir()) == []


def test_a_run_keeps_its_memory_on_resume(tmp_path):
    config = functools.partial(ControlConfig, **SMALL, run_dir=str(tmp_path / "run"), tensorboard=False, plot=False)
    train(config(recurrent="lstm"), make_env=Walk, console=Console(quiet=True))
    with pytest.raises(UserError, match="--recurrent: lstm -> gru"):
        train(config(recurrent="gru", resume=True), make_env=Walk, console=Console(quiet=True))
