"""Log-probabilities and entropies of distributions, with gradients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from ._call import Array, Call, batched, compute_dtype, in_front, is_array, with_gradient

LogProb = tuple[Array, Array | None]


def _rows(function, *arrays):
    """function(*arrays) of rows [..., width]: vmap is one call with more of them."""

    def rule(size, is_batched, *xs):
        return _rows(function, *(in_front(x, b, size) for x, b in zip(xs, is_batched, strict=True)))

    return batched(function, rule, *arrays)


def _lead(op: str, name: str, x: Any) -> tuple[int, ...]:
    if not is_array(x):
        raise TypeError(f"{op}: {name} must be an array, got {'None' if x is None else type(x).__name__}")
    return x.shape[:-1]


def _results(call: Call, lead: Sequence[int], dtype: Any, entropy: bool) -> list[Any]:
    return [call.result(lead, dtype), call.result(lead, dtype) if entropy else None]


def _unpacked(found: list[Array], entropy: bool) -> tuple[Array, Array | None, Any]:
    """(log_prob, entropy or None, what else there is or None) of a kernel's results."""
    log_prob, *rest = found
    h = rest.pop(0) if entropy else None
    return log_prob, h, rest[0] if rest else None


def categorical_log_prob(
    logits: Array,
    actions: Array,
    *,
    temperature: float | Array = 1.0,
    action_mask: Array | None = None,
    ignore_index: int | None = None,
    entropy: bool = True,
    inplace_backward: bool = False,
) -> LogProb:
    """Log-probability of the action taken and entropy of softmax(logits / temperature): `ppo_fast.categorical_log_prob` for
    JAX, with its arguments (one label a row), formula and bits.

    inplace_backward: the gradient takes the memory of the logits where nobody reads them any more (XLA copies them where
    somebody does).

    Gradient: of the logits, in their dtype. `vmap` is one call over all rows.

    Errors, while tracing: TypeError for a dtype, ValueError for a shape or a temperature that is a number. An action out of
    range is an error of the running program on the CPU; on a GPU its row is 0.
    """
    op = "categorical_log_prob"
    lead = _lead(op, "logits", logits)
    rows = None
    if is_array(temperature):
        rows, temperature = jnp.asarray(temperature), 1.0
        rows = rows if rows.ndim else jnp.broadcast_to(rows, lead)
    elif not (isinstance(temperature, (int, float, np.generic)) and 0 < temperature < math.inf):
        raise ValueError(f"{op}: temperature must be a finite number > 0 or an array, got {temperature!r}")
    number = float(temperature)

    def forward(inputs, constants, needed):
        def kernel(logits, actions, mask, rows):
            call, lead, dtype = Call(op), logits.shape[:-1], compute_dtype(logits)
            places = [call(x) for x in (logits, actions, mask, rows)]
            out = _results(call, lead, dtype, entropy)
            saved = call.result((2, *lead), dtype, kernel_shape=(2, math.prod(lead)))
            log_prob, h, saved = _unpacked(call.run(*places, number, ignore_index, *out, saved), entropy)
            return log_prob, h, jnp.moveaxis(saved, 0, -1)  # [..., 2]: rows first, for vmap

        log_prob, h, saved = _rows(kernel, *inputs, *constants)
        return (log_prob, h), (inputs, constants, h, saved)

    def backward(residuals, needed, grads):
        inputs, constants, h, saved = residuals
        d_log_prob, d_h = grads

        def kernel(logits, actions, mask, rows, h, saved, d_log_prob, d_h):
            call, n = Call(f"{op}_backward"), math.prod(logits.shape[:-1])
            places = [call(x) for x in (logits, actions, mask, rows)]
            entropy = None if d_h is None else call(h)
            saved = call(jnp.moveaxis(saved, -1, 0), shape=(2, n))
            grads = [call(d_log_prob), call(d_h)]
            d_logits = call.result(logits.shape, logits.dtype, over=places[0] if inplace_backward else None)
            return call.run(*places, number, entropy, saved, *grads, d_logits)[0]

        return [_rows(kernel, *inputs, *constants, None if d_h is None else h, saved, d_log_prob, d_h)]

    return with_gradient((logits,), (actions, action_mask, rows), forward, backward)


