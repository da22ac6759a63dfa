"""What runs the GPU tests and measures on a GPU, as far as that goes without one: bench/gpu*.py, bench/gpu.sh, tests/gpu.

Whether a kernel is right or fast is not asked here; whether the tools would notice is.
"""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import itertools
import os
import re
import shutil
import subprocess
import sys
import time
import weakref
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from gpu import cases, sanitize
from ppo_fast.bench import gpu, gpu_cases, gpu_peers, gpu_report, gpu_setup, gpu_timing
from ppo_fast.bench.gpu_cases import BACKWARD, CASES, FORWARD, IN_PLACE, Target
from ppo_fast.bench.gpu_report import COPY, GpuRow
from ppo_fast.bench.gpu_timing import Counts, Method
from ppo_fast.bench.harness import refusal
from torch.autograd import DeviceType

import ppo_fast as pf

ROOT = Path(__file__).parents[1]
CPU = torch.device("cpu")
MEASURED = {*cases.OPS, "linear_ppo_loss"}
TINY = [dataclasses.replace(c, shape=c.tiny) for c in CASES]
in_repository = pytest.mark.skipif(not (ROOT / "bench" / "gpu.sh").exists(), reason="needs the repository")
on_linux = pytest.mark.skipif(sys.platform != "linux", reason="needs bash, coreutils and links")


@pytest.fixture(autouse=True)
def plain_torch():
    """What is timed is torch as users have it."""
    torch.use_deterministic_algorithms(False)


def name_of(case):
    return case.name


# --- the cases --------------------------------------------------------------------------------------------------------


def test_the_targets_are_those_of_the_issue():
    asked = {(c.op, c.shape, c.mode): [(t.kind, t.bound, t.peer) for t in c.targets] for c in CASES if c.targets}
    by_row = [c for c in CASES if c.op == "gae" and c.shape == (4096, 4096)]
    assert [c.targets for c in by_row] == [(Target("bandwidth", 0.9),)] * 2 and len({c.remark for c in by_row}) == 2
    assert asked == {
        ("gae", (4096, 4096), FORWARD): [("bandwidth", 0.9, "")],
        ("gae", (128, 4096), FORWARD): [("call", 15e-6, "")],
        ("gae", (512, 8192), FORWARD): [("bandwidth", 0.85, "")],
        ("categorical_log_prob", (8192, 151_936), FORWARD): [("bandwidth", 0.95, "")],
        ("categorical_log_prob", (8192, 151_936), IN_PLACE): [("bandwidth", 0.9, "")],
        ("ppo_loss", (262_144,), BACKWARD): [("device", 20e-6, ""), ("launches", 2, ""), ("syncs", 0, "")],
        ("categorical_ppo_loss", (65_536, 18), BACKWARD): [("bandwidth", 0.8, ""), ("faster", 5, "torch.compile")],
    }
    assert {c.dtype for c in CASES if c.shape == (8192, 151_936)} == {"bfloat16"}


def test_every_op_has_a_case_and_names_are_unique():
    assert {c.op for c in CASES} == MEASURED
    assert len({c.name for c in CASES}) == len(CASES)
    assert all(c.bytes > 0 and c.name for c in CASES)
    first = next(i for i, c in enumerate(CASES) if not c.targets)
    assert not any(c.targets for c in CASES[first:])  # what is aimed at is measured before the time is up


@pytest.mark.parametrize("case", TINY, ids=name_of)
def test_predicted_bytes_are_those_of_the_tensors(case):
    """And the inputs exist on the device that is asked for, in the dtype that is said, with leaves where gradients go."""
    torch.manual_seed(0)
    x = case.inputs(CPU)
    reads = case.recipe.reads
    assert set(reads) <= set(x) and set(x) <= set(reads) | {"d log_prob", "d entropy", "pristine", "anchor"}
    assert {k for k, v in x.items() if v.requires_grad} - {"anchor"} == (
        set(case.recipe.leaves) if case.mode == BACKWARD else set()
    )
    with pf.use_backend("cpu"):
        written = gpu_cases.results(case, gpu_cases.ours(case), x)
    assert case.bytes == sum(n * x[k].nbytes for k, n in reads.items()) + sum(v.nbytes for v in written.values())
    assert all(x[name].dtype == case.torch_dtype for name in case.recipe.leaves)


@pytest.mark.parametrize("case", TINY, ids=name_of)
def test_eager_ours_and_truth_are_the_same_function(case):
    torch.manual_seed(1)
    x = case.inputs(CPU)
    truth = gpu_cases.truth(case, x)
    for formula in (gpu_cases.ours(case), gpu_peers.eager(case)):
        if case.mode == IN_PLACE:
            gpu_cases.restore(x)
        with pf.use_backend("cpu"):
            got = gpu_cases.results(case, formula, x)
        common = {k: v for k, v in truth.items() if k in got}
        assert common and ("stats" in got or common.keys() == truth.keys() or case.op.endswith("_ppo_loss"))
        assert refusal(got, got, common, case.recipe.scales, ulps=200.0) == ""


@pytest.mark.parametrize("case", [c for c in TINY if c.recipe.truth is not None], ids=name_of)
def test_truth_in_pieces_is_that_of_all_tokens_at_once(case, monkeypatch):
    x = case.inputs(CPU)
    leaves = {k: v.detach().double().requires_grad_() for k, v in x.items() if k in case.recipe.leaves}
    if case.op == "linear_ppo_loss":
        out = pf.reference.linear_log_prob(*leaves.values(), x["actions"])
    else:
        out = pf.reference.categorical_log_prob(*leaves.values(), x["actions"])
    loss = gpu_cases.token_loss_of(pf.reference, {**x, "old_log_prob": x["old_log_prob"].double()}, *out)
    grads = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    for rows in (1, 5, 512):
        monkeypatch.setattr(gpu_cases, "PIECE", rows)
        found = gpu_cases.truth(case, x)
        assert found.keys() == {"loss", *(f"d {k}" for k in leaves)}
        torch.testing.assert_close(found.pop("loss"), loss.detach(), rtol=1e-12, atol=1e-15)
        for name, g in grads.items():
            torch.testing.assert_close(found[f"d {name}"], g, rtol=1e-11, atol=1e-15)


