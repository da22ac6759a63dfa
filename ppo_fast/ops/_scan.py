"""What gae, vtrace and discounted_returns share in Python: outputs, checks for the reference path, more dimensions."""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
from torch import Tensor

from .. import _backend, _memory

_FLOAT = torch.float32
_DOUBLE = torch.float64
Final = Tensor | tuple[Tensor, Tensor] | None


def is_double(*inputs: Tensor) -> bool:
    for x in inputs:  # noqa: SIM110 (a generator costs half a microsecond, a small call takes five)
        if getattr(x, "dtype", None) is _DOUBLE:
            return True
    return False


def empty(like: Tensor, double: bool) -> Tensor:
    """An output, contiguous in the shape of `like`."""
    return _memory.empty_like(like, _DOUBLE if double else _FLOAT)


def check_out(op: str, out: tuple[Tensor, Tensor], rewards: Tensor, values: Tensor, others: tuple) -> None:
    if not (isinstance(out, tuple) and len(out) == 2 and all(isinstance(x, Tensor) for x in out)):
        raise TypeError(f"{op}: out must be a tuple of two tensors, (advantages, returns)")
    _tensor(op, "rewards", rewards)
    _tensor(op, "values", values)
    dtype = _DOUBLE if is_double(rewards, values) else _FLOAT
    taken = [x.untyped_storage().data_ptr() for x in (rewards, values, *others) if isinstance(x, Tensor) and x.numel()]
    for i, x in enumerate(out):
        if x.dtype is not dtype:
            raise TypeError(f"{op}: out[{i}] must be {str(dtype)[6:]}, got {str(x.dtype)[6:]}")
        if x.shape != rewards.shape:
            raise ValueError(
                f"{op}: out[{i}] must be the shape of rewards = {list(rewards.shape)}, got {list(x.shape)}"
            )
        if not x.is_contiguous() or x.requires_grad:
            raise ValueError(f"{op}: out[{i}] must be contiguous and require no gradient")
        if x.numel() and x.untyped_storage().data_ptr() in taken:
            raise ValueError(f"{op}: out[{i}] must have memory of its own, got that of an input or of the other output")
        taken.append(x.untyped_storage().data_ptr())


# --- checks: what the bindings check for the kernels ------------------------------------------------------------------


def check(
    op: str,
    streams: dict[str, Tensor],
    last_values: Tensor | None,
    flags: dict[str, Tensor | None],
    final_values: Final,
    rates: dict[str, Any],
    clips: dict[str, float],
    cu_seqlens: Tensor | None,
    time_dim: int,
    carry: bool = True,
) -> None:
    for name, x in streams.items():
        _floating(op, name, x)
    rewards = streams["rewards"]
    ndim = rewards.ndim
    if ndim == 0:
        raise ValueError(f"{op}: rewards must have a time dimension: [T] or [T, N], got []")
    if not -ndim <= time_dim < ndim:
        raise ValueError(f"{op}: time_dim must be in [{-ndim}, {ndim}), got {time_dim}")
    columns = list(rewards.shape)
    del columns[time_dim]
    letters = "[T]" if ndim == 1 else ("[T, N]", "[N, T]")[time_dim % 2] if ndim == 2 else "the shape of rewards"
    per_column = "[N]"
    if cu_seqlens is not None:
        columns, letters, per_column = [_sequences(op, rewards, cu_seqlens)], "[M]", "[S]"
    if ndim > 2:
        per_column = "the shape of rewards without time"

    def shaped(name, x):
        if x.shape != rewards.shape:
            raise ValueError(f"{op}: {name} must be {letters} = {list(rewards.shape)}, got {list(x.shape)}")

    def per_row(name, x):
        if not columns:
            if x.numel() != 1 or x.ndim > 1:
                raise ValueError(f"{op}: {name} must be [] or [1], got {list(x.shape)}")
        elif list(x.shape) != columns:
            raise ValueError(f"{op}: {name} must be {per_column} = {columns}, got {list(x.shape)}")

    for name, x in streams.items():
        shaped(name, x)
    for name, flag in flags.items():
        if flag is not None:
            _tensor(op, name, flag)
            shaped(name, flag)
    if final_values is None:
        if flags["truncated"] is not None:
            raise ValueError(
                f"{op}: final_values must be given with truncated: V of the state that each truncated step led to, "
                f"{letters} or (flat_index, value)"
            )
    elif isinstance(final_values, tuple):
        _sparse(op, rewards, flags, final_values, carry)
    else:
        _floating(op, "final_values", final_values)
        shaped("final_values", final_values)
    if last_values is not None:
        _floating(op, "last_values", last_values)
        per_row("last_values", last_values)
    final = dict(zip(("final_values[0]", "final_values[1]"), final_values, strict=True)) if isinstance(
        final_values, tuple) else {"final_values": final_values}  # fmt: skip
    for name, x in {**streams, **flags, **rates, **final, "last_values": last_values, "cu_seqlens": cu_seqlens}.items():
        if isinstance(x, Tensor) and x.device != rewards.device:
            raise TypeError(f"{op}: {name} must be on {rewards.device} as rewards, got {x.device}")
    for name, x in rates.items():
        if isinstance(x, Tensor):
            _floating(op, name, x)
            if x.ndim:
                per_row(name, x)
            if _may_look(x) and type(x) in _backend._PLAIN and _backend._peek_functorch() is None:
                wrong = ~((x >= 0) & (x <= 1)).reshape(-1)
                if bool(wrong.any()):
                    at = int(wrong.nonzero()[0])
                    raise ValueError(f"{op}: {name} must be in [0, 1], got {x.reshape(-1)[at].item():g} at {at}")
        elif not 0.0 <= _number(op, name, x) <= 1.0:
            raise ValueError(f"{op}: {name} must be in [0, 1], got {x:g}")
    for name, clip in clips.items():
        if not _number(op, name, clip) > 0.0:
            raise ValueError(f"{op}: {name} must be > 0, got {clip:g}")