def multi_categorical_log_prob(
    logits: Array, actions: Array, nvec: Sequence[int], *, action_mask: Array | None = None, entropy: bool = True
) -> LogProb:
    """Sum over K heads of a categorical's log-probability and entropy: `ppo_fast.multi_categorical_log_prob` for JAX, with its
    arguments, formula and bits. Gradient, `vmap` and errors as `categorical_log_prob`."""
    op, nvec = "multi_categorical_log_prob", [int(n) for n in nvec]
    _lead(op, "logits", logits)

    def forward(inputs, constants, needed):
        def kernel(logits, actions, mask):
            call, lead, dtype = Call(op), logits.shape[:-1], compute_dtype(logits)
            places = [call(x) for x in (logits, actions, mask)]
            out = _results(call, lead, dtype, entropy)
            shape = (3, len(nvec), math.prod(lead))
            saved = call.result((3, len(nvec), *lead), dtype, kernel_shape=shape)
            log_prob, h, saved = _unpacked(call.run(*places, nvec, *out, saved), entropy)
            return log_prob, h, jnp.moveaxis(saved, (0, 1), (-2, -1))

        log_prob, h, saved = _rows(kernel, *inputs, *constants)
        return (log_prob, h), (inputs, constants, saved)

    def backward(residuals, needed, grads):
        inputs, constants, saved = residuals

        def kernel(logits, actions, mask, saved, d_log_prob, d_h):
            call, shape = Call(f"{op}_backward"), (3, len(nvec), math.prod(logits.shape[:-1]))
            places = [call(x) for x in (logits, actions, mask)]
            saved = call(jnp.moveaxis(saved, (-2, -1), (0, 1)), shape=shape)
            grads = [call(d_log_prob), call(d_h)]
            return call.run(*places, nvec, saved, *grads, call.result(logits.shape, logits.dtype))[0]

        return [_rows(kernel, *inputs, *constants, saved, *grads)]

    return with_gradient((logits,), (actions, action_mask), forward, backward)


def bernoulli_log_prob(logits: Array, actions: Array, *, entropy: bool = True) -> LogProb:
    """Log-probability of bits under independent Bernoullis, summed over the last dimension, and their entropy:
    `ppo_fast.bernoulli_log_prob` for JAX, with its arguments, formula and bits. Gradient of the logits; `vmap` is one call."""
    op = "bernoulli_log_prob"
    _lead(op, "logits", logits)

    def forward(inputs, actions, needed):
        def kernel(logits, actions):
            call = Call(op)
            places = [call(logits), call(actions)]
            found = call.run(*places, *_results(call, logits.shape[:-1], compute_dtype(logits), entropy))
            return _unpacked(found, entropy)[:2]

        return _rows(kernel, *inputs, actions), (inputs, actions)

    def backward(residuals, needed, grads):
        (logits,), actions = residuals

        def kernel(logits, actions, d_log_prob, d_h):
            call = Call(f"{op}_backward")
            places = [call(x) for x in (logits, actions, d_log_prob, d_h)]
            return call.run(*places, call.result(logits.shape, logits.dtype))[0]

        return [_rows(kernel, logits, actions, *grads)]

    return with_gradient((logits,), actions, forward, backward)


