"""Small calls of every op, made on the CPU from a seed, and what any backend on any device is held to.

Shapes are odd on purpose: one element, ragged tails, more than one block, rows short and long, views that start off
16-byte alignment. The same seed gives the same numbers, another one other numbers in the same shapes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from conftest import as_double, assert_as_good
from log_prob_laws import assert_parity
from loss_cases import Streams, compare, replace
from torch import Tensor

import ppo_fast as pf
from ppo_fast import reference
from ppo_fast.config import POLICIES

SCANS = ("gae", "vtrace", "discounted_returns")
LOG_PROBS = ("categorical_log_prob", "multi_categorical_log_prob", "bernoulli_log_prob", "normal_log_prob",
             "beta_log_prob")  # fmt: skip
LOSSES = ("ppo_loss", "categorical_ppo_loss", "normal_ppo_loss")
OPS = (*SCANS, "whiten", *LOG_PROBS, *LOSSES)
DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


@dataclass
class Call:
    """`inputs` get gradients where the op has any; `rest` are its other arguments by name."""

    op: str
    inputs: dict[str, Tensor]
    rest: dict[str, Any] = field(default_factory=dict)
    ulps: float = 8.0
    size_of_log_prob: float = 1.0

    @property
    def arguments(self) -> dict[str, Any]:
        return {**self.inputs, **self.rest}


# --- another device ---------------------------------------------------------------------------------------------------


def moved(x: Any, device: torch.device | str) -> Any:
    """The same on another device, tensors with the same strides and offset in memory; tuples part by part."""
    if isinstance(x, tuple):
        return tuple(moved(part, device) for part in x)
    if not isinstance(x, Tensor):
        return x
    with torch.no_grad():
        storage = torch.empty(0, dtype=x.dtype, device=x.device).set_(x.untyped_storage())
        there = storage.to(device, copy=True).as_strided(x.shape, x.stride(), x.storage_offset())
    return there.requires_grad_(x.requires_grad)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, device):
        ctx.back = x.device
        return moved(x.detach(), device)

    @staticmethod
    def backward(ctx, g):
        return g.to(ctx.back), None


def _there(x: Any, device: torch.device | str) -> Any:
    return _Moved.apply(x, device) if isinstance(x, Tensor) and x.requires_grad else moved(x, device)


def _back(x: Any) -> Any:
    if isinstance(x, pf.PPOLoss):
        return pf.PPOLoss(x.loss.cpu(), pf.Stats(x.stats.vector.cpu()))
    return tuple(map(_back, x)) if isinstance(x, tuple) else x.cpu() if isinstance(x, Tensor) else x


def on(backend: str, device: torch.device | str, op: str) -> Callable[..., Any]:
    """The op as a function of CPU tensors that runs on a device by a backend: what is written for the CPU tests it too."""
    function = getattr(pf, op)

    def run(*args, **kwargs):
        args = [_there(x, device) for x in args]
        kwargs = {k: _there(x, device) for k, x in kwargs.items()}
        with pf.use_backend(backend):
            return _back(function(*args, **kwargs))

    return run


# --- what comes out ---------------------------------------------------------------------------------------------------


def outcome(call: Call, function: Callable[..., Any], given: list[Tensor] | None = None) -> dict[str, Tensor]:
    """Everything that a call gives: results by name and gradients as "d <input>". `given`: the gradients that reach a
    log-prob and an entropy; made here, from a seed, where they are not."""
    differentiable = call.op in LOG_PROBS or call.op in LOSSES
    inputs = {k: v.detach().requires_grad_(differentiable) for k, v in call.inputs.items()}
    out = function(**inputs, **call.rest)
    if not differentiable:
        return dict(enumerate_names(out))
    if isinstance(out, pf.PPOLoss):
        grads = torch.autograd.grad(out.loss, list(inputs.values()), allow_unused=True)
        named = {"loss": out.loss.detach(), "stats": out.stats.vector}
    else:
        given = upstream(out) if given is None else given
        grads = torch.autograd.grad(out, list(inputs.values()), given)
        named = dict(zip(("log_prob", "entropy"), (x.detach() for x in out), strict=True))
    return {**named, **{f"d {k}": g for k, g in zip(inputs, grads, strict=True) if g is not None}}


def upstream(out: tuple[Tensor, ...]) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(x.shape, generator=generator).to(x) for x in out]


def enumerate_names(out: Any) -> Iterator[tuple[str, Tensor]]:
    for i, x in enumerate(out if isinstance(out, tuple) else (out,)):
        yield f"output {i}", x


def assert_parity_of(call: Call, function: Callable[..., Any], kernel: bool = True) -> None:
    """Values, statistics and gradients of function(**arguments), on CPU tensors, by the rule of tests/conftest.py."""
    specification = getattr(reference, call.op)
    if call.op in LOSSES:
        rest = dict(call.rest)
        config, tensors = rest.pop("config"), {k: v for k, v in rest.items() if isinstance(v, Tensor)}
        numbers = {k: v for k, v in rest.items() if not isinstance(v, Tensor)}
        compare(function, specification, call.inputs, Streams(config, tensors, numbers), call.size_of_log_prob)
        return
    wide = {k: tuple(map(as_double, v)) if isinstance(v, tuple) else as_double(v) for k, v in call.rest.items()}
    if call.op in LOG_PROBS:
        names = list(call.inputs)

        def of(f, rest):
            return lambda *xs: f(**dict(zip(names, xs, strict=True)), **rest)

        assert_parity(of(function, call.rest), of(specification, call.rest), list(call.inputs.values()), call.ulps,
                      of(specification, wide))  # fmt: skip
        return
    got, eager = (
        dict(enumerate_names(function(**call.arguments))),
        dict(enumerate_names(specification(**call.arguments))),
    )
    true = dict(enumerate_names(specification(**{k: as_double(v) for k, v in call.inputs.items()}, **wide)))
    for name, x in got.items():
        assert x.dtype == eager[name].dtype and (x.is_contiguous() or not kernel), name
        assert_as_good(x, eager[name], true[name], name, call.ulps)


# --- the calls --------------------------------------------------------------------------------------------------------


class _Numbers:
    """Random tensors from a seed."""

    def __init__(self, seed: int) -> None:
        self.generator = torch.Generator().manual_seed(seed)

    def normal(self, *shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> Tensor:
        return (torch.randn(shape, generator=self.generator) * scale).to(dtype)

    def flags(self, *shape: int, p: float = 0.5) -> Tensor:
        return torch.rand(shape, generator=self.generator) < p

    def uniform(self, *shape: int, low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(shape, generator=self.generator)

    def labels(self, n: int, *shape: int) -> Tensor:
        return torch.randint(n, shape, generator=self.generator)


def unaligned(x: Tensor) -> Tensor:
    """The same numbers, contiguous, one element past where an allocation starts."""
    return torch.cat([x.new_zeros(1), x.flatten()])[1:].view(x.shape)


def _steps(r: _Numbers, shape: tuple[int, ...], time_dim: int = 0, dtype: torch.dtype = torch.float32,
           ends: bool = True) -> dict[str, Any]:  # fmt: skip
    columns = shape[1 - time_dim] if len(shape) > 1 else 1
    case = {"rewards": r.normal(*shape, dtype=dtype), "values": r.normal(*shape, dtype=dtype),
            "last_values": r.normal(columns, dtype=dtype), "time_dim": time_dim}  # fmt: skip
    if ends:
        case |= {"terminated": r.flags(*shape, p=0.1), "truncated": r.flags(*shape, p=0.1).to(torch.uint8),
                 "final_values": r.normal(*shape, dtype=dtype)}  # fmt: skip
    return case


def _scans(op: str, r: _Numbers) -> Iterator[Call]:
    def call(case: dict[str, Any], **rest: Any) -> Call:
        streams = {"gae": ("rewards", "values"), "vtrace": ("log_rhos", "rewards", "values"),
                   "discounted_returns": ("rewards",)}[op]  # fmt: skip
        case = {"log_rhos": r.normal(*case["rewards"].shape, scale=0.5), **case, **rest}
        inputs = {k: case[k] for k in streams}
        return Call(op, inputs, {k: v for k, v in case.items() if k not in ("rewards", "values", "log_rhos")})

    def rates(n: int) -> dict[str, Tensor]:
        found = {"gamma": r.uniform(n, low=0.5), "lam": r.uniform(n)}
        return found if op != "discounted_returns" else {"gamma": found["gamma"]}

    yield call(_steps(r, (13, 7)))
    yield call(_steps(r, (7, 131), 1), **rates(7))
    yield call(_steps(r, (3, 2300), 1), mask=r.flags(3, 2300, p=0.7))  # rows shorter in number than multiprocessors
    yield call(_steps(r, (260, 33), dtype=torch.float64))
    yield call(_steps(r, (9, 40), 1, torch.bfloat16), mask=r.flags(9, 40, p=0.6).float())
    yield call(_steps(r, (1, 1), ends=False))
    yield call(_steps(r, (257,), ends=False))
    strided = _steps(r, (65, 12), ends=False)
    strided["rewards"] = torch.stack([strided["rewards"], strided["rewards"]], -1)[..., 1]
    yield call(strided, terminated=r.flags(12, 65, p=0.1).t())
    if op == "gae":
        yield call(_steps(r, (5, 300), 1), mask=r.flags(5, 300, p=0.5), mask_mode="zero")
        bounds = torch.tensor([0, 5, 5, 69, 70, 200, 203])
        packed = {"rewards": unaligned(r.normal(203)), "values": r.normal(203), "last_values": r.normal(6)}
        yield call(packed, cu_seqlens=bounds, **rates(6))


def _whitens(r: _Numbers) -> Iterator[Call]:
    x = r.normal(1003, scale=3.0) + 1.0
    yield Call("whiten", {"x": x})
    yield Call("whiten", {"x": unaligned(r.normal(40_001))}, {"mask": r.flags(40_001, p=0.8)})
    yield Call("whiten", {"x": r.normal(31, 33, dtype=torch.bfloat16).t()}, {"ddof": 0, "shift_mean": False})
    yield Call("whiten", {"x": r.normal(77, dtype=torch.float64)}, {"eps_in_variance": True}, ulps=64.0)
    yield Call("whiten", {"x": r.normal(1)})


def _categoricals(r: _Numbers) -> Iterator[Call]:
    def call(rows: int, width: int, dtype: torch.dtype = torch.float32, **rest: Any) -> Call:
        logits = r.normal(rows, width, scale=2.0).to(dtype)
        rest = {"actions": r.labels(width, rows), **rest}
        return Call("categorical_log_prob", {"logits": logits}, rest, ulps=32.0 if dtype == torch.float64 else 8.0)

    yield call(5, 3)
    yield call(1, 1)
    yield call(70, 18, temperature=r.uniform(70, low=0.5, high=1.5))
    yield call(33, 65, torch.float64)
    yield call(3, 1030, torch.bfloat16)
    yield call(2, 5003, torch.float16, temperature=0.7)
    yield call(3, 40_001, torch.bfloat16)  # more than one block takes a row, if any does
    masked = call(33, 70)
    allowed = r.flags(33, 70, p=0.6).scatter_(-1, masked.rest["actions"][:, None], True)
    actions = torch.where(r.flags(33, p=0.3), -100, masked.rest["actions"])
    yield Call(
        "categorical_log_prob", masked.inputs, {"actions": actions, "action_mask": allowed, "ignore_index": -100}
    )
    shifted = call(20, 300)
    shifted.inputs["logits"] = unaligned(shifted.inputs["logits"])
    yield shifted


def _multi_categoricals(r: _Numbers) -> Iterator[Call]:
    for rows, nvec, dtype in ((9, (3, 1, 70), torch.float32), (65, (2, 5), torch.bfloat16), (1, (4,), torch.float64)):
        logits = r.normal(rows, sum(nvec), scale=2.0).to(dtype)
        actions = torch.stack([r.labels(k, rows) for k in nvec], -1)
        ulps = 32.0 if dtype == torch.float64 else 8.0
        yield Call("multi_categorical_log_prob", {"logits": logits}, {"actions": actions, "nvec": nvec}, ulps)


def _bernoullis(r: _Numbers) -> Iterator[Call]:
    for rows, width, dtype in ((9, 8, torch.float32), (300, 1, torch.float16), (7, 130, torch.float64)):
        logits = unaligned(r.normal(rows, width, scale=2.0).to(dtype))
        ulps = 32.0 if dtype == torch.float64 else 8.0
        yield Call("bernoulli_log_prob", {"logits": logits}, {"actions": r.flags(rows, width).float()}, ulps)


def _normals(r: _Numbers) -> Iterator[Call]:
    for rows, width, dtype, shape, squash in (
        (65, 6, torch.float32, (6,), False),
        (5000, 3, torch.float32, (3,), True),
        (33, 17, torch.bfloat16, (33, 17), False),
        (9, 70, torch.float64, (1, 70), False),
    ):
        inputs = {"mean": r.normal(rows, width, dtype=dtype), "log_std": r.normal(*shape, scale=0.3, dtype=dtype)}
        rest = {"actions": r.normal(rows, width, dtype=dtype), "squash": squash}
        yield Call("normal_log_prob", inputs, rest, ulps=32.0 if dtype == torch.float64 else 8.0)


def _betas(r: _Numbers) -> Iterator[Call]:
    for rows, width, dtype in ((9, 3, torch.float32), (130, 6, torch.bfloat16)):
        inputs = {k: r.uniform(rows, width, low=0.4, high=6.0).to(dtype) for k in ("alpha", "beta")}
        rest = {"actions": r.uniform(rows, width, low=-1.9, high=1.9).to(dtype), "low": -2.0, "high": 2.0}
        yield Call("beta_log_prob", inputs, rest)


FULL = pf.LossConfig(dual_clip=3.0, value_clip=0.2, entropy_coef=0.01, normalize_advantages=True, kl="k3", kl_coef=0.1,
                     rollout_correction="tis")  # fmt: skip
BARE = pf.LossConfig()
SEQUENCES = pf.LossConfig(reduction="seq-mean-token-mean", value_clip=0.2, log_ratio_clamp=20.0, kl="k2", kl_coef=0.2)


def _rollout(
    r: _Numbers, shape: tuple[int, ...], center: float | Tensor = 0.0, dtype: torch.dtype = torch.float32
) -> dict[str, Tensor]:
    log_probs, others = ("old_log_prob", "ref_log_prob", "rollout_log_prob"), ("advantages", "old_values", "returns")
    near = {k: (r.normal(*shape, scale=0.2) + center).to(dtype) for k in log_probs}
    return near | {k: r.normal(*shape, dtype=dtype) for k in others}


def _only(stored: dict[str, Tensor], config: pf.LossConfig) -> dict[str, Tensor]:
    """Without what the config has no use for."""
    absent = {"ref_log_prob": config.kl is None, "rollout_log_prob": config.rollout_correction is None}
    return {k: v for k, v in stored.items() if not absent.get(k, False)}


def _losses(r: _Numbers) -> Iterator[Call]:
    def call(shape, config, dtype=torch.float32, **rest):
        inputs = {"log_prob": r.normal(*shape, scale=0.3, dtype=dtype), "values": r.normal(*shape, dtype=dtype),
                  "entropy": r.uniform(*shape).to(dtype)}  # fmt: skip
        stored = _only(_rollout(r, shape, dtype=dtype), config)
        return Call("ppo_loss", inputs, {"config": config, **stored, **rest})

    yield call((301,), FULL, mask=r.flags(301, p=0.8))
    yield call((5003,), FULL)
    yield call((7, 33), SEQUENCES, mask=r.flags(7, 33, p=0.7).to(torch.uint8))
    yield call((70_001,), pf.LossConfig(value_clip=0.2, entropy_coef=0.01))  # plain streams: the fast path, many blocks
    yield call((257,), FULL, torch.float64)
    yield call((33,), SEQUENCES, torch.bfloat16, cu_seqlens=torch.tensor([0, 10, 10, 33]))
    for policy in POLICIES[1:]:
        config = replace(FULL, policy=policy, reduction="seq-mean-token-mean", kl_weight="ratio", cov_ratio=0.1)
        policies = call((5, 41), config, mask=r.flags(5, 41, p=0.8))
        for name in ("log_prob", "old_log_prob", "ref_log_prob", "rollout_log_prob"):  # DPPO reads probabilities
            where = policies.inputs if name == "log_prob" else policies.rest
            where[name] = where[name] - 1.2
        if policy != "clip_cov":  # draws tokens at random
            yield policies
    bare = call((97,), BARE, weights=r.uniform(97), denominator=37.5)
    yield Call("ppo_loss", {"log_prob": unaligned(bare.inputs["log_prob"])},
               {k: v for k, v in bare.rest.items() if k not in ("old_values", "returns")})  # fmt: skip


def _categorical_losses(r: _Numbers) -> Iterator[Call]:
    def call(rows, width, config, stored=None, dtype=torch.float32, **rest):
        n = rows if stored is None else stored
        inputs = {"logits": r.normal(rows, width, dtype=dtype), "values": r.normal(rows, dtype=dtype)}
        kept = _only(_rollout(r, (n,), -math.log(width), dtype), config)
        return Call("categorical_ppo_loss", inputs, {"config": config, "actions": r.labels(width, n), **kept, **rest})

    yield call(65, 18, FULL, mask=r.flags(65, p=0.8))
    yield call(130, 5, FULL, 200, index=r.labels(200, 130))
    yield call(3, 1030, BARE, dtype=torch.bfloat16)
    yield call(9, 70, FULL, dtype=torch.float64)
    masked = call(40, 6, pf.LossConfig.preset("cleanrl"))
    masked.rest["action_mask"] = r.flags(40, 6, p=0.6).scatter_(-1, masked.rest["actions"][:, None], True)
    yield masked


def _normal_losses(r: _Numbers) -> Iterator[Call]:
    def call(rows, width, config, shared, stored=None, dtype=torch.float32, **rest):
        n = rows if stored is None else stored
        mean, log_std = r.normal(rows, width), r.normal(*((width,) if shared else (rows, width)), scale=0.2)
        actions = (mean if stored is None else r.normal(n, width)) + r.normal(n, width)
        center = -1.4 * width
        if stored is None:  # near the true log-prob, so that ratios stay near 1
            center = reference.normal_log_prob(mean, log_std, actions, squash=rest.get("squash", False))[0]
        kept = _only(_rollout(r, (n,), center, dtype), config)
        inputs = {"mean": mean.to(dtype), "log_std": log_std.to(dtype), "values": r.normal(rows, dtype=dtype)}
        return Call("normal_ppo_loss", inputs, {"config": config, "actions": actions.to(dtype), **kept, **rest},
                    size_of_log_prob=6.0 * width)  # fmt: skip

    yield call(65, 6, FULL, True, mask=r.flags(65, p=0.8))
    yield call(5000, 3, pf.LossConfig.preset("cleanrl"), True)
    yield call(33, 17, BARE, False, squash=True)
    yield call(130, 3, BARE, True, 200, index=r.labels(200, 130))
    yield call(9, 2, FULL, True, dtype=torch.float64)


_MAKERS: dict[str, Callable[[_Numbers], Iterator[Call]]] = {
    **{op: lambda r, op=op: _scans(op, r) for op in SCANS},
    "whiten": _whitens,
    "categorical_log_prob": _categoricals,
    "multi_categorical_log_prob": _multi_categoricals,
    "bernoulli_log_prob": _bernoullis,
    "normal_log_prob": _normals,
    "beta_log_prob": _betas,
    "ppo_loss": _losses,
    "categorical_ppo_loss": _categorical_losses,
    "normal_ppo_loss": _normal_losses,
}


def small(op: str, seed: int = 0) -> list[Call]:
    """The op's calls, on the CPU."""
    return list(_MAKERS[op](_Numbers(seed)))


#: (op, number of the call), for parametrize.
SMALL = [(op, i) for op in OPS for i in range(len(small(op)))]


def there(call: Call, device: torch.device | str) -> Call:
    """The same call with its tensors on a device, their strides kept."""
    inputs = {k: moved(v, device) for k, v in call.inputs.items()}
    rest = {k: moved(v, device) for k, v in call.rest.items()}
    return Call(call.op, inputs, rest, call.ulps, call.size_of_log_prob)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> list[str]:
    """Names whose bits differ, NaN for NaN."""
    assert a.keys() == b.keys()
    return [k for k in a if a[k].dtype != b[k].dtype or not torch.equal(_bits(a[k]), _bits(b[k]))]


def _bits(x: Tensor) -> Tensor:
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return torch.where(x.isnan(), torch.nan, x).contiguous().view(kinds[x.itemsize]) if x.numel() else x