def test_the_in_place_case_overwrites_and_is_restored():
    case = next(c for c in TINY if c.mode == IN_PLACE)
    x = case.inputs(CPU)
    address = x["logits"].data_ptr()
    with pf.use_backend("cpu"):
        out = gpu_cases.results(case, gpu_cases.ours(case), x)
    assert out["d logits"].data_ptr() == address and not torch.equal(x["logits"], x["pristine"])
    gpu_cases.restore(x)
    assert torch.equal(x["logits"], x["pristine"])


def test_a_sample_of_a_large_case_is_the_rows_of_the_whole(monkeypatch):
    case = next(c for c in TINY if c.mode == IN_PLACE)
    monkeypatch.setattr(gpu_cases, "sample_of", lambda c: None)
    x, rows = case.inputs(CPU), torch.tensor([0, 3, 5])
    whole, part = gpu_cases.truth(case, x), gpu_cases.truth(case, x, rows)
    for name, value in part.items():
        torch.testing.assert_close(value, whole[name][rows])
    assert gpu_cases.sampled(case, {"loss": whole["log_prob"], **whole}, rows)["loss"].shape == (6,)


def test_only_what_would_not_fit_is_sampled():
    sampled = {c.name: gpu_cases.sample_of(c) for c in CASES}
    assert {c.shape for c in CASES if sampled[c.name] is not None} == {(8192, 151_936)}
    rows = next(r for r in sampled.values() if r is not None)
    assert rows[0] == 0 and rows[-1] == 8191 and len(rows.unique()) == 256


# --- running a case ---------------------------------------------------------------------------------------------------


def quick(case, wanted=("cpu", "eager"), seconds=0.01):
    return {row.provider: row for row in gpu.run_case(case, gpu_timing.clock_of(CPU), seconds, list(wanted))}


@pytest.mark.parametrize("case", TINY, ids=name_of)
def test_every_case_runs_through_the_harness(case):
    rows = quick(case)
    assert set(rows) == {"cpu", "eager", COPY}
    for row in rows.values():
        assert row.status == "ok" and row.samples > 0 and 0 < row.p20 <= row.p50 <= row.p80, row
    assert rows["cpu"].ours_faster == 1.0 and rows["eager"].ours_faster > 0 and rows[COPY].copy_share == 1.0
    assert rows["cpu"].error < (0.02 if case.dtype == "bfloat16" else 1e-5)
    assert (rows["cpu"].call is not None) is case.small


WHITEN = next(c for c in TINY if c.op == "whiten")


def spoiled(how):
    """whiten with another implementation in our place, and the reference as it is."""
    recipe = WHITEN.recipe
    wrong = lambda lib, x: recipe.ours(lib, x) if lib is pf.reference else how(recipe.ours(lib, x))  # noqa: E731
    return dataclasses.replace(WHITEN, recipe=dataclasses.replace(recipe, ours=wrong))


@pytest.mark.parametrize(
    ("how", "status"),
    [
        (lambda y: y * (1 + 1e-5), "parity failed"),
        (lambda y: y[:-1], "parity failed"),
        (lambda y: y.masked_fill(torch.arange(y.numel()) == 7, torch.nan), "parity failed"),
        (lambda y: 1 / 0, "failed"),
    ],
    ids=["scaled", "shape", "nan", "raises"],
)
def test_a_wrong_result_gets_no_number(how, status, tmp_path, monkeypatch, capsys):
    case = spoiled(how)
    rows = quick(case)
    assert rows["cpu"].status == status and rows["cpu"].note
    assert not any(row.samples for row in rows.values())  # nobody's time is taken
    monkeypatch.setattr(gpu, "CASES", (case,))
    assert gpu.main(["--device", "cpu", "--quick", "--out", str(tmp_path)]) == 1
    assert status in capsys.readouterr().out
    (path,) = tmp_path.glob("*/quick.csv")
    with path.open(newline="") as file:
        assert all(line["device_p50_us"] == line["bandwidth_share"] == "" for line in csv.DictReader(file))


def test_a_wrong_backend_does_not_cost_the_other_its_number(monkeypatch):
    """Two implementations: where one is wrong, the other's times stand."""
    recipe, backend = WHITEN.recipe, []

    def ours(lib, x):
        y = recipe.ours(lib, x)
        return y + 1.0 if lib is pf and backend[-1] == "triton" else y

    @contextlib.contextmanager
    def use(name):
        backend.append(name)
        yield
        backend.pop()

    monkeypatch.setitem(gpu.BACKENDS, "cpu", ("cpu", "triton"))
    monkeypatch.setattr(gpu.pf, "use_backend", use)
    monkeypatch.setitem(gpu._backend._WHY_NOT, "triton", "")
    rows = quick(dataclasses.replace(WHITEN, recipe=dataclasses.replace(recipe, ours=ours)), ("cpu", "triton", "eager"))
    assert (rows["triton"].status, rows["triton"].samples) == ("parity failed", 0)
    assert rows["cpu"].samples and rows["eager"].samples


def test_a_missing_backend_is_left_out_with_its_reason(monkeypatch):
    monkeypatch.setitem(gpu.BACKENDS, "cpu", ("cuda", "cpu"))
    monkeypatch.setitem(gpu._backend._WHY_NOT, "cuda", "not built here")
    rows = quick(WHITEN, ("cuda", "cpu"))
    assert (rows["cuda"].status, rows["cuda"].note) == ("left out", "not built here")
    assert rows["cpu"].samples


