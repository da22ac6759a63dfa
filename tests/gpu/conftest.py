"""What the GPU tests share: which backends this machine must have, skips where there is no GPU, and a clean state."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch

from ppo_fast import _backend, _workspace

HERE = Path(__file__).parent
#: To try these tests where there is no GPU: PPO_FAST_TRY_GPU_TESTS=cpu, or triton with TRITON_INTERPRET=1. Those backends
#: then run on the CPU in place of a GPU's, and what needs streams, graphs or CUDA's memory is skipped.
TRIED = tuple(os.environ.get("PPO_FAST_TRY_GPU_TESTS", "").split())
DEVICE = "cpu" if TRIED else "cuda:0"
BACKENDS = TRIED or ("cuda", "triton")
NO_GPU = "" if TRIED or torch.cuda.is_available() else "no NVIDIA GPU here: torch.cuda.is_available() is False"
needs_cuda = pytest.mark.skipif(bool(TRIED), reason="tried on a CPU: no streams, graphs or device memory")


def missing(backend: str) -> str:
    """Why a backend that a GPU machine should have is not there, or ""."""
    if backend == "triton" and not TRIED and _backend.interprets_triton():
        return "TRITON_INTERPRET=1: nothing would run on the GPU"
    return _backend._WHY_NOT[backend]


def expected(backend: str) -> bool:
    """Only NVIDIA's GPUs have CUDA kernels; torch calls AMD's "cuda" too."""
    return backend != "cuda" or torch.version.cuda is not None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Without a GPU everything here is skipped. With one, a backend that is not there fails once, by name
    (test_gpu_backends.py), and its other tests say that they could not run."""
    for item in items:
        if HERE not in Path(item.path).parents:
            continue
        item.add_marker(pytest.mark.gpu)
        if NO_GPU:
            item.add_marker(pytest.mark.skip(reason=NO_GPU))
            continue
        backend = getattr(item, "callspec", None) and item.callspec.params.get("backend")
        if backend and "test_gpu_backends" not in item.nodeid and (why := missing(backend)):
            item.add_marker(pytest.mark.skip(reason=f"no {backend}: {why}"))


@pytest.fixture(autouse=True)
def clean_state():
    """As for all tests: memory starts poisoned with NaN, scratch included, and nothing is left behind, no error of CUDA's
    either. (The poison comes with torch's deterministic mode, of whose other warnings nobody needs to hear.)"""
    torch.manual_seed(0)
    poison(True)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
        yield
    poison(False)
    if NO_GPU or TRIED:
        return
    torch.cuda.synchronize()
    _workspace.raise_reported()  # a label that one test left unsaid would be the next one's error


def poison(on: bool) -> None:
    torch.use_deterministic_algorithms(on, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True


@pytest.fixture
def plain_memory():
    """As users have it, for what counts launches or lets others compile."""
    poison(False)
    yield
    poison(True)


def free_bytes() -> int:
    """That this process may allocate. (The processes beside it are asked to stay out of the large tests' way.)"""
    torch.cuda.empty_cache()
    return torch.cuda.mem_get_info()[0]


def needs_memory(n_bytes: float) -> None:
    if free_bytes() < n_bytes:
        pytest.skip(f"needs {n_bytes / 1e9:.0f} GB of free GPU memory, there are {free_bytes() / 1e9:.0f}")


assert os.environ.get("CUDA_VISIBLE_DEVICES") is not None  # tests/conftest.py has run: it hides GPUs from make test
