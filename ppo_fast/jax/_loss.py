"""The PPO losses: one pass that leaves loss, statistics and gradients."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ..config import STATS, DeviceLossConfig, LossConfig
from ._call import Array, Call, compute_dtype, is_array, plans, with_gradient
from ._reductions import token_weights


@jax.tree_util.register_pytree_node_class
class Stats:
    """Statistics of one loss call: `stats.approx_kl` is a 0-dim array, `to_dict()` Python floats. A tree of one array."""

    __slots__ = ("vector",)

    def __init__(self, vector: Any) -> None:
        self.vector = vector  # [..., len(STATS)]

    def __getattr__(self, name: str) -> Array:
        if name not in STATS:
            raise AttributeError(f"Stats has no {name!r}; it has {', '.join(STATS)}")
        return self.vector[..., STATS.index(name)]

    def __dir__(self) -> list[str]:
        return ["vector", "to_dict", *STATS]

    def to_dict(self) -> dict[str, float]:
        return dict(zip(STATS, self.vector.tolist(), strict=True))

    def tree_flatten(self):
        return (self.vector,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)

    def __repr__(self) -> str:
        if not isinstance(self.vector, jax.Array) or isinstance(self.vector, jax.core.Tracer) or self.vector.ndim != 1:
            return f"Stats({self.vector})"
        return "Stats(" + ", ".join(f"{name}={value:.6g}" for name, value in self.to_dict().items()) + ")"


class PPOLoss(NamedTuple):
    """`loss`: 0-dim, differentiable. `stats`: `Stats`, constants. A pair, as `jax.grad(..., has_aux=True)` wants it."""

    loss: Array
    stats: Stats


def _run(
    op: str,
    inputs: dict[str, Any],
    extra: dict[str, Any],
    config: LossConfig,
    rollout: dict[str, Any],
    cu_seqlens: Array | None,
    denominator: float | Array | None,
    raw: Callable[..., tuple],
) -> PPOLoss:
    """`inputs` get gradients; `extra`, the distribution's, and `rollout` none. raw(places) is what the kernel's call takes
    between its params and its denominator."""
    for name, x in {**inputs, **extra, **rollout, "cu_seqlens": cu_seqlens}.items():
        if not (x is None or is_array(x)):
            raise TypeError(f"{op}: {name} must be an array, got {type(x).__name__}")
    first = next(iter(inputs.values()))
    if first is None:
        raise TypeError(f"{op}: {next(iter(inputs))} must be an array, got None")
    if not (denominator is None or is_array(denominator) or _is_positive(denominator)):
        raise ValueError(f"{op}: denominator must be a finite number > 0, got {denominator!r}")
    shape = first.shape if op == "ppo_loss" else first.shape[:-1]
    rollout = _weighted(op, config, shape, compute_dtype(first), rollout, extra.get("index"), cu_seqlens, denominator)
    params = plans.LossParams(config.numbers(), config.choices(), None)
    plain = rollout.pop("plain")
    total = rollout.pop("total")

    def forward(given, constants, needed):
        call, dtype = Call(op), compute_dtype(*given)
        places = {name: call(x) for name, x in {**dict(zip(inputs, given, strict=True)), **constants}.items()}
        out = [call.result((), dtype), call.result((len(STATS),), dtype)]
        out += [call.result(x.shape, x.dtype) if n else None for x, n in zip(given, needed, strict=True)]
        loss, stats, *grads = call.run(params, *raw(places), plain, total, *out)
        return (loss, stats), grads

    def backward(grads, needed, cotangents):
        g = cotangents[0]  # of the statistics, which are constants, there is none
        return [(x.astype(g.dtype) * g).astype(x.dtype) for x in grads]

    loss, stats = with_gradient(tuple(inputs.values()), {**extra, **rollout}, forward, backward)
    return PPOLoss(loss, Stats(jax.lax.stop_gradient(stats)))


def _is_positive(x: Any) -> bool:
    return isinstance(x, (int, float)) and math.isfinite(x) and x > 0


def _weighted(op, config, shape, dtype, rollout, index, cu_seqlens, denominator) -> dict[str, Any]:
    """The rollout as kernels take it: its weights, `plain`, a denominator or NaN, and `total`, whether nothing else is
    divided."""
    mask, weights = rollout["mask"], rollout["weights"]
    if index is not None and weights is not None:  # kernels take weights per element of the minibatch
        weights = taken(op, weights, index)
    plain = weights is not None or config.reduction in ("token-mean", "sum")
    if plain and not is_array(denominator):
        number = math.nan if denominator is None else float(denominator)
        total = denominator is not None or weights is not None or config.reduction == "sum"
        return {**rollout, "weights": weights, "plain": number, "total": total}
    if index is not None and mask is not None:
        mask = taken(op, mask, index)
    valid = None if mask is None else mask != 0
    if valid is not None and valid.shape != shape:  # the kernel's message names it
        return {**rollout, "plain": math.nan, "total": True}
    w = token_weights(shape, dtype, valid, config.reduction, weights, denominator, cu_seqlens)
    return {**rollout, "weights": w, "plain": math.nan, "total": True}


def taken(op: str, stored: Array, index: Array) -> Array:
    """Rows of the rollout, [...]."""
    if not jnp.issubdtype(index.dtype, jnp.integer):
        raise TypeError(f"{op}: index must be an integer type, got {index.dtype.name}")
    return stored.reshape(-1)[index]


def checked(op: str, config: LossConfig | None) -> LossConfig:
    if config is None:
        return LossConfig()
    if not isinstance(config, LossConfig) or isinstance(config, DeviceLossConfig):
        raise TypeError(f"{op}: config must be a LossConfig, got {type(config).__name__}")
    if config.forms:
        raise ValueError(
            f"{op}: policy {config.policy!r} is one of sequences, which ppo_fast.jax has not; torch's ppo_loss has"
        )
    return config


_ROLLOUT = ("old_log_prob", "advantages", "values", "old_values", "returns")
_REST = ("ref_log_prob", "rollout_log_prob", "mask", "weights")


def ppo_loss(
    log_prob: Array,
    old_log_prob: Array,
    advantages: Array,
    config: LossConfig | None = None,
    *,
    values: Array | None = None,
    old_values: Array | None = None,
    returns: Array | None = None,
    entropy: Array | None = None,
    ref_log_prob: Array | None = None,
    rollout_log_prob: Array | None = None,
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    weights: Array | None = None,
    denominator: float | Array | None = None,
) -> PPOLoss:
    """Clipped PPO loss with value, entropy and KL terms, gradients and statistics in one pass: `ppo_fast.ppo_loss` for JAX,
    with its arguments, formula and bits. `config` is a Python constant of the program (`static_argnames` under jit).

    Gradient: of log_prob, values and entropy, those that are asked for, in their dtypes; written by the forward pass. All
    else is constant. Reverse mode, once; `vmap` runs one call after the other, since a loss is a sum over its batch.

    Errors: as torch's, while tracing. What only the running program knows (labels, index) is its error on the CPU.
    """

    def raw(x):
        return tuple(x[name] for name in ("log_prob", *_ROLLOUT, "entropy", *_REST))

    rollout = dict(
        old_log_prob=old_log_prob, advantages=advantages, old_values=old_values, returns=returns, ref_log_prob=ref_log_prob,
        rollout_log_prob=rollout_log_prob, mask=mask, weights=weights,
    )  # fmt: skip
    inputs = {"log_prob": log_prob, "values": values, "entropy": entropy}
    return _run("ppo_loss", inputs, {}, checked("ppo_loss", config), rollout, cu_seqlens, denominator, raw)


def categorical_ppo_loss(
    logits: Array,
    actions: Array,
    old_log_prob: Array,
    advantages: Array,
    config: LossConfig | None = None,
    *,
    values: Array | None = None,
    old_values: Array | None = None,
    returns: Array | None = None,
    ref_log_prob: Array | None = None,
    rollout_log_prob: Array | None = None,
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    weights: Array | None = None,
    denominator: float | Array | None = None,
    action_mask: Array | None = None,
    index: Array | None = None,
) -> PPOLoss:
    """`categorical_log_prob` and `ppo_loss` in one pass: `ppo_fast.categorical_ppo_loss` for JAX, with its arguments, formula
    and bits. `index` names the minibatch's rows of the rollout, so that nothing is gathered.

    Gradient: of logits and values; the rest as `ppo_loss`. An action or an index out of range is an error of the running
    program on the CPU; on a GPU its row counts as masked out.
    """

    def raw(x):
        return tuple(x[name] for name in ("logits", "actions", "action_mask", "index", *_ROLLOUT, *_REST))

    op = "categorical_ppo_loss"
    rollout = dict(
        old_log_prob=old_log_prob, advantages=advantages, old_values=old_values, returns=returns, ref_log_prob=ref_log_prob,
        rollout_log_prob=rollout_log_prob, mask=mask, weights=weights,
    )  # fmt: skip
    extra = {"actions": actions, "action_mask": action_mask, "index": index}
    inputs = {"logits": logits, "values": values}
    return _run(op, inputs, extra, checked(op, config), rollout, cu_seqlens, denominator, raw)


def normal_ppo_loss(
    mean: Array,
    log_std: Array,
    actions: Array,
    old_log_prob: Array,
    advantages: Array,
    config: LossConfig | None = None,
    *,
    values: Array | None = None,
    old_values: Array | None = None,
    returns: Array | None = None,
    ref_log_prob: Array | None = None,
    rollout_log_prob: Array | None = None,
    mask: Array | None = None,
    cu_seqlens: Array | None = None,
    weights: Array | None = None,
    denominator: float | Array | None = None,
    index: Array | None = None,
    squash: bool = False,
) -> PPOLoss:
    """`normal_log_prob` and `ppo_loss` in one pass: `ppo_fast.normal_ppo_loss` for JAX, with its arguments, formula and bits.

    Gradient: of mean, log_std and values; that of a log_std [D] is a sum over the rows in a fixed order. The rest as
    `categorical_ppo_loss`.
    """

    def raw(x):
        names = ("mean", "log_std", "actions"), ("index", *_ROLLOUT, *_REST)
        return *(x[name] for name in names[0]), squash, *(x[name] for name in names[1])

    op = "normal_ppo_loss"
    if is_array(mean) and is_array(log_std) and log_std.shape not in (mean.shape, mean.shape[-1:]):
        try:
            log_std = jnp.broadcast_to(log_std, mean.shape)
        except ValueError:
            wanted = f"broadcast to the shape of mean = {list(mean.shape)}"
            raise ValueError(f"{op}: log_std must {wanted}, got {list(log_std.shape)}") from None
    rollout = dict(
        old_log_prob=old_log_prob, advantages=advantages, old_values=old_values, returns=returns, ref_log_prob=ref_log_prob,
        rollout_log_prob=rollout_log_prob, mask=mask, weights=weights,
    )  # fmt: skip
    extra = {"actions": actions, "index": index}
    inputs = {"mean": mean, "log_std": log_std, "values": values}
    return _run(op, inputs, extra, checked(op, config), rollout, cu_seqlens, denominator, raw)
