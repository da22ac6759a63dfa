"""What is measured on a GPU: shapes with their floors in bytes, the inputs, and the formulas of ours and of the peers.

Formulas are those of the CPU suite (bench/<op>.py). A floor counts every input read once and every output and gradient
written once; inputs that a later pass must read again count again; flags are bool, labels int64. Scratch does not count.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

import ppo_fast as pf

from . import bernoulli_log_prob as bernoulli
from . import beta_log_prob as beta
from . import categorical_log_prob as categorical
from . import categorical_ppo_loss as categorical_loss
from . import discounted_returns, vtrace
from . import gae as gae_bench
from . import linear_ppo_loss as linear_loss
from . import multi_categorical_log_prob as multi
from . import normal_log_prob as normal
from . import normal_ppo_loss as normal_loss
from . import ppo_loss as loss_bench
from . import whiten as whiten_bench
from .harness import SHORT, grid

Inputs = dict[str, Tensor]
Outputs = dict[str, Tensor]
FORWARD, BACKWARD, IN_PLACE = "forward", "forward + backward", "forward + in-place backward"
SHORT_MODE = {FORWARD: "fwd", BACKWARD: "fwd + bwd", IN_PLACE: "fwd + in-place bwd"}


@dataclass(frozen=True)
class Target:
    """A bound on one number of our row. `kind`: "bandwidth" (share of the device copy bandwidth, at least), "device",
    "call" (seconds, at most), "launches", "syncs" (at most), "faster" (times, at least, than `peer`)."""

    kind: str
    bound: float
    peer: str = ""

    def __str__(self) -> str:
        if self.kind == "bandwidth":
            return f"≥ {self.bound:.0%} of the device copy bandwidth"
        if self.kind == "faster":
            return f"≥ {self.bound:g}× {self.peer}"
        if self.kind in ("device", "call"):
            where = "on the device" if self.kind == "device" else "a full call from Python"
            return f"≤ {self.bound * 1e6:g} µs {where}"
        return f"≤ {self.bound:g} {self.kind}"

    def met(self, value: float) -> bool:
        return value >= self.bound if self.kind in ("bandwidth", "faster") else value <= self.bound


@dataclass(frozen=True)
class Recipe:
    """One op: its inputs, and how often the floor reads each; which get gradients; which outputs have a given one."""

    op: str
    inputs: Callable[[tuple[int, ...], torch.dtype], Inputs]
    ours: Callable[[ModuleType, Inputs], Any]  # of ppo_fast, or of its reference
    eager: Callable[[Inputs], Any]
    named: Callable[[Any], Outputs]  # what `ours` returned
    eager_named: Callable[[Any], Outputs]
    floor: Callable[[tuple[int, ...], torch.dtype], int]
    reads: dict[str, int]
    leaves: tuple[str, ...] = ()
    upstream: tuple[str, ...] = ()  # outputs whose gradient is the input "d <output>"; none: "loss" gets 1
    scales: dict[str, float] = field(default_factory=dict)
    rows: tuple[str, ...] = ()  # inputs and outputs with a row per row, of which a sample can be checked
    truth: Callable[[Inputs], Outputs] | None = None  # where float64 of everything at once would not fit


@dataclass(frozen=True)
class GpuCase:
    shape: tuple[int, ...]
    tiny: tuple[int, ...]  # the same case small enough for tests
    dtype: str
    mode: str
    recipe: Recipe
    targets: tuple[Target, ...] = ()
    remark: str = ""
    compile: str = ""  # why torch.compile is left out, or "" where it takes part
    small: bool = False  # the wall time of a call matters

    @property
    def op(self) -> str:
        return self.recipe.op

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    @property
    def bytes(self) -> int:
        return self.recipe.floor(self.shape, self.torch_dtype)

    @property
    def name(self) -> str:
        remark = f" {self.remark}" if self.remark else ""
        return f"{self.op} {list(self.shape)} {SHORT[self.dtype]} {SHORT_MODE[self.mode]}{remark}"

    def inputs(self, device: torch.device) -> Inputs:
        """Fresh random ones; leaves where the mode is to differentiate them."""
        with torch.device(device):
            x = self.recipe.inputs(self.shape, self.torch_dtype)
            if self.mode == IN_PLACE:
                x["pristine"], x["anchor"] = x["logits"].clone(), torch.zeros((), requires_grad=True)
        if self.mode == BACKWARD:
            for name in self.recipe.leaves:
                x[name] = x[name].detach().clone().requires_grad_()
        return x


# --- one call ---------------------------------------------------------------------------------------------------------


class FromNetwork(torch.autograd.Function):
    """Logits as a network's head hands them on: not a leaf, and whoever has them may overwrite them."""

    @staticmethod
    def forward(ctx, anchor, logits, seen):
        ctx.seen = seen
        return logits.detach()

    @staticmethod
    def backward(ctx, d_logits):
        ctx.seen["d logits"] = d_logits
        return None, None, None