def _may_look(x: Tensor) -> bool:
    """Whether reading what `x` holds makes nobody wait: on a GPU nothing is checked that is only known there."""
    return x.device.type == "cpu"


def _tensor(op: str, name: str, x: Tensor) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{op}: {name} must be a tensor, got {'None' if x is None else type(x).__name__}")


def _floating(op: str, name: str, x: Tensor) -> None:
    _tensor(op, name, x)
    if not x.is_floating_point():
        wanted = "float32, float64, bfloat16 or float16"
        raise TypeError(f"{op}: {name} must be {wanted}, got {str(x.dtype).removeprefix('torch.')}")


def _number(op: str, name: str, x: float) -> float:
    try:
        return float(x)
    except (TypeError, ValueError):
        raise TypeError(f"{op}: {name} must be a number, got {type(x).__name__}") from None


def _sequences(op: str, rewards: Tensor, cu_seqlens: Tensor) -> int:
    _tensor(op, "cu_seqlens", cu_seqlens)
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        got = str(cu_seqlens.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: cu_seqlens must be int32 or int64, got {got}")
    if rewards.ndim != 1:
        raise ValueError(f"{op}: rewards must be packed, [M], with cu_seqlens, got {list(rewards.shape)}")
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1:
        raise ValueError(f"{op}: cu_seqlens must be [S + 1], got {list(cu_seqlens.shape)}")
    if not _may_look(cu_seqlens):
        return len(cu_seqlens) - 1
    bounds = cu_seqlens.tolist()
    if bounds[0] != 0 or bounds[-1] != len(rewards):
        raise ValueError(f"{op}: cu_seqlens must go from 0 to M = {len(rewards)}, got {bounds[0]} to {bounds[-1]}")
    for a, b in itertools.pairwise(bounds):
        if b < a:
            raise ValueError(f"{op}: cu_seqlens must not decrease, got {a} before {b}")
    return len(bounds) - 1


def _sparse(op: str, rewards: Tensor, flags: dict[str, Tensor | None], pair: tuple, carry: bool) -> None:
    if len(pair) != 2:
        raise ValueError(
            f"{op}: final_values must be a tensor or a pair (flat_index, value), got a tuple of {len(pair)}"
        )
    index, value = pair
    _tensor(op, "final_values[0]", index)
    if index.is_floating_point() or index.dtype == torch.bool:
        got = str(index.dtype).removeprefix("torch.")
        raise TypeError(f"{op}: final_values[0] must be an integer type, got {got}")
    _floating(op, "final_values[1]", value)
    if index.ndim != 1:
        raise ValueError(f"{op}: final_values[0] must be [K], got {list(index.shape)}")
    if value.shape != index.shape:
        raise ValueError(f"{op}: final_values[1] must be [K] = {list(index.shape)}, got {list(value.shape)}")
    if not _may_look(index):
        return
    outside = (index < 0) | (index >= rewards.numel())
    if bool(outside.any()):
        at = int(outside.nonzero()[0])
        raise ValueError(
            f"{op}: final_values[0] must be in [0, {rewards.numel()}), flat positions in rewards, "
            f"got {int(index[at])} at {at}"
        )
    if flags["truncated"] is None:
        return
    needed = flags["truncated"] != 0
    if flags["terminated"] is not None:
        needed = needed & (flags["terminated"] == 0)
    if carry and flags["mask"] is not None:
        needed = needed & (flags["mask"] != 0)
    needed = needed.flatten().index_fill(0, index.long(), False)
    if bool(needed.any()):
        raise ValueError(
            f"{op}: final_values must have an entry for every truncated step, got none for flat index "
            f"{int(needed.nonzero()[0])}"
        )


def final_grid(backend: _backend.Backend, final_values: Final, rewards: Tensor) -> Final:
    """Final values as the backend takes them: on a GPU sparse ones become a grid, NaN where there is none, and nobody
    waits to see whether one is missing."""
    if not isinstance(final_values, tuple) or backend.name == "cpu":
        return final_values
    index, value = final_values
    grid = torch.full_like(rewards, math.nan, dtype=value.dtype, memory_format=torch.contiguous_format)
    grid.view(-1).index_put_((index.long(),), value)
    return grid


def borders(backend: _backend.Backend, cu_seqlens: Tensor | None) -> Tensor | None:
    """cu_seqlens as the backend takes them: a GPU's kernels read them where they lie, as int64."""
    if backend.name == "cpu" or not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype is not torch.int32:
        return cu_seqlens
    return cu_seqlens.long()


# --- more than two dimensions ------------------------------------------------------------------------------------------


class Grids:
    """Inputs of more than two dimensions as [T, N] where time comes first, else [N, T]; views where strides allow it."""

    def __init__(self, shape: torch.Size, time_dim: int) -> None:
        self.shape = shape
        self.time = time_dim % len(shape)
        self.time_dim = min(self.time, 1)

    def __call__(self, x: Tensor | None) -> Tensor | None:
        if x is None:
            return None
        if self.time == 0:
            return x.reshape(x.shape[0], math.prod(x.shape[1:]))
        x = x.movedim(self.time, -1)
        return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])

    def rows(self, x: float | Tensor | None) -> float | Tensor | None:
        return x.reshape(-1) if isinstance(x, Tensor) and x.ndim else x

    def final(self, x: Final) -> Final:
        if not isinstance(x, tuple):
            return self(x)
        index, value = x
        inner = math.prod(self.shape[self.time + 1 :])
        if self.time == 0 or inner == 1:
            return x
        index = index.long()
        steps = self.shape[self.time]
        outer, step, rest = index // (inner * steps), index // inner % steps, index % inner
        return (outer * inner + rest) * steps + step, value

    def back(self, y: Tensor) -> Tensor:
        if self.time == 0:
            return y.view(self.shape)
        moved = [*self.shape[: self.time], *self.shape[self.time + 1 :], self.shape[self.time]]
        return y.view(moved).movedim(-1, self.time).contiguous()


# --- under torch.compile ----------------------------------------------------------------------------------------------


def constant(x: Tensor | None) -> Tensor | None:
    return x.detach() if isinstance(x, Tensor) else x


def split_final(x: Any) -> tuple[Tensor | None, Tensor | None]:
    """(value, index) as a registered op takes them."""
    index, value = x if isinstance(x, tuple) else (None, x)
    return constant(value), index


def joined_final(value: Any, index: Any) -> Any:
    return value if index is None else (index, value)


def split_rate(x: float | Tensor) -> tuple[float, Tensor | None]:
    return (0.0, constant(x)) if isinstance(x, Tensor) else (x, None)


def joined_rate(number: float, row: Tensor | None) -> float | Tensor:
    return number if row is None else row


def fake(like: Tensor, *inputs: Tensor) -> Tensor:
    return like.new_empty(like.shape, dtype=_DOUBLE if is_double(like, *inputs) else _FLOAT)