def test_peers_that_break_or_compute_something_else_have_no_time(monkeypatch):
    named = gpu_cases.names_of("y")
    makers = {
        "eager": gpu_peers.eager,
        "breaks": lambda c: gpu_cases.Formula(lambda x: 1 / 0, named),
        "other": lambda c: gpu_cases.Formula(lambda x: x["x"] - x["x"].mean(), named),
        "elsewhere": lambda c: None,
    }

    def not_here(case):
        raise gpu_peers.Left("not installed")

    monkeypatch.setattr(gpu, "MAKERS", {**makers, "absent": not_here})
    rows = quick(WHITEN, ("cpu", *makers, "absent"))
    status = {name: (row.status, row.samples > 0) for name, row in rows.items()}
    assert status == {"cpu": ("ok", True), "eager": ("ok", True), COPY: ("ok", True), "breaks": ("failed", False),
                      "other": ("differs", False), "absent": ("left out", False)}  # fmt: skip
    assert rows["breaks"].note.startswith("ZeroDivisionError") and rows["absent"].note == "not installed"


def test_peers_are_asked_only_where_they_compute_such_a_thing():
    """None: not its op. A reason: could be, but is not measured here."""
    found = {}
    for case in TINY:
        for name, make in gpu_peers.MAKERS.items():
            try:
                found[name, case.op] = make(case) is not None or found.get((name, case.op), False)
            except gpu_peers.Left as why:
                assert str(why)
                found[name, case.op] = True
    of = lambda name: {op for (n, op), there in found.items() if n == name and there}  # noqa: E731
    for name in ("flash-attn", "QuACK", "cut-cross-entropy"):
        assert of(name) == {"categorical_log_prob"}
    for name in ("products", "torch, chunked", "TRL", "verl"):
        assert of(name) == {"linear_ppo_loss"}
    assert of("Liger") == {"categorical_log_prob", "linear_ppo_loss"} and of("JAX") == {"gae"}
    assert all(found["eager", op] for op in cases.OPS)


def test_torch_compile_takes_the_same_inputs(monkeypatch):
    case = next(c for c in TINY if c.op == "categorical_ppo_loss" and not c.compile)
    monkeypatch.setattr(torch, "compile", lambda f, dynamic: f)
    x = case.inputs(CPU)
    got = gpu_cases.results(case, gpu_peers.compiled(case), x)
    want = gpu_cases.results(case, gpu_peers.eager(case), x)
    assert got.keys() == want.keys() and all(torch.equal(got[k], want[k]) for k in want)


def test_cases_that_time_did_not_reach_are_said(monkeypatch):
    monkeypatch.setattr(gpu, "run_case", lambda case, *rest: time.sleep(0.02) or [GpuRow(case, "cpu")])
    options = gpu.parse(["--device", "cpu", "--limit", "0.01"])
    rows = gpu.measure([WHITEN, *TINY[:3]], gpu_timing.clock_of(CPU), options)
    assert [row.note for row in rows] == ["", *["time was up"] * 3]


def test_without_a_gpu_it_says_so(capsys):
    assert gpu.main([]) == 2
    assert "no NVIDIA GPU" in capsys.readouterr().err


# --- clocks -----------------------------------------------------------------------------------------------------------


def test_methods_take_turns_and_slow_ones_fewer():
    order = []
    slow = Method("slow", [lambda: (order.append("slow"), time.sleep(0.01))])
    fast = Method("fast", [lambda: order.append("fast")])
    taken = gpu_timing.take_turns([slow, fast], gpu_timing.clock_of(CPU), 0.1)
    assert len(taken["fast"].seconds) > len(taken["slow"].seconds) >= 5
    assert taken["slow"].quantile(0.5) >= 0.01
    assert sum(a != b for a, b in itertools.pairwise(order)) >= 6


def test_sets_of_inputs_rotate_and_are_restored_outside_the_clock():
    seen = []
    method = Method("m", [lambda: seen.append(0), lambda: seen.append(1), lambda: seen.append(2)],
                    [lambda i=i: seen.append(f"r{i}") for i in range(3)])  # fmt: skip
    found, hidden = gpu_timing.clock_of(CPU).turn(method, 0.0)
    assert seen == ["r0", 0, "r1", 1, "r2", 2] and len(found) == 3 and hidden
    call, restore = method.next_call()
    call(), restore()
    assert seen[-2:] == [0, "r0"]


def test_sets_are_as_many_as_the_cache_asks_for():
    clock = SimpleNamespace(cache_bytes=100, most_sets=24)
    assert [gpu_timing.sets_of(n, clock) for n in (1, 5, 30, 99, 100, 1000)] == [24, 20, 4, 2, 1, 1]


def test_what_a_call_returned_is_kept_until_its_next_turn():
    """So that neither outputs nor gradients are written to memory that is still in the cache."""
    alive = []

    def noted(x):
        y = x["x"] * 2.0
        alive.append(weakref.ref(y))
        return y

    formula = gpu_cases.Formula(noted, gpu_cases.names_of("y"))
    method = gpu.method_of(WHITEN, "eager", formula, [WHITEN.inputs(CPU) for _ in range(2)])
    for call in (*method.calls, method.calls[0]):
        call()
    assert [y() is not None for y in alive] == [False, True, True]
    method.drop()
    assert not any(y() is not None for y in alive)
    case = next(c for c in TINY if c.op == "ppo_loss")
    sets = [case.inputs(CPU) for _ in range(2)]
    method = gpu.method_of(case, "eager", gpu_peers.eager(case), sets)
    for call in method.calls:
        call()
    assert all(x["log_prob"].grad is not None for x in sets)
    method.drop()
    assert all(x["log_prob"].grad is None for x in sets)


class FakeEvent:
    """Of a GPU that is as fast as the CPU; `late`: it has reached the first event before Python was done."""

    late = False

    def __init__(self, enable_timing=True):
        self.at = 0.0

    def record(self):
        self.at = time.perf_counter()

    def query(self):
        return FakeEvent.late

    def elapsed_time(self, other):
        return (other.at - self.at) * 1e3


