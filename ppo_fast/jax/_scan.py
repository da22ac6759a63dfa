"""gae, vtrace and discounted_returns: what they share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._call import Array, Call, batched, compute_dtype, in_front, is_array

Final = Array | tuple[Array, Array] | None


class Scan:
    """One call: `streams` are grids of the shape of the rewards, `columns` numbers or arrays without time.

    raw(call, streams, columns, time_dim, double, output) runs it for grids of [T], [T, N] or [N, T].
    """

    def __init__(self, op: str, n_results: int, raw: Callable[..., list[Array]]) -> None:
        self.op, self.n_results, self.raw = op, n_results, raw

    def __call__(
        self,
        streams: Mapping[str, Any],
        columns: Mapping[str, Any],
        final_values: Final,
        time_dim: int,
        packed: bool = False,
    ) -> list[Array]:
        rewards = streams["rewards"]
        if not is_array(rewards):
            raise TypeError(
                f"{self.op}: rewards must be an array, got {'None' if rewards is None else type(rewards).__name__}"
            )
        streams = {**streams, "final_values": self._final_grid(final_values, rewards)}
        columns = {name: float(x) if isinstance(x, np.generic) else x for name, x in columns.items()}
        arrays = {name: x for name, x in {**streams, **columns}.items() if is_array(x)}
        rest = {name: x for name, x in {**streams, **columns}.items() if not is_array(x)}
        ndim = rewards.ndim
        if ndim and not -ndim <= time_dim < ndim:
            raise ValueError(f"{self.op}: time_dim must be in [{-ndim}, {ndim}), got {time_dim}")
        self._time = time_dim % ndim if ndim else 0
        arrays = {name: jax.lax.stop_gradient(jnp.asarray(x)) for name, x in arrays.items()}
        self._check_grids(arrays, columns)
        return self._vmapped(arrays, rest, set(columns), self._time, packed)

    def _vmapped(self, arrays, rest, columns, time, packed):
        """vmap of grids is one call with more columns: the bits of a column do not depend on the others."""
        names = list(arrays)

        def function(*xs):
            return self._run(dict(zip(names, xs, strict=True)), rest, columns, time)

        def rule(size, is_batched, *xs):
            if packed:  # one program of packed sequences after the other
                moving = [x for x, b in zip(xs, is_batched, strict=True) if b]

                def one(some):
                    some = iter(some)
                    return function(*(next(some) if b else x for x, b in zip(xs, is_batched, strict=True)))

                return jax.lax.map(one, moving)
            shape = xs[names.index("rewards")].shape[is_batched[names.index("rewards")] :]
            lead = shape[:time] + shape[time + 1 :]
            wide = {}
            for name, x, b in zip(names, xs, is_batched, strict=True):
                if name in columns and x.ndim == b and (b or name == "last_values"):  # one number for all columns
                    x = (
                        jnp.broadcast_to(x.reshape(-1, *[1] * len(lead)), (x.size, *lead))
                        if b
                        else jnp.broadcast_to(x, lead)
                    )
                elif name in columns and x.ndim == 0:
                    wide[name] = x
                    continue
                elif name in columns:
                    x = x.reshape((size, *lead) if b else lead)
                wide[name] = in_front(x, b, size)
            return self._vmapped(wide, rest, columns, time + 1, packed)

        return batched(function, rule, *arrays.values())

    def _run(self, arrays: dict[str, Any], rest: dict[str, Any], columns: set[str], time: int) -> list[Array]:
        """As [T] or [T, N], or as [N, T] where nothing has to be moved for it."""
        shape = arrays["rewards"].shape
        outer, inner = math.prod(shape[:time]), math.prod(shape[time + 1 :])
        time_dim, grid, back = time, lambda x: x, lambda y: y
        if len(shape) > 2:
            arrays = {k: x.reshape(-1) if k in columns and x.ndim else x for k, x in arrays.items()}
            if inner == 1 or outer == 1:
                time_dim, flat = (1, (outer, shape[time])) if inner == 1 else (0, (shape[time], inner))
                grid, back = lambda x: x.reshape(flat), lambda y: y.reshape(shape)
            else:
                time_dim, first = 0, (shape[time], *shape[:time], *shape[time + 1 :])
                grid = lambda x: jnp.moveaxis(x, time, 0).reshape(shape[time], outer * inner)  # noqa: E731
                back = lambda y: jnp.moveaxis(y.reshape(first), 0, time)  # noqa: E731
        arrays = {k: x if k in columns or k == "cu_seqlens" else grid(x) for k, x in arrays.items()}
        dtype = compute_dtype(*(arrays.get(k) for k in ("rewards", "values", "log_rhos")))
        call = Call(self.op)
        taken = {k: self._take(call, k, x) for k, x in arrays.items()}
        places = {**rest, **taken}
        over = [places.pop(f"out[{i}]", None) for i in range(self.n_results)]
        outputs = [call.result(arrays["rewards"].shape, dtype, over=x) for x in over]
        found = self.raw(call, places, time_dim, dtype == jnp.float64, outputs)
        return [*map(back, found)]

    def _take(self, call: Call, name: str, x: Array) -> Any:
        if name != "cu_seqlens" or x.dtype not in (jnp.int32, jnp.int64) or x.ndim != 1:
            return call(x)
        if x.dtype == jnp.int32:  # the kernels' int64: its two halves
            return call(jnp.stack([x, jnp.zeros_like(x)], -1), shape=x.shape, dtype="int64")
        return call(x)

    def _check_grids(self, arrays: Mapping[str, Array], columns: Mapping[str, Any]) -> None:
        """What the bindings cannot see of more than two dimensions."""
        shape = arrays["rewards"].shape
        if len(shape) < 3:
            return
        without = shape[: self._time] + shape[self._time + 1 :]
        for name, x in arrays.items():
            if name in columns and x.ndim and x.shape != without:
                wanted = f"the shape of rewards without time = {list(without)}"
                raise ValueError(f"{self.op}: {name} must be {wanted}, got {list(x.shape)}")
            if name not in columns and x.shape != shape:
                raise ValueError(f"{self.op}: {name} must be the shape of rewards = {list(shape)}, got {list(x.shape)}")

    def _final_grid(self, final_values: Final, rewards: Array) -> Array | None:
        """Sparse ones as a grid, NaN where there is none: nobody can look whether one is missing."""
        if not isinstance(final_values, tuple):
            return final_values
        if len(final_values) != 2:
            what = f"must be an array or a pair (flat_index, value), got a tuple of {len(final_values)}"
            raise ValueError(f"{self.op}: final_values {what}")
        index, value = final_values
        for i, x in enumerate(final_values):
            if not is_array(x):
                raise TypeError(f"{self.op}: final_values[{i}] must be an array, got {type(x).__name__}")
        if not jnp.issubdtype(index.dtype, jnp.integer):
            raise TypeError(f"{self.op}: final_values[0] must be an integer type, got {index.dtype.name}")
        if index.ndim != 1 or value.shape != index.shape:
            raise ValueError(
                f"{self.op}: final_values must be two of [K], got {list(index.shape)} and {list(value.shape)}"
            )
        grid = jnp.full(rewards.size, jnp.nan, value.dtype).at[index].set(value, mode="drop")
        return grid.reshape(rewards.shape)


def gae(
    rewards: Array,
    values: Array,
    last_values: Array | None = None,
    *,
    terminated: Array | None = None,
    truncated: Array | None = None,
    final_values: Final = None,
    mask: Array | None = None,
    mask_mode: str = "carry",
    cu_seqlens: Array | None = None,
    gamma: float | Array = 0.99,
    lam: float | Array = 0.95,
    time_dim: int = 0,
    out: tuple[Array, Array] | None = None,
) -> tuple[Array, Array]:
    """Advantages and returns: `ppo_fast.gae` for JAX, with its arguments, formula and bits.

    out: arrays of the results' shape and dtype whose memory the results may take, e.g. those of the last update, donated
        to the program (`jit(..., donate_argnames="out")`): it then maps no fresh pages. What they hold is not read.

    Gradient: none; the inputs are constants. `vmap` is one call over all columns, but for packed inputs.

    Errors, while tracing: TypeError for a dtype or a missing array, ValueError for a shape or a rate that is a number. Rates
    in arrays are not looked at; a truncated step that a sparse `final_values` misses gives NaN. cu_seqlens that do not go
    from 0 to M in order are an error of the running program on the CPU.
    """

    def raw(call, x, time_dim, double, out):
        return call.run(
            x["rewards"], x["values"], x["last_values"], x["terminated"], x["truncated"], x["final_values"], x["mask"],
            mask_mode, x["cu_seqlens"], x["gamma"], x["lam"], time_dim, double, *out, None,
        )  # fmt: skip

    streams = {"rewards": rewards, "values": values, "terminated": terminated, "truncated": truncated, "mask": mask}
    if out is not None:
        streams |= _checked_out(out, rewards, values)
    columns = {"last_values": last_values, "gamma": gamma, "lam": lam}
    if cu_seqlens is not None:
        columns["cu_seqlens"] = cu_seqlens
    else:
        streams["cu_seqlens"] = None
    advantages, returns = Scan("gae", 2, raw)(streams, columns, final_values, time_dim, cu_seqlens is not None)
    return advantages, returns


def _checked_out(out: Any, rewards: Any, values: Any) -> dict[str, Array]:
    if not (isinstance(out, tuple) and len(out) == 2 and all(map(is_array, out))):
        raise TypeError("gae: out must be a tuple of two arrays, (advantages, returns)")
    dtype = np.dtype(compute_dtype(rewards, values))
    for i, x in enumerate(out):
        if x.dtype != dtype:
            raise TypeError(f"gae: out[{i}] must be {dtype.name}, got {x.dtype.name}")
        if x.shape != np.shape(rewards):
            raise ValueError(
                f"gae: out[{i}] must be the shape of rewards = {list(np.shape(rewards))}, got {list(x.shape)}"
            )
    return {f"out[{i}]": x for i, x in enumerate(out)}


def vtrace(
    log_rhos: Array,
    rewards: Array,
    values: Array,
    last_values: Array | None = None,
    *,
    terminated: Array | None = None,
    truncated: Array | None = None,
    final_values: Final = None,
    mask: Array | None = None,
    gamma: float | Array = 0.99,
    lam: float | Array = 1.0,
    rho_clip: float = 1.0,
    c_clip: float = 1.0,
    time_dim: int = 0,
) -> tuple[Array, Array]:
    """V-trace targets and advantages: `ppo_fast.vtrace` for JAX, with its arguments, formula and bits. No gradient; `vmap`
    and errors as `gae`."""

    def raw(call, x, time_dim, double, out):
        return call.run(
            x["log_rhos"], x["rewards"], x["values"], x["last_values"], x["terminated"], x["truncated"], x["final_values"],
            x["mask"], x["gamma"], x["lam"], rho_clip, c_clip, time_dim, double, *out,
        )  # fmt: skip

    streams = {
        "log_rhos": log_rhos, "rewards": rewards, "values": values, "terminated": terminated, "truncated": truncated,
        "mask": mask,
    }  # fmt: skip
    columns = {"last_values": last_values, "gamma": gamma, "lam": lam}
    targets, advantages = Scan("vtrace", 2, raw)(streams, columns, final_values, time_dim)
    return targets, advantages


def discounted_returns(
    rewards: Array,
    last_values: Array | None = None,
    *,
    terminated: Array | None = None,
    truncated: Array | None = None,
    final_values: Final = None,
    mask: Array | None = None,
    gamma: float | Array = 0.99,
    time_dim: int = 0,
) -> Array:
    """Discounted sum of the rewards to come: `ppo_fast.discounted_returns` for JAX, with its arguments, formula and bits. No
    gradient; `vmap` and errors as `gae`."""

    def raw(call, x, time_dim, double, out):
        return call.run(
            x["rewards"], x["last_values"], x["terminated"], x["truncated"], x["final_values"], x["mask"], x["gamma"],
            time_dim, double, *out,
        )  # fmt: skip

    streams = {"rewards": rewards, "terminated": terminated, "truncated": truncated, "mask": mask}
    columns = {"last_values": last_values, "gamma": gamma}
    return Scan("discounted_returns", 1, raw)(streams, columns, final_values, time_dim)[0]
