"""The control trainer on a GPU: graphs change no bit, a resumed run is exact, nothing waits where it need not."""

from __future__ import annotations

import os

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # else cuBLAS may sum in another order on another stream

import dataclasses

import pytest
import torch

pytest.importorskip("gymnasium")  # a GPU machine may have a torch of its own and no environments
from rich.console import Console
from test_trainer_resume import assert_equal_states, masked_guess
from trainer_worlds import Push

import ppo_fast as pf
from ppo_fast.trainer import checkpoint
from ppo_fast.trainer.control import ControlConfig, Trainer, train
from ppo_fast.trainer.replay import Replay

from .conftest import BACKENDS, DEVICE, needs_cuda
from .test_gpu_graphs import captured

pytestmark = [
    needs_cuda,
    pytest.mark.filterwarnings("ignore:This instance was constructed with capturable=True"),
]
QUIET = {"tensorboard": False, "plot": False, "progress": False}
CARTPOLE = {"total_timesteps": 512 * 40, "device": "cuda", **QUIET}
SMALL = {"num_envs": 3, "num_steps": 20, "total_timesteps": 480, "hidden_sizes": (8,), "device": "cuda", **QUIET}
VARIANTS = [
    (None, {**CARTPOLE, "anneal_clip": True}),
    (None, {**CARTPOLE, "total_timesteps": 512 * 10, "num_minibatches": 7, "target_kl": 0.01}),
    (Push, {**SMALL, "normalize_observations": True, "normalize_rewards": True}),
    (masked_guess, SMALL),
]


def go_on(trainer):
    rows = []
    while trainer.now.iteration < trainer.config.num_iterations:
        episodes, row = trainer.iterate()
        rows.append((episodes, {name: x for name, x in row.items() if name != "steps_per_second" and x == x}))
    trainer.close()
    return rows


def comparable(trainer):
    state = trainer.state_dict()
    for group in state["optimizer"]["param_groups"]:
        del group["capturable"]
    return state


@pytest.mark.parametrize(("make_env", "changes"), VARIANTS)
def test_a_graph_changes_no_bit_of_a_run(make_env, changes):
    plain, graph = (Trainer(ControlConfig(**changes, cuda_graph=on), make_env) for on in (False, True))
    assert go_on(plain) == go_on(graph)
    assert_equal_states(comparable(plain), comparable(graph))
    assert graph.learner.minibatches.recorded
    assert {x.device.type for x in plain.net.parameters()} == {"cuda"}


@pytest.mark.parametrize("cuda_graph", [False, True])
@pytest.mark.parametrize(("make_env", "changes"), [*VARIANTS, (masked_guess, {**SMALL, "autoreset": "next_step"})])
def test_a_resumed_run_ends_with_the_same_bits(make_env, changes, cuda_graph, tmp_path):
    if cuda_graph and "autoreset" in changes:
        pytest.skip("minibatches vary in length: refused")
    config = ControlConfig(**changes, cuda_graph=cuda_graph)
    straight = Trainer(config, make_env)
    rows = [straight.iterate() for _ in range(config.num_iterations // 2)]
    checkpoint.save(tmp_path / "c.pt", straight.state_dict())
    assert {x.device.type for x in torch.load(tmp_path / "c.pt")["parameters"].values()} == {"cpu"}
    resumed = Trainer(config, make_env)
    for _ in range(2):  # a used one: what was recorded must be recorded again
        resumed.iterate()
    assert resumed.load_state_dict(checkpoint.load(tmp_path / "c.pt"))
    assert go_on(straight) == go_on(resumed) and rows
    assert_equal_states(straight.state_dict(), resumed.state_dict())


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_cartpole_learns(tmp_path, cuda_graph):
    """On a CPU these 20,480 steps end with a mean return of 71 to 80 (seeds 1 to 3); acting at random gives 22."""
    config = ControlConfig(**CARTPOLE, cuda_graph=cuda_graph, run_dir=str(tmp_path / "run"))
    result = train(config, console=Console(quiet=True))
    assert result.finished and result.mean_return > 50
    timing = result.timing
    assert min(timing.rollout, timing.advantage, timing.update) > 0


def test_the_first_iteration_is_that_of_a_cpu():
    """The same random numbers, so the same rollout; then the arithmetic differs in rounding only."""
    gpu, cpu = (Trainer(ControlConfig(**{**CARTPOLE, "device": device})) for device in ("cuda", "cpu"))
    assert gpu.iterate()[0] == cpu.iterate()[0]
    for ours, theirs in zip(gpu.net.parameters(), cpu.net.parameters(), strict=True):
        torch.testing.assert_close(ours.cpu(), theirs, rtol=1e-3, atol=1e-4)
    gpu.close(), cpu.close()


@pytest.mark.parametrize("cuda_graph", [False, True])
def test_an_update_waits_for_nothing(cuda_graph):
    trainer = Trainer(ControlConfig(**CARTPOLE, cuda_graph=cuda_graph, anneal_clip=True))
    for _ in range(2):
        trainer.iterate()
    assert not cuda_graph or set(trainer.learner.minibatches.recorded) == {128}
    trainer.collector.collect()
    batch = trainer.learner.batch(trainer.collector, None)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        trainer.learner.update(batch, torch.arange(512), 1e-4, 0.5)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    trainer.close()


def test_time_counts_where_it_is_spent_not_where_it_is_waited_for():
    trainer = Trainer(ControlConfig(**CARTPOLE, cuda_graph=True))
    trainer.iterate()
    before, batch = dataclasses.replace(trainer.now.timing), trainer.learner.batch

    def slow(*arguments):
        torch.cuda._sleep(2 * 10**9)  # clock cycles: about a second
        return batch(*arguments)

    trainer.learner.batch = slow
    trainer.iterate()
    now = trainer.now.timing
    assert now.advantage - before.advantage > 0.5
    assert max(now.update - before.update, now.rollout - before.rollout) < 0.5
    trainer.close()


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_captured_loss_reads_what_was_set(backend):
    g = torch.Generator().manual_seed(0)
    logits, *streams = (torch.randn(*shape, generator=g).to(DEVICE) for shape in ((64, 5), *[(64,)] * 5))
    actions = (torch.arange(64) % 5).to(DEVICE)
    base = pf.LossConfig.preset("cleanrl")
    config = base.on(DEVICE)

    def loss(config):
        x, v = logits.clone().requires_grad_(), streams[0].clone().requires_grad_()
        out = pf.categorical_ppo_loss(
            x, actions, streams[1] - 2, streams[2], config, values=v, old_values=streams[3], returns=streams[4]
        )
        out.loss.backward()
        return out.loss.detach(), out.stats.vector, x.grad, v.grad

    with pf.use_backend(backend):
        graph, results = captured(lambda: loss(config))
        for numbers in ({}, {"clip_low": 0.01, "clip_high": 0.02}, {"value_clip": 0.5, "entropy_coef": -1.0}):
            base = dataclasses.replace(base, **numbers)
            config.set(**numbers)
            graph.replay()
            for ours, theirs in zip(results, loss(base), strict=True):
                assert torch.equal(ours, theirs)


def test_recordings_of_two_lengths_share_the_training():
    trainer = Trainer(ControlConfig(**{**CARTPOLE, "num_minibatches": 7}, cuda_graph=True))
    for _ in range(3):
        trainer.iterate()
    replay = trainer.learner.minibatches
    assert isinstance(replay, Replay) and set(replay.recorded) == {73, 74}
    trainer.close()