@pytest.fixture
def cuda_clock(monkeypatch):
    """The clock of a GPU, its calls into torch.cuda replaced: everything but the GPU itself."""
    slept = []
    stream = SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Event": FakeEvent, "_sleep": slept.append, "synchronize": lambda device=None: None, "Stream": lambda: stream,
        "current_stream": lambda: stream, "stream": contextlib.nullcontext, "graph": contextlib.nullcontext,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: slept.append("replay")),
        "get_device_properties": lambda device: SimpleNamespace(L2_cache_size=1 << 14),
        "reset_peak_memory_stats": lambda device: None, "memory_allocated": lambda device: 5,
        "max_memory_allocated": lambda device: 12,
    }  # fmt: skip
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)
    monkeypatch.setattr(FakeEvent, "late", False)
    monkeypatch.setattr(gpu_timing.CudaClock, "loop", (4, 3))
    clock = gpu_timing.CudaClock(CPU)
    clock.slept = slept
    return clock


def test_short_calls_share_events_behind_a_sleeping_kernel(cuda_clock):
    calls = []
    method = Method("m", [lambda i=i: calls.append(i) for i in range(3)], launches=10)
    found, hidden = cuda_clock.turn(method, 1e-6)
    assert hidden and len(found) == 1 and not method.is_long
    assert calls[:2] == [0, 1] and calls[2:] == [2, 0, 1] * 13  # two to see how long, then 39: 400 // 10, whole rounds
    FakeEvent.late = True
    del cuda_clock.slept[:]
    found, hidden = cuda_clock.turn(method, 1e-6)
    assert not hidden and len(cuda_clock.slept) == 3  # tried longer sleeps, and says that it was no use
    assert cuda_clock.slept[2] > 8 * cuda_clock.slept[0]


def test_long_calls_have_events_of_their_own_and_are_restored(cuda_clock):
    order = []
    method = Method("m", [lambda: (order.append("call"), time.sleep(1e-3))])
    found, hidden = cuda_clock.turn(method, 1.2e-3)
    assert method.is_long and hidden and len(found) == 4 and min(found) > 0.9e-3
    method = Method("m", [lambda: order.append("call")], [lambda: order.append("restore")])
    del order[:]
    assert len(cuda_clock.turn(method, 1e-5)[0]) == 4 and order == ["restore", "call"] * 4
    loop_over_time = Method("m", [lambda: time.sleep(1e-3)])
    assert cuda_clock.turn(loop_over_time, 0.5)[1] is False  # nobody queues thousands of launches ahead
    foreign = Method("m", [lambda: None], finish=lambda: order.append("finish"))
    assert cuda_clock.turn(foreign, 1e-5)[1] is False and order[-2:] == ["finish", "finish"]


def test_graphs_are_replayed_and_what_cannot_be_captured_is_none(cuda_clock):
    method = Method("m", [lambda: None, lambda: None])
    assert gpu_timing.graph_seconds(method, cuda_clock) >= 0 and cuda_clock.slept.count("replay") == 16
    assert gpu_timing.graph_seconds(Method("m", [lambda: 1 / 0]), cuda_clock) is None
    assert gpu_timing.graph_seconds(Method("m", [lambda: None], [lambda: None]), cuda_clock) is None


@pytest.mark.parametrize("case", [c for c in TINY if c.op in ("ppo_loss", "gae") or c.mode == IN_PLACE], ids=name_of)
def test_a_case_on_the_clock_of_a_gpu(case, cuda_clock):
    rows = {r.provider: r for r in gpu.run_case(case, cuda_clock, 0.01, ["cpu", "eager"])}
    assert all(row.status == "ok" and row.samples for row in rows.values())
    assert rows["cpu"].counts == Counts() and rows["cpu"].peak_bytes == 7
    assert (rows["cpu"].graph is not None) is (case.small and case.mode != IN_PLACE)


def event(name, start, end, device=DeviceType.CPU):
    span = SimpleNamespace(start=start, end=end, elapsed_us=lambda: end - start)
    return SimpleNamespace(name=name, time_range=span, device_type=device)


def test_launches_copies_and_waits_are_counted():
    gpu_side = DeviceType.CUDA
    events = [
        event("cudaDeviceSynchronize", 0, 1),  # before the call
        event("the call", 10, 100),
        event("cudaLaunchKernel", 20, 25),
        event("cudaStreamSynchronize", 30, 40),
        event("cudaMemcpyAsync", 50, 51),
        event("cudaDeviceSynchronize", 110, 120),  # after it: the profiler's own
        event("the call", 10, 100, gpu_side),
        event("void pf::cuda::ppo_loss_kernel<float>", 60, 70, gpu_side),
        event("void at::native::vectorized_elementwise_kernel<FillFunctor>", 70, 72, gpu_side),
        event("Memcpy DtoH (Device -> Pageable)", 73, 74, gpu_side),
        event("Memset (Device)", 74, 75, gpu_side),
        event("Stream Sync", 74, 75, gpu_side),
    ]
    assert gpu_timing.counted(events, "the call") == Counts(2, 1, 2, 1, pytest.approx(12e-6))


def test_a_real_profile_has_what_is_counted():
    """The attributes that `counted` reads are those of this torch."""
    profiler = torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU])
    with profiler as profile, torch.profiler.record_function("the call"):
        torch.ones(5) + 1
    assert gpu_timing.counted(profile.events(), "the call") == Counts()


def test_a_copy_moves_as_many_bytes_as_it_says():
    method = gpu_timing.copy_of(4096, gpu_timing.clock_of(CPU), COPY)
    for call in method.calls:
        assert call().nbytes == 2048 and bool(call().any())  # random, not zeros
    assert gpu_timing.copy_bandwidth(gpu_timing.clock_of(CPU)) > 0


# --- reports ----------------------------------------------------------------------------------------------------------

FACTS = {"gpu": "NVIDIA H100 80GB HBM3", "driver": "1", "copy_gb_s": "3000", "torch": "2", "cuda": "13", "triton": "3",
         "commit": "abc", "date": "today"}  # fmt: skip


