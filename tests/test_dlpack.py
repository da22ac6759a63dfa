"""The way from Python objects to kernels: DLPack views of tensors of every kind.

`raw` calls ppo_fast._C as any DLPack library could; the rest goes through the public ops.
"""

from __future__ import annotations

import math
import sys

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

import ppo_fast as pf
from ppo_fast import _C

N = 40
PARAMS = _C.LossParams(pf.LossConfig().numbers(), pf.LossConfig().choices())


def raw(log_prob, old_log_prob, advantages, *, mask=None, loss=None, stats=None, grad=None, threads=1):
    """The kernel behind ppo_loss, by hand."""
    loss = np.full((), np.nan, np.float32) if loss is None else loss
    stats = np.full(len(_C.STATS), np.nan, np.float32) if stats is None else stats
    _C.ppo_loss(PARAMS, log_prob, old_log_prob, advantages, None, None, None, None, None, None, mask, None, math.nan,
                False, loss, stats, grad, None, None, threads)  # fmt: skip
    return loss


def streams(n=N, dtype=torch.float32):
    return torch.randn(3, n, dtype=dtype).unbind()


def same(actual, expected):
    """The same bits; explained_variance is NaN on both sides where there are no values."""
    assert torch.equal(actual.loss, expected.loss)
    torch.testing.assert_close(actual.stats.vector, expected.stats.vector, rtol=0, atol=0, equal_nan=True)


def contiguous(x):
    return x.detach().clone(memory_format=torch.contiguous_format)


# --- views ------------------------------------------------------------------------------------------------------------

VIEWS = {
    "offset": lambda x: torch.cat([torch.full((7,), torch.nan), x.flatten()])[7:].view(x.shape),
    "step": lambda x: torch.stack([x, torch.full_like(x, torch.nan)], -1)[..., 0],
    "column": lambda x: torch.stack([torch.full_like(x, torch.nan), x], 0)[1],
    "transposed": lambda x: x.mT.contiguous().mT,
    "permuted": lambda x: x.T.contiguous().T,
    "size-1 stride": lambda x: x.contiguous().as_strided(x.shape, (999, *x.stride()[1:])) if x.shape[0] == 1 else x,
}


@pytest.mark.parametrize("shape", [(8, 5), (1, 40), (40, 1)])
@pytest.mark.parametrize("view", VIEWS)
def test_views_give_the_same_bits(view, shape):
    xs = [torch.randn(shape) for _ in range(3)]
    expected = pf.ppo_loss(*xs)
    for i in range(3):
        same(pf.ppo_loss(*(VIEWS[view](x) if i == j else x for j, x in enumerate(xs))), expected)


def test_stride_of_size_one_is_ignored():
    """A [1, n] view may carry any stride where there is nothing to step to; torch does not normalise it."""
    x = torch.randn(N).as_strided((1, N), (999, 1))
    assert x.stride() == (999, 1)
    old, advantages = torch.randn(2, 1, N)
    same(pf.ppo_loss(x, old, advantages), pf.ppo_loss(contiguous(x), old, advantages))
    grad = torch.empty(N).as_strided((1, N), (999, 1))  # an output too
    raw(x, old, advantages, grad=grad)
    assert grad.isfinite().all()


def test_expanded_inputs():
    x, old, _ = streams()
    one = torch.tensor(0.5).expand(N)
    assert one.stride() == (0,)
    same(pf.ppo_loss(x, old, one), pf.ppo_loss(x, old, contiguous(one)))
    leaf = torch.tensor(0.3, requires_grad=True)
    pf.ppo_loss(leaf.expand(N), old, one).loss.backward()
    again = torch.full((N,), 0.3, requires_grad=True)
    pf.ppo_loss(again, old, one).loss.backward()
    torch.testing.assert_close(leaf.grad, again.grad.sum())


def test_outputs_must_not_overlap():
    x, old, advantages = streams()
    with pytest.raises(ValueError, match="ppo_loss: grad_log_prob must be contiguous"):
        raw(x, old, advantages, grad=torch.empty(1).expand(N))


