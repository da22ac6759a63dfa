"""The same cases through pytest-benchmark, for its comparisons over time and machines: nothing here asserts a time.

pytest bench/test_speed.py -k "gae and ours" --benchmark-autosave      # then --benchmark-compare
pytest bench/test_speed.py --benchmark-disable                         # every provider runs once and is checked
"""

from __future__ import annotations

import functools

import pytest
import torch

from .harness import OURS, SOMETHING_ELSE, Case, Workload, deviation, refusal
from .main import PEERS, cases

CASES = {case.name: case for case in cases()}


@functools.lru_cache(maxsize=1)  # tests of one case follow each other
def workload_of(name: str) -> tuple[Workload, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    case: Case = CASES[name]
    workload = case.build(case)
    return workload, workload.truth()


@pytest.mark.parametrize("peer", PEERS)
@pytest.mark.parametrize("name", CASES)
def test_speed(benchmark, name: str, peer: str) -> None:
    workload, truth = workload_of(name)
    provider = next((p for p in workload.providers if p.name == peer), None)
    if provider is None or provider.run is None:
        pytest.skip(f"{peer} does not run {name}" + (f": {provider.why_not}" if provider else ""))
    got = {k: x.detach().clone() for k, x in provider.read(provider.call()).items()}
    if peer == OURS:
        yardstick = next(p for p in workload.providers if p.name == workload.yardstick)
        due = {k: v for k, v in truth.items() if k not in workload.peers_only}
        assert not refusal(got, yardstick.read(yardstick.call()), due, workload.scales)
    else:
        assert all(
            deviation(x, truth[k], workload.scales.get(k, 0.0)) < SOMETHING_ELSE for k, x in got.items() if k in truth
        )
    benchmark.group = name
    benchmark.extra_info.update(bytes=CASES[name].bytes, threads=torch.get_num_threads())
    benchmark.pedantic(provider.run, setup=provider.prepare, rounds=30, warmup_rounds=3)
