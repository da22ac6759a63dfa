"""That the backends which a GPU machine should have are there, and that an op takes the one that it should."""

from __future__ import annotations

import pytest
import torch

import ppo_fast as pf
from ppo_fast import _backend

from .conftest import BACKENDS, DEVICE, expected, missing, needs_cuda


@pytest.mark.parametrize("backend", BACKENDS)
def test_backend_is_here(backend):
    """Not a skip: a run in which nothing of ours was tested must not look like one that passed."""
    if not expected(backend):
        pytest.skip("torch is not built for CUDA")
    assert not missing(backend)


@needs_cuda
def test_choice():
    """CUDA before Triton before the reference, unless the user says otherwise."""
    x = torch.zeros(3, device=DEVICE)
    present = [name for name in BACKENDS if expected(name) and not missing(name)]
    assert _backend.pick("whiten", x).name == present[0]
    for name in present:
        with pf.use_backend(name):
            assert _backend.pick("whiten", x).name == name
            assert f"a GPU tensor takes:  {name}" in pf.explain()
    with pf.use_backend("reference"):
        assert _backend.pick("whiten", x) is None
    assert "no GPU here" not in pf.explain()


@needs_cuda
def test_forced_backend_refuses_the_wrong_device():
    x = torch.zeros(3, device=DEVICE)
    with pf.use_backend("cpu"), pytest.raises(ValueError, match="whiten: backend 'cpu' takes tensors on the CPU"):
        pf.whiten(x)