@pytest.mark.parametrize("shape", [(0,), (0, 5), (5, 0)])
def test_empty(shape):
    """Tensors without elements have no data pointer; that is no error."""
    x = torch.empty(shape, requires_grad=True)
    out = pf.ppo_loss(x, torch.empty(shape), torch.empty(shape))
    out.loss.backward()
    assert out.loss == 0 and x.grad.shape == shape


def test_scalars():
    x, old, advantages = torch.randn(3)
    same(pf.ppo_loss(x, old, advantages), pf.ppo_loss(x[None], old[None], advantages[None]))


# --- other libraries --------------------------------------------------------------------------------------------------


def test_numpy_without_the_c_interface():
    x, old, advantages = streams()
    expected = pf.ppo_loss(x, old, advantages).loss
    assert raw(x.numpy(), old.numpy(), advantages.numpy()) == expected.item()
    assert raw(x, old.numpy(), advantages) == expected.item()


def test_numpy_with_negative_steps():
    x, old, advantages = (s.numpy()[::-1] for s in streams())
    assert x.strides == (-4,)
    expected = raw(x.copy(), old.copy(), advantages.copy())
    assert raw(x, old, advantages) == expected
    both = np.random.default_rng(0).standard_normal((3, 5, 8), dtype=np.float32)[:, ::-1, ::-2]
    assert raw(*both) == raw(*both.copy())


def test_numpy_that_may_not_be_written():
    x, old, advantages = (s.numpy() for s in streams())
    x.flags.writeable = False
    try:
        assert raw(x, old, advantages) == raw(x.copy(), old, advantages)
    except BufferError as error:  # NumPy refuses to hand it out through unversioned DLPack
        assert "readonly" in str(error)
    loss = np.empty((), np.float32)
    loss.flags.writeable = False
    with pytest.raises((BufferError, ValueError), match=r"(?i)read.?only"):
        raw(x.copy(), old, advantages, loss=loss)
    with pytest.raises(BufferError, match="byte order"):
        raw(old.astype(">f4"), old, advantages)


class Foreign:
    """A library that has nothing but __dlpack__."""

    def __init__(self, array):
        self.array = array

    def __dlpack__(self, **kwargs):
        return self.array.__dlpack__(**kwargs)

    def __dlpack_device__(self):
        return self.array.__dlpack_device__()


def test_any_object_with_dlpack():
    x, old, advantages = (s.numpy() for s in streams())
    before = sys.getrefcount(x)
    for _ in range(100):
        assert raw(Foreign(x), Foreign(old), Foreign(advantages)) == raw(x, old, advantages)
    assert sys.getrefcount(x) == before  # capsules that nobody took over were freed


@pytest.mark.parametrize("thing", [None, 1.0, [1.0, 2.0], "x", object()])
def test_objects_that_are_no_tensors(thing):
    _, old, advantages = streams()
    with pytest.raises(TypeError, match="ppo_loss: log_prob must be a tensor, got "):
        raw(thing, old, advantages)


# --- special tensors --------------------------------------------------------------------------------------------------


def negated(x):
    """x behind a neg bit: a view that says «negate what lies here», which DLPack does not carry."""
    lazy = torch.complex(torch.zeros_like(x), -x).conj().imag
    assert lazy.is_neg() and torch.equal(lazy, x)
    return lazy


@pytest.mark.parametrize("name", ["log_prob", "old_log_prob", "advantages", "values", "returns", "weights"])
def test_neg_bit(name):
    names = ("log_prob", "old_log_prob", "advantages", "values", "returns", "weights")
    inputs = dict(zip(names, torch.randn(6, N), strict=True))
    same(pf.ppo_loss(**{**inputs, name: negated(inputs[name])}), pf.ppo_loss(**inputs))


def test_complex_is_refused():
    x, old, advantages = streams()
    with pytest.raises(TypeError, match="ppo_loss: advantages"):
        pf.ppo_loss(x, old, advantages.to(torch.complex64))


@pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")
def test_tensors_without_data_are_refused():
    x, old, advantages = streams()
    with FakeTensorMode():
        fake = torch.randn(N)
    for args in [(fake, old, advantages), (x, old, fake)]:
        with pytest.raises(TypeError, match="must have storage, got a tensor without data"):
            raw(*args)
    with pytest.raises(TypeError, match="ppo_loss: old_log_prob must have storage"):
        pf.ppo_loss(x, fake, advantages)