def made_up():
    """ppo_loss misses its 20 µs, gae is at 95 %, the fused loss is 4× torch.compile; Triton is slower everywhere."""
    out = []
    for case in CASES:
        if not case.targets:
            continue
        t = case.bytes / 3e12 / 0.95
        if case.op == "ppo_loss":
            t = 25e-6
        rows = {"cuda": t, "triton": 1.5 * t, "eager": 20 * t, "torch.compile": 4 * t, COPY: 0.9 * t}
        for name, p50 in rows.items():
            counts = Counts(3, 1, 0, 0, p50) if name in ("cuda", "triton") and case.op == "ppo_loss" else None
            out.append(GpuRow(case, name, error=1e-7, samples=9, p20=0.9 * p50, p50=p50, p80=1.1 * p50, call=2e-5,
                              graph=p50, counts=counts, peak_bytes=1 << 20, sets=3, copy_share=0.9 * t / p50,
                              ours_faster=p50 / t))  # fmt: skip
        out.append(GpuRow(case, "Liger", "left out", "liger_kernel cannot be imported"))
    return out


def test_verdicts():
    lines = {(a, b): rest for a, b, *rest in gpu_report.target_lines(made_up(), FACTS)}
    assert lines["case", "target"] == ["ppo_fast CUDA", "ppo_fast Triton", ""]
    loss = next(c.name for c in CASES if c.op == "ppo_loss")
    assert lines[loss, "≤ 20 µs on the device"] == ["25.0 µs", "37.5 µs", "**missed**"]
    assert lines[loss, "≤ 2 launches"] == ["2", "2", "met"]  # torch's own fill is not counted
    assert lines[loss, "≤ 0 syncs"] == ["0", "0", "met"]
    fused = next(c.name for c in CASES if c.op == "categorical_ppo_loss" and c.targets)
    assert lines[fused, "≥ 5× torch.compile"][-1] == "**missed**" and lines[fused, "≥ 5× torch.compile"][0] == "4.0×"
    by_row = next(c.name for c in CASES if c.remark == "batch-major")
    assert lines[by_row, "≥ 90% of the device copy bandwidth"] == ["95%", "63%", "met"]
    small = next(c.name for c in CASES if c.shape == (128, 4096))
    assert lines[small, "≤ 15 µs a full call from Python"] == ["20.0 µs", "20.0 µs", "**missed**"]
    assert sum(len(c.targets) for c in CASES) == len(lines) - 1


def test_the_verdict_is_on_cuda_and_nothing_is_met_without_a_number():
    rows = [r for r in made_up() if r.provider != "torch.compile"]
    for row in rows:
        if row.provider == "cuda":
            row.samples, row.status = 0, "parity failed"
    assert {line[-1] for line in gpu_report.target_lines(rows, FACTS)[1:]} == {"not measured"}


def test_a_time_for_which_the_gpu_waited_is_marked_and_not_judged():
    rows = [dataclasses.replace(r, hidden=False, graph=18e-6) for r in made_up() if r.case.op == "ppo_loss"]
    lines = gpu_report.target_lines(rows, FACTS)
    assert ["18.0 µs", "18.0 µs", "met"] in [line[2:] for line in lines]
    assert "(waits)" in gpu_report.markdown(rows, FACTS)


def test_markdown_has_everything_and_ends_with_the_targets():
    text = gpu_report.markdown(made_up(), FACTS)
    lines = text.splitlines()
    assert lines[0] == "# NVIDIA H100 80GB HBM3" and lines[-1].startswith("|") and "3,000 GB/s" in text
    assert "liger_kernel cannot be imported" in text and "torch.compile 4.0×" in text and "eager torch 20×" in text
    assert "2 + 1 of torch" in text
    head = lines.index("## Targets")
    assert len(lines) - head < 25  # the summary of gpu.sh shows it whole
    for block in (lines[head + 2 :], [line for line in lines[:head] if line.startswith("|")]):
        assert len({line.count("|") for line in block}) == 1 and len({len(line) for line in block}) == 1


def test_csv_has_machine_and_versions_in_every_line(tmp_path):
    path = tmp_path / "gpu.csv"
    rows = made_up()
    gpu_report.write_csv(rows, FACTS, path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows) and {*gpu_report.COLUMNS, *FACTS} == set(lines[0])
    assert all(line["gpu"] == FACTS["gpu"] and line["commit"] == "abc" for line in lines)
    first = lines[0]
    assert (first["provider"], first["bandwidth_share"], first["sets"]) == ("cuda", "0.95", "3")
    assert float(first["device_p50_us"]) == pytest.approx(rows[0].p50 * 1e6, abs=1e-3)
    absent = next(line for line in lines if line["provider"] == "Liger")
    assert absent["status"] == "left out" and absent["device_p50_us"] == absent["call_us"] == absent["launches"] == ""


