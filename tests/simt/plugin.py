"""pytest plugin: runs a test file with the CUDA kernels, as fibers on the CPU, in place of the CPU's.

    LD_PRELOAD=libasan.so python -m pytest -p simt.plugin tests/test_gae.py     (PYTHONPATH=tests, PF_SIMT_MODULE=<path>)

Left out is what a GPU's kernels do not promise or have no say in: instruction sets and threads, torch.compile, and errors
that need to look at what lies on the device before the call.
"""

from __future__ import annotations

import importlib.util
import os

import pytest
import torch

from ppo_fast import _backend, _workspace

_SEED, _BLOCKS = int(os.environ.get("PF_SIMT_SEED", "1")), int(os.environ.get("PF_SIMT_BLOCKS", "3"))


def _load():
    spec = importlib.util.spec_from_file_location("_C_simt", os.environ["PF_SIMT_MODULE"])
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


module = _load()
reports = torch.full((module.SLOTS, 2), -1, dtype=torch.int64)


def pytest_configure(config):
    module.set_reports(reports.data_ptr())
    module.set_schedule(_SEED, _BLOCKS)
    _backend._cpu = _backend.Backend("cuda", module, lambda: _workspace, True)


#: Words in a test's name, and why it is not run.
NOT_HERE = {
    "isa": "instruction sets",
    "thread": "threads",
    "cache": "the caches of a CPU, and minutes for so many fibers",
    "errors": "what lies on a GPU is looked at late, and refused in other words",
    "out_of_range": "what lies on a GPU is looked at late, and refused in other words",
    "compile": "torch.compile looks at the device of tensors",
    "opcheck": "torch.compile looks at the device of tensors",
    "registered": "torch.compile looks at the device of tensors",
}


def pytest_collection_modifyitems(config, items):
    left_out = [i for i in items if any(word in i.name.lower() for word in NOT_HERE)]
    config.hook.pytest_deselected(items=left_out)
    items[:] = [i for i in items if i not in left_out]


@pytest.fixture(autouse=True)
def nothing_reported():
    yield
    reports.fill_(-1)