def test_fake_tensors_take_the_reference():
    with FakeTensorMode():
        x = torch.randn(N, requires_grad=True)
        out = pf.ppo_loss(x, torch.randn(N), torch.randn(N))
        out.loss.backward()
        assert out.loss.shape == () and x.grad.shape == (N,)


def test_meta_tensors():
    x, old, advantages = streams()
    assert pf.ppo_loss(*(s.to("meta") for s in (x, old, advantages))).loss.is_meta
    with pytest.raises((RuntimeError, TypeError), match="meta"):
        pf.ppo_loss(x, old, advantages.to("meta"))


def test_sparse_tensors_are_refused():
    x, old, advantages = streams()
    with pytest.raises((RuntimeError, TypeError), match="storage"):
        pf.ppo_loss(x, old, advantages.to_sparse())


class Tagged(torch.Tensor):
    pass


def test_subclasses_take_the_reference_and_stay():
    x, old, advantages = streams()
    out = pf.ppo_loss(x.as_subclass(Tagged), old, advantages)
    assert isinstance(out.loss, Tagged)
    torch.testing.assert_close(out.loss.as_subclass(torch.Tensor), pf.ppo_loss(x, old, advantages).loss)
    torch.testing.assert_close(pf.ppo_loss(x, old.as_subclass(Tagged), advantages).loss.as_subclass(torch.Tensor),
                               pf.ppo_loss(x, old, advantages).loss)  # fmt: skip


def test_parameters_and_their_type_cache():
    """Tensor, Parameter and other types in turn: what is remembered per type must not be mixed up."""
    x, old, advantages = streams()
    expected = raw(x, old, advantages)
    for _ in range(3):
        for kind in (torch.nn.Parameter, contiguous, torch.Tensor.numpy, Foreign, lambda t: Foreign(t.numpy())):
            if kind is Foreign:
                continue
            assert raw(kind(x), old, kind(advantages)) == expected
    parameter = torch.nn.Parameter(x)
    pf.ppo_loss(parameter, old, advantages).loss.backward()
    assert parameter.grad is not None


def test_many_types():
    x, old, advantages = streams()
    expected = raw(x, old, advantages)
    for i in range(50):
        kind = type(f"Kind{i}", (torch.Tensor,), {})
        assert raw(x.as_subclass(kind), old, advantages) == expected


def test_functorch_takes_the_reference():
    xs, old, advantages = torch.randn(4, N), *streams()[:2]

    def loss(x):
        return pf.ppo_loss(x, old, advantages).loss

    one_by_one = torch.stack([loss(x) for x in xs])
    torch.testing.assert_close(torch.func.vmap(loss)(xs), one_by_one)
    leaves = xs.clone().requires_grad_()
    torch.stack([loss(x) for x in leaves]).sum().backward()
    torch.testing.assert_close(torch.func.vmap(torch.func.grad(loss))(xs), leaves.grad)
    torch.testing.assert_close(torch.func.grad(loss)(xs[0]), leaves.grad[0])
    hessian = torch.func.hessian(loss)(xs[0])
    assert hessian.shape == (N, N) and hessian.isfinite().all()
    # what is mapped over may be any input: here the one that needs no gradient
    torch.testing.assert_close(
        torch.func.vmap(lambda a: pf.ppo_loss(xs[0], old, a).loss)(xs),
        torch.stack([pf.ppo_loss(xs[0], old, a).loss for a in xs]),
    )


# --- autograd ---------------------------------------------------------------------------------------------------------


def test_no_grad_and_inference_mode():
    x, old, advantages = streams()
    expected = pf.ppo_loss(x, old, advantages)
    leaf = x.clone().requires_grad_()
    with torch.no_grad():
        out = pf.ppo_loss(leaf, old, advantages.clone().requires_grad_())
    assert not out.loss.requires_grad
    same(out, expected)
    with torch.inference_mode():
        inside = [s.clone() for s in (x, old, advantages)]
        out = pf.ppo_loss(*inside)
        same(out, expected)
    assert out.loss.is_inference()
    same(pf.ppo_loss(leaf, *inside[1:]), expected)  # constants made in inference mode, used outside