def test_picture_is_drawn(tmp_path):
    path = tmp_path / "gpu.png"
    assert gpu_report.draw(made_up(), FACTS, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not gpu_report.draw([], FACTS, tmp_path / "none.png")
    many = [(c, []) for c in CASES]
    shown = [c for c, _ in gpu_report.headlines(many)]
    assert [c for c in shown if c.targets] == [c for c in CASES if c.targets]
    assert {c.op for c in shown} == MEASURED


def test_results_have_a_folder_of_their_gpu(tmp_path, monkeypatch):
    assert gpu.slug("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3"
    monkeypatch.setattr(gpu, "CASES", (CASES[0],))
    monkeypatch.setenv("PPO_FAST_COMMIT", "feedbee")
    assert gpu.main(["--device", "cpu", "--tiny", "--quick", "--out", str(tmp_path)]) == 0
    assert {p.name for p in (tmp_path / "cpu").iterdir()} == {"quick.csv", "quick.md", "quick.png"}
    assert "feedbee" in (tmp_path / "cpu" / "quick.md").read_text()


@in_repository
def test_the_table_in_the_docs_is_what_the_benchmark_computes():
    text = (ROOT / "docs" / "gpu.md").read_text()
    table = text.split("<!-- issue shapes -->")[1].split("<!-- end of issue shapes -->")[0]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.strip().splitlines()[2:]]
    aimed = [c for c in CASES if c.targets]
    assert len(rows) == len(aimed)
    for (call, n_bytes, predicted, asked, _), case in zip(rows, aimed, strict=True):
        assert call.startswith(f"`{case.op}` {list(case.shape)}")
        assert n_bytes == f"{case.bytes:,}"
        assert predicted == f"{case.bytes / 3e12 * 1e6:,.1f} µs"
        for target in case.targets:
            if target.kind == "bandwidth":
                assert f"{target.bound:.0%}".replace("%", " %") in asked
                assert f"{case.bytes / 3e12 / target.bound * 1e6:,.1f} µs" in asked


# --- the small calls of tests/gpu ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("op", "i"), cases.SMALL)
def test_small_calls_pass_on_the_cpu(op, i):
    """The CPU's kernels are held to the same truth by the same calls: so the backends agree with each other."""
    cases.assert_parity_of(cases.small(op)[i], cases.on("cpu", "cpu", op))


@pytest.mark.parametrize("op", cases.OPS)
def test_small_calls_fail_where_a_result_is_wrong(op):
    """A little too large, by more than rounding: no op's parity passes it."""

    def wrong(*args, **kwargs):
        out = getattr(pf, op)(*args, **kwargs)
        if isinstance(out, pf.PPOLoss):
            return pf.PPOLoss(out.loss * 1.001, pf.Stats(out.stats.vector * 1.001))
        return tuple(x * 1.001 for x in out) if isinstance(out, tuple) else out * 1.001

    with pytest.raises(AssertionError):
        cases.assert_parity_of(cases.small(op)[0], wrong)


@pytest.mark.parametrize("op", cases.OPS)
def test_another_seed_gives_other_numbers_in_the_same_memory(op):
    """What graphs are replayed with: everything fits where the first call's tensors lie."""
    for one, two, again in zip(cases.small(op, 0), cases.small(op, 1), cases.small(op, 0), strict=True):
        tensors = [k for k, v in one.arguments.items() if isinstance(v, torch.Tensor)]
        assert tensors == [k for k, v in two.arguments.items() if isinstance(v, torch.Tensor)]
        for name in tensors:
            a, b, c = one.arguments[name], two.arguments[name], again.arguments[name]
            assert (a.shape, a.stride(), a.dtype) == (b.shape, b.stride(), b.dtype) and torch.equal(a, c)
            assert 0 not in [s for s, n in zip(a.stride(), a.shape, strict=True) if n > 1]  # can be copied into
        assert not all(torch.equal(one.arguments[k], two.arguments[k]) for k in tensors)


def test_moving_keeps_strides_offsets_and_gradients():
    x = torch.arange(60.0)[3:].as_strided((4, 5), (11, 2))
    y = cases.moved(x, "cpu")
    assert torch.equal(x, y) and y.stride() == (11, 2) and y.storage_offset() == 3 and y.data_ptr() != x.data_ptr()
    wide = torch.randn(5).expand(3, 5)
    assert cases.moved(wide, "cpu").stride() == (0, 1)
    assert cases.moved((x, 3), "cpu")[1] == 3
    leaf = torch.randn(7, requires_grad=True)
    cases._there(leaf, "cpu").square().sum().backward()
    assert torch.equal(leaf.grad, 2 * leaf.detach())


def test_bits_are_compared():
    nan, zero = torch.tensor([torch.nan, 0.0]), torch.tensor([torch.nan, -0.0])
    assert cases.same({"x": nan}, {"x": nan.clone()}) == []
    other_nan = torch.tensor([-1, 0], dtype=torch.int32).view(torch.float32)
    assert other_nan[0].isnan() and cases.same({"x": nan}, {"x": other_nan}) == []
    assert cases.same({"x": nan}, {"x": zero}) == ["x"]
    assert cases.same({"x": nan}, {"x": nan.double()}) == ["x"]
    ones = torch.ones(3)
    assert cases.same({"x": ones}, {"x": torch.nextafter(ones, 2 * ones)}) == ["x"]


def run_pytest(*args, **environment):
    """tests/gpu in a process of its own: what is decided at import is decided anew."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTEST_", "TRITON_", "PPO_FAST_TRY"))}
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu"), *args]
    return subprocess.run(command, cwd=ROOT, env=kept | {"OMP_NUM_THREADS": "1"} | environment, capture_output=True,
                          text=True, timeout=900)  # fmt: skip


@in_repository
def test_gpu_tests_are_skipped_with_a_reason():
    done = run_pytest("-m", "gpu", "-rs", "-k", "backends or errors or large", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 0, done.stdout[-2000:]
    assert "no NVIDIA GPU here: torch.cuda.is_available() is False" in done.stdout
    assert re.search(r"\d+ skipped", done.stdout) and "passed" not in done.stdout.splitlines()[-1]


@in_repository
def test_gpu_tests_pass_on_the_cpu_in_a_gpus_place():
    done = run_pytest("-k", "bits or errors or backends or (parity and reference)", PPO_FAST_TRY_GPU_TESTS="cpu")
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


# --- compute-sanitizer ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("tool", "code", "text", "passed", "says"),
    [
        ("memcheck", 0, "========= ERROR SUMMARY: 0 errors", True, "ERROR SUMMARY: 0 errors"),
        ("racecheck", 0, "========= RACECHECK SUMMARY: 0 hazards displayed (0 errors, 0 warnings)", True, "0 hazards"),
        ("memcheck", 99, "========= Invalid __global__ read of size 4 bytes\n========= ERROR SUMMARY: 1 error", False,
         "first: Invalid __global__ read"),
        ("memcheck", 1, "Traceback\nValueError: wrong\n========= ERROR SUMMARY: 0 errors", False, "exit 1"),
        ("synccheck", 0, "3 ops called", False, "the tool said nothing"),
        ("initcheck", None, "", False, "took too long"),
        ("memcheck", 255, "Device not supported", False, "exit 255: Device not supported"),
        ("planted", 99, "========= Invalid __global__ write of size 4", True, "was found"),
        ("planted", 0, "========= ERROR SUMMARY: 0 errors", False, "DID NOT FIND"),
    ],
)  # fmt: skip
def test_verdicts_on_the_sanitizer(tool, code, text, passed, says):
    got, line = sanitize.verdict(tool, code, text)
    assert got is passed and says in line and "\n" not in line


def test_a_missing_sanitizer_fails(monkeypatch, capsys):
    monkeypatch.setattr(sanitize.shutil, "which", lambda *args, **kwargs: None)
    assert sanitize.main([]) == 1
    assert "compute-sanitizer is not on PATH" in capsys.readouterr().out


def test_sanitized_calls_cover_every_op_and_fail_where_one_does(monkeypatch, capsys):
    assert sanitize.calls(["cpu"], ["whiten", "normal_log_prob"], "cpu") == 0
    assert "2 ops called, 0 calls failed" in capsys.readouterr().out
    monkeypatch.setattr(cases, "on", lambda *args: lambda **kwargs: 1 / 0)
    assert sanitize.calls(["cpu"], ["whiten"], "cpu") == len(cases.small("whiten"))
    assert "whiten[0]: ZeroDivisionError" in capsys.readouterr().out


@on_linux
@pytest.mark.parametrize("broken", [(), ("racecheck", "planted")], ids=["all well", "two broken"])
def test_all_tools_run_and_each_can_fail_the_part(tmp_path, capsys, monkeypatch, broken):
    """With a stand-in that exits as the tool would."""
    stub = tmp_path / "compute-sanitizer"
    stub.write_text(f"""#!/bin/sh
case "{" ".join(broken)}|$*" in
*planted*"|"*planted) ;;
*"|"*planted) echo "========= Invalid __global__ write of size 4"; exit 99 ;;
*racecheck*"|"*"--tool racecheck "*) echo "========= ERROR SUMMARY: 4 errors"; exit 99 ;;
esac
echo "========= ERROR SUMMARY: 0 errors"
""")
    stub.chmod(0o755)
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: str(stub))
    code = sanitize.main(["--backends", "cpu", "--device", "cpu", "--ops", "whiten", "--logs", str(tmp_path)])
    lines = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line}
    assert code == bool(broken)
    assert {*sanitize.TOOLS, "planted"} <= set(lines)
    for tool in (*sanitize.TOOLS, "planted"):
        assert ("FAILED" in lines[tool]) is (tool in broken), lines[tool]


# --- bench/gpu.sh -----------------------------------------------------------------------------------------------------


def gpu_sh(root=ROOT, python=sys.executable, **environment):
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PPO_FAST_", "PYTHON"))}
    kept.update({"CUDA_VISIBLE_DEVICES": "", "PYTHON": str(python)} | environment)
    return subprocess.run(
        ["bash", str(root / "bench" / "gpu.sh")], env=kept, capture_output=True, text=True, timeout=120
    )


@in_repository
@on_linux
@pytest.mark.parametrize(
    ("environment", "says"),
    [
        ({}, "no NVIDIA GPU"),
        ({"PARTS": "bild"}, "PARTS must be of build, test, sanitize and bench; got bild"),
        ({"ARGS": "-k gae"}, "ARGS are for a single part"),
        ({"PYTHON": "no-such-python"}, "no no-such-python on PATH"),
    ],
    ids=["no GPU", "parts", "args", "python"],
)
def test_gpu_sh_says_what_is_missing(environment, says):
    began = time.monotonic()
    done = gpu_sh(**environment)
    assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
    assert says in done.stderr and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert time.monotonic() - began < 60


FAKE = """#!/bin/bash
# A Python on a machine with a GPU, as gpu.sh sees it: says what it was asked, and fails where the test wants it to.
case "$*" in
*"gpu_setup.py facts") printf 'gpu=NVIDIA Test 9\\ndevices=0,1\\narchitecture=90-real\\ntag=cpython-399\\n'; exit ;;
*"gpu_setup.py dlpack"*) echo /some/include; exit ;;
*"gpu_setup.py tree"*) mkdir -p "$3"; exit ;;
"-c import xdist") exit ;;
esac
echo "asked in $PWD: $*"
echo "with $CUDA_VISIBLE_DEVICES $PPO_FAST_CUDA $PPO_FAST_CUDA_ARCHITECTURES $PPO_FAST_DLPACK_INCLUDE $PPO_FAST_BUILD_DIR"
case "$*" in
"setup.py build_ext"*) part=build; echo "ppo_fast: built _C_cuda.so (3 KiB); CUDA: built with nvcc" ;;
"-m pytest"*) part=test; echo "FAILED tests/gpu/test_gpu_bits.py::test_x - AssertionError"; echo "1 failed, 9 passed in 2s" ;;
*sanitize.py*) part=sanitize; echo "memcheck   passed  ERROR SUMMARY: 0 errors" ;;
"-m ppo_fast.bench.gpu"*) part=bench; printf -- '- parity failed: y\\n## Targets\\n\\n| case |\\n| gae | 90%% |\\n' ;;
esac
[[ " $SLOW " != *" $part "* ]] || sleep 30
[[ " $FAIL " != *" $part "* ]]
"""


@pytest.fixture
def machine(tmp_path):
    """A checkout with nothing but the script, and a stand-in for Python."""
    (tmp_path / "bench").mkdir()
    shutil.copy(ROOT / "bench" / "gpu.sh", tmp_path / "bench")
    python = tmp_path / "python"
    python.write_text(FAKE)
    python.chmod(0o755)
    environment = {"CUDA_VISIBLE_DEVICES": "3"}
    return lambda **more: gpu_sh(tmp_path, python, **environment | more)


@in_repository
@on_linux
def test_gpu_sh_runs_its_parts_and_sums_up(machine):
    done = machine()
    assert done.returncode == 0, done.stdout
    summary = done.stdout.split("=== summary: NVIDIA Test 9")[1]
    assert len(summary.splitlines()) < 60
    assert re.findall(r"^(build|test|sanitize|bench) +passed", summary, re.M) == ["build", "test", "sanitize", "bench"]
    for line in ("ppo_fast: built _C_cuda.so", "FAILED tests/gpu/test_gpu_bits.py", "1 failed, 9 passed", "memcheck   passed",
                 "- parity failed: y", "| gae | 90% |"):  # fmt: skip
        assert line in summary
    assert "with 3 1 90-real /some/include build/gpu/cpython-399" in done.stdout  # the user's device, our build
    asked = re.findall(r"^asked in (\S+): (.*)", done.stdout, re.M)
    assert [command.split()[0] for _, command in asked] == ["setup.py", "-m", asked[2][1].split()[0], "-m"]
    assert all(where.endswith("build/gpu/site") for where, _ in asked[1:])  # the package is found there
    assert "-m gpu" in asked[1][1] and "--dist loadgroup" in asked[1][1] and "--limit" in asked[3][1]


@in_repository
@on_linux
def test_gpu_sh_fails_where_a_part_did_and_runs_the_later_ones(machine):
    done = machine(FAIL="build sanitize")
    assert done.returncode == 1
    summary = done.stdout.split("=== summary")[1]
    verdicts = re.findall(r"^(build|test|sanitize|bench) +(passed|FAILED)", summary, re.M)
    assert verdicts == [("build", "FAILED"), ("test", "passed"), ("sanitize", "FAILED"), ("bench", "passed")]


@in_repository
@on_linux
def test_gpu_sh_stops_what_takes_too_long(machine):
    """A part leaves a minute for each that comes after it; here the first one may take six seconds."""
    began = time.monotonic()
    done = machine(PARTS="sanitize bench", LIMIT_S="66", SLOW="sanitize")
    assert done.returncode == 1 and time.monotonic() - began < 60
    assert re.search(r"^sanitize +FAILED: out of time", done.stdout, re.M) and re.search(
        r"^bench +passed", done.stdout, re.M
    )


@in_repository
@on_linux
def test_gpu_sh_runs_a_part_alone_with_arguments(machine):
    done = machine(PARTS="test", ARGS="-k graphs")
    assert done.returncode == 0
    (asked,) = re.findall(r"^asked in .*", done.stdout, re.M)
    assert asked.endswith("tests/gpu -k graphs")


# --- bench/gpu_setup.py -----------------------------------------------------------------------------------------------

HEADER = "#define DLPACK_MAJOR_VERSION {}\n#define DLPACK_MINOR_VERSION {}\n" + "\n".join(gpu_setup.NEEDED)


def carry(folder, place, text):
    (folder / place).parent.mkdir(parents=True, exist_ok=True)
    (folder / place).write_text(text)


def test_dlpack_header_of_the_build_dependency_comes_first(tmp_path, monkeypatch):
    monkeypatch.delenv("PPO_FAST_DLPACK_INCLUDE", raising=False)
    carry(tmp_path, "tvm_ffi/include/dlpack/dlpack.h", HEADER.format(1, 3))
    carry(tmp_path, "torch/include/ATen/dlpack.h", HEADER.format(1, 3))
    monkeypatch.setattr(gpu_setup, "package_folder", lambda name: tmp_path / name)
    assert gpu_setup.dlpack_include(tmp_path / "scratch") == tmp_path / "tvm_ffi" / "include"


@on_linux
def test_dlpack_header_of_torch_is_linked_to_where_there_is_no_other(tmp_path, monkeypatch):
    monkeypatch.delenv("PPO_FAST_DLPACK_INCLUDE", raising=False)
    carry(tmp_path, "torch/include/ATen/dlpack.h", HEADER.format(1, 2))
    monkeypatch.setattr(gpu_setup, "package_folder", lambda name: None if name == "tvm_ffi" else tmp_path / name)
    for _ in range(2):  # the second run finds the first one's link
        assert gpu_setup.dlpack_include(tmp_path / "scratch") == tmp_path / "scratch"
    assert "DLPackExchangeAPI" in (tmp_path / "scratch" / "dlpack" / "dlpack.h").read_text()


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (HEADER.format(0, 8), "version 0.8, not 1.x"),
        (HEADER.format(1, 0).replace("DLPackExchangeAPI", ""), "version 1.0 without DLPackExchangeAPI"),
        ("", "no version, not 1.x"),
    ],
)
def test_old_dlpack_headers_are_named(tmp_path, monkeypatch, text, why):
    monkeypatch.delenv("PPO_FAST_DLPACK_INCLUDE", raising=False)
    carry(tmp_path, "torch/include/ATen/dlpack.h", text)
    monkeypatch.setattr(gpu_setup, "package_folder", lambda name: tmp_path / name if name == "torch" else None)
    with pytest.raises(gpu_setup.Missing, match="PPO_FAST_DLPACK_INCLUDE=FOLDER") as caught:
        gpu_setup.dlpack_include(tmp_path / "scratch")
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_a_given_dlpack_header_is_taken_or_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("PPO_FAST_DLPACK_INCLUDE", str(tmp_path))
    with pytest.raises(gpu_setup.Missing, match="not there"):
        gpu_setup.dlpack_include(tmp_path / "scratch")
    carry(tmp_path, "dlpack/dlpack.h", HEADER.format(1, 3))
    assert gpu_setup.dlpack_include(tmp_path / "scratch") == tmp_path


def test_the_header_of_this_torch_would_serve():
    """So that a machine without apache-tvm-ffi can build."""
    header = next((h for h in gpu_setup.headers() if h.parent.name == "ATen"), None)
    if header is None or not header.exists():
        pytest.skip("torch is not installed as a wheel")
    assert gpu_setup.why_not(header) == ""


@in_repository
@on_linux
def test_the_tree_imports_as_an_installation_does(tmp_path):
    gpu_setup.tree(tmp_path)
    gpu_setup.tree(tmp_path)  # again, over what is there
    code = f"""
import ppo_fast, ppo_fast.kernels, ppo_fast.bench.gpu_report, ppo_fast.ops.gae
assert ppo_fast.__file__.startswith({str(tmp_path)!r}), ppo_fast.__file__
assert ppo_fast.bench.__file__.startswith({str(tmp_path)!r}) and ppo_fast.kernels.__file__.startswith({str(tmp_path)!r})
import torch
print(ppo_fast.whiten(torch.randn(5)).shape)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "PYTHONPATH": str(tmp_path)})  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert "torch.Size([5])" in done.stdout
    assert not (ROOT / "ppo_fast" / "kernels").exists() and not (ROOT / "ppo_fast" / "bench").exists()
