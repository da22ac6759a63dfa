"""What every log-prob op is held to, written once: parity, determinism, double backward, the registered op."""

from __future__ import annotations

import pytest
import torch
from conftest import _C, ISAS, as_double, assert_as_good


def gradients(op, inputs, seed=0):
    """(log_prob, entropy, *gradients of a random weighting of both) on fresh leaves that keep the inputs' strides."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    log_prob, entropy = op(*leaves)
    generator = torch.Generator().manual_seed(seed)
    g, h = (torch.randn(log_prob.shape, generator=generator, dtype=torch.float64) for _ in range(2))
    loss = (log_prob * g.to(log_prob.dtype)).sum()
    if entropy is not None:
        loss = loss + (entropy * h.to(log_prob.dtype)).sum()
    grads = torch.autograd.grad(loss, leaves)
    return [log_prob.detach(), None if entropy is None else entropy.detach(), *grads]


def assert_parity(op, reference, inputs, ulps=8.0, double=None):
    """Values and gradients of op(*inputs) against the reference in float64, beside the reference in the same dtype.

    `double` is the reference for float64 inputs, where it closes over further tensors.
    """
    got, eager = gradients(op, inputs), gradients(reference, inputs)
    truth = gradients(double or reference, [as_double(x.detach()) for x in inputs])
    names = ["log_prob", "entropy", *(f"gradient {i}" for i in range(len(inputs)))]
    for name, x, e, t in zip(names, got, eager, truth, strict=True):
        if t is None:
            assert x is None
            continue
        assert x.dtype == e.dtype, name
        assert_as_good(x, e, t, name, ulps)


def assert_same_bits(op, inputs):
    """On every instruction set, on one and two threads, and when it runs again."""
    results = []
    for isa in [*ISAS, ISAS[-1]]:
        _C.set_isa(isa)
        for threads in (1, 2):
            torch.set_num_threads(threads)
            results.append(gradients(op, inputs))
    for other in results[1:]:
        for a, b in zip(results[0], other, strict=True):
            assert torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


def assert_rows_stand_alone(op, inputs, rows):
    """op(*inputs of rows i..j) has the bits of the same rows in the whole batch."""
    whole = op(*inputs)
    n = len(whole[0])
    for i, j in ((0, 1), (1, 2), (n - 1, n), (3, min(n, 20)), (n // 2, n)):
        part = op(*[x[i:j] if r else x for x, r in zip(inputs, rows, strict=True)])
        for a, b in zip(part, whole, strict=True):
            assert torch.equal(a, b[i:j])


def assert_double_backward(op, inputs):
    assert torch.autograd.gradcheck(op, inputs)
    assert torch.autograd.gradgradcheck(op, inputs)


def assert_compiles(op, inputs):
    """fullgraph, and the same results as without."""
    torch._dynamo.reset()
    compiled = torch.compile(op, fullgraph=True, backend="aot_eager")
    for a, b in zip(gradients(compiled, inputs), gradients(op, inputs), strict=True):
        assert torch.equal(a, b)


def assert_refuses(error, words, op, *args, **kwargs):
    with pytest.raises(error) as caught:
        op(*args, **kwargs)
    for word in words:
        assert word in str(caught.value), str(caught.value)


LAYOUTS = ["plain", "sliced", "transposed", "stepped", "expanded", "gaps"]


def strided(shape, layout, dtype, scale=3.0):
    """Random numbers that lie in memory in one of several ways."""
    *lead, width = shape
    if layout == "sliced":
        return (torch.randn(*lead, width + 3) * scale).to(dtype)[..., 1 : width + 1]
    if layout == "transposed":
        return (torch.randn(width, *lead) * scale).to(dtype).movedim(0, -1)
    if layout == "stepped":
        return (torch.randn(*lead, 2 * width) * scale).to(dtype)[..., ::2]
    if layout == "expanded":
        return (torch.randn(width) * scale).to(dtype).expand(shape)
    if layout == "gaps":
        return (torch.randn(*[2 * n for n in lead], width) * scale).to(dtype)[tuple(slice(None, None, 2) for _ in lead)]
    return (torch.randn(shape) * scale).to(dtype)
