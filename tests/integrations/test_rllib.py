"""RLlib: its functions against ours; the learner's loss on batches as its pipeline makes them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch

pytest.importorskip("ray")
pytest.importorskip("ray.rllib.algorithms.ppo.torch.ppo_torch_learner")
from ray.rllib.algorithms.ppo.torch.ppo_torch_learner import PPOTorchLearner
from ray.rllib.core.columns import Columns
from ray.rllib.core.distribution.torch import torch_distribution as distributions
from ray.rllib.evaluation.postprocessing import Postprocessing
from ray.rllib.utils.postprocessing.value_predictions import compute_value_targets

from ppo_fast.integrations import rllib as ours


def episodes(size, dtype=np.float32, flags=np.bool_):
    rng = np.random.default_rng(0)
    values, rewards = rng.normal(size=(2, size))
    terminateds, truncateds = (rng.random((2, size)) < 0.1).astype(flags)
    truncateds[-1] = size % 2 == 0
    return [values.astype(np.float32), rewards.astype(dtype), terminateds, truncateds, 0.99, 0.95]


@pytest.mark.parametrize("size", [1, 2, 50, 4000])
@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("flags", [np.bool_, np.float32])
@pytest.mark.parametrize("gamma, lambda_", [(0.99, 0.95), (1.0, 1.0), (0.9, 0.0)])
def test_value_targets(size, dtype, flags, gamma, lambda_):
    x = [*episodes(size, dtype, flags)[:4], gamma, lambda_]
    expected, got = compute_value_targets(*x), ours.compute_value_targets(*x)
    assert isinstance(got, np.ndarray) and got.dtype == expected.dtype and got.shape == expected.shape
    np.testing.assert_allclose(got, expected, rtol=1e-6, atol=1e-6)


def test_views_of_value_targets():
    x = [y[::-2] if isinstance(y, np.ndarray) else y for y in episodes(100)]
    np.testing.assert_allclose(ours.compute_value_targets(*x), compute_value_targets(*x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("case", ["dimensions", "empty"])
def test_other_value_targets_are_theirs(case, monkeypatch):
    called = []
    monkeypatch.setattr(ours, "_theirs", lambda *x: called.append(x))
    x = [y.reshape(-1, 2) if case == "dimensions" else y[:0] for y in episodes(10)[:4]]
    ours.compute_value_targets(*x, 0.9, 0.9)
    assert len(called) == 1


class Module:
    def __init__(self, kind, values):
        self.kind, self.values = kind, values

    def unwrapped(self):
        return self

    def get_train_action_dist_cls(self):
        return self.kind

    get_exploration_action_dist_cls = get_train_action_dist_cls

    def compute_values(self, batch, embeddings=None):
        return self.values


class Twice(distributions.TorchCategorical):
    """A distribution of the user's."""

    def logp(self, value, **kwargs):
        return 2 * super().logp(value, **kwargs)


KINDS = {
    "categorical": (distributions.TorchCategorical, 5),
    "gaussian": (distributions.TorchDiagGaussian, 6),
    "of the user": (Twice, 4),
}


def loss_and_gradients(learner, kind, shape, masked=False, nan=False, bfloat16=False, scale=1.0, **options):
    torch.manual_seed(0)
    kind, width = KINDS[kind]
    old = torch.randn(*shape, width)
    inputs = (old + scale * torch.randn(*shape, width)).to(torch.bfloat16 if bfloat16 else torch.float32)
    dist = kind.from_logits(old)
    actions = dist.sample()
    values, targets, advantages = torch.randn(3, *shape) * 2
    batch = {
        Columns.ACTION_DIST_INPUTS: old, Columns.ACTIONS: actions, Columns.ACTION_LOGP: dist.logp(actions),
        Postprocessing.ADVANTAGES: advantages, Postprocessing.VALUE_TARGETS: targets,
    }  # fmt: skip
    if masked:
        batch[Columns.LOSS_MASK] = mask = torch.rand(shape) < 0.7
        if nan:
            advantages[~mask] = targets[~mask] = torch.nan
    inputs.requires_grad_(), values.requires_grad_()
    config = {"clip_param": 0.3, "vf_clip_param": 1.5, "vf_loss_coeff": 0.7, "use_kl_loss": True, "use_critic": True}
    logged = {}
    self = SimpleNamespace(
        module={"m": Module(kind, values)},
        entropy_coeff_schedulers_per_module={"m": SimpleNamespace(get_current_value=lambda: torch.tensor(0.02))},
        curr_kl_coeffs_per_module={"m": torch.tensor(0.2)},
        metrics=SimpleNamespace(log_dict=lambda x, key, window: logged.update(x)),
    )
    config = SimpleNamespace(**(config | options))
    forward = {Columns.ACTION_DIST_INPUTS: inputs}
    loss = learner.compute_loss_for_module(self, module_id="m", config=config, batch=batch, fwd_out=forward)
    loss.backward()
    return loss.detach(), inputs.grad, values.grad, logged


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape, options", [
    ((32,), {}), ((6, 5), {"masked": True}), ((32,), {"use_kl_loss": False}), ((32,), {"use_critic": False}),
    ((32,), {"vf_clip_param": 0.01}), ((32,), {"scale": 6.0}), ((32,), {"scale": 0.0}), ((2,), {}),
    ((4, 3), {"masked": True, "use_kl_loss": False, "vf_clip_param": float("inf")}),
])  # fmt: skip
def test_loss(kind, shape, options):
    if options.get("vf_clip_param") == float("inf"):
        options = options | {"vf_clip_param": 1e30}
    expected = loss_and_gradients(PPOTorchLearner, kind, shape, **options)
    got = loss_and_gradients(ours.PPOTorchLearner, kind, shape, **options)
    for x, y in zip(expected[:3], got[:3], strict=True):
        if x is None:
            assert y is None or not y.any()
        else:
            torch.testing.assert_close(y, x, rtol=2e-5, atol=1e-6 * max(1.0, x.abs().max().item()))
    assert expected[3].keys() == got[3].keys()
    for key, value in expected[3].items():
        torch.testing.assert_close(got[3][key], value, rtol=2e-5, atol=2e-6, check_dtype=False, msg=key)


@pytest.mark.parametrize("kind", ["categorical", "gaussian"])
def test_nothing_masked_is_read(kind):
    expected = loss_and_gradients(ours.PPOTorchLearner, kind, (6, 5), masked=True)
    got = loss_and_gradients(ours.PPOTorchLearner, kind, (6, 5), masked=True, nan=True)
    for x, y in zip(expected[:3], got[:3], strict=True):
        assert torch.equal(x, y)


def test_the_connector_takes_ours():
    from ray.rllib.connectors.learner import general_advantage_estimation as connector

    with ours.enabled():
        assert connector.compute_value_targets is ours.compute_value_targets
        assert PPOTorchLearner.compute_loss_for_module is ours.compute_loss_for_module
    assert connector.compute_value_targets is compute_value_targets
