"""How calls on a GPU are timed, counted and captured; the CPU takes the same way where tests run it.

Three times of one call, because they answer different questions:
- device: CUDA events around many calls that lie queued behind a sleeping kernel, so that the GPU never waits for Python.
- call: the wall clock over a loop of calls that ends in one synchronisation: what a Python loop pays, whichever is slower.
- graph: the same calls captured in a CUDA graph and replayed: nothing of Python is left.

Every method has several sets of inputs, more bytes in all than twice the L2 cache, and keeps what each call returned
until that set's next turn: neither inputs nor outputs are found in the cache. All methods of a case take turns.
"""

from __future__ import annotations

import contextlib
import gc
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.profiler import ProfilerActivity

from .harness import silent

#: Kernels that may lie queued at once; the driver's queue holds about a thousand and then makes the CPU wait.
QUEUE = 400
#: A call longer than this has events of its own; shorter ones share a pair.
LONG = 200e-6


@dataclass
class Method:
    """One way to compute a case, on each of the sets of inputs. `calls` are timed, `restore` before a long one is not."""

    name: str
    calls: list[Callable[[], Any]]
    restore: list[Callable[[], None]] | None = None
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext
    finish: Callable[[], None] | None = None  # of another framework: its own way to wait; then the wall clock counts
    drop: Callable[[], None] | None = None  # lets go of what the calls keep
    launches: int = 10  # a guess until counted
    at: int = 0  # the set whose turn is next
    is_long: bool | None = None  # on the device; None: not seen yet

    def next_call(self) -> tuple[Callable[[], Any], Callable[[], None] | None]:
        i, self.at = self.at, (self.at + 1) % len(self.calls)
        return self.calls[i], None if self.restore is None else self.restore[i]


@dataclass
class Times:
    seconds: list[float] = field(default_factory=list)
    hidden: bool = True  # whether Python was always ahead of the GPU

    def quantile(self, q: float) -> float:
        ordered = sorted(self.seconds)
        return ordered[min(len(ordered) - 1, int(q * len(ordered)))]


@dataclass
class Counts:
    """Of one call. `foreign`: torch's own kernels among the launches (a fill of the gradient 1, say)."""

    launches: int = 0
    foreign: int = 0
    copies: int = 0  # of memory, by the driver
    syncs: int = 0
    busy: float = 0.0  # seconds that the kernels ran, gaps left out


class Clock:
    """Of a CPU: everything has happened when a call returns."""

    device = torch.device("cpu")
    #: Inputs of one case together are at least this large, where that takes no more than `most_sets` sets.
    cache_bytes = 1 << 16
    most_sets = 2
    #: Of a Python loop: calls in a row, and how often.
    loop = 5, 3

    def wait(self) -> None:
        pass

    def turn(self, method: Method, estimate: float) -> tuple[list[float], bool]:
        """One turn of a method: seconds a call, and whether they are the device's alone."""
        found = []
        for _ in method.calls:
            call, restore = method.next_call()
            if restore is not None:
                restore()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        return found, True

    def graph(self, method: Method) -> Callable[[], float] | None:
        return None

    def counts(self, method: Method) -> Counts | None:
        return None

    def peak_bytes(self, method: Method) -> int | None:
        return None

    def device_name(self) -> str:
        return "CPU"