@dataclass(frozen=True)
class Formula:
    """One way to compute a case: `call` is timed, `named` says what it returned. `upstream`: outputs with a given gradient."""

    call: Callable[[Inputs], Any]
    named: Callable[[Any], Outputs]
    upstream: tuple[str, ...] = ()
    note: str = ""
    compared: tuple[str, ...] = ()  # outputs that are compared with the truth; all by default
    finish: Callable[[], None] | None = None  # waits, where that is not torch's own way of waiting
    wrap: Callable[[Inputs], Inputs] | None = None  # the inputs as it has them, once, before anything is timed
    is_whole: bool = False  # the call is all there is to time: nothing is differentiated after it


def ours(case: GpuCase, lib: ModuleType = pf) -> Formula:
    recipe = case.recipe
    return Formula(lambda x: recipe.ours(lib, x), recipe.named, recipe.upstream)


def caller(case: GpuCase, formula: Formula, x: Inputs) -> Callable[[], Any]:
    """A call without arguments, on these inputs, for the clock. Forward only: without anything around it."""
    call, leaves = formula.call, [x[name] for name in case.recipe.leaves]
    if case.mode == FORWARD or formula.is_whole:
        return lambda: call(x)
    given = [x[f"d {name}"] for name in formula.upstream]

    def differentiated():
        seen: Outputs = {}
        if case.mode == IN_PLACE:
            out = call({**x, "logits": FromNetwork.apply(x["anchor"], x["logits"], seen)})
        else:
            for leaf in leaves:
                leaf.grad = None
            out = call(x)
        named = formula.named(out)
        if given:
            torch.autograd.backward([named[name] for name in formula.upstream], given)
        else:
            torch.autograd.backward(named["loss"])
        return out, seen

    return differentiated


def results(case: GpuCase, formula: Formula, x: Inputs) -> Outputs:
    """What one call returns and, where the case differentiates, the gradients as "d <input>"."""
    if case.mode == FORWARD:
        with torch.no_grad():
            return formula.named(formula.call(x))
    if formula.is_whole:
        return formula.named(formula.call(x))
    out, seen = caller(case, formula, x)()
    if case.mode == BACKWARD:
        seen = {f"d {name}": g for name in case.recipe.leaves if (g := x[name].grad) is not None}
    return {**{k: v.detach() for k, v in formula.named(out).items()}, **seen}


def restore(x: Inputs) -> None:
    """Puts back the logits that an in-place backward has overwritten."""
    x["logits"].copy_(x["pristine"])


def sample_of(case: GpuCase) -> Tensor | None:
    """Rows that are checked where float64 of all of them would not fit: spread evenly, the last one included."""
    if not case.recipe.rows or case.bytes < 1e9:
        return None
    return torch.linspace(0, case.shape[0] - 1, 256).long()


def sampled(case: GpuCase, x: dict[str, Tensor], rows: Tensor | None) -> dict[str, Tensor]:
    if rows is None:
        return x
    return {k: v[rows.to(v.device)] if k in case.recipe.rows else v for k, v in x.items()}


def truth(case: GpuCase, x: Inputs, rows: Tensor | None = None) -> Outputs:
    """By the reference in float64, on the inputs' device."""
    source = {**x, "logits": x["pristine"]} if case.mode == IN_PLACE else x
    source = {k: v for k, v in sampled(case, source, rows).items() if k not in ("pristine", "anchor")}
    if case.recipe.truth is not None:
        return case.recipe.truth(source)
    wide = {k: v.detach().double() if v.is_floating_point() else v for k, v in source.items()}
    plain = case if case.mode == FORWARD else dataclasses.replace(case, mode=BACKWARD)
    if plain.mode == BACKWARD:
        for name in case.recipe.leaves:
            wide[name].requires_grad_()
    return results(plain, ours(plain, pf.reference), wide)


# --- recipes: advantages ----------------------------------------------------------------------------------------------

