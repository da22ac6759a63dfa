"""ppo_fast.jax against rlax's definitions: other people's formulas in other people's code."""

from __future__ import annotations

import numpy as np
import pytest

import ppo_fast as pf

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

rlax = pytest.importorskip("rlax")

import ppo_fast.jax as pj  # noqa: E402


def close(a, b):
    np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)


@pytest.fixture
def x():
    rng = np.random.default_rng(0)
    T, N = 17, 5
    return {
        "rewards": rng.standard_normal((T, N)).astype(np.float32),
        "values": rng.standard_normal((T + 1, N)).astype(np.float32),
        "terminated": rng.random((T, N)) < 0.15,
        "log_rhos": rng.standard_normal((T, N)).astype(np.float32) * 0.5,
        "logits": rng.standard_normal((T, N, 4)).astype(np.float32),
        "actions": rng.integers(0, 4, (T, N)),
    }


def discounts(x):
    return 0.9 * (1.0 - x["terminated"])


def test_gae(x):
    of_column = lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, 0.8, v)  # noqa: E731
    wanted = jax.vmap(of_column, 1, 1)(x["rewards"], discounts(x), x["values"])
    adv, ret = pj.gae(x["rewards"], x["values"][:-1], x["values"][-1], terminated=x["terminated"], gamma=0.9, lam=0.8)
    close(adv, wanted)
    close(ret, wanted + x["values"][:-1])


def test_gae_under_vmap_over_columns(x):
    one = lambda r, v, e: pj.gae(r, v[:-1], v[-1], terminated=e, gamma=0.9, lam=0.8)[0]  # noqa: E731
    of_column = lambda r, d, v: rlax.truncated_generalized_advantage_estimation(r, d, 0.8, v)  # noqa: E731
    found = jax.vmap(one, 1, 1)(x["rewards"], x["values"], x["terminated"])
    close(found, jax.vmap(of_column, 1, 1)(x["rewards"], discounts(x), x["values"]))


def test_vtrace(x):
    of_column = lambda v, r, d, rho: rlax.vtrace_td_error_and_advantage(v[:-1], v[1:], r, d, rho, lambda_=0.7)  # noqa: E731
    wanted = jax.vmap(of_column, 1, 1)(x["values"], x["rewards"], discounts(x), jnp.exp(x["log_rhos"]))
    targets, advantages = pj.vtrace(
        x["log_rhos"], x["rewards"], x["values"][:-1], x["values"][-1], terminated=x["terminated"], gamma=0.9, lam=0.7
    )
    close(targets - x["values"][:-1], wanted.errors)
    # rlax bootstraps its advantages with lambda mixed in; at lambda = 1 the definitions meet
    of_column = lambda v, r, d, rho: rlax.vtrace_td_error_and_advantage(v[:-1], v[1:], r, d, rho)  # noqa: E731
    wanted = jax.vmap(of_column, 1, 1)(x["values"], x["rewards"], discounts(x), jnp.exp(x["log_rhos"]))
    _, advantages = pj.vtrace(
        x["log_rhos"], x["rewards"], x["values"][:-1], x["values"][-1], terminated=x["terminated"], gamma=0.9
    )
    close(advantages, wanted.pg_advantage)


def test_discounted_returns(x):
    of_column = lambda r, d, v: rlax.discounted_returns(r, d, v)  # noqa: E731
    wanted = jax.vmap(of_column, (1, 1, 0), 1)(x["rewards"], discounts(x), x["values"][-1])
    close(pj.discounted_returns(x["rewards"], x["values"][-1], terminated=x["terminated"], gamma=0.9), wanted)


def test_clipped_surrogate(x):
    advantages = x["rewards"].reshape(-1)
    old = x["log_rhos"].reshape(-1) * 0

    def theirs(log_prob):
        return rlax.clipped_surrogate_pg_loss(jnp.exp(log_prob - old), advantages, 0.2)

    def mine(log_prob):
        return pj.ppo_loss(log_prob, old, advantages, pf.LossConfig(value_coef=0.0)).loss

    log_prob = x["log_rhos"].reshape(-1)
    for a, b in zip(jax.value_and_grad(mine)(log_prob), jax.value_and_grad(theirs)(log_prob), strict=True):
        close(a, b)


def test_categorical_log_prob_and_entropy(x):
    softmax = rlax.softmax()
    log_prob, entropy = pj.categorical_log_prob(x["logits"], x["actions"])
    close(log_prob, softmax.logprob(x["actions"], x["logits"]))
    close(entropy, softmax.entropy(x["logits"]))


def test_normal_log_prob_and_entropy(x):
    mean, actions, log_std = x["logits"], x["logits"][::-1], x["logits"][0, 0] * 0.3
    normal = rlax.gaussian_diagonal()
    log_prob, entropy = pj.normal_log_prob(mean, log_std, actions)
    scale = jnp.broadcast_to(jnp.exp(log_std), mean.shape)
    close(log_prob, normal.logprob(actions, mean, scale))
    close(entropy, normal.entropy(mean, scale))
