"""PPO on CartPole in JAX: environment, rollout, advantages, loss and Adam in one jitted program, with ppo_fast's kernels inside.

python examples/jax_cartpole.py
python examples/jax_cartpole.py --seed 2 --num-envs 32
"""

import itertools
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import ppo_fast as pf
import ppo_fast.jax as pfj


@dataclass(frozen=True)
class Args:
    """CartPole-v1 to a mean return of 475 and more over the last 100 episodes: some seconds, and a picture."""

    seed: int = 1
    total_timesteps: int = 500_000
    learning_rate: float = 2.5e-3
    """Falls linearly to 0."""
    num_envs: int = 8
    num_steps: int = 128
    """Steps of each environment between two updates."""
    gamma: float = 0.99
    gae_lambda: float = 0.95
    num_minibatches: int = 4
    update_epochs: int = 4
    clip_coef: float = 0.2
    ent_coef: float = 0.01
    vf_coef: float = 0.5
    max_grad_norm: float = 0.5
    plot: Path = Path("runs/jax_cartpole.png")
    """Where the learning curve goes."""


# --- CartPole-v1 (Barto, Sutton and Anderson 1983), with the constants of Gymnasium's -----------------------------------------

LIMIT = 500  # steps


class Env(NamedTuple):
    state: jax.Array  # [4]: position, velocity, angle, angular velocity
    steps: jax.Array  # of this episode: its return, since every step is rewarded with 1


def reset(key):
    return Env(jax.random.uniform(key, (4,), minval=-0.05, maxval=0.05), jnp.zeros((), jnp.int32))


def step(env, action, key):
    """(what comes next, its observation before any reset, terminated, truncated)"""
    _, v, angle, omega = env.state
    force = jnp.where(action == 1, 10.0, -10.0)
    sin, cos = jnp.sin(angle), jnp.cos(angle)
    pull = (force + 0.05 * omega**2 * sin) / 1.1
    angular = (9.8 * sin - cos * pull) / (0.5 * (4.0 / 3.0 - 0.1 * cos**2 / 1.1))
    linear = pull - 0.05 * angular * cos / 1.1
    state = env.state + 0.02 * jnp.stack([v, linear, omega, angular])
    terminated = (jnp.abs(state[0]) > 2.4) | (jnp.abs(state[2]) > 12 * jnp.pi / 180)
    truncated = env.steps + 1 >= LIMIT
    after = Env(state, env.steps + 1)
    fresh = reset(key)
    following = jax.tree.map(lambda a, b: jnp.where(terminated | truncated, a, b), fresh, after)
    return following, state, terminated, truncated


# --- networks and Adam ---------------------------------------------------------------------------------------------------


def layers(key, *sizes, last):
    keys = jax.random.split(key, len(sizes) - 1)
    gains = [2.0**0.5] * (len(sizes) - 2) + [last]
    orthogonal = jax.nn.initializers.orthogonal
    shapes = itertools.pairwise(sizes)
    return [(orthogonal(g)(k, shape), jnp.zeros(shape[1])) for k, g, shape in zip(keys, gains, shapes, strict=True)]


def mlp(params, x):
    for weight, bias in params[:-1]:
        x = jnp.tanh(x @ weight + bias)
    weight, bias = params[-1]
    return x @ weight + bias


def policy(params, obs):
    return mlp(params["actor"], obs)  # logits [..., 2]


def value(params, obs):
    return mlp(params["critic"], obs)[..., 0]


def adam(params, grads, moments, t, rate, max_norm):
    norm = jnp.sqrt(sum((g**2).sum() for g in jax.tree.leaves(grads)))
    grads = jax.tree.map(lambda g: g * jnp.minimum(1.0, max_norm / (norm + 1e-6)), grads)
    mean = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, moments[0], grads)
    square = jax.tree.map(lambda s, g: 0.999 * s + 0.001 * g**2, moments[1], grads)
    rate = rate * jnp.sqrt(1 - 0.999**t) / (1 - 0.9**t)
    return jax.tree.map(lambda p, m, s: p - rate * m / (jnp.sqrt(s) + 1e-5), params, mean, square), (mean, square)


# --- PPO -----------------------------------------------------------------------------------------------------------------


