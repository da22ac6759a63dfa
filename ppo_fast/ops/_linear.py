"""The head of a language model, a chunk of tokens at a time: logits = hidden·Wᵀ (+ bias, softcapped), what they say of the
targets, and from a gradient written over them d_hidden and dW. The matrix products are torch's; the rest is
categorical_log_prob's kernels on the chunk. Over a process group each rank has a shard of the vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import _backend
from . import _checks
from . import categorical_log_prob as _categorical

#: Bytes of logits that are alive at a time, unless the caller says otherwise.
LOGITS_MEMORY = {"cpu": 192 << 20}
_ON_A_GPU = 1 << 30
_SKIPPED = -100  # the target of a token that is not read


class Chunk(NamedTuple):
    """Tokens of one block. `rows`: which of the flat tokens, a slice or their indices."""

    rows: slice | Tensor
    logits: Tensor | None  # [m, V]; None: forgotten, to be computed again
    log_prob: Tensor  # [m]
    entropy: Tensor | None  # [m]
    saved: Tensor  # [2, m], what categorical_log_prob's backward needs
    targets: Tensor  # [m], of this rank's shard


class Gradients:
    """Sums over chunks, in float32 at least; None where none is wanted."""

    def __init__(self, head: Head, needed: tuple[bool, bool, bool]) -> None:
        dtype = torch.float64 if head.dtype is torch.float64 else torch.float32
        made: list[Any] = [None, None, None]
        for i, x in enumerate((head.hidden, head.weight, head.bias)):
            if needed[i] and x is not None:
                make = torch.empty if i == 1 else torch.zeros
                made[i] = make(x.shape, dtype=head.dtype if i == 0 else dtype, device=x.device)
        self.hidden, self.weight, self.bias = made
        self._is_first = True  # nothing is in `weight` yet: to fill it with zeros and read them again takes time

    def add_to_weight(self, d_logits: Tensor, hidden: Tensor) -> None:
        """weight += d_logitsᵀ·hidden, summed in the dtype of `weight`: float32 for halves, so that what many chunks add is not
        rounded away."""
        to, a = self.weight, d_logits.t()
        if to.dtype is a.dtype:
            torch.addmm(to, a, hidden, beta=0.0 if self._is_first else 1.0, out=to)
        else:
            found = torch.mm(a, hidden, out_dtype=to.dtype) if a.is_cuda else torch.mm(a, hidden)
            to.copy_(found) if self._is_first else to.add_(found)
        self._is_first = False

    def results(self, head: Head, shape: torch.Size) -> list[Tensor | None]:
        """In the dtypes of the inputs; `shape` is that of hidden."""
        hidden = self.hidden
        if self.weight is not None and self._is_first:
            self.weight.zero_()
        if hidden is not None and head.group is not None:
            torch.distributed.all_reduce(hidden, group=head.group)
        pairs: Any = ((hidden, head.hidden), (self.weight, head.weight), (self.bias, head.bias))
        found: list[Any] = [None if g is None else g.to(x.dtype) for g, x in pairs]
        return [None if hidden is None else found[0].view(shape), *found[1:]]


class Head:
    """hidden [M, H], weight [V, H] and bias [V] of one call. On CPUs tokens that are not read are left out of every
    product; on a GPU, where to know which costs a wait, they are computed and count nothing."""

    def __init__(
        self, op: str, hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None,
        temperature: float | Tensor, softcap: float | None, ignore_index: int | None, mask: Tensor | None,
        group: Any, logits_memory: int | None,
    ) -> None:  # fmt: skip
        self.op, self.weight, self.bias, self.softcap, self.group = op, weight, bias, softcap, group
        self.lead = hidden.shape[:-1]
        self.hidden = hidden.reshape(-1, hidden.shape[-1])
        self.dtype = product_dtype(hidden, weight)
        self.temperature, rows = _temperature(op, temperature, targets)
        self.temperatures = None if rows is None else rows.reshape(-1)
        self.n, self.vocabulary = self.hidden.shape[0], weight.shape[0]
        self.rank: int = 0 if group is None else group.rank()
        self.ranks: int = 1 if group is None else group.size()
        targets = targets.reshape(-1).long()
        skipped = None if ignore_index is None else targets == ignore_index
        if mask is not None:
            masked = mask.reshape(-1) == 0
            skipped = masked if skipped is None else skipped | masked
        _check_targets(op, targets, skipped, self.vocabulary * self.ranks)
        self.targets = targets if skipped is None else targets.masked_fill(skipped, _SKIPPED)
        self.skipped = skipped
        if skipped is not None and hidden.device.type != "cpu":  # 0·NaN must not reach the products
            self.hidden = self.hidden.masked_fill(skipped[:, None], 0.0)
        memory = LOGITS_MEMORY.get(hidden.device.type, _ON_A_GPU) if logits_memory is None else logits_memory
        self.row_bytes = max(1, self.vocabulary * self.dtype.itemsize)
        self.memory = memory
        self.on_cpu = hidden.device.type == "cpu"

    def blocks(self, size: int, bounds: list[int] | None = None, first: int = 0) -> Iterator[slice]:
        """Consecutive tokens, at most `size` of them (the first block: `first`) where `bounds`, the ends that a block may
        have, allow it."""
        begin = 0
        if bounds is None:
            while begin < self.n:
                end = min(begin + (first if begin == 0 and first else size), self.n)
                yield slice(begin, end)
                begin = end
            return
        for i, end in enumerate(bounds):
            following = bounds[i + 1] if i + 1 < len(bounds) else math.inf
            if following - begin > size and end > begin:
                yield slice(begin, end)
                begin = end

    def chunks(self, backend: Any, ends: list[int] | None) -> Iterator[tuple[slice, slice | Tensor, Chunk]]:
        """(tokens, those of them that are read, their chunk), one after another in the same memory. `ends`: see `blocks`."""
        buffer = None
        for rows in self._turns(ends):
            length = rows.stop - rows.start
            if buffer is None or len(buffer) < length:
                buffer = torch.empty((length, self.vocabulary), dtype=self.dtype, device=self.hidden.device)
            live = self.live(rows)
            yield rows, live, self.forward(backend, live, buffer, True)

    def is_one_chunk(self, ends: list[int] | None) -> bool:
        """Whether `chunks` gives all tokens at once."""
        return sum(1 for _ in self._turns(ends)) == 1

    def _turns(self, ends: list[int] | None) -> Iterator[slice]:
        """A third of the memory that may be, as chunks only have to be large enough for the products."""
        return self.blocks(self.chunk_rows(1 / 3), ends)

    def chunk_rows(self, share: float) -> int:
        return max(1, min(self.n, int(self.memory * share) // self.row_bytes))

    def live(self, rows: slice) -> slice | Tensor:
        """Those of `rows` that are read."""
        if self.skipped is None or not self.on_cpu:
            return rows
        kept = (~self.skipped[rows]).nonzero().squeeze(1)
        return rows if len(kept) == rows.stop - rows.start else kept + rows.start

    # --- forward -------------------------------------------------------------------------------------------------------

    def logits(self, rows: slice | Tensor, buffer: Tensor | None = None) -> Tensor:
        """[m, V] in the product's dtype, written to the front of `buffer` if there is one."""
        hidden = self.hidden[rows].to(self.dtype)
        weight = self.cast(self.weight)
        if buffer is None:
            buffer = torch.empty((len(hidden), self.vocabulary), dtype=self.dtype, device=hidden.device)
        out = buffer[: len(hidden)]
        if self.bias is None:
            torch.mm(hidden, weight.t(), out=out)
        else:
            torch.addmm(self.bias.to(self.dtype), hidden, weight.t(), out=out)
        if self.softcap is not None:
            out.div_(self.softcap).tanh_().mul_(self.softcap)
        return out

    def cast(self, x: Tensor) -> Tensor:
        if x.dtype is self.dtype:
            return x
        if getattr(self, "_cast", None) is None:
            self._cast = x.to(self.dtype)
        return self._cast

    def forward(self, backend: Any, rows: slice | Tensor, buffer: Tensor | None, entropy: bool) -> Chunk:
        logits = self.logits(rows, buffer)
        targets, temperatures = self.targets[rows], None if self.temperatures is None else self.temperatures[rows]
        if self.group is not None:
            targets, own = self._of_shard(targets)
        log_prob, h, saved = _categorical._forward(
            backend, logits, targets, None, temperatures, self.temperature, _SKIPPED, entropy or self.group is not None
        )
        if self.group is not None:
            self._join(log_prob, h, saved, own, targets == _SKIPPED, temperatures)
        return Chunk(rows, logits, log_prob, h, saved, targets)

    def _of_shard(self, targets: Tensor) -> tuple[Tensor, Tensor]:
        """(targets here, whether they are this rank's); another rank's stand at 0."""
        here = targets - self.rank * self.vocabulary
        own = (here >= 0) & (here < self.vocabulary) & (targets != _SKIPPED)
        return torch.where(own, here, torch.where(targets == _SKIPPED, _SKIPPED, 0)), own

    def _join(self, log_prob, h, saved, own, skipped, temperatures) -> None:
        """From a shard's results to those of the whole vocabulary, in place: one collective.

        Each rank tells log Σ exp, entropy and the target's logit. With Z = Σ_r Z_r: entropy = log Z - Σ_r Z_r/Z·(log Z_r - H_r).
        """
        inverse = 1.0 / (self.temperature if temperatures is None else temperatures.to(saved.dtype))
        base = saved[0] * inverse
        empty = saved[1] == math.inf  # nothing possible in the shard, or skipped
        lse = torch.where(empty, -math.inf, base + saved[1])
        taken = torch.where(own, log_prob + lse, 0.0)
        size = torch.full_like(lse, self.vocabulary)
        mine = torch.stack([lse, h, torch.where(own & empty, -math.inf, taken), size])
        all_ranks = [torch.empty_like(mine) for _ in range(self.ranks)]
        torch.distributed.all_gather(all_ranks, mine, group=self.group)
        lses, entropies, taken_of, sizes = torch.stack(all_ranks, 1)
        if self.on_cpu and bool((sizes != size).any()):
            raise ValueError(
                f"{self.op}: weight must have as many rows on every rank of group, got {sizes[:, 0].int().tolist()}"
            )
        total = lses.logsumexp(0)
        dead = skipped | (total == -math.inf)
        total = torch.where(dead, 0.0, total)
        share = (lses - total).exp()
        mean = torch.where(share > 0, share * (lses - entropies), 0.0).sum(0)
        log_prob.copy_(torch.where(dead, 0.0, taken_of.sum(0) - total))
        h.copy_(torch.where(dead, 0.0, total - mean))
        saved[1] = torch.where(dead | empty, math.inf, total - base)

    # --- backward ------------------------------------------------------------------------------------------------------

    def backward(self, backend: Any, chunk: Chunk, d_log_prob: Tensor, d_entropy: Tensor | None, to: Gradients) -> None:
        """Adds a chunk's share of the gradients. Its logits are overwritten; tokens without a gradient cost nothing."""
        rows, logits, h, saved, targets = chunk.rows, chunk.logits, chunk.entropy, chunk.saved, chunk.targets
        if self.on_cpu:
            live = d_log_prob != 0
            if d_entropy is not None:
                live |= d_entropy != 0
            kept = live.nonzero().squeeze(1)
            if len(kept) == 0:
                return
            if len(kept) < len(live):  # the rest leaves both products
                rows = kept + rows.start if isinstance(rows, slice) else rows[kept]
                saved, targets, d_log_prob = saved[:, kept], targets[kept], d_log_prob[kept]
                h = None if h is None else h[kept]
                d_entropy = None if d_entropy is None else d_entropy[kept]
                logits = None if logits is None else _front(logits, kept)
        if logits is None:
            logits = self.logits(rows)
        slope = None if self.softcap is None else 1.0 - (logits / self.softcap).square_()
        temperatures = None if self.temperatures is None else self.temperatures[rows]
        _categorical._backward(
            backend, logits, targets, None, temperatures, self.temperature, h if d_entropy is not None else None, saved,
            d_log_prob.contiguous(), d_entropy, logits,
        )  # fmt: skip
        if self.group is not None:
            self._take_back(rows, targets, d_log_prob, temperatures, saved, logits)
        if slope is not None:
            logits *= slope
        if to.hidden is not None:
            if isinstance(rows, slice):
                torch.mm(logits, self.cast(self.weight), out=to.hidden[rows])
            else:
                to.hidden[rows] = torch.mm(logits, self.cast(self.weight))
        if to.weight is not None:
            to.add_to_weight(logits, self.hidden[rows].to(self.dtype))
        if to.bias is not None:
            to.bias += logits.sum(0, dtype=to.bias.dtype)

    def _take_back(self, rows, targets, d_log_prob, temperatures, saved, d_logits) -> None:
        """Targets of other ranks stood at 0: their 1[target] leaves it again."""
        _, own = self._of_shard(self.targets[rows])
        elsewhere = ~own & (targets != _SKIPPED) & (saved[1] != math.inf)
        inverse = 1.0 / (self.temperature if temperatures is None else temperatures.to(saved.dtype))
        d_logits[:, 0] -= torch.where(elsewhere, d_log_prob * inverse, 0.0).to(d_logits.dtype)


