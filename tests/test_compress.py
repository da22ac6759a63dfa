"""Rollouts by a compressed copy of the policy: what samples, what is recorded of it, what the loss makes of the difference."""

from __future__ import annotations

import csv
import dataclasses
import functools
import math

import numpy as np
import pytest
import torch
from rich.console import Console
from test_cli import assert_one_line
from test_cli import run as command
from test_trainer_resume import SMALL, assert_equal_states, masked_guess
from torch import nn
from trainer_worlds import Aim, Guess, Push, Walk

from ppo_fast.trainer import checkpoint, compress
from ppo_fast.trainer.compress import MISMATCH, compressed, mismatch
from ppo_fast.trainer.control import ControlConfig, Trainer, train
from ppo_fast.trainer.errors import UserError
from ppo_fast.trainer.networks import mlp
from ppo_fast.trainer.policies import Batch

KINDS = ("int8", "pruned")


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def config(kind, **changes) -> ControlConfig:
    return ControlConfig(**{**SMALL, "rollout_policy": kind, **changes})


def actor(sizes=(5, 32, 7)) -> nn.Sequential:
    return mlp(list(sizes), 1.0, torch.Generator().manual_seed(1))


# --- the copies -------------------------------------------------------------------------------------------------------


def test_full_is_the_policy_itself():
    net = actor()
    assert compressed(net, config("full")) is net


@pytest.mark.parametrize("sparsity", [0.0, 0.3, 0.75, 1.0])
def test_pruned_leaves_out_the_smallest_weights_of_each_layer(sparsity):
    net = actor()
    before = [p.clone() for p in net.parameters()]
    pruned = compressed(net, config("pruned", rollout_sparsity=sparsity))
    for whole, less in zip(net[::2], pruned[::2], strict=True):
        gone = less.weight == 0
        assert int(gone.sum()) == round(sparsity * gone.numel())
        if gone.any() and not gone.all():
            assert whole.weight[gone].abs().max() <= whole.weight[~gone].abs().min()
        assert torch.equal(less.weight[~gone], whole.weight[~gone])
        assert torch.equal(less.bias, whole.bias)
    assert all(torch.equal(a, b) for a, b in zip(before, net.parameters(), strict=True))


def test_int8_is_off_by_no_more_than_half_a_step_of_weights_and_activations():
    layer = nn.Sequential(nn.Linear(64, 9))
    x = torch.randn(11, 64, generator=torch.Generator().manual_seed(1))
    got = compressed(layer, config("int8"))(x).detach().double()
    weight, bias, x = layer[0].weight.double(), layer[0].bias.double(), x.double()
    of_weights = weight.abs().amax(1) / 127  # at least a step; the largest weight is 127 or 127.5 of them
    of_inputs = (x.clamp(min=0).max() - x.clamp(max=0).min()) / 127  # a step of 7 bits, as without VNNI
    bound = 0.5 * (x.abs().sum(1)[:, None] * of_weights + (weight.abs() + of_weights[:, None]).sum(1) * of_inputs)
    error = (got - (x @ weight.T + bias)).detach().abs()
    assert (error <= 1.001 * bound).all()
    assert 1e-4 < float(error.max()) < 0.1  # it is int8, and a good one


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_can_be_made_and_run_in_inference_mode(kind):
    net = actor()
    with torch.inference_mode():
        compress.rollout_actor(net, config(kind))(torch.zeros(3, 5))
    net(torch.zeros(3, 5)).sum().backward()  # the policy itself is as it was


# --- what is recorded -------------------------------------------------------------------------------------------------


