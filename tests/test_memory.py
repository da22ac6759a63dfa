"""Blocks kept for large results: used again only when nothing refers to them."""

import threading

import pytest
import torch

import ppo_fast as pf
from ppo_fast import _memory

LARGE = torch.empty(_memory._LEAST // 4)


@pytest.fixture(autouse=True)
def no_blocks():
    _memory._blocks.clear()
    yield
    _memory._blocks.clear()


def test_a_block_is_used_again_only_when_free():
    a = _memory.empty_like(LARGE)
    address = a.data_ptr()
    b = _memory.empty_like(LARGE)
    assert b.data_ptr() != address
    del a
    assert _memory.empty_like(LARGE).data_ptr() == address


@pytest.mark.parametrize("holder", [lambda x: x.view(2, -1), lambda x: x.detach(), lambda x: x.numpy(), lambda x: x[5:9],
                                    lambda x: x.untyped_storage(), lambda x: torch.from_dlpack(x)])  # fmt: skip
def test_whatever_holds_the_memory_keeps_it(holder):
    a = _memory.empty_like(LARGE)
    address, held = a.data_ptr(), holder(a)
    del a
    assert _memory.empty_like(LARGE).data_ptr() != address
    del held
    assert _memory.empty_like(LARGE).data_ptr() == address


def test_shape_dtype_and_layout():
    x = torch.empty(64, 1 << 14, dtype=torch.bfloat16).t()
    y = _memory.empty_like(x, torch.float32)
    assert y.shape == x.shape and y.dtype == torch.float32 and y.is_contiguous() and y._base is None


def test_no_more_than_a_few_are_kept_and_small_ones_never():
    held = [_memory.empty_like(LARGE) for _ in range(2 * _memory.KEPT)]
    assert len(held) == 2 * _memory.KEPT and len(_memory._blocks) == _memory.KEPT
    _memory._blocks.clear()
    _memory.empty_like(torch.empty(100))
    assert not _memory._blocks


def test_kept_blocks_are_bounded_in_bytes(monkeypatch):
    monkeypatch.setattr(_memory, "_MOST", 3 * _memory._LEAST)
    for _ in range(5):
        held = [_memory.empty_like(LARGE) for _ in range(2)] + [_memory.empty_like(torch.empty(_memory._LEAST // 2))]
        assert sum(block.nbytes() for _, block in _memory._blocks) <= _memory._MOST
        del held
    assert _memory.empty_like(torch.empty(_memory._LEAST)).nbytes > _memory._MOST
    assert sum(block.nbytes() for _, block in _memory._blocks) <= _memory._MOST


def test_results_of_earlier_calls_stay_as_they_were():
    rewards, values = torch.randn(600, 600), torch.randn(600, 600)
    first = pf.gae(rewards, values)
    kept = [x.clone() for x in first]
    pf.gae(rewards + 1.0, values)
    assert all(torch.equal(a, b) for a, b in zip(first, kept, strict=True))


def test_gradients_of_earlier_calls_stay_as_they_were():
    log_prob = torch.zeros(300_000, requires_grad=True)
    pf.ppo_loss(log_prob, torch.zeros(300_000), torch.ones(300_000)).loss.backward()
    kept, grad = log_prob.grad.clone(), log_prob.grad
    log_prob.grad = None
    pf.ppo_loss(log_prob, torch.zeros(300_000), -torch.ones(300_000)).loss.backward()
    assert torch.equal(grad, kept) and torch.equal(log_prob.grad, -kept)


def test_threads_never_share_a_block():
    rewards = [torch.full((600, 600), float(i)) for i in range(4)]
    wanted = [pf.gae(r, torch.zeros_like(r))[0] for r in rewards]
    wrong = []

    def work(i):
        for _ in range(20):
            if not torch.equal(pf.gae(rewards[i], torch.zeros_like(rewards[i]))[0], wanted[i]):
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert not wrong
