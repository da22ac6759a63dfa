"""A kernel's call inside a JAX program. While the program is traced the same bindings as torch's check the call, from shapes
and dtypes, and write it down as a plan; the plan goes into the program as an attribute, and XLA's handler runs it."""

from __future__ import annotations

import contextlib
import importlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

try:
    import jax
except ModuleNotFoundError as error:
    if error.name != "jax":
        raise
    raise ImportError('ppo_fast.jax needs jax: pip install "ppo_fast[jax]"') from None
if jax.__version_info__ < (0, 6):
    raise ImportError(f"ppo_fast.jax needs jax >= 0.6, got {jax.__version__}: pip install --upgrade jax")

import jax.numpy as jnp
import numpy as np
from jax.custom_batching import custom_vmap

Array = jax.Array


def _load() -> Any:
    """The module of plans, its handlers registered with XLA: on the CPU, and on NVIDIA GPUs where their kernels are built."""
    try:
        plans = importlib.import_module("ppo_fast._C_xla")
        kernels = {"cpu": importlib.import_module("ppo_fast._C")._KERNELS}
    except (ImportError, AttributeError) as error:
        raise ImportError(
            f"ppo_fast.jax: this ppo_fast was built without its part for XLA ({error}); it is built where jax is installed: "
            "pip install --force-reinstall --no-deps --no-cache-dir ppo_fast"
        ) from None
    header = Path(jax.ffi.include_dir()) / "xla" / "ffi" / "api" / "c_api.h"
    found = tuple(int(x) for x in re.findall(r"#define XLA_FFI_API_M\w+ (\d+)", header.read_text()))
    if found < plans.FFI:  # XLA takes handlers of its past, not of its future
        raise ImportError(
            f"ppo_fast.jax: this ppo_fast was built for a newer jaxlib (FFI {plans.FFI}) than {jax.lib.__version__} (FFI "
            f"{found}): pip install --upgrade jax, or build ppo_fast anew"
        )
    with contextlib.suppress(ImportError, AttributeError):  # not built, or by an older release
        kernels["CUDA"] = importlib.import_module("ppo_fast._C_cuda")._KERNELS
    for platform, table in kernels.items():
        handler = plans.handler(platform, table)
        for op in plans.OPS:
            jax.ffi.register_ffi_target(f"ppo_fast.{op}", handler, platform=platform)
    return plans


plans = _load()


def is_array(x: Any) -> bool:
    return isinstance(x, (jax.Array, np.ndarray))


class Call:
    """Gathers what a raw call reads and writes: `call(x)` is x's place in the plan, `call.result(...)` a new array's."""

    def __init__(self, op: str) -> None:
        self.op = op
        self.inputs: list[Array] = []
        self.results: list[jax.ShapeDtypeStruct] = []
        self.aliases: dict[int, int] = {}  # input -> result

    def __call__(self, x: Any, shape: Sequence[int] | None = None, dtype: str | None = None) -> Any:
        """Of an array; `shape` and `dtype` are the kernel's where they are not x's. Anything else the bindings judge."""
        if not is_array(x):
            return x
        x = jnp.asarray(x)
        self.inputs.append(x)
        return plans.Buffer(x.shape if shape is None else shape, dtype or x.dtype.name, len(self.inputs) - 1)

    def result(
        self, shape: Sequence[int], dtype: Any, kernel_shape: Sequence[int] | None = None, over: Any = None
    ) -> Any:
        """After all inputs. `over`: the place of an input whose memory it may take."""
        if over is not None:
            self.aliases[over.index] = len(self.results)
        self.results.append(jax.ShapeDtypeStruct(tuple(shape), dtype))
        at = len(self.inputs) + len(self.results) - 1
        return plans.Buffer(shape if kernel_shape is None else kernel_shape, np.dtype(dtype).name, at)

    def run(self, *raw: Any) -> list[Array]:
        """The results, in the order in which they were asked for. `vmap` runs one call after the other."""
        written: list[bytes] = []
        getattr(plans, self.op)(*raw, written)
        call = jax.ffi.ffi_call(
            f"ppo_fast.{self.op}", self.results, vmap_method="sequential", input_output_aliases=self.aliases
        )
        axes = varying(self.inputs)
        return over(axes, [*call(*over(axes, self.inputs), plan=np.frombuffer(written[0], dtype=np.int64))])


def varying(arrays: Any) -> frozenset:
    """The axes of an enclosing shard_map over which one of them varies."""
    types = map(getattr(jax, "typeof", lambda x: x.aval), jax.tree.leaves(arrays))
    return frozenset().union(*(x.mat.varying if hasattr(x, "mat") else getattr(x, "vma", ()) for x in types))


def over(axes: frozenset, arrays: Any) -> Any:
    """The same, varying over all of `axes`."""

    def one(x):
        missing = tuple(axes - varying(x))
        if not missing:
            return x
        return jax.lax.pcast(x, missing, to="varying") if hasattr(jax.lax, "pcast") else jax.lax.pvary(x, missing)

    return jax.tree.map(one, arrays) if axes else arrays


def compute_dtype(*inputs: Any) -> Any:
    return jnp.float64 if any(getattr(x, "dtype", None) == jnp.float64 for x in inputs) else jnp.float32


@jax.tree_util.register_static
class _Needed(tuple):
    """Which gradients are wanted: known while tracing, no array."""


def with_gradient(inputs: tuple, constants: Any, forward: Callable, backward: Callable) -> Any:
    """forward(inputs, constants, needed) -> (outputs, residuals), with one bool for each input; backward(residuals, needed,
    cotangents of the outputs, None where zero) -> the gradients of those needed. `constants` get none."""

    @jax.custom_vjp
    def function(inputs, constants):
        return forward(inputs, constants, (False,) * len(inputs))[0]

    def fwd(inputs, constants):
        needed = tuple(x is not None and x.perturbed for x in inputs)
        inputs, constants = jax.tree.map(lambda x: x.value, (inputs, constants))
        outputs, residuals = forward(inputs, constants, needed)
        return outputs, (residuals, _Needed(needed))

    def bwd(kept, cotangents):
        residuals, needed = kept
        is_zero = lambda x: isinstance(x, jax.custom_derivatives.SymbolicZero)  # noqa: E731
        known = jax.tree.map(lambda x: None if is_zero(x) else x, cotangents, is_leaf=is_zero)
        nothing = not jax.tree.leaves(known)
        found = iter(() if nothing else backward(residuals, needed, known))
        return tuple(next(found) if n and not nothing else None for n in needed), None

    function.defvjp(fwd, bwd, symbolic_zeros=True)
    # all alike under shard_map, so that a gradient is of its input's kind
    inputs, constants = over(varying((inputs, constants)), (inputs, constants))
    return function(inputs, constants)


def batched(function: Callable, rule: Callable, *arrays: Any) -> Any:
    """function(*arrays), of which vmap makes rule(size, is_batched, *arrays): all results batched, in front. Arrays may be
    None."""
    there = [i for i, x in enumerate(arrays) if x is not None]

    def full(some):
        every = [None] * len(arrays)
        for i, x in zip(there, some, strict=True):
            every[i] = x
        return every

    @custom_vmap
    def call(*some):
        return function(*full(some))

    @call.def_vmap
    def _(size, in_batched, *some):
        out = rule(size, [bool(x) for x in full(in_batched)], *full(some))
        return out, jax.tree.map(lambda _: True, out)

    return call(*[arrays[i] for i in there])


def in_front(x: Any, is_batched: bool, size: int) -> Any:
    """With the batch as its first dimension."""
    return x if x is None or is_batched else jnp.broadcast_to(x, (size, *x.shape))
