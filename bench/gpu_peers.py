"""Other people's GPU code for the same results, where it imports; a peer that does not says so instead of a number.

Each maker takes a case and gives the formula, or None where it does not compute such a thing, or raises `Left` with the
reason why it is not measured.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import torch

from . import linear_ppo_loss, peers
from .gpu_cases import GAMMA, IN_PLACE, LAM, Formula, GpuCase, Inputs, names_of


class Left(Exception):
    """Why a peer that could compute a case is not measured."""


def eager(case: GpuCase) -> Formula:
    recipe = case.recipe
    return Formula(recipe.eager, recipe.eager_named, recipe.upstream)


def compiled(case: GpuCase) -> Formula:
    if case.compile:
        raise Left(case.compile)
    formula, names = case.recipe.eager, sorted(_names(case))
    torch._dynamo.reset()
    fast = torch.compile(lambda *tensors: formula(dict(zip(names, tensors, strict=True))), dynamic=False)
    call = lambda x: fast(*(x[name] for name in names))  # noqa: E731
    return Formula(call, case.recipe.eager_named, case.recipe.upstream)


def _names(case: GpuCase) -> list[str]:
    """Inputs that the formula takes: not the upstream gradients, nor what the in-place mode keeps aside."""
    return list(case.recipe.reads.keys() - {"d log_prob", "d entropy"})


# --- cross-entropies of a vocabulary: the log-prob with its sign turned, no entropy -------------------------------------


def _cross_entropy(case: GpuCase, module: str, name: str, call: Callable[..., Any]) -> Formula | None:
    if case.op != "categorical_log_prob" or case.shape[1] < 1000:
        return None
    function, why = peers.function(module, name)
    if function is None:
        raise Left(why)

    in_place, named = case.mode == IN_PLACE, names_of("log_prob")
    return Formula(lambda x: -call(function, x["logits"], x["actions"], in_place), named, ("log_prob",),
                   "log-prob only: no entropy, nor its gradient", compared=("log_prob",))  # fmt: skip


def liger(case: GpuCase) -> Formula | None:
    if case.op == "linear_ppo_loss":
        return _head_loss(case, "liger")

    def call(function, logits, actions, in_place):
        return function(logits, actions, reduction="none")

    found = _cross_entropy(case, "liger_kernel.transformers.functional", "liger_cross_entropy", call)
    if found is not None and case.mode != IN_PLACE:
        raise Left("writes its gradient over the logits, even in the forward pass")
    return found


def flash_attn(case: GpuCase) -> Formula | None:
    def call(function, logits, actions, in_place):
        return function(logits, actions, inplace_backward=in_place)[0]

    return _cross_entropy(case, "flash_attn.ops.triton.cross_entropy", "cross_entropy_loss", call)


def quack(case: GpuCase) -> Formula | None:
    def call(function, logits, actions, in_place):
        return function(logits, actions, reduction="none", inplace_backward=in_place)

    return _cross_entropy(case, "quack.cross_entropy", "cross_entropy", call)


def cut_cross_entropy(case: GpuCase) -> Formula | None:
    if case.op != "categorical_log_prob" or case.shape[1] < 1000:
        return None
    _, why = peers.imported("cut_cross_entropy")
    raise Left(why or "takes hidden states and the head's weights, not logits: another floor")


# --- losses of a head ---------------------------------------------------------------------------------------------------


def products(case: GpuCase) -> Formula | None:
    """The floor of a head: its three products, of all tokens at once and nothing else."""
    if case.op != "linear_ppo_loss":
        return None

    def call(x: Inputs) -> Any:
        hidden, weight = x["hidden"].detach(), x["weight"].detach()
        logits = hidden @ weight.t()
        return logits @ weight, logits.t() @ hidden

    return Formula(call, lambda _: {}, note="nothing but matrix products", is_whole=True)


def _head_loss(case: GpuCase, name: str) -> Formula | None:
    if case.op != "linear_ppo_loss":
        return None
    loss, note = linear_ppo_loss.losses_of_peers()[name]
    if loss is None:
        raise Left(note)
    names = ("hidden", "weight", "actions", "old_log_prob", "advantages", "mask")
    return Formula(lambda x: loss(*(x[k] for k in names)), case.recipe.named, note=note)


def trl(case: GpuCase) -> Formula | None:
    return _head_loss(case, "trl")


def verl(case: GpuCase) -> Formula | None:
    return _head_loss(case, "verl")


def torch_chunked(case: GpuCase) -> Formula | None:
    return _head_loss(case, "torch-chunked")


# --- JAX --------------------------------------------------------------------------------------------------------------


def jax(case: GpuCase) -> Formula | None:
    """GAE as JAX trainers write it: lax.scan over time under jit."""
    if case.op != "gae" or "mask" in case.recipe.reads:
        return None
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # or it takes three quarters of the memory
    library, why = peers.imported("jax")
    if library is None:
        raise Left(why)
    if case.torch_dtype != torch.float32 or not any(d.platform == "gpu" for d in library.devices()):
        raise Left("JAX sees no GPU here")
    lax, numpy = library.lax, library.numpy
    by_row = case.recipe.inputs.__name__ == "steps_by_row"
    last: list[Any] = []

    @library.jit
    def estimate(rewards, values, last_values, terminated):
        rewards, values, terminated = (x.T if by_row else x for x in (rewards, values, terminated))

        def step(carry, x):
            running, following = carry
            reward, value, alive = x
            delta = reward + GAMMA * following * alive - value
            running = delta + GAMMA * LAM * alive * running
            return (running, value), running

        alive = 1.0 - terminated.astype(rewards.dtype)
        start = (numpy.zeros_like(last_values), last_values)
        _, advantages = lax.scan(step, start, (rewards, values, alive), reverse=True)
        returns = advantages + values
        return (advantages.T, returns.T) if by_row else (advantages, returns)

    def wrap(x: Inputs) -> Inputs:
        device = next(d for d in library.devices() if d.platform == "gpu")
        return {k: library.device_put(v.cpu().numpy(), device) for k, v in x.items()}

    def call(x: Inputs) -> Any:
        last[:] = estimate(x["rewards"], x["values"], x["last_values"], x["terminated"])
        return tuple(last)

    def finish() -> None:
        library.block_until_ready(last)

    return Formula(call, case.recipe.named, note="wall clock, dispatch included", finish=finish, wrap=wrap)


#: In the order of the tables.
MAKERS: dict[str, Callable[[GpuCase], Formula | None]] = {
    "eager": eager,
    "torch.compile": compiled,
    "products": products,
    "torch, chunked": torch_chunked,
    "TRL": trl,
    "verl": verl,
    "Liger": liger,
    "flash-attn": flash_attn,
    "QuACK": quack,
    "cut-cross-entropy": cut_cross_entropy,
    "JAX": jax,
}
PACKAGES = ("triton", "liger-kernel", "trl", "verl", "flash-attn", "quack-kernels", "cut-cross-entropy", "jax")
