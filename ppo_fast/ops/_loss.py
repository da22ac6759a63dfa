"""What the three losses share in Python: checks, weights, the three doors, and the registered op."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _library, _memory
from .._autograd import attach
from ..config import STATS, LossConfig
from ..outputs import PPOLoss, Stats
from ..reductions import token_weights

#: What the rollout stored, in the order in which every kernel and registered op takes it.
ROLLOUT = ("old_log_prob", "advantages", "old_values", "returns", "ref_log_prob", "rollout_log_prob", "mask", "weights")
_N_STATS = len(STATS)
_ROLLOUT_SCHEMA = (
    "Tensor old_log_prob, Tensor advantages, Tensor? old_values, Tensor? returns, Tensor? ref_log_prob, "
    "Tensor? rollout_log_prob, Tensor? mask, Tensor? weights, float denominator, bool total"
)


class Loss:
    """One loss op.

    fill(backend, params, inputs, needed, extra, rollout) -> loss, statistics and a list of the inputs' gradients, by the kernel
    specify(config, inputs, extra, stored, cu_seqlens, denominator) -> PPOLoss, by the reference
    `inputs` and `extra` are schemas of what comes before the rollout, with and without gradient.
    """

    def __init__(self, name: str, like: str, inputs: str, extra: str, fill: Callable, specify: Callable) -> None:
        self.name, self.like, self.fill, self.specify = name, like, fill, specify
        self.names = [argument.split()[-1] for argument in f"{inputs}, {extra}".strip(", ").split(", ")]
        self.n_inputs = inputs.count("Tensor")
        self.n_extra = extra.count(",") + 1 if extra else 0
        arguments = ", ".join(filter(None, [inputs, extra, _ROLLOUT_SCHEMA, _library.CONFIG_SCHEMA]))
        returns = ", ".join(["Tensor"] * (2 + self.n_inputs))
        schema = f"({arguments}) -> ({returns})"
        self.op = _library.define(name, schema, self._kernel, self._fake, self._setup_context, self._backward)

    def __call__(
        self,
        inputs: tuple[Any, ...],
        extra: tuple,
        config: LossConfig | None,
        shape: Any,
        stored: tuple[Any, ...],
        cu_seqlens: Tensor | None,
        denominator: float | Tensor | None,
        index: Tensor | None = None,
    ) -> PPOLoss:
        """Checks, then one of three: the registered op while compiling, the kernel, or the specification."""
        config = check_config(self.name, config)
        constants(self.name, ROLLOUT, stored)
        if extra:
            constants(self.name, ("actions",), extra)
        if denominator is not None:
            check_denominator(self.name, denominator)
        first = inputs[0]
        compiling = torch.compiler.is_compiling()
        backend = None if compiling else _backend.pick(self.name, first)
        kernel = _backend.compiles_kernel(first) if compiling else backend is not None
        if not kernel or (backend is not None and not backend.checks):
            self._check_streams(shape, config, inputs, extra, stored, index)
        if not kernel:
            return self.specify(config, inputs, extra, stored, cu_seqlens, denominator)
        rollout = weighting(self.name, config, shape, first, stored, denominator, cu_seqlens, index)
        if compiling:
            loss, stats, *_ = self.op(*inputs, *extra, *rollout, config.numbers_vector, *config.choices())
            return PPOLoss(loss, Stats(stats))
        with_grad = torch.is_grad_enabled()
        needed = [with_grad and x is not None and x.requires_grad for x in inputs]
        assert backend is not None
        loss, stats, grads = self.fill(backend, packed(config, backend), inputs, needed, extra, rollout)
        if True in needed:
            loss = attach(
                _Call(self, loss, grads, backend, needed, config, extra, rollout, stored, cu_seqlens, denominator),
                inputs,
            )
        return PPOLoss(loss, Stats(stats))

    def _check_streams(self, shape, config, inputs, extra, rollout, index) -> None:
        """For the reference and for Triton, what the bindings check for their kernels."""
        streams = dict(zip(ROLLOUT, rollout, strict=True))
        params = dict(zip(self.names, (*inputs, *extra), strict=True))
        for name, x in {**params, **streams}.items():
            if isinstance(x, Tensor) and x.device != inputs[0].device:
                raise TypeError(f"{self.name}: {name} must be on {inputs[0].device} as the rest, got {x.device}")
        for name in self.names[: self.n_inputs]:
            x = params[name]
            if x is not None and not x.is_floating_point():
                wanted = "float32, float64, bfloat16 or float16"
                raise TypeError(f"{self.name}: {name} must be {wanted}, got {str(x.dtype)[6:]}")
        stored = None if index is None else rollout[0].numel()
        for name, x in streams.items():
            if x is None and name not in ("old_log_prob", "advantages"):
                continue
            if not isinstance(x, Tensor):
                raise TypeError(f"{self.name}: {name} must be a tensor, got {type(x).__name__ if x is not None else x}")
            if name != "mask" and not x.is_floating_point():
                raise TypeError(f"{self.name}: {name} must be float32, float64, bfloat16 or float16, got {x.dtype}")
            if stored is not None and x.numel() != stored:
                what = f"have as many elements as old_log_prob, {stored}, got {list(x.shape)}"
                raise ValueError(f"{self.name}: {name} must {what}")
            if stored is None and x.shape != shape:
                raise ValueError(f"{self.name}: {name} must be {self.like} = {list(shape)}, got {list(x.shape)}")
        if index is not None and index.shape != shape:
            raise ValueError(f"{self.name}: index must be {self.like} = {list(shape)}, got {list(index.shape)}")
        values = inputs[1] if self.name != "normal_ppo_loss" else inputs[2]
        if values is not None:
            if values.shape != shape:
                raise ValueError(f"{self.name}: values must be {self.like} = {list(shape)}, got {list(values.shape)}")
            if streams["returns"] is None:
                raise TypeError(f"{self.name}: returns must be a tensor with values, got None")
            clipped = config.value_clip is not None and config.value_clip_mode != "error"
            if clipped and streams["old_values"] is None:
                raise TypeError(f"{self.name}: old_values must be a tensor with values and value_clip, got None")
        for name, wanted in (("ref_log_prob", "kl"), ("rollout_log_prob", "rollout_correction")):
            if getattr(config, wanted) is not None and streams[name] is None:
                raise TypeError(f"{self.name}: {name} must be a tensor with LossConfig({wanted}=...), got None")

    # --- the registered op: (loss, statistics, one gradient per input), gradients for a grad_output of 1 --------------

    def _kernel(self, *args):
        inputs, extra, rest = self._split(args)
        n_config = 1 + len(_library.CHOICES)
        numbers, *choices = rest[-n_config:]
        backend = _backend.pick(self.name, inputs[0])
        if backend is None:
            raise RuntimeError(f"{self.name}: compiled for kernels that take no tensor on {inputs[0].device} any more")
        config = LossConfig.unpacked(numbers.tolist(), choices)
        if not backend.checks:
            shape = inputs[0].shape if self.name == "ppo_loss" else inputs[0].shape[:-1]
            index = dict(zip(self.names[self.n_inputs :], extra, strict=True)).get("index")
            self._check_streams(shape, config, inputs, extra, rest[: len(ROLLOUT)], index)
        params = packed(config, backend)
        needed = [x is not None for x in inputs]
        loss, stats, grads = self.fill(backend, params, inputs, needed, extra, rest[:-n_config])
        return loss, stats, *(_library.placeholder(inputs[0]) if g is None else g for g in grads)

    def _fake(self, *args):
        inputs, _, _ = self._split(args)
        grads = (_library.placeholder(inputs[0]) if x is None else x.new_empty(x.shape) for x in inputs)
        return *outputs(*inputs), *grads

    def _split(self, args):
        end = self.n_inputs + self.n_extra
        return args[: self.n_inputs], args[self.n_inputs : end], args[end:]

    def _setup_context(self, ctx, inputs, output):
        ctx.save_for_backward(*output[2:])
        ctx.absent = [x is None for x in inputs[: self.n_inputs]]
        ctx.n_rest = len(inputs) - self.n_inputs
        ctx.mark_non_differentiable(*output[1:])

    def _backward(self, ctx, grad_loss, *_):
        pairs = zip(ctx.absent, ctx.saved_tensors, strict=True)
        return *(None if absent else g * grad_loss.to(g.dtype) for absent, g in pairs), *([None] * ctx.n_rest)


class _Call:
    """See `_autograd.Call`."""

    __slots__ = ("args", "grads", "loss")

    def __init__(self, op: Loss, loss: Tensor, grads: list[Tensor | None] | None, *args: Any) -> None:
        self.loss, self.grads, self.args = loss, grads, (op, *args)

    def recompute(self, inputs):
        op, backend, needed, config, extra, rollout, *_ = self.args
        return op.fill(backend, packed(config, backend), inputs, needed, extra, rollout)[2]

    def scale(self, grads, grad_loss):
        if grad_loss.is_cpu:
            if grad_loss.item() == 1.0:
                return grads
            return [None if g is None else g.mul_(grad_loss) for g in grads]
        self.args[1].ops.scale(grad_loss, *[g for g in grads if g is not None])  # looks at grad_loss on the device
        return grads

    def specification(self, *inputs):
        op, _, _, config, extra, _, stored, cu_seqlens, denominator = self.args
        return op.specify(config, inputs, extra, stored, cu_seqlens, denominator).loss


def packed(config: LossConfig, backend: _backend.Backend):
    """The config as the backend has it, made once. It may point to `device_numbers`, which the config keeps alive."""
    kept = config.__dict__.get("_packed")
    if kept is None or kept[0] is not backend:
        on_device = None if backend.name == "cpu" else config.device_numbers
        params = backend.ops.LossParams(config.numbers(), config.choices(), on_device)
        kept = config.__dict__["_packed"] = backend, params
    return kept[1]


def check_config(op: str, config: LossConfig | None) -> LossConfig:
    if config is None:
        return LossConfig()
    if not isinstance(config, LossConfig):
        raise TypeError(f"{op}: config must be a LossConfig, got {type(config).__name__}")
    return config


def check_denominator(op: str, denominator: float | Tensor) -> None:
    if isinstance(denominator, Tensor):
        return
    if not (isinstance(denominator, (int, float)) and math.isfinite(denominator) and denominator > 0):
        raise ValueError(f"{op}: denominator must be a finite number > 0, got {denominator!r}")


def constants(op: str, names: Sequence[str], tensors: Sequence[Any]) -> None:
    """An input that gets no gradient but requires one is a mistake that would train silently wrong."""
    if not torch.is_grad_enabled():
        return
    for i in range(len(names)):
        x = tensors[i]
        if x is not None and getattr(x, "requires_grad", False):
            raise ValueError(f"{op}: {names[i]} gets no gradient but requires one; detach it or use torch.no_grad()")


def taken(op: str, stored: Tensor, index: Tensor) -> Tensor:
    """Rows of the rollout; indices out of range are named as the bindings do."""
    if index.is_floating_point() or index.dtype == torch.bool:
        raise TypeError(f"{op}: index must be an integer type, got {str(index.dtype)[6:]}")
    n = stored.numel()
    if index.device.type == "cpu" and not torch.compiler.is_compiling() and index.numel() > 0:
        least, most = index.min().item(), index.max().item()
        if least < 0 or most >= n:
            worst = least if least < 0 else most
            raise ValueError(f"{op}: index must be in [0, {n}), the elements of the rollout, got {worst}")
    return stored.reshape(-1)[index.long()]


def weighting(
    op: str,
    config: LossConfig,
    shape: torch.Size,
    like: Tensor,
    rollout: tuple[Any, ...],
    denominator: float | Tensor | None,
    cu_seqlens: Tensor | None,
    index: Tensor | None,
) -> tuple[Any, ...]:
    """The rollout as kernels take it: for its weights (weights, denominator or NaN, whether nothing else is divided)."""
    mask, weights = rollout[-2:]
    if index is not None and weights is not None:  # kernels take weights per element of the minibatch
        weights = taken(op, weights, index)
    plain = weights is not None or config.reduction == "token-mean" or config.reduction == "sum"
    if plain and denominator is None:
        return *rollout[:-1], weights, math.nan, weights is not None or config.reduction == "sum"
    if plain and not isinstance(denominator, Tensor):
        return *rollout[:-1], weights, float(denominator), True  # type: ignore[arg-type]
    if index is not None and mask is not None:
        mask = taken(op, mask, index)
    valid = None if mask is None else mask != 0
    element = torch.empty((), dtype=compute_dtype(like), device=like.device).expand(shape)
    w = token_weights(element, valid, config.reduction, weights, denominator, cu_seqlens)
    return *rollout[:-1], w, math.nan, True


def compute_dtype(*inputs: Tensor | None) -> torch.dtype:
    for x in inputs:
        if x is not None and x.dtype is torch.float64:
            return torch.float64
    return torch.float32


def outputs(like: Tensor, *others: Tensor | None) -> tuple[Tensor, Tensor]:
    """The loss [] and the statistics [len(STATS)], for a kernel to fill."""
    dtype = compute_dtype(like, *others)
    if like.dtype is dtype:
        return like.new_empty(size=()), like.new_empty(_N_STATS)
    return like.new_empty(size=(), dtype=dtype), like.new_empty(_N_STATS, dtype=dtype)


def gradients(inputs: Sequence[Tensor | None], needed: Sequence[bool]) -> list[Tensor | None]:
    """For a kernel to fill; None where none is wanted."""
    return [_memory.empty_like(inputs[i]) if needed[i] else None for i in range(len(needed))]  # type: ignore[arg-type]
