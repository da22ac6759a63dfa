"""Whitening."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from ._call import Array, Call, compute_dtype, is_array


def whiten(
    x: Array,
    *,
    mask: Array | None = None,
    ddof: int = 1,
    eps: float = 1e-8,
    shift_mean: bool = True,
    eps_in_variance: bool = False,
) -> Array:
    """y = (x - mean) / (std + eps) over the elements that `mask` keeps: `ppo_fast.whiten` for JAX, with its arguments, formula
    and bits. No gradient. `vmap` whitens one after the other."""
    if ddof not in (0, 1):
        raise ValueError(f"whiten: ddof must be 0 or 1, got {ddof!r}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"whiten: eps must be finite and >= 0, got {eps!r}")
    call = Call("whiten")
    places = [call(jax.lax.stop_gradient(jnp.asarray(a)) if is_array(a) else a) for a in (x, mask)]
    shape, dtype = (x.shape, compute_dtype(x)) if is_array(x) else ((), jnp.float32)
    return call.run(*places, call.result(shape, dtype), None, False, ddof, float(eps), shift_mean, eps_in_variance)[0]