def log_softmax_at(logits, actions):
    return logits.double().log_softmax(-1).gather(-1, actions[..., None]).squeeze(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_recorded_is_what_sampled_and_old_log_probs_are_the_learners(kind):
    trainer = Trainer(config(kind, total_timesteps=6000), Walk)
    try:
        for _ in range(3):  # made anew from the weights before each rollout
            copied = compressed(trainer.net.actor, trainer.config)
            trainer.collector.collect()
            rollout = trainer.collector
            with torch.no_grad():
                sampled = torch.stack(
                    [copied(obs) for obs in rollout.obs[:-1]]
                )  # int8 looks at the range of a step's rows
                learners = trainer.net.actor(rollout.obs[:-1])
            torch.testing.assert_close(rollout.params, sampled, rtol=1e-6, atol=1e-6)
            assert torch.equal(rollout.actions, (rollout.params + rollout.noise.host).argmax(-1))
            batch = trainer.learner.batch(rollout, None)
            for got, logits in ((batch.rollout_log_prob, sampled), (batch.log_prob, learners)):
                expected = log_softmax_at(logits, rollout.actions).flatten()
                torch.testing.assert_close(got.double(), expected, rtol=0, atol=1e-5)
            assert not torch.equal(batch.rollout_log_prob, batch.log_prob)
            trainer.learner.update(batch, torch.arange(len(batch.log_prob)), 1e-2)
    finally:
        trainer.close()


def test_nothing_changes_where_the_policy_itself_samples():
    rows, states = [], []
    for changes in ({}, {"rollout_correction": "none", "rollout_sparsity": 0.9, "rollout_high": 1.1}):
        trainer = Trainer(config("full", **changes), Walk)
        rows.append([trainer.iterate()[1] for _ in range(2)][-1])
        states.append(trainer.state_dict())
        assert trainer.learner.batch(trainer.collector, None).rollout_log_prob is None
        trainer.close()
    assert_equal_states(states[0], states[1])
    assert all(math.isnan(row[name]) for row in rows for name in MISMATCH)


def test_mismatch_is_its_formula_over_the_valid_tokens():
    generator = torch.Generator().manual_seed(1)
    old, rollout = (-3 * torch.rand(6, 9, generator=generator).double() for _ in range(2))
    mask = torch.rand(6, 9, generator=generator) < 0.7
    old[~mask] = torch.nan
    found = mismatch(old, rollout, config("int8", rollout_high=1.5), mask)
    u = (old - rollout)[mask].numpy()
    rho = np.exp(u)
    expected = [np.mean(rho - 1 - u), np.minimum(rho, 1.5).mean(), np.minimum(rho, 1.5).max(), np.mean(rho > 1.5)]
    np.testing.assert_allclose([float(found[name]) for name in MISMATCH], expected, rtol=1e-12)
    assert 0 < expected[3] < 1


# --- the correction ---------------------------------------------------------------------------------------------------


WORLDS = [Walk, masked_guess, functools.partial(Guess, masked=True), Push]


def gradient(trainer: Trainer, batch: Batch) -> torch.Tensor:
    index = torch.arange(len(batch.log_prob))
    params, values = trainer.net(batch.obs)
    loss = trainer.learner.policy.loss(
        params, trainer.net.log_std, values, batch, index, trainer.learner.loss_config
    ).loss
    learned = [*trainer.net.actor.parameters(), *([trainer.net.log_std] if trainer.net.log_std.numel() else [])]
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)]).double()


@pytest.mark.parametrize("correction", ["token", "none"])
@pytest.mark.parametrize("make_env", WORLDS)
def test_the_policy_term_has_the_truncated_ratio_as_its_weight(make_env, correction):
    """At the first step the ratio is 1, so the gradient is that of -mean(w·A·log π), w = min(π_learner/π_copy, bound)."""
    changes = {"entropy_coef": 0.0, "value_coef": 0.0, "normalize_advantages": False, "rollout_high": 1.02}
    trainer = Trainer(config("pruned", rollout_sparsity=0.8, rollout_correction=correction, **changes), make_env)
    try:
        trainer.iterate()
        trainer.collector.collect()
        batch = trainer.learner.batch(trainer.collector, None)
        got = gradient(trainer, batch)
        policy, net = trainer.learner.policy, trainer.net
        log_prob = policy.log_prob(net.actor(batch.obs), net.log_std, batch.actions, batch.action_mask)
        weights = (batch.log_prob - batch.rollout_log_prob).exp().clamp(max=1.02)
        assert float(weights.min()) < 0.99 < 1.02 == pytest.approx(float(weights.max()))
        weights = weights if correction == "token" else torch.ones_like(weights)
        loss = -(weights * batch.advantages * log_prob).mean()
        learned = [*net.actor.parameters(), *([net.log_std] if net.log_std.numel() else [])]
        expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, learned)]).double()
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)
    finally:
        trainer.close()


