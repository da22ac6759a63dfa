"""Several processes that are one run: the ranks that torchrun or Ray Train starts.

A rank has a block of the environments or prompts; everything else is common. Random numbers that decide what is learned
are drawn alike on every rank, for the whole run, and each takes its block of them: so the noise of an environment, the
order of prompts and the minibatches are those of a run in one process, and so is a checkpoint. Gradients are averaged by
torch's data parallel, and every rank weighs its loss such that the average is the gradient of the whole minibatch.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import os
import platform
import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

import ppo_fast as pf
from ppo_fast import reference
from ppo_fast.ops.whiten import joined_moments

from . import sharding
from .errors import UserError, one_line
from .fields import RunFields, flag
from .normalize import RunningMoments
from .rundir import claim

if TYPE_CHECKING:
    from .policies import Batch, Policy
    from .rollout import Episode

C = TypeVar("C", bound=RunFields)
T = TypeVar("T")

#: What torchrun sets. Ray Train and others that make the process group themselves need none of it.
VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
#: A rank that died is noticed at once, as its connections close; one that hangs after this long.
TIMEOUT = timedelta(minutes=10)


class Ranks:
    """This process among those of a run. With one rank everything here gives back what it was given."""

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0, group: Any = None, host: Any = None) -> None:
        self.rank, self.size, self.local_rank = rank, size, local_rank
        self.group = group  # of tensors on the device; None where this is the only rank
        self.host = host  # of tensors and objects of the host

    @property
    def alone(self) -> bool:
        return self.size == 1

    @property
    def leads(self) -> bool:
        """Whether this rank prints, and writes files."""
        return self.rank == 0

    def seed(self, seed: int, *more: int) -> int:
        """For what every rank draws by itself; that of the first is `seed`."""
        key = (self.rank, *more)
        return int(np.random.SeedSequence(seed, spawn_key=key).generate_state(1)[0]) if any(key) else seed

    # --- the share of this rank -----------------------------------------------------------------------------------------

    def local(self, config: C, field: str, of: int = 1) -> C:
        """`config` with this rank's share of `field`, in units of `of`, and its device."""
        if self.alone:
            return config
        count = getattr(config, field)
        if count % (of * self.size):
            units = f" times {of} to a prompt" if of > 1 else ""
            raise UserError(f"{flag(field)}: expected a multiple of the {self.size} ranks{units}, got {count}")
        if config.device not in ("cpu", "cuda"):
            raise UserError(
                f"--device: expected cuda with {self.size} ranks, of which each takes one, got {config.device}"
            )
        share = copy.copy(config)  # not `replace`, which would check the share as if it were a run
        object.__setattr__(share, field, count // self.size)
        object.__setattr__(share, "device", self._device(config.device))
        return share

    def _device(self, device: str) -> str:
        if device == "cpu":
            return device
        count = torch.cuda.device_count()
        if self.local_rank >= count:
            raise UserError(
                f"--device: expected a GPU for each rank of this machine, found {count} for rank {self.local_rank} (from 0) "
                f"of them; start no more: torchrun --nproc-per-node {max(1, count)}, or --device cpu"
            )
        return f"cuda:{self.local_rank}"

    def block(self, count: int) -> slice:
        """The share of this rank in `count` things."""
        each = count // self.size
        return slice(self.rank * each, (self.rank + 1) * each)

    def mine(self, index: Tensor, width: int) -> Tensor:
        """Those of the flat indices into [..., width] whose column is of this rank's block, as indices into that."""
        if self.alone:
            return index
        block, row, column = self.block(width), index // width, index % width
        inside = (column >= block.start) & (column < block.stop)
        return (row * (block.stop - block.start) + column - block.start)[inside]

    def shares(self, order: Tensor, parts: int, width: int) -> tuple[list[Tensor], list[float]]:
        """`order` in `parts` minibatches: this rank's part of each, and how much of it that is."""
        whole = order.tensor_split(parts)
        mine = [self.mine(index, width) for index in whole]
        return mine, [len(m) / len(w) for m, w in zip(mine, whole, strict=True)]

    def most(self, index: Tensor, count: int) -> int:
        """The most of the indices into `count` things that a rank has."""
        return len(index) if self.alone else int((index // (count // self.size)).bincount().max())

    def noise(self, policy: Policy, out: Tensor, generator: torch.Generator) -> None:
        """Fills `out` [T, block, ...] with this rank's columns of the run's noise."""
        if self.alone:
            policy.noise(out, generator)
            return
        steps, columns, *rest = out.shape
        whole = torch.empty(steps, columns * self.size, *rest, dtype=out.dtype)
        policy.noise(whole, generator)
        out.copy_(whole[:, self.block(whole.shape[1])])

    # --- all ranks together ---------------------------------------------------------------------------------------------

    def gather(self, x: T) -> list[T]:
        """The `x` of every rank, on every rank."""
        if self.alone:
            return [x]
        found: list[Any] = [None] * self.size
        dist.all_gather_object(found, x, group=self.host)
        return found

    def collect(self, x: T) -> list[T] | None:
        """The `x` of every rank, on the first; None on the others."""
        if self.alone:
            return [x]
        found: list[Any] | None = [None] * self.size if self.leads else None
        dist.gather_object(x, found, dst=0, group=self.host)
        return found

    def any(self, flag: bool) -> bool:
        if self.alone:
            return flag
        found = torch.tensor(int(flag))
        dist.all_reduce(found, dist.ReduceOp.MAX, group=self.host)
        return bool(found)

    def sum(self, x: Tensor) -> Tensor:
        if self.alone:
            return x
        x = x.clone()
        dist.all_reduce(x, group=self.group)
        return x

    def mean(self, x: Tensor) -> Tensor:
        """Of as many elements on each rank."""
        return x.mean() if self.alone else self.sum(x.mean()) / self.size

    def rows(self, x: Tensor) -> Tensor:
        """[block, ...] of this rank -> [all, ...] of the run."""
        if self.alone:
            return x
        parts = [torch.empty_like(x) for _ in range(self.size)]
        dist.all_gather(parts, x.contiguous(), group=self.group)
        return torch.cat(parts)

    def columns(self, x: np.ndarray) -> np.ndarray:
        """[T, block] of this rank -> [T, all] of the run."""
        if self.alone:
            return x
        mine = torch.from_numpy(np.ascontiguousarray(x))
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self.host)
        return torch.cat(parts, 1).numpy()

    def variance(self, x: Tensor) -> Tensor:
        """Of the elements of all ranks, dividing by their number."""
        if self.alone:
            return x.var(correction=0)
        count, _, m2 = joined_moments(reference.moments_of(x, None), self.group)
        return (m2 / count.clamp(min=1)).to(x.dtype)

    def merge(self, moments: RunningMoments, before: RunningMoments, rows: np.ndarray) -> None:
        """`moments` becomes `before` and the `rows` of all ranks."""
        if self.alone:
            return
        seen = RunningMoments(rows.shape[1:])
        seen.update(rows)
        merged = copy.copy(before)
        for count, mean, m2 in self.gather((seen.count, seen.mean, seen.m2)):
            merged.merge(count, mean, m2)
        moments.count, moments.mean, moments.m2 = merged.count, merged.mean, merged.m2

    def episodes(self, found: list[Episode], first_step: int, envs: int) -> list[Episode]:
        """Those of all ranks in the order of one process; a rank counts only its own `envs` and their steps."""
        if self.alone:
            return found
        moved = [
            e._replace(step=first_step + (e.step - first_step) * self.size, env=self.rank * envs + e.env) for e in found
        ]
        return sorted((e for part in self.gather(moved) for e in part), key=lambda e: (e.step, e.env))

    def agree(self, what: str, value: Any) -> None:
        """`UserError` where ranks were started differently."""
        for rank, other in enumerate(self.gather(value)):
            if other != value:
                mine = value
                if isinstance(value, dict):
                    names = [name for name in value if value[name] != other.get(name)]
                    mine, other = ({name: x.get(name) for name in names} for x in (value, other))
                raise UserError(
                    f"{what}: expected the same on every rank, got {mine} on rank {self.rank} and {other} on rank {rank}; start "
                    "all with one command, and keep the run in a folder that every machine sees"
                )

    def agree_on_versions(self) -> None:
        for node, there in self.gather((platform.node(), versions())):
            check_versions("WORLD_SIZE", node, there)

    # --- the update -----------------------------------------------------------------------------------------------------

    def parallel(self, net: nn.Module) -> nn.Module:
        """`net` with the gradients of its parameters averaged over ranks in every backward."""
        if self.alone:
            return net
        for p in net.parameters():
            p.requires_grad_(p.numel() > 0)  # data parallel would wait for the gradient of nothing
        return nn.parallel.DistributedDataParallel(net, process_group=self.group)

    def shard(self, policy: Any) -> None:
        """Parameters of the policy and of its reference in pieces, one on each rank."""
        if not self.alone:
            for root in (policy, *policy.references):
                sharding.shard(root, root.causal, policy.head.weight.device.type, self.size)

    def weighted(self, loss: Tensor, share: float) -> Tensor:
        """The mean over this rank's `share` of a minibatch, such that the average over ranks is that over the minibatch."""
        return loss if self.alone else loss * (share * self.size)

    def part(self, x: Tensor, share: float) -> Tensor:
        """What the mean `x` over this rank's share adds to that over all."""
        return x if self.alone else (x * share if share else torch.zeros_like(x))

    def normalized(self, batch: Batch, index: Tensor) -> Batch:
        """`batch` with the advantages of the minibatch whitened, over the parts of all ranks."""
        if self.alone:
            return batch
        batch = copy.copy(batch)
        advantages = batch.advantages.clone()
        advantages[index] = pf.whiten(batch.advantages[index], group=self.group)
        batch.advantages = advantages
        return batch

    # --- the folder -----------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def claim(self, config: RunFields) -> Iterator[Any]:
        """The folder of the run: claimed by the first rank, known to all."""
        if self.leads:
            with claim(config) as run:
                self.gather(run.path)
                yield run
        else:
            yield SimpleNamespace(path=self.gather(Path())[0], taken=None)


ALONE = Ranks()


class Follower:
    """What a session is to the first rank, for the others: it writes nothing, but takes part in snapshots."""

    due = False

    def __init__(self, trainer: Any, state: dict[str, Any] | None) -> None:
        self.trainer = trainer
        if state is not None:
            trainer.load_state_dict(state)
        self._saved = trainer.now.iteration

    def log(self, *_: Any) -> None:
        pass

    def save(self) -> None:
        self.trainer.state_dict()
        self._saved = self.trainer.now.iteration

    def finish(self) -> list[Any]:
        if self._saved != self.trainer.now.iteration:
            self.save()
        return []

    def close(self) -> None:
        pass


def versions() -> dict[str, str]:
    """Packages whose objects travel between processes."""
    found = {"python": ".".join(platform.python_version_tuple()[:2]), "ppo_fast": pf.__version__}
    return {**found, "torch": torch.__version__, "numpy": np.__version__}


def check_versions(field: str, node: str, there: dict[str, str]) -> None:
    """`UserError` where another machine has other packages than this one."""
    for name, version in versions().items():
        if there.get(name) != version:
            mend = f"install python {version}" if name == "python" else f"pip install {name}=={version}"
            raise UserError(
                f"{field}: expected {name} {version} as here on every node, got {there.get(name)} on {node}; there: {mend}"
            )


def _size() -> int:
    """The number of ranks by the environment, once for all that torchrun says."""
    if not any(name in os.environ for name in ("RANK", "WORLD_SIZE")):
        return 1
    missing = [name for name in VARIABLES if not os.environ.get(name)]
    if missing:
        given = " and ".join(name for name in ("RANK", "WORLD_SIZE") if name in os.environ)
        raise UserError(
            f"{given} without {', '.join(missing)}: expected all that torchrun sets; start with torchrun --nproc-per-node 2 "
            f"-m ppo_fast.cli train ..., or alone with: unset {given.replace(' and', '')}"
        )
    numbers = {}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        value = os.environ[name]
        if not value.isdecimal():
            raise UserError(f"{name}: expected an integer >= 0, as torchrun sets it, got {value!r}")
        numbers[name] = int(value)
    if numbers["RANK"] >= numbers["WORLD_SIZE"]:
        raise UserError(f"RANK: expected less than WORLD_SIZE = {numbers['WORLD_SIZE']}, got {numbers['RANK']}")
    return numbers["WORLD_SIZE"]


@contextlib.contextmanager
def joined(config: RunFields) -> Iterator[Ranks]:
    """The ranks of this run, for as long as it lasts: of a process group that exists, else of torchrun's variables.

    An error of one rank ends all of them; it is printed by the first that has one.
    """
    made = False
    if not (dist.is_available() and dist.is_initialized()):
        if _size() == 1:
            yield ALONE
            return
        _begin(config)
        made = True
    ranks = _of_group()
    if config.device != "cpu" and ranks.local_rank < torch.cuda.device_count():
        torch.cuda.set_device(ranks.local_rank)
    try:
        ranks.agree_on_versions()
        ranks.agree("configuration", _comparable(config))
        yield ranks
    except UserError as error:
        raise _told(UserError(f"rank {ranks.rank}: {error}")) from error
    except RuntimeError as error:
        if not _lost(error):
            raise
        raise _told(
            UserError(
                f"rank {ranks.rank} lost the others ({_cause(error)}): one of them died or hangs; the run goes on from its "
                "last checkpoint, with any number of ranks, by the same command with --run-dir and --resume"
            )
        ) from error
    finally:
        if made:
            dist.destroy_process_group()


def _begin(config: RunFields) -> None:
    rank, local_rank = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    here = config.device != "cpu" and local_rank < torch.cuda.device_count()  # else `Ranks.local` says what is wrong
    if here:
        torch.cuda.set_device(local_rank)
    backend = "cpu:gloo,cuda:nccl" if here else "gloo"
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=TIMEOUT))
        # torchrun's store outlives a restart of the ranks, and with it the addresses of those that died
        store = dist.PrefixStore(f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=TIMEOUT)
    except (RuntimeError, ValueError) as error:
        address = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        raise UserError(
            f"MASTER_ADDR: rank {rank} cannot reach the others at {address} ({one_line(error)}); start all with torchrun"
        ) from error


def _of_group() -> Ranks:
    rank, size = dist.get_rank(), dist.get_world_size()
    if size == 1:
        return ALONE
    host = dist.group.WORLD
    if "gloo" not in str(dist.get_backend_config()):  # made elsewhere, for devices alone
        host = dist.new_group(backend="gloo", timeout=TIMEOUT)
    return Ranks(rank, size, int(os.environ.get("LOCAL_RANK", 0)), dist.group.WORLD, host)


def _comparable(config: RunFields) -> dict[str, Any]:
    return {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]


def _lost(error: RuntimeError) -> bool:
    """Whether a collective failed, and not the training."""
    return isinstance(error, dist.DistError) or "gloo" in str(error)


def _cause(error: RuntimeError) -> str:
    """The first sentence, without the source file that gloo names."""
    return re.sub(r"\[/\S+\] ", "", one_line(error)).split(". ")[0]


def _told(error: UserError) -> UserError:
    """Marks which rank prints: the first that fails, as the others mostly fail because of it."""
    try:
        store = dist.distributed_c10d._get_default_store()
        error.speaks = store.add("ppo_fast failed", 1) == 1
    except RuntimeError:  # the rank that kept the store is gone
        error.speaks = True
    return error
