"""The benchmark suite itself: what it refuses, what it writes, and that it counts the bytes that there are."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import re
import time

import pytest
import torch
from ppo_fast.bench import harness, linear_ppo_loss, machine, main, report, vocabulary_peers
from ppo_fast.bench.harness import COPY, OURS, Provider, Row, Target
from rich.console import Console

import ppo_fast as pf

QUICK = {case.op: case for case in main.cases(quick=True)}


@pytest.fixture(autouse=True)
def plain_torch():
    """What a benchmark times is torch as users have it."""
    torch.use_deterministic_algorithms(False)


def whiten_case(ours=pf.whiten):
    """The quick case of whiten, with another implementation in our place."""
    case = QUICK["whiten"]

    def build(c):
        workload = case.build(c)
        x = workload.reads[0]
        workload.providers[0] = Provider(OURS, lambda: ours(x), lambda y: {"y": y})
        return workload

    return dataclasses.replace(case, build=build)


def only(case, monkeypatch):
    monkeypatch.setattr(main, "cases", lambda ops=(), quick=False: [case])


def read_csv(folder):
    (path,) = folder.glob("*/*.csv")
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def config(tmp_path, **changes):
    return main.BenchConfig(quick=True, seconds=0.01, out=tmp_path, png=False, **changes)


# --- refusal ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong",
    [
        lambda x: pf.whiten(x) * (1 + 1e-5),
        lambda x: pf.whiten(x)[:-1],
        lambda x: pf.whiten(x).masked_fill(torch.arange(x.numel()) == 7, torch.nan),
        lambda x: 1 / 0,
    ],
    ids=["scaled", "shape", "nan", "raises"],
)
def test_a_wrong_result_gets_no_number(tmp_path, monkeypatch, capsys, wrong):
    only(whiten_case(wrong), monkeypatch)
    assert main.run(config(tmp_path)) == 1
    ours = [line for line in read_csv(tmp_path) if line["provider"] == OURS]
    assert ours and all(line["status"] == "parity failed" and line["note"] for line in ours)
    assert all(line["p50_us"] == line["gb_per_s"] == "" for line in read_csv(tmp_path))  # nobody's time is taken
    assert "parity failed" in capsys.readouterr().out


def test_a_right_result_gets_one(tmp_path, monkeypatch):
    only(whiten_case(), monkeypatch)
    assert main.run(config(tmp_path)) == 0
    ours = [line for line in read_csv(tmp_path) if line["provider"] == OURS]
    assert ours and all(line["status"] == "ok" and float(line["p50_us"]) > 0 for line in ours)


def test_a_missing_gradient_is_refused():
    truth = {"y": torch.ones(3), "d x": torch.ones(3)}
    assert "d x is missing" in harness.refusal({"y": torch.ones(3)}, {}, truth, {})
    assert harness.refusal(dict(truth), {}, truth, {}) == ""


def test_the_rule_is_twice_eager_plus_a_few_ulp():
    truth, eps = {"y": torch.ones(4, dtype=torch.float64)}, torch.finfo(torch.float32).eps

    def off(by):
        return {"y": torch.full((4,), 1.0 + by)}

    assert harness.refusal(off(7 * eps), off(0.0), truth, {}) == ""
    assert harness.refusal(off(12 * eps), off(0.0), truth, {}) != ""
    assert harness.refusal(off(12 * eps), off(4 * eps), truth, {}) == ""


def test_sums_that_cancel_are_judged_by_what_was_summed():
    truth, eps = {"loss": torch.tensor(0.01, dtype=torch.float64)}, torch.finfo(torch.float32).eps
    ours = {"loss": torch.tensor(0.01 + 4 * eps)}
    assert harness.refusal(ours, {}, truth, {}) != ""
    assert harness.refusal(ours, {}, truth, {"loss": 1.0}) == ""


def test_peers_that_break_or_compute_something_else_have_no_time():
    case = QUICK["whiten"]

    def build(c):
        workload = case.build(c)
        x = workload.reads[0]
        workload.providers[2:] = [
            Provider("numba", lambda: 1 / 0, lambda y: {"y": y}),
            Provider("sb3", lambda: x - x.mean(), lambda y: {"y": y}),
            harness.left_out("torchrl-loop", "not installed"),
        ]
        return workload

    rows = harness.run_case(dataclasses.replace(case, build=build), 1, main.PEERS, 0.01)
    status = {row.provider: (row.status, row.calls > 0) for row in rows}
    assert status[OURS] == status["eager"] == status[COPY] == ("ok", True)
    assert (status["numba"], status["sb3"]) == (("failed", False), ("differs", False))
    assert status["torchrl-loop"] == ("left out", False)


@pytest.mark.parametrize("entropy", [False, True])
def test_peers_of_a_vocabulary_compute_the_same_or_say_why_not(entropy):
    hidden, weight, targets = torch.randn(40, 8), torch.randn(70, 8), torch.randint(70, (40,))
    logits = hidden @ weight.T
    truth = pf.reference.categorical_log_prob(logits.double(), targets)
    of_hidden, of_logits = vocabulary_peers.from_hidden(entropy), vocabulary_peers.from_logits("float32")
    rollout = truth[0].float() + 0.1, torch.randn(40), torch.arange(40) % 3 > 0
    expected, _ = linear_ppo_loss.loss_of(*truth, *(x.double() if x.is_floating_point() else x for x in rollout))
    found = {name: (f and f(hidden, weight, targets), why) for name, (f, why) in of_hidden.items()}
    found |= {f"{name} of logits": (f and f(logits, targets), why) for name, (f, why) in of_logits.items()}
    assert found["torch-chunked"][0] is not None or entropy or "2.13" in found["torch-chunked"][1]
    for results, why in found.values():
        assert results is not None or why
        for x, y in zip(results or (), truth, strict=False):
            if x is not None:
                torch.testing.assert_close(x.double(), y, rtol=1e-5, atol=1e-5)
    for loss, why in linear_ppo_loss.losses_of_peers().values():
        assert loss is not None or why
        if loss is not None:
            torch.testing.assert_close(loss(hidden, weight, targets, *rollout).double(), expected, rtol=1e-5, atol=1e-5)


# --- the floor --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("op", main.OPS)
def test_declared_bytes_are_those_of_the_tensors(op):
    case = QUICK[op]
    workload = case.build(case)
    assert workload.providers[0].name == OURS
    assert workload.yardstick in {p.name for p in workload.providers}
    written = workload.providers[0].read(workload.providers[0].call())
    truth = workload.truth()
    assert set(written) == set(truth) - set(workload.peers_only)
    assert case.bytes == sum(t.nbytes for t in [*workload.reads, *written.values()])
    assert case.flops > 0
    assert harness.refusal(written, {}, {k: truth[k] for k in written}, workload.scales, ulps=64.0) == ""


def test_every_op_has_a_quick_case_and_names_are_unique():
    every = main.cases()
    assert set(QUICK) == set(main.OPS)
    assert len({case.name for case in every}) == len(every)
    assert {p for case in every for t in case.targets for p in t.peers} <= set(harness.LABELS)


# --- report -----------------------------------------------------------------------------------------------------------


def rows():
    """Made-up times of a case with targets: ours 10 µs, eager 200 µs, torch.compile 20 µs, the copy 9 µs."""
    target = Target(3, ("compile",)), Target(10, ("eager",)), Target(0.8, (COPY,))
    case = dataclasses.replace(QUICK["ppo_loss"], targets=target)
    out = []
    for threads in (1, 2):
        for name, us in ((OURS, 10.0), ("eager", 200.0), ("compile", 20.0), (COPY, 9.0)):
            t = us * 1e-6
            out.append(Row(case, threads, name, error=1e-7, calls=5, p20=0.9 * t, p50=t, p80=1.2 * t, ours_faster=us / 10,
                           copy_share=9 / us, others=0.0))  # fmt: skip
        out.append(Row(case, threads, "numba", status="left out", note="numba cannot be imported"))
    return out


def printed(rows, width=140):
    file = io.StringIO()
    report.print_table(rows, machine.facts(), Console(file=file, width=width, force_terminal=True, no_color=True))
    return re.sub(r"\x1b\[[0-9;]*m", "", file.getvalue())


def test_table_says_what_was_met_missed_and_left_out():
    text = printed(rows())
    verdicts = {line.split("≥")[1].split("  ")[0].strip(): line for line in text.splitlines() if "≥" in line}
    assert "missed" in verdicts["3× torch.compile"] and "2.0×" in verdicts["3× torch.compile"]
    assert "met" in verdicts["10× eager torch"] and "20×" in verdicts["10× eager torch"]
    assert "met" in verdicts["80% of copy bandwidth"] and "90%" in verdicts["80% of copy bandwidth"]
    assert "numba cannot be imported" in text
    assert "busy" not in text


@pytest.mark.parametrize("width", [80, 100, 140])
def test_table_fits(width):
    assert all(len(line) <= width for line in printed(rows(), width).splitlines())


def test_a_busy_machine_is_named():
    busy = [dataclasses.replace(row, others=1.5) for row in rows()]
    assert "1.5 cores busy" in printed(busy)
    assert "no verdict: machine busy" in printed(busy) and " met" not in printed(busy)


def test_unmeasured_targets_are_not_met():
    left = [row for row in rows() if row.provider != "compile"]
    assert "not measured" in printed(left)


def test_csv_has_machine_and_versions_in_every_line(tmp_path):
    path = tmp_path / "x.csv"
    report.write_csv(rows(), machine.facts(), path)
    with path.open(newline="") as file:
        lines = list(csv.DictReader(file))
    assert len(lines) == len(rows())
    needed = {*report.COLUMNS, "date", "commit", "cpu", "cores", "isa", "python", "torch", "numba", "torchrl"}
    assert needed <= set(lines[0])
    for line in lines:
        assert line["torch"] == torch.__version__ and line["threads"] in ("1", "2") and line["commit"]
    first = lines[0]
    assert (first["provider"], first["p50_us"], first["copy_share"]) == (OURS, "10.000", "0.9")
    assert float(first["gb_per_s"]) == pytest.approx(QUICK["ppo_loss"].bytes / 10e-6 / 1e9, rel=1e-3)


def test_picture_is_drawn(tmp_path):
    path = tmp_path / "x.png"
    assert report.draw(rows(), machine.facts(), path)
    assert path.read_bytes().startswith(b"\x89PNG")
    assert not report.draw([], machine.facts(), tmp_path / "none.png")


# --- harness and configuration ----------------------------------------------------------------------------------------


def test_providers_take_turns_and_slow_ones_fewer():
    order = []

    def wait():
        order.append("slow")
        time.sleep(0.01)

    slow = Provider("eager", wait)
    fast = Provider(OURS, lambda: order.append("fast"))
    taken = harness.measure([fast, slow], seconds=0.1)
    assert taken["eager"].turns >= 3
    assert len(taken[OURS].seconds) > len(taken["eager"].seconds)
    assert taken["eager"].quantile(0.5) >= 0.01
    changes = sum(a != b for a, b in itertools.pairwise(order))
    assert changes >= 6  # not one after the other


def test_peak_memory_counts_what_is_alive_at_once():
    def run():
        a = torch.zeros(1000)
        b = a + 1  # two of 4000 bytes
        del a
        return b * 2  # again two

    assert 8000 <= harness.peak_memory(Provider("eager", run)) < 8100  # and the scalars


def test_threads_are_as_before(tmp_path, monkeypatch):
    only(whiten_case(), monkeypatch)
    before = torch.get_num_threads()
    main.run(config(tmp_path, threads=(1,)))
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("bad", [{"ops": ("gea",)}, {"providers": ("copy",)}, {"threads": (0,)}, {"seconds": 0.0}])
def test_bad_configuration_says_what_is_expected(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        main.BenchConfig(**bad)


def test_partial_runs_do_not_overwrite_the_full_one(tmp_path, monkeypatch):
    only(whiten_case(), monkeypatch)
    main.run(config(tmp_path, providers=("ours",)))
    (path,) = tmp_path.glob("*/*.csv")
    assert path.name == "quick.csv"


def test_the_readmes_table_of_trainers_is_that_of_the_committed_results():
    from bench.trainers import table
    from ppo_fast.integrations import TRAINERS

    assert set(table.REPLACED) == {*TRAINERS, "cleanrl"}
    assert table.table() in (table.RESULTS.parents[1] / "README.md").read_text()
