"""Shapes and FLOP of common operators, without running them.

Running the first meta operator imports torch's decompositions (1 to 4 s); these rules need none of
it. A rule returns None when it is not sure (odd arguments, shapes that do not fit): then the operator
itself runs on meta tensors, and says what is wrong where something is.

FLOP are of contractions only, 2 per multiply-add, as ``torch.utils.flop_counter`` counts them:
element-wise work is bound by memory and priced by its bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True, slots=True)
class Work:
    """Arithmetic of one node over the whole traced batch."""

    flops: float = 0.0
    gemm: tuple[int, int] | None = None  # (k, n) of the largest contraction
    rows: float = 0.0  # rows of that contraction, over the batch

    def __add__(self, other: Work) -> Work:
        largest = max(self, other, key=lambda work: work.flops)
        return Work(self.flops + other.flops, largest.gemm, largest.rows)


NO_WORK = Work()
Ruled = tuple[Tensor, Work] | None
Rule = Callable[..., Ruled]


def contraction(rows: float, k: int, n: int) -> Work:
    """``rows`` x ``k`` times ``k`` x ``n``."""
    return Work(2.0 * rows * k * n, (k, n), float(rows))


def empty(shape: tuple[int, ...] | torch.Size, dtype: torch.dtype) -> Tensor:
    """A meta tensor; making one runs no meta kernel."""
    return torch.empty(shape, dtype=dtype, device="meta")


def _floating(*values: object) -> bool:
    return all(isinstance(value, Tensor) and value.is_floating_point() for value in values)


def _same(*args: Any, **kwargs: Any) -> Ruled:
    """Output of the shape and type of the first argument."""
    if not args or not _floating(args[0]) or "dtype" in kwargs or "out" in kwargs:
        return None
    return empty(args[0].shape, args[0].dtype), NO_WORK


def _binary(*args: Any, **kwargs: Any) -> Ruled:
    """Broadcasting element-wise operator on two operands."""
    if len(args) != 2 or kwargs or not any(_floating(arg) for arg in args):
        return None
    if not all(isinstance(arg, int | float) or _floating(arg) for arg in args):
        return None
    shape = _broadcast(*(tuple(arg.shape) if isinstance(arg, Tensor) else () for arg in args))
    return None if shape is None else (empty(shape, torch.result_type(*args)), NO_WORK)


def _in_place(*args: Any, **kwargs: Any) -> Ruled:
    ruled = _binary(*args, **kwargs)
    fits = ruled is not None and _floating(args[0]) and ruled[0].shape == args[0].shape
    return (args[0], NO_WORK) if fits and ruled and ruled[0].dtype == args[0].dtype else None


def _broadcast(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[int, ...] | None:
    try:
        return tuple(torch.broadcast_shapes(a, b))  # type: ignore[no-untyped-call]
    except RuntimeError:
        return None


def _tensors(args: tuple[Any, ...]) -> list[Tensor] | None:
    if not args or not isinstance(args[0], tuple | list) or not args[0] or not _floating(*args[0]):
        return None
    tensors = list(args[0])
    same = all(t.dtype == tensors[0].dtype and t.ndim == tensors[0].ndim for t in tensors)
    return tensors if same and tensors[0].ndim else None


def _cat(*args: Any, **kwargs: Any) -> Ruled:
    tensors = _tensors(args)
    dim = args[1] if len(args) > 1 else kwargs.pop("dim", kwargs.pop("axis", 0))
    if tensors is None or kwargs or not isinstance(dim, int) or not -tensors[0].ndim <= dim < tensors[0].ndim:
        return None
    dim %= tensors[0].ndim
    frames = {(*t.shape[:dim], *t.shape[dim + 1 :]) for t in tensors}
    if len(frames) != 1:
        return None
    shape = list(tensors[0].shape)
    shape[dim] = sum(t.shape[dim] for t in tensors)
    return empty(tuple(shape), tensors[0].dtype), NO_WORK


def _stack(*args: Any, **kwargs: Any) -> Ruled:
    tensors = _tensors(args)
    dim = args[1] if len(args) > 1 else kwargs.pop("dim", 0)
    if tensors is None or kwargs or not isinstance(dim, int) or len({t.shape for t in tensors}) != 1:
        return None
    ndim = tensors[0].ndim + 1
    if not -ndim <= dim < ndim:
        return None
    shape = list(tensors[0].shape)
    shape.insert(dim % ndim, len(tensors))
    return empty(tuple(shape), tensors[0].dtype), NO_WORK


def _matmul(*args: Any, **kwargs: Any) -> Ruled:
    if len(args) != 2 or kwargs or not _floating(*args) or min(arg.ndim for arg in args) < 2:
        return None
    a, b = args
    batch = _broadcast(tuple(a.shape[:-2]), tuple(b.shape[:-2]))
    if a.shape[-1] != b.shape[-2] or batch is None or a.dtype != b.dtype:
        return None
    out = empty((*batch, a.shape[-2], b.shape[-1]), a.dtype)
    return out, contraction(math.prod(batch) * a.shape[-2], a.shape[-1], b.shape[-1])


def _bmm(*args: Any, **kwargs: Any) -> Ruled:
    batched = len(args) == 2 and _floating(*args) and args[0].ndim == args[1].ndim == 3
    return _matmul(*args, **kwargs) if batched and args[0].shape[0] == args[1].shape[0] else None


def _mm(*args: Any, **kwargs: Any) -> Ruled:
    flat = len(args) == 2 and _floating(*args) and args[0].ndim == args[1].ndim == 2
    return _matmul(*args, **kwargs) if flat else None


def linear(x: object, weight: object, bias: object = None) -> Ruled:
    """``x @ weight.T + bias``: (..., k) and (n, k) to (..., n)."""
    if not isinstance(x, Tensor) or not isinstance(weight, Tensor) or not _floating(x, weight):
        return None
    if weight.ndim != 2 or not x.ndim or x.shape[-1] != weight.shape[1] or x.dtype != weight.dtype:
        return None
    n, k = (int(size) for size in weight.shape)
    return empty((*x.shape[:-1], n), x.dtype), contraction(math.prod(x.shape[:-1]), k, n)


def _attention(*args: Any, **kwargs: Any) -> Ruled:
    """``scaled_dot_product_attention``: (..., L, E), (..., S, E) and (..., S, V) to (..., L, V)."""
    options = {"dropout_p", "is_causal", "scale"}
    if len(args) != 3 or set(kwargs) - options or not _floating(*args) or min(t.ndim for t in args) < 3:
        return None
    q, k, v = args
    same = len({t.dtype for t in args}) == 1 and q.shape[:-2] == k.shape[:-2] == v.shape[:-2]
    if not same or q.shape[-1] != k.shape[-1] or k.shape[-2] != v.shape[-2]:
        return None
    rows = float(math.prod(q.shape[:-1]))
    scores = contraction(rows, int(q.shape[-1]), int(k.shape[-2]))
    mixed = contraction(rows, int(k.shape[-2]), int(v.shape[-1]))
    return empty((*q.shape[:-1], v.shape[-1]), q.dtype), Work(scores.flops + mixed.flops)


def _reduce(*args: Any, **kwargs: Any) -> Ruled:
    """Sum or mean over named dimensions."""
    keep = bool(kwargs.pop("keepdim", False))
    dim = args[1] if len(args) > 1 else kwargs.pop("dim", None)
    if len(args) not in (1, 2) or kwargs or not _floating(args[0]) or dim is None:
        return None
    ndim = args[0].ndim
    dims = [dim] if isinstance(dim, int) else list(dim)
    if not ndim or not dims or any(not isinstance(d, int) or not -ndim <= d < ndim for d in dims):
        return None
    gone = {d % ndim for d in dims}
    sizes = [1 if i in gone else int(size) for i, size in enumerate(args[0].shape) if keep or i not in gone]
    return empty(tuple(sizes), args[0].dtype), NO_WORK


FUNCTIONS: dict[str, Rule] = {
    **dict.fromkeys(
        (
            *("relu", "relu_", "sigmoid", "sigmoid_", "tanh", "tanh_", "gelu", "silu", "leaky_relu", "elu"),
            *("softplus", "hardtanh", "relu6", "hardswish", "selu", "mish", "neg", "exp", "log", "log1p"),
            *("sqrt", "rsqrt", "abs", "square", "dropout", "softmax", "log_softmax", "logsigmoid"),
        ),
        _same,
    ),
    **dict.fromkeys(("add", "sub", "mul", "truediv", "div"), _binary),
    **dict.fromkeys(("iadd", "isub", "imul", "itruediv", "add_", "sub_", "mul_", "div_"), _in_place),
    "cat": _cat,
    "concat": _cat,
    "stack": _stack,
    "matmul": _matmul,
    "bmm": _bmm,
    "mm": _mm,
    "linear": linear,
    "scaled_dot_product_attention": _attention,
    "sum": _reduce,
    "mean": _reduce,
}
"""Rules by the name of a function or method of torch."""

_SAME_SHAPE = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.Sigmoid, nn.Tanh, nn.GELU, nn.SiLU, nn.ELU, nn.SELU, nn.Mish),
    *(nn.Softplus, nn.Hardtanh, nn.Hardswish, nn.Dropout, nn.Softmax, nn.LogSoftmax),
)


def module_rule(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Ruled:
    """The rule of a leaf module of ``torch.nn``; None without one."""
    if len(args) != 1 or kwargs or not _floating(args[0]):
        return None
    kind, x = type(module), args[0]
    if kind is nn.Linear:
        return linear(x, module.weight)
    if kind is nn.Identity:
        return x, NO_WORK
    if kind in _SAME_SHAPE:
        return _same(x)
    if isinstance(module, nn.LayerNorm) and kind is nn.LayerNorm:
        width = tuple(module.normalized_shape)
        return _same(x) if tuple(x.shape[-len(width) :]) == width else None
    if isinstance(module, nn.BatchNorm1d) and kind is nn.BatchNorm1d:
        return _same(x) if x.ndim in (2, 3) and x.shape[1] == module.num_features else None
    return None
