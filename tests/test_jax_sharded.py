"""ppo_fast.jax on more than one device: two of the CPU's, in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("jax")

PROGRAM = """
import jax, jax.numpy as jnp, numpy as np, ppo_fast.jax as pj
from jax.sharding import NamedSharding, PartitionSpec as P

mesh = jax.make_mesh((2,), ("d",), axis_types=(jax.sharding.AxisType.Auto,))
x = np.random.default_rng(0).standard_normal((16, 8)).astype(np.float32)
gae = lambda r: pj.gae(r, r)[0]
columns = P(None, "d")

# each device its own columns; and a sharded array outside of shard_map
np.testing.assert_array_equal(jax.jit(jax.shard_map(gae, mesh=mesh, in_specs=columns, out_specs=columns))(x), gae(x))
np.testing.assert_array_equal(jax.jit(gae)(jax.device_put(x, NamedSharding(mesh, columns))), gae(x))

# data parallel: parameters that all devices have, a batch of which each has half; the gradient is the whole batch's
weight, obs, actions = x[:4, :3], x[:, :4], jnp.arange(16) % 3

def loss(weight, obs, actions, old, advantages):
    return pj.categorical_ppo_loss(obs @ weight, actions, old, advantages).loss

def mean(*args):
    return jax.lax.pmean(loss(*args), "d")

split = jax.shard_map(mean, mesh=mesh, in_specs=(P(), *[P("d")] * 4), out_specs=P())
args = weight, obs, actions, x[:, 0] * 0 - 1, x[:, 1]
for found, wanted in zip(jax.jit(jax.value_and_grad(split))(*args), jax.value_and_grad(loss)(*args)):
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-7)
print("two devices agree")
"""


def test_two_devices():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True,
                          env={**os.environ, "XLA_FLAGS": "--xla_force_host_platform_device_count=2"})  # fmt: skip
    assert done.stdout == "two devices agree\n", done.stdout + done.stderr