def beta_log_prob(
    alpha: Array, beta: Array, actions: Array, *, low: float = 0.0, high: float = 1.0, entropy: bool = True
) -> LogProb:
    """Log-density of actions in [low, high] under independent Betas, summed over the last dimension, and their entropy:
    `ppo_fast.beta_log_prob` for JAX, with its arguments, formula and bits. Gradients of alpha and beta; `vmap` is one call."""
    op = "beta_log_prob"
    if not low < high:
        raise ValueError(f"{op}: low must be less than high, got {low!r} and {high!r}")
    bounds = float(low), float(high)
    _lead(op, "alpha", alpha)

    def forward(inputs, actions, needed):
        def kernel(alpha, beta, actions):
            call = Call(op)
            places = [call(x) for x in (alpha, beta, actions)]
            found = call.run(
                *places, *bounds, *_results(call, alpha.shape[:-1], compute_dtype(alpha, beta, actions), entropy)
            )
            return _unpacked(found, entropy)[:2]

        return _rows(kernel, *inputs, actions), (inputs, actions)

    def backward(residuals, needed, grads):
        inputs, actions = residuals

        def kernel(alpha, beta, actions, d_log_prob, d_h):
            call = Call(f"{op}_backward")
            places = [call(x) for x in (alpha, beta, actions)]
            grads = [call(d_log_prob), call(d_h)]
            out = [call.result(x.shape, x.dtype) if n else None for x, n in zip((alpha, beta), needed, strict=True)]
            return call.run(*places, *bounds, *grads, *out)

        return _rows(kernel, *inputs, actions, *grads)

    return with_gradient((alpha, beta), actions, forward, backward)


def normal_log_prob(
    mean: Array, log_std: Array, actions: Array, *, squash: bool = False, entropy: bool = True
) -> LogProb:
    """Log-density of actions under a diagonal normal, summed over its dimensions, and its entropy:
    `ppo_fast.normal_log_prob` for JAX, with its arguments, formula and bits. Gradients of mean and log_std, in their dtypes.
    `vmap` is one call forward; backward one after the other, since the gradient of a shared log_std is a sum over rows."""
    op = "normal_log_prob"
    _lead(op, "mean", mean)

    def kernel(mean, log_std, actions):
        call = Call(op)
        places = [call(x) for x in (mean, log_std, actions)]
        out = _results(call, mean.shape[:-1], compute_dtype(mean, log_std, actions), entropy)
        return _unpacked(call.run(*places, squash, *out), entropy)[:2]

    def rule(size, is_batched, mean, log_std, actions):
        if is_batched[1]:  # as [batch, 1, ..., D], which broadcasts
            log_std = log_std.reshape(size, *[1] * (mean.ndim - is_batched[0] - (log_std.ndim - 1)), *log_std.shape[1:])
        return _rows_of_normal(in_front(mean, is_batched[0], size), log_std, in_front(actions, is_batched[2], size))

    def _rows_of_normal(mean, log_std, actions):
        return batched(kernel, rule, mean, log_std, actions)

    def forward(inputs, actions, needed):
        return _rows_of_normal(*inputs, actions), (inputs, actions)

    def backward(residuals, needed, grads):
        (mean, log_std), actions = residuals
        width = mean.shape[-1]
        shared = log_std.size == width and log_std.ndim > 0 and log_std.shape[-1] == width
        call = Call(f"{op}_backward")
        places = [call(x) for x in (mean, log_std, actions)]
        given = [call(x) for x in grads]
        d_mean = call.result(mean.shape, mean.dtype) if needed[0] else None
        d_log_std = None
        if needed[1] and (log_std.shape == mean.shape or shared):
            d_log_std = call.result(log_std.shape if log_std.shape == mean.shape else (width,), log_std.dtype)
        elif needed[1]:  # neither one for all rows nor one for each: summed afterwards
            d_log_std = call.result(mean.shape, compute_dtype(mean, log_std, actions))
        found = call.run(*places, squash, *given, d_mean, d_log_std)
        return [*found[:-1], summed_to(found[-1], log_std)] if needed[1] else found

    return with_gradient((mean, log_std), actions, forward, backward)


def summed_to(x: Array, like: Array) -> Array:
    """The gradient of what was broadcast to x's shape."""
    if x.size != like.size:
        lead = x.ndim - like.ndim
        once = [d for d in range(x.ndim) if d < lead or (like.shape[d - lead] == 1 and x.shape[d] != 1)]
        x = x.sum(axis=once)
    return x.reshape(like.shape).astype(like.dtype)