def test_without_the_correction_the_statistics_show_what_it_leaves_out():
    """The same first rollout, the same numbers; what is learned from it differs. int8 is close, a tenth of the weights is not."""
    rows, parameters = {}, {}
    for kind, correction in (("int8", "none"), ("pruned", "none"), ("pruned", "token")):
        chosen = config(kind, rollout_sparsity=0.9, rollout_correction=correction, total_timesteps=600)
        trainer = Trainer(chosen, Walk)
        first, *_, last = (trainer.iterate()[1] for _ in range(8))
        rows[kind, correction] = [{name: row[name] for name in MISMATCH} for row in (first, last)]
        parameters[kind, correction] = trainer.net.actor[0].weight.detach().clone()
        trainer.close()
    assert rows["pruned", "none"][0] == rows["pruned", "token"][0]
    assert not torch.equal(parameters["pruned", "none"], parameters["pruned", "token"])
    close, far = rows["int8", "none"][1], rows["pruned", "none"][1]
    assert 0 < close["rollout_kl"] < 1e-3 < 0.05 < far["rollout_kl"]
    assert abs(close["rollout_weight_mean"] - 1) < 0.02 < abs(far["rollout_weight_mean"] - 1)
    assert close["rollout_clip_fraction"] == 0.0 < far["rollout_clip_fraction"]
    assert close["rollout_weight_max"] < 1.2 < far["rollout_weight_max"] == 2.0


def test_filler_steps_are_no_part_of_the_statistics(monkeypatch):
    trainer = Trainer(config("pruned", autoreset="next_step"), Walk)
    seen = []
    monkeypatch.setattr("ppo_fast.trainer.learner.mismatch", lambda *args: seen.append(args) or mismatch(*args))
    trainer.iterate()
    assert 0 < len(seen[0][0]) == int(trainer.collector.valid.sum()) < trainer.collector.valid.size
    trainer.close()


def test_a_recorded_step_reads_the_copys_log_probs_of_each_rollout():
    first, second = (
        Batch(*(torch.rand(4) for _ in range(2)), None, *(torch.rand(4) for _ in range(5))) for _ in range(2)
    )
    kept = first.rollout_log_prob
    first.take(second)
    assert first.rollout_log_prob is kept
    assert torch.equal(kept, second.rollout_log_prob)


# --- runs -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("make_env", [Walk, Push])
def test_a_resumed_run_goes_on_bit_for_bit(kind, make_env, tmp_path):
    chosen = config(kind, total_timesteps=600)
    straight = Trainer(chosen, make_env)
    for _ in range(3):
        straight.iterate()
    checkpoint.save(tmp_path / "3.pt", straight.state_dict())
    rows = [straight.iterate() for _ in range(3)]
    resumed = Trainer(chosen, make_env)
    resumed.iterate()
    assert resumed.load_state_dict(checkpoint.load(tmp_path / "3.pt"))
    for episodes, row in rows:
        again, other = resumed.iterate()
        assert again == episodes
        assert {k: v for k, v in other.items() if k != "steps_per_second"} == {
            k: v for k, v in row.items() if k != "steps_per_second"
        }
    assert_equal_states(resumed.state_dict(), straight.state_dict())
    straight.close()
    resumed.close()