GAMMA, LAM = gae_bench.GAMMA, gae_bench.LAM


def numel(shape: tuple[int, ...]) -> int:
    return math.prod(shape)


def steps(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Time-major, an episode's end in a hundred steps."""
    x = {"rewards": torch.randn(shape), "values": torch.randn(shape), "last_values": torch.randn(shape[1])}
    return {**{k: v.to(dtype) for k, v in x.items()}, "terminated": torch.rand(shape) < 0.01}


def steps_by_row(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x = steps((shape[1], shape[0]), dtype)
    return {k: v.t().contiguous() if v.ndim == 2 else v for k, v in x.items()}


def masked_rows(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """Sequences of a language model: prompts at the start, padding at the end, and holes where a tool spoke."""
    rows, length = shape
    at = torch.arange(length)
    begin, end = torch.randint(0, length // 4 + 1, (rows, 1)), torch.randint(length // 2, length + 1, (rows, 1))
    mask = (at >= begin) & (at < end) & (torch.rand(shape) < 0.9)
    return {"rewards": torch.randn(shape).to(dtype), "values": torch.randn(shape).to(dtype), "mask": mask}


def gae(lib: ModuleType, x: Inputs) -> Any:
    return lib.gae(x["rewards"], x["values"], x["last_values"], terminated=x["terminated"], gamma=GAMMA, lam=LAM)


def gae_by_row(lib: ModuleType, x: Inputs) -> Any:
    return lib.gae(x["rewards"], x["values"], x["last_values"], terminated=x["terminated"], gamma=GAMMA, lam=LAM,
                   time_dim=1)  # fmt: skip


def gae_loop(x: Inputs) -> Any:
    return gae_bench.unrolled_loop(x["rewards"], x["values"], x["last_values"], x["terminated"])


def gae_loop_by_row(x: Inputs) -> Any:
    return [y.t() for y in gae_loop({k: v.t() if v.ndim == 2 else v for k, v in x.items()})]


def masked_gae(lib: ModuleType, x: Inputs) -> Any:
    return lib.gae(x["rewards"], x["values"], mask=x["mask"], gamma=1.0, lam=LAM, time_dim=1)


def masked_loop(x: Inputs) -> Any:
    """As trainers of language models write it: a masked step hands on what comes after it."""
    rewards, values, mask = x["rewards"], x["values"], x["mask"].to(x["values"].dtype)
    running, following, out = torch.zeros_like(values[:, 0]), torch.zeros_like(values[:, 0]), []
    for t in range(rewards.shape[1] - 1, -1, -1):
        keep = mask[:, t]
        new = rewards[:, t] + following - values[:, t] + LAM * running
        running = new * keep + running * (1 - keep)
        following = values[:, t] * keep + following * (1 - keep)
        out.append(running)
    advantages = torch.stack(out[::-1], 1) * mask
    return advantages, (advantages + values) * mask


def vtrace_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return {"log_rhos": (0.3 * torch.randn(shape)).to(dtype), **steps(shape, dtype)}


def vtrace_of(lib: ModuleType, x: Inputs) -> Any:
    return lib.vtrace(x["log_rhos"], x["rewards"], x["values"], x["last_values"], terminated=x["terminated"],
                      gamma=vtrace.GAMMA)  # fmt: skip


def vtrace_loop(x: Inputs) -> Any:
    alive = (~x["terminated"]).to(x["values"].dtype)
    return vtrace.eager_loop(x["log_rhos"], x["rewards"], x["values"], x["last_values"], alive)


def returns_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return {k: v for k, v in steps(shape, dtype).items() if k != "values"}


def returns_of(lib: ModuleType, x: Inputs) -> Any:
    gamma = discounted_returns.GAMMA
    return lib.discounted_returns(x["rewards"], x["last_values"], terminated=x["terminated"], gamma=gamma)


def returns_loop(x: Inputs) -> Any:
    alive = (~x["terminated"]).to(x["rewards"].dtype)
    return discounted_returns.eager_loop(x["rewards"], x["last_values"], alive)


def names_of(*names: str) -> Callable[[Any], Outputs]:
    """For a function that returns these in a row; of one name, the result itself."""
    if len(names) == 1:
        return lambda out: {names[0]: out}
    return lambda out: dict(zip(names, out, strict=True))


def _scan_recipe(op, inputs, ours, eager, names, a_step, columns, *streams: str) -> Recipe:
    """`a_step`: bytes of a step; `columns`: which dimension has a last value each, None without."""
    named = names_of(*names)

    def floor(shape, dtype):
        return a_step * numel(shape) + (0 if columns is None else 4 * shape[columns])

    return Recipe(op, inputs, ours, eager, named, named, floor, dict.fromkeys(streams, 1))


_ADVANTAGES, _ENDS = ("advantages", "returns"), ("rewards", "last_values", "terminated")
GAE = _scan_recipe("gae", steps, gae, gae_loop, _ADVANTAGES, 17, 1, *_ENDS, "values")
GAE_BY_ROW = _scan_recipe("gae", steps_by_row, gae_by_row, gae_loop_by_row, _ADVANTAGES, 17, 0, *_ENDS, "values")
GAE_MASKED = _scan_recipe(
    "gae", masked_rows, masked_gae, masked_loop, _ADVANTAGES, 17, None, "rewards", "values", "mask"
)
VTRACE = _scan_recipe(
    "vtrace", vtrace_inputs, vtrace_of, vtrace_loop, ("targets", "advantages"), 21, 1, *_ENDS, "values", "log_rhos"
)
RETURNS = _scan_recipe("discounted_returns", returns_inputs, returns_of, returns_loop, ("returns",), 9, 1, *_ENDS)
WHITEN = Recipe(
    "whiten",
    lambda shape, dtype: {"x": (3.0 * torch.randn(shape) + 1.0).to(dtype)},
    lambda lib, x: lib.whiten(x["x"]),
    lambda x: whiten_bench.eager(x["x"]),
    names_of("y"),
    names_of("y"),
    lambda shape, dtype: 12 * numel(shape),
    {"x": 2},
)


# --- recipes: log-probabilities ---------------------------------------------------------------------------------------


def upstream(rows: int) -> Inputs:
    return {f"d {k}": g for k, g in categorical.upstream(rows).items()}


def categorical_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, n = shape
    logits = torch.empty(shape, dtype=dtype)
    for part in logits.split(1024):  # a whole vocabulary's in float32 would be twice the tensor
        part.normal_(0.0, 2.0)
    return {"logits": logits, "actions": torch.randint(n, (rows,)), **upstream(rows)}


def _categorical(backward: bool, in_place: bool = False) -> Recipe:
    def ours(lib: ModuleType, x: Inputs) -> Any:
        return lib.categorical_log_prob(x["logits"], x["actions"], inplace_backward=in_place)

    def eager(x: Inputs) -> Any:
        formula = categorical.vocabulary_formula if x["logits"].shape[1] > 1000 else categorical.policy_formula
        return formula(x["logits"], x["actions"])

    def floor(shape: tuple[int, ...], dtype: torch.dtype) -> int:
        size = dtype.itemsize * numel(shape)
        return 3 * size + 32 * shape[0] if backward else size + 16 * shape[0]

    both = {"d log_prob": 1, "d entropy": 1} if backward else {}
    times = 2 if backward else 1
    rows = ("logits", "actions", "log_prob", "entropy", "d log_prob", "d entropy", "d logits")
    return Recipe("categorical_log_prob", categorical_inputs, ours, eager, categorical.named, categorical.named, floor,
                  {"logits": times, "actions": times, **both}, ("logits",), ("log_prob", "entropy"), rows=rows)  # fmt: skip


def _log_prob(op, inputs, ours, eager, a_number, a_row, shared, leaves, reads) -> Recipe:
    """Forward and backward of a log-prob op over [rows, D]: bytes a number, a row, and of what all rows share."""

    def with_upstream(shape, dtype):
        return {**inputs(shape, dtype), **upstream(shape[0])}

    def floor(shape, dtype):
        return a_number * numel(shape) + (a_row + 16) * shape[0] + shared * shape[1]

    return Recipe(op, with_upstream, ours, eager, categorical.named, categorical.named, floor,
                  {**reads, "d log_prob": 1, "d entropy": 1}, leaves, ("log_prob", "entropy"))  # fmt: skip


def heads(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    actions = torch.stack([torch.randint(k, (shape[0],)) for k in multi.NVEC], dim=1)
    return {"logits": 2.0 * torch.randn(shape, dtype=dtype), "actions": actions}


def switches(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    return {"logits": 2.0 * torch.randn(shape, dtype=dtype), "actions": torch.randint(2, shape).to(dtype)}


def gaussians(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    mean, log_std = torch.randn(shape, dtype=dtype), 0.2 * torch.randn(shape[1], dtype=dtype) - 0.5
    return {"mean": mean, "log_std": log_std, "actions": mean + log_std.exp() * torch.randn(shape, dtype=dtype)}


def betas(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    def positive():
        return torch.nn.functional.softplus(torch.randn(shape, dtype=dtype)) + 1.0

    return {"alpha": positive(), "beta": positive(), "actions": 0.01 + 0.98 * torch.rand(shape, dtype=dtype)}


MULTI = _log_prob(
    "multi_categorical_log_prob", heads,
    lambda lib, x: lib.multi_categorical_log_prob(x["logits"], x["actions"], multi.NVEC),
    lambda x: multi.eager(x["logits"], x["actions"]),
    12, 16 * len(multi.NVEC), 0, ("logits",), {"logits": 2, "actions": 2},
)  # fmt: skip
BERNOULLI = _log_prob(
    "bernoulli_log_prob", switches, lambda lib, x: lib.bernoulli_log_prob(x["logits"], x["actions"]),
    lambda x: bernoulli.eager(x["logits"], x["actions"]), 20, 0, 0, ("logits",), {"logits": 2, "actions": 2},
)  # fmt: skip
NORMAL = _log_prob(
    "normal_log_prob", gaussians, lambda lib, x: lib.normal_log_prob(x["mean"], x["log_std"], x["actions"]),
    lambda x: normal.eager(x["mean"], x["log_std"], x["actions"]), 20, 0, 12, ("mean", "log_std"),
    {"mean": 2, "actions": 2, "log_std": 2},
)  # fmt: skip
BETA = _log_prob(
    "beta_log_prob", betas, lambda lib, x: lib.beta_log_prob(x["alpha"], x["beta"], x["actions"]),
    lambda x: beta.eager(x["alpha"], x["beta"], x["actions"]), 32, 0, 0, ("alpha", "beta"),
    {"alpha": 2, "beta": 2, "actions": 2},
)  # fmt: skip


# --- recipes: losses --------------------------------------------------------------------------------------------------


def named_loss(out: Any) -> Outputs:
    return {"loss": out.loss, "stats": out.stats.vector}


def rollout(log_prob: Tensor) -> Inputs:
    names = "old_log_prob", "advantages", "old_values", "returns"
    x = dict(zip(names, categorical_loss.rollout_of(log_prob), strict=True))
    return {**x, "values": x["old_values"] + grid(0.2 * torch.randn(len(log_prob)))}


def loss_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    """On a grid, so that no clip or tie is met to within rounding."""
    old_log_prob, old_values = grid(-torch.rand(shape)), grid(torch.randn(shape))
    return {
        "log_prob": old_log_prob + grid(0.15 * torch.randn(shape)), "values": old_values + grid(0.2 * torch.randn(shape)),
        "entropy": torch.rand(shape), "old_log_prob": old_log_prob, "advantages": torch.randn(shape),
        "old_values": old_values, "returns": old_values + grid(0.5 * torch.randn(shape)),
    }  # fmt: skip


def loss_of(lib: ModuleType, x: Inputs) -> Any:
    return lib.ppo_loss(x["log_prob"], x["old_log_prob"], x["advantages"], loss_bench.CONFIG, values=x["values"],
                        old_values=x["old_values"], returns=x["returns"], entropy=x["entropy"])  # fmt: skip


def _stored(x: Inputs) -> tuple[Tensor, ...]:
    return tuple(x[k] for k in ("old_log_prob", "advantages", "old_values", "returns"))


def eager_loss(x: Inputs) -> Any:
    return loss_bench.eager_loss(x["log_prob"], x["values"], x["entropy"], *_stored(x))


def categorical_loss_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    rows, n = shape
    x = {"logits": torch.randn(shape, dtype=dtype), "actions": torch.randint(n, (rows,))}
    return {**x, **rollout(pf.reference.categorical_log_prob(x["logits"], x["actions"])[0])}


def categorical_loss_of(lib: ModuleType, x: Inputs) -> Any:
    return lib.categorical_ppo_loss(x["logits"], x["actions"], x["old_log_prob"], x["advantages"], categorical_loss.CONFIG,
                                    values=x["values"], old_values=x["old_values"], returns=x["returns"])  # fmt: skip


def eager_categorical_loss(x: Inputs) -> Any:
    return categorical_loss.eager(x["logits"], x["values"], x["actions"], *_stored(x))


def normal_loss_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x = gaussians(shape, dtype)
    return {**x, **rollout(pf.reference.normal_log_prob(x["mean"], x["log_std"], x["actions"])[0])}


def normal_loss_of(lib: ModuleType, x: Inputs) -> Any:
    return lib.normal_ppo_loss(x["mean"], x["log_std"], x["actions"], x["old_log_prob"], x["advantages"], normal_loss.CONFIG,
                               values=x["values"], old_values=x["old_values"], returns=x["returns"])  # fmt: skip


def eager_normal_loss(x: Inputs) -> Any:
    return normal_loss.eager(x["mean"], x["log_std"], x["values"], x["actions"], *_stored(x))


# Losses of tokens over a vocabulary, where float64 of all logits at once would not fit.


PIECE = 512


def in_pieces(x: Inputs, log_prob_of: Callable[..., Any], of_tokens: str, shared: tuple[str, ...] = ()) -> Outputs:
    """Loss and gradients by the reference in float64, some tokens at a time: the log-probs of all, their loss, and each
    piece's share of the gradients. `of_tokens`, the leaf with a row a token, is taken apart; `shared` leaves are not."""
    whole = {name: x[name].detach().double().requires_grad_() for name in shared}
    pieces = range(0, len(x[of_tokens]), PIECE)

    def piece(first: int) -> tuple[Tensor, list[Tensor]]:
        leaf = x[of_tokens][first : first + PIECE].detach().double().requires_grad_()
        return leaf, list(log_prob_of(leaf, *whole.values(), x["actions"][first : first + PIECE]))

    with torch.no_grad():
        of_all = [torch.cat(parts) for parts in zip(*(piece(first)[1] for first in pieces), strict=True)]
    log_prob, entropy = (y.requires_grad_() for y in of_all)
    stored = {k: x[k].double() if x[k].is_floating_point() else x[k] for k in _TOKENS}
    loss = token_loss_of(pf.reference, stored, log_prob, entropy)
    given = torch.autograd.grad(loss, (log_prob, entropy))
    grads = {name: torch.zeros_like(leaf) for name, leaf in whole.items()}
    rows = []
    for first in pieces:
        leaf, out = piece(first)
        mine, *others = torch.autograd.grad(out, (leaf, *whole.values()), [g[first : first + PIECE] for g in given])
        rows.append(mine)
        for total, g in zip(grads.values(), others, strict=True):
            total += g
    return {"loss": loss.detach(), f"d {of_tokens}": torch.cat(rows), **{f"d {k}": g for k, g in grads.items()}}


_TOKENS = ("old_log_prob", "advantages", "mask")


def tokens_of(log_prob: Tensor) -> Inputs:
    """Ratios inside the clip: what bfloat16 rounds must not decide which tokens have a gradient."""
    rows = len(log_prob)
    old_log_prob = log_prob.float() + 0.1 * (2.0 * torch.rand(rows) - 1.0)
    return {"old_log_prob": old_log_prob, "advantages": torch.randn(rows), "mask": torch.ones(rows, dtype=torch.bool)}


def token_loss_of(lib: ModuleType, x: Inputs, log_prob: Tensor, entropy: Tensor) -> Tensor:
    return lib.ppo_loss(
        log_prob, x["old_log_prob"], x["advantages"], linear_loss.CONFIG, entropy=entropy, mask=x["mask"]
    ).loss


def named_total(loss: Tensor) -> Outputs:
    return {"loss": loss}


def head_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    m, h, v = shape
    hidden, weight = torch.empty(m, h, dtype=dtype).normal_(), torch.empty(v, h, dtype=dtype).normal_(0.0, h**-0.5)
    x = {"hidden": hidden, "weight": weight, "actions": torch.randint(v, (m,))}
    parts = zip(hidden.split(PIECE), x["actions"].split(PIECE), strict=True)
    return {**x, **tokens_of(torch.cat([pf.reference.linear_log_prob(a, weight, b)[0] for a, b in parts]))}


def head_loss_of(lib: ModuleType, x: Inputs) -> Any:
    return lib.linear_ppo_loss(x["hidden"], x["weight"], x["actions"], x["old_log_prob"], x["advantages"],
                               linear_loss.CONFIG, mask=x["mask"]).loss  # fmt: skip


def eager_head_loss(x: Inputs) -> Any:
    return linear_loss.eager_loss(*(x[k] for k in ("hidden", "weight", "actions", *_TOKENS)))[0]


def vocabulary_inputs(shape: tuple[int, ...], dtype: torch.dtype) -> Inputs:
    x = {k: v for k, v in categorical_inputs(shape, dtype).items() if not k.startswith("d ")}
    parts = zip(x["logits"].split(PIECE), x["actions"].split(PIECE), strict=True)
    return {**x, **tokens_of(torch.cat([pf.reference.categorical_log_prob(a, b)[0] for a, b in parts]))}


def vocabulary_loss_of(lib: ModuleType, x: Inputs) -> Any:
    return lib.categorical_ppo_loss(x["logits"], x["actions"], x["old_log_prob"], x["advantages"], linear_loss.CONFIG,
                                    mask=x["mask"]).loss  # fmt: skip


def vocabulary_loss_in_place(lib: ModuleType, x: Inputs) -> Any:
    out = lib.categorical_log_prob(x["logits"], x["actions"], inplace_backward=True)
    return token_loss_of(lib, x, *out)


def eager_vocabulary_loss(x: Inputs) -> Any:
    out = categorical.vocabulary_formula(x["logits"], x["actions"])
    return linear_loss.loss_of(*out, *(x[k] for k in _TOKENS))[0]


def _vocabulary_loss(ours: Callable[[ModuleType, Inputs], Any]) -> Recipe:
    """Floor of both: the logits are read once and their gradient written once. Neither fits into a processor's own memory,
    so a second read comes from the L2 cache at best."""
    return Recipe(
        "categorical_ppo_loss", vocabulary_inputs, ours, eager_vocabulary_loss, named_total, named_total,
        lambda s, d: 2 * d.itemsize * numel(s) + 17 * s[0] + 4, dict.fromkeys(("logits", "actions", *_TOKENS), 1),
        ("logits",), scales={"loss": 0.8}, truth=lambda x: in_pieces(x, pf.reference.categorical_log_prob, "logits"),
    )  # fmt: skip


VOCABULARY_LOSS, VOCABULARY_LOSS_IN_PLACE = map(_vocabulary_loss, (vocabulary_loss_of, vocabulary_loss_in_place))
HEAD_LOSS = Recipe(
    "linear_ppo_loss", head_inputs, head_loss_of, eager_head_loss, named_total, named_total,
    lambda s, d: 2 * d.itemsize * (s[0] * s[1] + s[2] * s[1]) + 17 * s[0] + 4,
    dict.fromkeys(("hidden", "weight", "actions", *_TOKENS), 1), ("hidden", "weight"), scales={"loss": 0.8},
    truth=lambda x: in_pieces(x, pf.reference.linear_log_prob, "hidden", ("weight",)),
)  # fmt: skip


ROLLOUT_READS = {"old_log_prob": 1, "advantages": 2, "old_values": 1, "returns": 1, "values": 1}
LOSS = Recipe(
    "ppo_loss", loss_inputs, loss_of, eager_loss, named_loss, loss_bench.named,
    lambda s, d: 40 * numel(s) + loss_bench.STATS_BYTES,
    {**ROLLOUT_READS, "advantages": 1, "log_prob": 1, "entropy": 1}, ("log_prob", "values", "entropy"),
    scales=loss_bench.LOSS_SCALE,
)  # fmt: skip
CATEGORICAL_LOSS = Recipe(
    "categorical_ppo_loss", categorical_loss_inputs, categorical_loss_of, eager_categorical_loss, named_loss,
    categorical_loss.named,
    lambda s, d: 8 * numel(s) + 36 * s[0] + loss_bench.STATS_BYTES, {**ROLLOUT_READS, "logits": 1, "actions": 1},
    ("logits", "values"), scales=loss_bench.LOSS_SCALE,
)  # fmt: skip
NORMAL_LOSS = Recipe(
    "normal_ppo_loss", normal_loss_inputs, normal_loss_of, eager_normal_loss, named_loss, categorical_loss.named,
    lambda s, d: 12 * numel(s) + 28 * s[0] + 8 * s[1] + loss_bench.STATS_BYTES,
    {**ROLLOUT_READS, "mean": 1, "log_std": 1, "actions": 1}, ("mean", "log_std", "values"),
    scales=loss_bench.LOSS_SCALE,
)  # fmt: skip


# --- cases ------------------------------------------------------------------------------------------------------------

_UNROLLS = "unrolls the loop over time, minutes to compile"
_NO_TARGET = "left out for time: only where there is a target"
_BW = "bandwidth"


def _case(recipe: Recipe, shape, tiny, mode, *targets: Target, dtype="float32", **rest) -> GpuCase:
    if not targets and "compile" not in rest:
        rest["compile"] = _NO_TARGET
    return GpuCase(shape, tiny, dtype, mode, recipe, targets, **rest)


def _scan(recipe: Recipe, shape, tiny, *targets: Target, **rest) -> GpuCase:
    return _case(recipe, shape, tiny, FORWARD, *targets, compile=_UNROLLS, **rest)


#: In the order in which they are measured: where time runs out, what has a target is there.
CASES: tuple[GpuCase, ...] = (
    _scan(GAE, (4096, 4096), (33, 5), Target(_BW, 0.9), remark="time-major"),
    _scan(GAE_BY_ROW, (4096, 4096), (5, 33), Target(_BW, 0.9), remark="batch-major"),
    _scan(GAE, (128, 4096), (16, 8), Target("call", 15e-6), small=True),
    _scan(GAE_MASKED, (512, 8192), (4, 70), Target(_BW, 0.85), remark="masks"),
    _case(_categorical(False), (8192, 151_936), (6, 1100), FORWARD, Target(_BW, 0.95), dtype="bfloat16"),
    _case(_categorical(True, True), (8192, 151_936), (6, 1100), IN_PLACE, Target(_BW, 0.9), dtype="bfloat16"),
    _case(
        LOSS,
        (262_144,),
        (300,),
        BACKWARD,
        Target("device", 20e-6),
        Target("launches", 2),
        Target("syncs", 0),
        small=True,
    ),
    _case(
        CATEGORICAL_LOSS,
        (65_536, 18),
        (40, 18),
        BACKWARD,
        Target(_BW, 0.8),
        Target("faster", 5, "torch.compile"),
        small=True,
    ),
    # without targets: a vocabulary's losses
    _case(HEAD_LOSS, (8192, 4096, 151_936), (24, 8, 1100), BACKWARD, dtype="bfloat16", remark="beside its products"),
    _case(VOCABULARY_LOSS, (8192, 100_000), (6, 1100), BACKWARD, dtype="bfloat16", remark="one op"),
    _case(VOCABULARY_LOSS_IN_PLACE, (8192, 100_000), (6, 1100), IN_PLACE, dtype="bfloat16", remark="two ops"),
    # every op small (as a minibatch for control) and large
    _scan(GAE, (128, 4), (16, 4), small=True, remark="CleanRL's CartPole rollout"),
    _scan(VTRACE, (20, 32), (20, 4), small=True, remark="IMPALA's batch"),
    _scan(VTRACE, (1024, 4096), (40, 6)),
    _scan(RETURNS, (128, 8), (16, 4), small=True),
    _scan(RETURNS, (1024, 4096), (40, 6)),
    _case(WHITEN, (4096,), (100,), FORWARD, small=True),
    _case(WHITEN, (4_194_304,), (300,), FORWARD),
    _case(_categorical(True), (128, 2), (16, 2), BACKWARD, small=True, remark="CleanRL's CartPole minibatch"),
    _case(_categorical(True), (65_536, 18), (40, 18), BACKWARD),
    _case(_categorical(True), (4096, 32_000), (5, 1100), BACKWARD, dtype="bfloat16"),
    _case(MULTI, (128, 76), (16, 76), BACKWARD, small=True),
    _case(MULTI, (65_536, 76), (40, 76), BACKWARD),
    _case(BERNOULLI, (128, 8), (16, 8), BACKWARD, small=True),
    _case(BERNOULLI, (524_288, 8), (40, 8), BACKWARD),
    _case(NORMAL, (64, 6), (16, 6), BACKWARD, small=True),
    _case(NORMAL, (524_288, 12), (40, 6), BACKWARD),
    _case(BETA, (64, 6), (16, 6), BACKWARD, small=True),
    _case(BETA, (262_144, 6), (40, 6), BACKWARD),
    _case(LOSS, (256,), (64,), BACKWARD, small=True),
    _case(LOSS, (4_194_304,), (300,), BACKWARD),
    _case(CATEGORICAL_LOSS, (128, 2), (16, 2), BACKWARD, small=True, remark="CleanRL's CartPole minibatch"),
    _case(NORMAL_LOSS, (64, 6), (16, 6), BACKWARD, small=True, remark="CleanRL's MuJoCo minibatch"),
    _case(NORMAL_LOSS, (262_144, 12), (40, 12), BACKWARD),
)