def _front(x: Tensor, rows: Tensor) -> Tensor:
    """x[rows] in the memory of x; rows ascend."""
    for to, at in enumerate(rows.tolist()):
        if to != at:
            x[to].copy_(x[at])
    return x[: len(rows)]


def product_dtype(hidden: Tensor, weight: Tensor) -> torch.dtype:
    """Of the logits: autocast's where it is on, else the wider of the two, so that a float32 head stays one."""
    kind = hidden.device.type
    if torch.is_autocast_enabled(kind) and torch.float64 not in (hidden.dtype, weight.dtype):
        return torch.get_autocast_dtype(kind)
    return torch.promote_types(hidden.dtype, weight.dtype)


def _temperature(op: str, temperature: float | Tensor, targets: Tensor) -> tuple[float, Tensor | None]:
    """As a number, or one a token."""
    if isinstance(temperature, Tensor):
        return 1.0, temperature if temperature.ndim else temperature.expand(targets.shape)
    if not (isinstance(temperature, (int, float)) and 0 < temperature < math.inf):
        raise ValueError(f"{op}: temperature must be a finite number > 0 or a tensor, got {temperature!r}")
    return float(temperature), None


def compiled_temperature(
    op: str, temperature: float | Tensor, targets: Tensor, group: Any
) -> tuple[float, Tensor | None]:
    """What a registered op takes; collectives are none of its arguments."""
    if group is not None:
        raise ValueError(f"{op}: group must be None under torch.compile, got {type(group).__name__}")
    return _temperature(op, temperature, targets)