@partial(jax.jit, static_argnums=0)
def train(args, key):
    """Trains from scratch; the lengths of the episodes that ended, 0 where none did: [updates, T, N]."""
    updates = args.total_timesteps // (args.num_envs * args.num_steps)
    size = args.num_envs * args.num_steps // args.num_minibatches
    config = pf.LossConfig(clip_low=args.clip_coef, clip_high=args.clip_coef, value_clip=args.clip_coef,
                           entropy_coef=args.ent_coef, value_coef=args.vf_coef, normalize_advantages=True)  # fmt: skip
    keys = jax.random.split(key, 4)
    params = {"actor": layers(keys[0], 4, 64, 64, 2, last=0.01), "critic": layers(keys[1], 4, 64, 64, 1, last=1.0)}
    zeros = jax.tree.map(jnp.zeros_like, params)
    envs = jax.vmap(reset)(jax.random.split(keys[2], args.num_envs))

    def act(carry, key):
        params, envs = carry
        logits = policy(params, envs.state)
        sample, resets = jax.random.split(key)
        actions = jax.random.categorical(sample, logits)
        following, final, terminated, truncated = jax.vmap(step)(envs, actions, jax.random.split(resets, args.num_envs))
        seen = {"obs": envs.state, "final": final, "actions": actions, "terminated": terminated, "truncated": truncated,
                "log_prob": pfj.categorical_log_prob(logits, actions, entropy=False)[0],
                "length": jnp.where(terminated | truncated, envs.steps + 1, 0)}  # fmt: skip
        return (params, following), seen

    def learn(carry, index, old):
        params, moments, t, rate = carry

        def loss(params):
            obs = old["obs"][index]
            return pfj.categorical_ppo_loss(
                policy(params, obs), old["actions"], old["log_prob"], old["advantages"], config, index=index,
                values=value(params, obs), old_values=old["values"], returns=old["returns"],
            )  # fmt: skip

        (_, stats), grads = jax.value_and_grad(loss, has_aux=True)(params)
        params, moments = adam(params, grads, moments, t, rate, args.max_grad_norm)
        return (params, moments, t + 1, rate), stats

    def update(carry, x):
        params, moments, t, envs = carry
        i, key = x
        key, shuffles = jax.random.split(key)
        (_, envs), seen = jax.lax.scan(act, (params, envs), jax.random.split(key, args.num_steps))
        values = value(params, seen["obs"])
        advantages, returns = pfj.gae(
            jnp.ones_like(values), values, value(params, envs.state), terminated=seen["terminated"],
            truncated=seen["truncated"], final_values=value(params, seen["final"]), gamma=args.gamma, lam=args.gae_lambda,
        )  # fmt: skip
        old = {**seen, "values": values, "advantages": advantages, "returns": returns}
        old = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), old)
        rows = args.num_envs * args.num_steps
        order = jax.vmap(lambda k: jax.random.permutation(k, rows))(jax.random.split(shuffles, args.update_epochs))
        rate = args.learning_rate * (1 - i / updates)
        minibatches = order[:, : args.num_minibatches * size].reshape(-1, size)
        (params, moments, t, _), stats = jax.lax.scan(partial(learn, old=old), (params, moments, t, rate), minibatches)
        return (params, moments, t, envs), (seen["length"], stats.vector.mean(0))

    start = (params, (zeros, zeros), 1.0, envs)
    _, (lengths, stats) = jax.lax.scan(update, start, (jnp.arange(updates), jax.random.split(keys[3], updates)))
    return lengths, pfj.Stats(stats)


def draw(args, lengths, path):
    """Return of the episodes that ended, and its mean over the last 100, against steps."""
    from matplotlib.figure import Figure

    at = np.flatnonzero(lengths)
    returns = lengths.reshape(-1)[at]
    mean = np.convolve(returns, np.ones(100) / 100, "valid")
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.plot(at, returns, ".", markersize=2, color="#b8c0cc", label="an episode")
    axes.plot(at[99:], mean, color="#0b8457", linewidth=2, label="mean of the last 100")
    axes.axhline(475, color="#7a828c", linewidth=0.8, linestyle="--", label="solved")
    axes.set(
        xlabel="steps of the environment",
        ylabel="return",
        ylim=(0, 515),
        title=f"CartPole-v1, {args.num_envs} at a time",
    )
    axes.legend(loc="lower right", frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


def main(args: Args) -> None:
    start = time.perf_counter()
    compiled = train.lower(args, jax.random.key(args.seed)).compile()
    print(
        f"compiled in {time.perf_counter() - start:.1f} s; training for {args.total_timesteps:,} steps ...", flush=True
    )
    start = time.perf_counter()
    lengths, stats = jax.device_get(compiled(jax.random.key(args.seed)))
    seconds = time.perf_counter() - start
    last = lengths[lengths > 0][-100:]
    print(f"{lengths.size:,} steps in {seconds:.1f} s, {lengths.size / seconds:,.0f} a second; approx_kl of the last update "
          f"{stats.approx_kl[-1]:.2g}")  # fmt: skip
    print(f"mean return of the last {len(last)} episodes: {last.mean():.1f}{', solved' if last.mean() >= 475 else ''}")
    draw(args, lengths, args.plot)
    print(f"wrote {args.plot}")


if __name__ == "__main__":
    main(tyro.cli(Args))
