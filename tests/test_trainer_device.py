"""What a run on a GPU adds, as far as a CPU can tell: buffers on two sides, recorded steps, numbers that are set.

`gpu` pretends: the device's buffers are copies in other memory, and a "graph" calls again. Bits must not change.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from test_trainer_resume import SMALL, assert_equal_states, masked_guess
from trainer_worlds import Push, Walk

import ppo_fast as pf
from ppo_fast import cli
from ppo_fast.trainer import checkpoint, control, learner, recurrent, report, rollout
from ppo_fast.trainer.control import ControlConfig, Trainer
from ppo_fast.trainer.device import Twin, find_device
from ppo_fast.trainer.errors import UserError
from ppo_fast.trainer.learner import Learner
from ppo_fast.trainer.policies import Batch
from ppo_fast.trainer.replay import Replay


class Again:
    """Records nothing: a replay calls again and leaves its results in the same memory, as a graph does."""

    def __init__(self, device=None):
        self.warm_ups, self.captures, self.replays = 0, 0, 0

    def warm_up(self, call):
        self.warm_ups += 1
        return call()

    def capture(self, call):
        self.captures += 1
        memory = []

        def replay():
            self.replays += 1
            results = call()
            memory.extend(x.clone() for x in results if len(memory) < len(results))
            return tuple(mine.copy_(result) for mine, result in zip(memory, results, strict=True))

        return replay


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)  # as `train` does: with more, steps this small mostly wait for each other


@pytest.fixture
def gpu(monkeypatch):
    monkeypatch.setattr(control, "find_device", lambda config, graph: torch.device("cpu"))
    monkeypatch.setattr(Twin, "_on", lambda twin, device: torch.full_like(twin.host, 1))
    for module in (learner, recurrent, rollout):
        monkeypatch.setattr(module, "upload", lambda x, device: x.clone())
    monkeypatch.setattr(learner, "CudaGraphs", Again)


def run(make_env, iterations=6, **changes):
    trainer = Trainer(ControlConfig(**{**SMALL, **changes}), make_env)
    rows = []
    for _ in range(iterations):
        episodes, row = trainer.iterate()
        rows.append((episodes, {name: x for name, x in row.items() if name != "steps_per_second" and x == x}))
    trainer.close()
    return trainer, rows


def comparable(trainer):
    state = trainer.state_dict()
    for group in state["optimizer"]["param_groups"]:
        del group["capturable"]
    return state


VARIANTS = [
    (Walk, {}),
    (Walk, {"num_minibatches": 7, "anneal_clip": True}),  # minibatches of two lengths
    (Walk, {"target_kl": 0.01}),
    (Push, {"normalize_observations": True, "normalize_rewards": True, "clip_value_loss": False}),
    (masked_guess, {}),
    (masked_guess, {"autoreset": "next_step"}),  # without graphs
    (Walk, {"recurrent": "lstm", "num_minibatches": 3}),
]


@pytest.mark.parametrize(("make_env", "changes"), VARIANTS)
def test_a_gpu_s_buffers_and_graphs_change_no_bit(make_env, changes, monkeypatch, request):
    plain, expected = run(make_env, **changes)
    request.getfixturevalue("gpu")
    for graph in (False,) if {"autoreset", "recurrent"} & changes.keys() else (False, True):
        other, rows = run(make_env, device="cuda", cuda_graph=graph, **changes)
        assert other.collector.obs.data_ptr() != other.collector.seen.host.data_ptr()
        assert rows == expected
        assert_equal_states(comparable(other), comparable(plain))
        if graph:
            made = other.learner.minibatches.graphs
            assert made.captures == (2 if "num_minibatches" in changes else 1)
            assert made.warm_ups == Replay.WARM_UP * made.captures and made.replays > 20


@pytest.mark.parametrize(("make_env", "changes"), VARIANTS[1:4])
def test_a_run_with_graphs_goes_on_in_a_fresh_trainer_and_records_again(gpu, make_env, changes, tmp_path):
    changes = {**changes, "device": "cuda", "cuda_graph": True}
    straight, rows = run(make_env, **changes)
    stopped, before = run(make_env, 3, **changes)
    checkpoint.save(tmp_path / "c.pt", stopped.state_dict())
    resumed = Trainer(straight.config, make_env)
    resumed.iterate()
    replay = resumed.learner.minibatches
    assert resumed.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    assert not replay.recorded and replay.kept is None
    for expected in rows[3:]:
        episodes, row = resumed.iterate()
        del row["steps_per_second"]
        assert (episodes, {name: x for name, x in row.items() if x == x}) == expected
    assert before == rows[:3]
    assert_equal_states(resumed.state_dict(), straight.state_dict())
    resumed.close()


def addresses(learner):
    state = learner.optimizer.state.values()
    tensors = [*learner.parameters, *(x for moments in state for x in moments.values())]
    tensors += [learner.learning_rate, learner.loss_config.device_numbers, learner.optimizer.param_groups[0]["lr"]]
    batch = learner.minibatches.batch
    tensors += [x for name in Batch.__slots__ if (x := getattr(batch, name)) is not None]
    return [x.data_ptr() for x in tensors]


def test_what_a_graph_reads_stays_where_it_is(gpu):
    """A real graph holds addresses; a replay that calls again would also follow tensors that were replaced."""
    trainer = Trainer(ControlConfig(**SMALL, device="cuda", cuda_graph=True, anneal_clip=True), masked_guess)
    trainer.iterate()
    first = addresses(trainer.learner)
    assert len(set(first)) == len(first) - 1  # the optimiser's learning rate is ours
    for _ in range(3):
        trainer.iterate()
        assert addresses(trainer.learner) == first
    trainer.load_state_dict(trainer.state_dict())
    assert trainer.learner.optimizer.param_groups[0]["lr"] is trainer.learner.learning_rate
    trainer.close()


def batch_of(value, rows=6):
    columns = [torch.full((rows,), float(value + i)) for i in range(5)]
    return Batch(torch.full((rows, 2), float(value)), columns[0], None, *columns[1:])


def test_replay_records_each_length_once_after_warming_up_with_real_steps():
    seen, graphs = [], Again()

    def step(batch, index):
        seen.append((batch, index))
        return batch.obs[index].sum(), index.clone()

    replay = Replay(step, graphs)
    results = []
    for value in range(4):
        replay.begin(batch_of(value))
        for pieces in torch.arange(6).tensor_split([2, 4]), torch.arange(6).tensor_split(2):
            results += [(value, piece, replay(piece)) for piece in pieces]
    for value, piece, (total, taken) in results:  # after all: nobody's results were written over
        assert total == 2.0 * value * len(piece)
        assert torch.equal(taken, piece)
    assert (graphs.warm_ups, graphs.captures) == (2 * Replay.WARM_UP, 2)
    assert len(seen) == len(results) == graphs.replays + graphs.warm_ups  # every step once
    assert len({id(batch) for batch, _ in seen}) == 1
    replayed = [index.data_ptr() for _, index in seen if len(index) == 3][Replay.WARM_UP :]
    assert len(set(replayed)) == 1
    replay.reset()
    replay.begin(batch_of(9))
    assert replay(torch.arange(3))[0] == 54.0 and graphs.captures == 2


def test_annealed_clip_is_that_of_a_config_made_anew():
    annealed, plain = (
        Trainer(ControlConfig(**{**SMALL, "anneal_clip": anneal, "clip_coef": 1.5}), Walk) for anneal in (True, False)
    )
    given = plain.learner.loss_config
    for i in range(plain.config.num_iterations):
        clip = 1.5 * (1.0 - i / plain.config.num_iterations)
        changes = {"clip_low": min(clip, 1.0), "clip_high": clip, "value_clip": clip}
        plain.learner.loss_config = pf.LossConfig(
            **{f.name: getattr(given, f.name) for f in dataclasses.fields(pf.LossConfig)} | changes
        )
        plain.iterate(), annealed.iterate()
        assert annealed.learner.loss_config.clip_high == clip
        assert_equal_states(annealed.state_dict()["parameters"], plain.state_dict()["parameters"])
    annealed.close(), plain.close()


def test_a_state_is_a_copy_on_the_host():
    x = torch.zeros(2, requires_grad=True)
    state = {"a": [x, (x, 1.5)], "b": None}
    copy = checkpoint.on_host(state)
    with torch.no_grad():
        x += 1
    assert_equal_states(copy["a"][0], torch.zeros(2))
    assert copy["a"][1][1] == 1.5 and isinstance(copy["a"][1], tuple) and copy["b"] is None


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--device", "cuda"], ["--device: expected cpu", "no GPU here", "cuda"]),
        (["--device", "cuda:1"], ["--device: expected cpu", "cuda:1"]),
        (["--device", "tpu"], ["--device: expected cpu, cuda or cuda:<number>", "tpu"]),
        (["--device", "cuda:01"], ["--device", "cuda:01"]),
        (["--device", "cuda:-1"], ["--device", "cuda:-1"]),
        (["--cuda-graph"], ["--cuda-graph: expected --device cuda", "cpu"]),
        (["--cuda-graph", "--device", "cuda", "--autoreset", "next_step"], ["--cuda-graph", "same_step", "next_step"]),
    ],
)
def test_a_device_that_is_not_here_is_one_line_and_leaves_nothing(capsys, tmp_path, monkeypatch, flags, parts):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cli.main(["train", "control", *flags]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert all(part in err for part in parts), err
    assert list(tmp_path.iterdir()) == []


def test_a_gpu_beyond_those_here_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(UserError, match=r"--device: expected a GPU below cuda:2, .* got cuda:2"):
        find_device(ControlConfig(device="cuda:2"))


def test_a_run_does_not_change_its_device_on_resume(tmp_path):
    from rich.console import Console

    config = ControlConfig(**SMALL, run_dir=str(tmp_path / "run"))
    control.train(config, make_env=Walk, console=Console(quiet=True))
    with pytest.raises(UserError, match="--device: cpu -> cuda; --cuda-graph: False -> True"):
        control.train(dataclasses.replace(config, device="cuda", cuda_graph=True, resume=True), make_env=Walk)


def test_the_summary_names_the_device(capsys):
    from rich.console import Console

    config = ControlConfig(device="cuda:1", cuda_graph=True)
    Console(width=100).print(report.summary(config, report.Snapshot(), []))
    assert "cuda:1, a CUDA graph for each minibatch" in capsys.readouterr().out


def test_the_learning_rate_reaches_the_step_exactly():
    """A double on the CPU: the bits of a run with a float, as before there was a tensor."""
    net = learner.ActorCritic(5, 3, 0, (8,), 0.0, torch.Generator().manual_seed(0))
    made = Learner(ControlConfig(), None, net, torch.Generator())
    made.learning_rate.fill_(1.7e-4)
    plain = [p.detach().clone().requires_grad_() for p in net.parameters()]
    optimizer = torch.optim.Adam(plain, lr=1.7e-4, eps=made.config.adam_eps, fused=True)
    for ours, theirs in zip(net.parameters(), plain, strict=True):
        if ours.numel():
            ours.grad = torch.from_numpy(np.random.default_rng(0).normal(size=ours.shape).astype(np.float32))
            theirs.grad = ours.grad.clone()
    made.optimizer.step(), optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), plain, strict=True))