def test_the_numbers_are_in_progress_and_tensorboard(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    chosen = config("pruned", run_dir=str(tmp_path / "run"), tensorboard=True)
    train(chosen, make_env=Walk, console=Console(quiet=True))
    with open(tmp_path / "run/progress.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    for name in MISMATCH:
        shown = [event.value for event in events.Scalars(f"losses/{name}")]
        np.testing.assert_allclose(shown, [float(row[name]) for row in rows], rtol=1e-6)
    assert all(float(row["rollout_kl"]) > 0 for row in rows)


def test_what_cannot_be_had_is_one_line_and_leaves_no_folder(tmp_path, monkeypatch, capsys):
    flags = ["--env-id", "Walk-v0", "--total-timesteps", "480", "--run-dir", str(tmp_path / "run")]
    for more, needle in (
        (["--rollout-policy", "int4"], "int4"),
        (["--rollout-sparsity", "1.5"], "--rollout-sparsity: expected a finite number >= 0 and <= 1, got 1.5"),
        (["--rollout-high", "0"], "--rollout-high: expected a finite number > 0, got 0.0"),
    ):
        assert_one_line(command(capsys, "train", "control", *flags, *more), needle)
    monkeypatch.setattr(compress, "_int8", lambda module: exec("raise RuntimeError('no engine')"))
    with pytest.raises(
        UserError, match=r"--rollout-policy: expected full or pruned, as torch .* has no engine for int8"
    ):
        train(config("int8", run_dir=str(tmp_path / "run")), make_env=Walk, console=Console(quiet=True))
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("name", "value"), [("device", "cuda"), ("dtype", "bfloat16")])
def test_int8_is_of_the_cpu_and_of_float32(name, value):
    fields = {**dataclasses.asdict(config("int8")), name: value}
    with pytest.raises(UserError, match=f"--rollout-policy: expected full or pruned with --{name} {value}, got int8"):
        compress.check(type("C", (), fields))
    compress.check(type("C", (), {**fields, "rollout_policy": "pruned"}))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_learns_with_a_compressed_copy(kind, tmp_path):
    easy = {
        "num_envs": 8, "num_steps": 32, "total_timesteps": 256 * 30, "learning_rate": 1e-2, "hidden_sizes": (16,), "gamma": 0.0,
        "entropy_coef": 0.0, "run_dir": str(tmp_path / "run"), "rollout_sparsity": 0.25,
    }  # fmt: skip
    result = train(config(kind, **easy), make_env=Guess, console=Console(quiet=True))
    assert result.mean_return > 0.9
    more = {"initial_log_std": -1.0, "total_timesteps": 256 * 60, "run_dir": str(tmp_path / "aim")}
    assert train(config(kind, **{**easy, **more}), make_env=Aim, console=Console(quiet=True)).mean_return > -0.15


@pytest.mark.slow
def test_cartpole_comes_to_the_return_of_the_full_policy(tmp_path):
    returns = {}
    for kind in ("full", *KINDS):
        chosen = ControlConfig(
            run_dir=str(tmp_path / kind), rollout_policy=kind, rollout_sparsity=0.3, total_timesteps=120_000,
            learning_rate=1e-3, num_envs=8, tensorboard=False, plot=False, progress=False,
        )  # fmt: skip
        returns[kind] = train(chosen, console=Console(quiet=True)).mean_return
    assert returns["full"] > 380, returns  # of at most 500; 20 at first
    assert min(returns.values()) > 0.85 * returns["full"], returns


# --- language models --------------------------------------------------------------------------------------------------


@pytest.fixture
def language():
    pytest.importorskip("transformers")
    import language_worlds

    return language_worlds


@torch.no_grad()
def log_probs_of(causal, responses):
    logits = causal(input_ids=responses.tokens, attention_mask=responses.attention.long()).logits
    at = responses.prompt_length
    return torch.where(responses.mask, log_softmax_at(logits[:, at - 1 : -1], responses.targets), 0.0)


def test_the_copy_of_a_language_model_samples_and_the_model_itself_learns(language, tmp_path, monkeypatch):
    trainer = language.trainer_in(tmp_path, rollout_policy="pruned", algorithm="grpo", kl_coef=0.0)
    causal, update, seen = trainer.policy.causal, trainer.learner.update, []
    monkeypatch.setattr(
        trainer.learner, "update", lambda experience, *rest: seen.append(experience) or update(experience, *rest)
    )
    for _ in range(2):
        copied = compressed(causal, trainer.config)
        seen.clear()
        expected_of = trainer.learner.experience

        def check(responses, *rest, copied=copied, expected_of=expected_of):
            torch.testing.assert_close(responses.log_prob.double(), log_probs_of(copied, responses), rtol=0, atol=1e-5)
            experience = expected_of(responses, *rest)
            torch.testing.assert_close(
                experience.old_log_prob.double(), log_probs_of(causal, responses), rtol=0, atol=1e-5
            )
            return experience

        monkeypatch.setattr(trainer.learner, "experience", check)
        row = trainer.iterate()[1]
        monkeypatch.setattr(trainer.learner, "experience", expected_of)
        assert trainer.policy.causal is causal
        assert trainer.policy.head is causal.get_output_embeddings()
        assert row["rollout_kl"] > 1e-5
        assert not torch.equal(seen[0].old_log_prob, seen[0].responses.log_prob)


@pytest.mark.parametrize("correction", ["token", "none"])
def test_the_loss_of_a_language_model_weighs_its_tokens(language, tmp_path, correction):
    """As above: at the first step the gradient is that of -mean(w·A·log π), over tokens."""
    changes = {"entropy_coef": 0.0, "value_coef": 0.0, "kl_coef": 0.0, "rollout_high": 1.05, "algorithm": "grpo"}
    trainer = language.trainer_in(
        tmp_path, rollout_policy="pruned", rollout_sparsity=0.9, rollout_correction=correction, **changes
    )
    learner, policy = trainer.learner, trainer.policy
    index = [i for i in range(6) for _ in range(2)]
    with policy.standing_in(compressed(policy.causal, trainer.config)):
        responses = trainer.respond(trainer.task.train, index)
    experience = learner.experience(responses, torch.randn(12, generator=torch.Generator().manual_seed(1)), None)
    learner.optimizer.zero_grad()
    learner.backward(experience, torch.arange(12))
    learned = policy.learned().values()
    got = torch.cat([p.grad.flatten() for p in learned])
    hidden = policy.hidden(responses.tokens, responses.attention, responses.prompt_length)
    log_prob = policy.head(hidden).log_softmax(-1).gather(-1, responses.targets[..., None]).squeeze(-1)
    weights = (experience.old_log_prob - responses.log_prob).exp().clamp(max=1.05)
    assert float(weights[responses.mask].min()) < 0.97
    weights = weights if correction == "token" else torch.ones_like(weights)
    loss = -(weights * experience.advantages * log_prob)[responses.mask].mean()
    expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(learned))])
    torch.testing.assert_close(got, expected, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize(("kind", "lora_rank"), [("int8", 0), ("int8", 2), ("pruned", 2)])
def test_a_resumed_language_run_goes_on_bit_for_bit(language, kind, lora_rank, tmp_path):
    if lora_rank:
        pytest.importorskip("peft")
    changes = {"rollout_policy": kind, "lora_rank": lora_rank, "iterations": 4}
    straight = language.trainer_in(tmp_path, **changes)
    straight.iterate()
    state = checkpoint.on_host(straight.state_dict())
    rows = [straight.iterate()[1] for _ in range(2)]
    resumed = language.trainer_in(tmp_path, **changes)
    resumed.iterate()
    resumed.load_state_dict(state)
    for row in rows:
        again = resumed.iterate()[1]
        assert all(
            again[name] == row[name] for name in (*MISMATCH, "reward", "policy_loss", "grad_norm", "log_prob_error")
        )
    for name, parameter in straight.policy.learned().items():
        assert torch.equal(parameter, resumed.policy.learned()[name])
    assert 0 < rows[-1]["rollout_kl"] < (1e-4 if kind == "int8" else 1.0)


def test_greedy_answers_are_the_learners(language, tmp_path, monkeypatch):
    """Without any weight the copy says the same always; ReMax's baseline and evaluation do not come from it."""
    trainer = language.trainer_in(
        tmp_path, rollout_policy="pruned", rollout_sparsity=1.0, algorithm="remax", group_size=1
    )
    heads = []
    respond = trainer.respond
    monkeypatch.setattr(
        trainer,
        "respond",
        lambda *args: heads.append((len(args) > 2, trainer.policy.head.weight.any())) or respond(*args),
    )
    trainer.iterate()
    assert [(greedy, bool(any_weight)) for greedy, any_weight in heads] == [(False, False), (True, True)]


# --- benchmarks -------------------------------------------------------------------------------------------------------


def test_the_benchmark_measures_each_policy_of_each_case(tmp_path, monkeypatch):
    from bench import rollout_compression as bench

    monkeypatch.setattr(bench, "CASES", {"tiny": lambda kind: bench.control(kind, (8,), 2, 4)})
    assert bench.run(bench.RolloutCompressionConfig(repeats=2, out=tmp_path)) == 0
    with open(tmp_path / "cpu/rollout_compression.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["policy"] for row in rows] == ["full", *KINDS]
    full = float(rows[0]["rollout_cpu_ms"])
    for row in rows:
        assert float(row["copy_cpu_ms"]) > 0
        assert float(row["units_per_cpu_second"]) == pytest.approx(8e3 / float(row["rollout_cpu_ms"]), rel=1e-4)
        assert float(row["speed_of_full"]) == pytest.approx(full / float(row["rollout_cpu_ms"]), rel=1e-4)
        assert row["commit"] and row["cpu"]


@pytest.mark.parametrize(
    ("ends", "code"), [({"ppo": 0.3, "epsilon_greedy": 0.2}, 0), ({"ppo": 0.3, "epsilon_greedy": 0.4}, 1)]
)
def test_the_recommenders_benchmark_compares_the_ends(ends, code, tmp_path, monkeypatch):
    from bench import recommend as bench

    (tmp_path / "example.py").write_text(f"""
from dataclasses import dataclass
import numpy as np
@dataclass
class Config:
    seeds: tuple
    out: object
    iterations: int = 20
def train(config):
    early = np.full((2, 18), 0.35)  # would decide, if it counted
    ends = {{**{ends}, "popularity": 0.1}}
    return {{name: np.hstack([early, np.full((2, 2), end)]) for name, end in ends.items()}}
def draw(config, curves):
    pass
""")
    monkeypatch.setattr(bench, "EXAMPLE", tmp_path / "example.py")
    assert bench.run(bench.RecommendConfig(out=tmp_path)) == code
    with open(tmp_path / "recommend.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 20
    assert {row["commit"] for row in rows} != {""}
    assert [float(row["click_through"]) for row in rows[18:20]] == [0.3, 0.3]
