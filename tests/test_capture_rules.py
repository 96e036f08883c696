"""Shape rules against the operators themselves, run on real tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from ir.capture_rules import FUNCTIONS, module_rule

SIZES = st.integers(1, 4)
SHAPES = st.lists(SIZES, min_size=1, max_size=4).map(tuple)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float64])


def agree(rule: Callable[..., Any], operator: Callable[..., Tensor], *args: Any, **kwargs: Any) -> None:
    """Shape, type and FLOP of the rule are the operator's; where it fails, the rule must not answer."""
    ruled = rule(*args, **dict(kwargs))
    try:
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            real = operator(*args, **kwargs)
    except (RuntimeError, TypeError, IndexError, ValueError):
        assert ruled is None
        return
    if ruled is not None:
        out, work = ruled
        assert (tuple(out.shape), out.dtype) == (tuple(real.shape), real.dtype)
        assert work.flops == counter.get_total_flops()


@pytest.mark.parametrize(
    ("name", "operator"),
    [("add", torch.add), ("mul", torch.mul), ("sub", torch.sub), ("truediv", torch.true_divide)],
)
@settings(deadline=None, max_examples=40)
@given(a=SHAPES, b=SHAPES, left=DTYPES, right=DTYPES, number=st.one_of(st.none(), st.floats(1, 2)))
def test_binary(
    name: str, operator: Any, a: Any, b: Any, left: torch.dtype, right: torch.dtype, number: float | None
) -> None:
    other: Any = torch.ones(b, dtype=right) if number is None else number
    agree(FUNCTIONS[name], operator, torch.ones(a, dtype=left), other)


@pytest.mark.parametrize("name", ["relu", "sigmoid", "tanh", "gelu", "silu", "leaky_relu", "softplus", "elu"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int64, torch.bool])
def test_unary(name: str, dtype: torch.dtype) -> None:
    agree(FUNCTIONS[name], getattr(F, name, getattr(torch, name, None)), torch.ones(2, 3, dtype=dtype))


@settings(deadline=None, max_examples=60)
@given(a=SHAPES, b=SHAPES, name=st.sampled_from(["matmul", "bmm", "mm", "linear"]), left=DTYPES, right=DTYPES)
def test_contractions(a: Any, b: Any, name: str, left: torch.dtype, right: torch.dtype) -> None:
    operator = F.linear if name == "linear" else getattr(torch, name)
    agree(FUNCTIONS[name], operator, torch.ones(a, dtype=left), torch.ones(b, dtype=right))


@settings(deadline=None, max_examples=60)
@given(batch=SHAPES, m=SIZES, k=SIZES, n=SIZES, name=st.sampled_from(["matmul", "linear"]))
def test_contractions_that_fit(batch: Any, m: int, k: int, n: int, name: str) -> None:
    a, b = torch.ones(*batch, m, k), torch.ones((k, n) if name == "matmul" else (n, k))
    ruled = FUNCTIONS[name](a, b)
    assert ruled is not None
    agree(FUNCTIONS[name], F.linear if name == "linear" else torch.matmul, a, b)


@pytest.mark.parametrize("name", ["cat", "stack"])
@settings(deadline=None, max_examples=60)
@given(shapes=st.lists(SHAPES, min_size=1, max_size=3), dim=st.integers(-5, 4))
def test_joining(name: str, shapes: Any, dim: int) -> None:
    tensors = [torch.ones(shape) for shape in shapes]
    agree(FUNCTIONS[name], getattr(torch, name), tensors, dim)
    agree(FUNCTIONS[name], getattr(torch, name), [tensors[0]] * 3, dim=dim)


@pytest.mark.parametrize("name", ["sum", "mean"])
@settings(deadline=None, max_examples=60)
@given(shape=SHAPES, dims=st.lists(st.integers(-4, 3), min_size=1, max_size=2), keep=st.booleans())
def test_reductions(name: str, shape: Any, dims: list[int], keep: bool) -> None:
    assume(len({d % len(shape) for d in dims}) == len(dims))
    agree(FUNCTIONS[name], getattr(torch, name), torch.ones(shape), dims, keepdim=keep)
    agree(FUNCTIONS[name], getattr(torch, name), torch.ones(shape), dim=dims[0])


@settings(deadline=None, max_examples=60)
@given(batch=st.lists(SIZES, min_size=1, max_size=2), q=SIZES, k=SIZES, e=SIZES, v=SIZES, odd=st.booleans())
def test_attention(batch: Any, q: int, k: int, e: int, v: int, odd: bool) -> None:
    tensors = [torch.ones(*batch, *shape) for shape in ((q, e), (k, e + odd), (k, v))]
    rule = FUNCTIONS["scaled_dot_product_attention"]
    ruled = rule(*tensors)
    assert (ruled is None) == odd
    if ruled is not None:
        real = F.scaled_dot_product_attention(*tensors)
        products = 2 * math.prod(batch) * q * k * (e + v)  # Q K^T, and the scores times V
        assert (tuple(ruled[0].shape), ruled[1].flops) == (tuple(real.shape), products)


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(3, 5),
        nn.ReLU(),
        nn.Identity(),
        nn.LayerNorm(3),
        nn.BatchNorm1d(3),
        nn.Dropout(),
        nn.Softmax(-1),
    ],
)
@pytest.mark.parametrize("shape", [(4, 3), (2, 3, 3), (4, 2), (3,)])
def test_modules(module: nn.Module, shape: tuple[int, ...]) -> None:
    agree(lambda x: module_rule(module, (x,), {}), module, torch.ones(shape))