def check(
    op: str, hidden: Any, weight: Any, targets: Any, bias: Any, temperature: float | Tensor, softcap: float | None,
    group: Any, logits_memory: int | None,
) -> None:  # fmt: skip
    """Everything that costs no look at the numbers."""
    for name, x in (("hidden", hidden), ("weight", weight), ("targets", targets), ("bias", bias)):
        if not isinstance(x, Tensor) and not (name == "bias" and x is None):
            raise TypeError(f"{op}: {name} must be a tensor, got {type(x).__name__}")
    _checks.floating(op, hidden=hidden, weight=weight, bias=bias)
    _checks.same_device(op, hidden, weight=weight, targets=targets, bias=bias)
    if hidden.ndim < 1 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        size = hidden.shape[-1] if hidden.ndim else "H"
        raise ValueError(f"{op}: weight must be [V, H] = [V, {size}], got {list(weight.shape)}")
    _checks.same_shape(op, hidden.shape[:-1], "a label for each row of hidden", targets=targets)
    _checks.same_shape(op, weight.shape[:1], "[V]", bias=bias)
    if targets.dtype == torch.bool or targets.is_floating_point():
        raise TypeError(f"{op}: targets must be an integer type, got {str(targets.dtype)[6:]}")
    if weight.shape[0] == 0:
        raise ValueError(f"{op}: weight must have at least one row, got {list(weight.shape)}")
    if isinstance(temperature, Tensor) and temperature.ndim:
        _checks.floating(op, temperature=temperature)
        _checks.same_device(op, hidden, temperature=temperature)
        _checks.same_shape(op, targets.shape, "the shape of targets", temperature=temperature)
    if softcap is not None and not (isinstance(softcap, (int, float)) and 0 < softcap < math.inf):
        raise ValueError(f"{op}: softcap must be a finite number > 0 or None, got {softcap!r}")
    if logits_memory is not None and not (isinstance(logits_memory, int) and logits_memory > 0):
        raise ValueError(f"{op}: logits_memory must be a number of bytes > 0 or None, got {logits_memory!r}")
    if group is not None and not (hasattr(group, "rank") and hasattr(group, "size")):
        raise TypeError(f"{op}: group must be a torch.distributed process group, got {type(group).__name__}")


def _check_targets(op: str, targets: Tensor, skipped: Tensor | None, vocabulary: int) -> None:
    """On a GPU the kernels find them, late."""
    if targets.device.type != "cpu" or targets.numel() == 0:
        return
    read = targets if skipped is None else targets.masked_fill(skipped, 0)
    least, most = (x.item() for x in read.aminmax())
    if least < 0 or most >= vocabulary:
        at = int(((read < 0) | (read >= vocabulary)).nonzero()[0])
        raise ValueError(f"{op}: targets must be in [0, {vocabulary}), got {int(targets[at])} at {at}")


def pick(op: str, hidden: Tensor, *others: Tensor | None) -> _backend.Backend | None:
    return _checks.pick(op, hidden, *others)