class CudaClock(Clock):
    most_sets = 24
    loop = 100, 7

    def __init__(self, device: torch.device) -> None:
        self.device = device
        properties = torch.cuda.get_device_properties(device)
        self.cache_bytes = 2 * properties.L2_cache_size
        self.cycles_a_second = self._cycles_a_second()
        with silent(), torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]):
            self.wait()  # the first profile of a process misses events

    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device)

    def wait(self) -> None:
        torch.cuda.synchronize(self.device)

    def _cycles_a_second(self) -> float:
        """Of the sleeping kernel's clock, measured: it is not the one that properties report."""
        torch.cuda._sleep(1_000_000)
        first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        first.record()
        torch.cuda._sleep(20_000_000)
        last.record()
        self.wait()
        return 20_000_000 / (first.elapsed_time(last) * 1e-3)

    def turn(self, method: Method, estimate: float) -> tuple[list[float], bool]:
        if method.finish is not None:
            return self._wall_turn(method, estimate), False
        if method.restore is not None or estimate > 20e-3:
            return self._long_turn(method, estimate)
        if method.is_long is None:
            method.is_long = self._short_turn(method, estimate, 2)[0][0] > LONG
        return self._long_turn(method, estimate) if method.is_long else self._short_turn(method, estimate, 64)

    def _wall_turn(self, method: Method, estimate: float) -> list[float]:
        assert method.finish is not None
        n = 1 if estimate > 5e-3 else len(method.calls)
        method.finish()
        start = time.perf_counter()
        for _ in range(n):
            method.next_call()[0]()
        method.finish()
        return [(time.perf_counter() - start) / n]

    def _long_turn(self, method: Method, estimate: float) -> tuple[list[float], bool]:
        """Each call between events of its own. Beyond 20 ms (loops over time) nobody tries to queue it all ahead."""
        found, hidden = [], estimate < 20e-3
        for _ in range(4 if hidden else 1):
            call, restore = method.next_call()
            if restore is not None:
                restore()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int((2 * estimate if hidden else 0.0) * self.cycles_a_second))
            first.record()
            call()
            last.record()
            hidden = hidden and not first.query()
            self.wait()
            found.append(first.elapsed_time(last) * 1e-3)
        return found, hidden

    def _short_turn(self, method: Method, estimate: float, most: int) -> tuple[list[float], bool]:
        """Calls behind a kernel that sleeps until all are queued; if it woke too early, longer."""
        n, sets = max(1, min(most, QUEUE // max(1, method.launches))), len(method.calls)
        n -= n % sets if n > sets else 0
        sleep = 4 * estimate * n + 200e-6
        for attempt in range(3):
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(sleep * self.cycles_a_second))
            first.record()
            for _ in range(n):
                method.next_call()[0]()
            last.record()
            hidden = not first.query()
            self.wait()
            if hidden or attempt == 2:
                break
            sleep *= 3
        return [first.elapsed_time(last) * 1e-3 / n], hidden

    def graph(self, method: Method) -> Callable[[], float] | None:
        """A function that replays all calls once and returns the seconds of one; None where they cannot be captured."""
        if method.finish is not None or method.restore is not None:
            return None
        n = len(method.calls)
        try:
            side = torch.cuda.Stream()
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for call in method.calls[: min(3, n)]:
                    call()
            torch.cuda.current_stream().wait_stream(side)
            self.wait()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                for call in method.calls:
                    call()
            graph.replay()
            self.wait()
        except Exception:  # a peer that waits for the GPU, say; the table leaves the column empty
            with contextlib.suppress(Exception):
                self.wait()
            return None

        def replay() -> float:
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(int(100e-6 * self.cycles_a_second))
            first.record()
            graph.replay()
            last.record()
            self.wait()
            return first.elapsed_time(last) * 1e-3 / n

        return replay

    def counts(self, method: Method) -> Counts | None:
        """Kernels, copies and waits of one call, as CUPTI saw them."""
        call = method.calls[0]
        if method.restore is not None:
            method.restore[0]()
        call()
        if method.restore is not None:
            method.restore[0]()
        self.wait()
        with silent(), torch.profiler.profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profile:
            with torch.profiler.record_function("one call"):
                call()
            self.wait()
        return counted(profile.events(), "one call")

    def peak_bytes(self, method: Method) -> int | None:
        if method.finish is not None:
            return None
        if method.drop is not None:
            method.drop()
        gc.collect()
        if method.restore is not None:
            method.restore[0]()
        self.wait()
        torch.cuda.reset_peak_memory_stats(self.device)
        before = torch.cuda.memory_allocated(self.device)
        method.calls[0]()
        self.wait()
        return torch.cuda.max_memory_allocated(self.device) - before


def counted(events: Any, name: str) -> Counts:
    """What happened between start and end of the range `name`, of a profile's events."""
    events = list(events)
    span = next(e.time_range for e in events if e.name == name and e.device_type == torch.autograd.DeviceType.CPU)
    found = Counts()
    for event in events:
        if event.device_type == torch.autograd.DeviceType.CPU:
            inside = span.start <= event.time_range.start <= span.end
            # a blocking copy is one that waits too; the asynchronous one has another name
            waits = "Synchronize" in event.name or event.name == "cudaMemcpy"
            found.syncs += int(inside and waits)
            continue
        if event.name == name or event.name.endswith((" Sync", " Wait Event")):  # the range again, and waits, as the
            continue  # GPU's timeline has them
        if event.name.startswith(("Memcpy", "Memset")):
            found.copies += 1
            continue
        found.launches += 1
        found.foreign += int("at::native" in event.name)
        found.busy += event.time_range.elapsed_us() * 1e-6
    return found


def clock_of(device: torch.device) -> Clock:
    return CudaClock(device) if device.type == "cuda" else Clock()


def sets_of(n_bytes: int, clock: Clock) -> int:
    """How many sets of inputs a case takes."""
    return max(1, min(clock.most_sets, -(-clock.cache_bytes // max(1, n_bytes))))


# --- turns ------------------------------------------------------------------------------------------------------------


def estimate(method: Method, clock: Clock) -> float:
    """Seconds of one call with everything around it, after warm-up; slow ones are not called again to be sure."""
    best = float("inf")
    for i in range(4):
        if method.restore is not None:
            method.restore[i % len(method.calls)]()
        clock.wait()
        start = time.perf_counter()
        method.calls[i % len(method.calls)]()
        (method.finish or clock.wait)()
        best = min(best, time.perf_counter() - start)
        if best > 0.1:
            break
    return best


def take_turns(methods: list[Method], clock: Clock, seconds: float, turns: int = 5) -> dict[str, Times]:
    """Round-robin for `seconds`, shared evenly: slow methods sit rounds out, but everyone gets a few turns."""
    taken = {m.name: Times() for m in methods}
    spent = dict.fromkeys(taken, 0.0)
    count = dict.fromkeys(taken, 0)
    estimates = {}
    for m in methods:
        with m.context():
            estimates[m.name] = estimate(m, clock)
            if estimates[m.name] < 0.02 and m.restore is None:
                for call in m.calls:  # every set once, so that memory is there
                    call()
    least = {name: turns if e < 0.02 else 3 if e < 0.1 else 1 for name, e in estimates.items()}
    with no_collection():
        start, share = time.perf_counter(), seconds / len(methods)
        while (over := (time.perf_counter() - start) / seconds) < 1 or any(count[n] < least[n] for n in count):
            due = [m for m in methods if count[m.name] < least[m.name] or spent[m.name] <= share * over]
            for m in due or [min(methods, key=lambda m: spent[m.name])]:
                began = time.perf_counter()
                with m.context():
                    found, hidden = clock.turn(m, estimates[m.name])
                taken[m.name].seconds += found
                taken[m.name].hidden &= hidden
                spent[m.name] += time.perf_counter() - began
                count[m.name] += 1
    return taken


def call_seconds(method: Method, clock: Clock, slow: bool = False) -> float:
    """Median wall time of a call in a loop that ends in one wait."""
    calls, rounds = (5, 3) if slow else clock.loop
    found = []
    with method.context(), no_collection():
        for _ in range(rounds):
            clock.wait()
            start = time.perf_counter()
            for i in range(calls):
                method.calls[i % len(method.calls)]()
            (method.finish or clock.wait)()
            found.append((time.perf_counter() - start) / calls)
    return sorted(found)[len(found) // 2]


def graph_seconds(method: Method, clock: Clock, rounds: int = 15) -> float | None:
    with method.context():
        replay = clock.graph(method)
        if replay is None:
            return None
        found = [replay() for _ in range(rounds)]
    return sorted(found)[len(found) // 2]  # type: ignore[type-var]


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    enabled = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


# --- the yardstick ----------------------------------------------------------------------------------------------------


def copy_of(n_bytes: int, clock: Clock, name: str) -> Method:
    """torch's copy_ of as many bytes, half read and half written, over as many sets; of random numbers, not zeros."""
    n = sets_of(n_bytes, clock)
    pairs = []
    for _ in range(n):
        source = torch.empty(max(1, n_bytes // 8), device=clock.device).uniform_()
        pairs.append((source, torch.empty_like(source)))
    return Method(name, [lambda s=s, t=t: t.copy_(s) for s, t in pairs], launches=1)


def copy_bandwidth(clock: Clock, n_bytes: int = 1 << 31) -> float:
    """Bytes a second that a copy far larger than the cache moves, read and written."""
    if clock.device.type == "cpu":
        n_bytes = 1 << 22
    method = copy_of(n_bytes, clock, "copy")
    return n_bytes / take_turns([method], clock, 0.1)["copy"].quantile(0.5)