def test_constants_that_require_grad_are_refused():
    x, old, advantages = streams()
    with pytest.raises(ValueError, match="ppo_loss: advantages gets no gradient but requires one"):
        pf.ppo_loss(x, old, advantages.requires_grad_())


@pytest.mark.parametrize("changed", ["log_prob", "values", "entropy"])
def test_inputs_changed_in_place_before_backward(changed):
    leaves = {name: torch.randn(N, requires_grad=True) for name in ("log_prob", "values", "entropy")}
    inputs = {name: leaf * 1.0 for name, leaf in leaves.items()}
    out = pf.ppo_loss(old_log_prob=torch.randn(N), advantages=torch.randn(N), returns=torch.randn(N), **inputs)
    with torch.no_grad():
        inputs[changed].add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.loss.backward()


def test_inputs_are_left_alone():
    x, old, advantages = streams()
    x.requires_grad_()
    before = [(s._version, s.detach().clone()) for s in (x, old, advantages)]
    pf.ppo_loss(x, old, advantages).loss.backward()
    for s, (version, value) in zip((x, old, advantages), before, strict=True):
        assert s._version == version and torch.equal(s, value)


# --- messages ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "message", "change"),
    [
        (ValueError, r"ppo_loss: advantages must be the shape of log_prob = \[40\], got \[40, 1\]",
         lambda x, o, a: (x, o, a[:, None])),
        (ValueError, r"ppo_loss: old_log_prob must be the shape of log_prob = \[40, 1\], got \[40\]",
         lambda x, o, a: (x[:, None], o, a)),
        (ValueError, r"ppo_loss: advantages must be the shape of log_prob = \[40\], got \[39\]",
         lambda x, o, a: (x, o, a[1:])),
        (ValueError, r"ppo_loss: advantages must be the shape of log_prob = \[40\], got \[\]",
         lambda x, o, a: (x, o, a[0])),
        (TypeError, r"ppo_loss: log_prob must be float32, float64, bfloat16 or float16, got int64",
         lambda x, o, a: (x.long(), o, a)),
        (TypeError, r"ppo_loss: advantages must be float32, float64, bfloat16 or float16, got bool",
         lambda x, o, a: (x, o, a > 0)),
        (TypeError, r"ppo_loss: advantages must be a tensor, got list", lambda x, o, a: (x, o, a.tolist())),
    ],
)  # fmt: skip
def test_messages(kind, message, change):
    with pytest.raises(kind, match=message):
        raw(*change(*streams()))


def test_messages_of_the_public_op():
    x, old, advantages = streams()
    with pytest.raises(TypeError, match=r"ppo_loss: .*torch.Tensor, got ndarray"):
        pf.ppo_loss(x.numpy(), old, advantages)
    with pytest.raises(ValueError, match=r"ppo_loss: advantages must be the shape of log_prob = \[40\], got \[40, 1\]"):
        pf.ppo_loss(x, old, advantages[:, None])
    with pytest.raises(TypeError, match="ppo_loss: config must be a LossConfig, got float"):
        pf.ppo_loss(x, old, advantages, 0.2)


@pytest.mark.parametrize("wrong", [{"loss": np.empty((), np.float64)}, {"stats": np.empty(3, np.float32)},
                                   {"grad": np.empty(N, np.float64)}, {"grad": np.empty((N, 2), np.float32)[:, 0]},
                                   {"grad": np.empty(N - 1, np.float32)}])  # fmt: skip
def test_outputs_that_do_not_fit_are_refused(wrong):
    with pytest.raises((TypeError, ValueError), match=f"ppo_loss: .*{next(iter(wrong))}"):
        raw(*streams(), **wrong)


def test_a_failed_call_leaves_nothing_behind():
    x, old, advantages = (s.numpy() for s in streams())
    before = sys.getrefcount(x)
    for _ in range(100):
        with pytest.raises(ValueError, match="advantages"):
            raw(x, old, advantages[1:])
    assert sys.getrefcount(x) == before
