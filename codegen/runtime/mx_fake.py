"""Fake quantisation: the values a format would keep, in the tensor's own type, with a gradient."""

from __future__ import annotations

import torch
from torch import Tensor

from codegen.runtime import mx_native
from codegen.runtime.mx_blocks import finite_max, from_blocks, pad_to_blocks, to_blocks
from codegen.runtime.mx_rowwise import from_rows, to_rows
from codegen.runtime.mx_tensor import IEEE_DTYPES, check_tensor, like_source, rows_of
from ir.formats import Format, parse_format

CHUNK = 1 << 17  # elements: the temporaries of the torch path then stay in a CPU's cache


def fake_quantize(x: Tensor, format: str | Format, axis: int | None = None) -> Tensor:
    """Quantise and dequantise ``x``; the gradient passes straight through.

    Args:
        x: a floating-point tensor of at least one axis, on any device. Computed in float32 (float64 is
            rounded to it first) and returned in the type of ``x``.
        format: a format or its id, ``"mx9"``, ``"mxfp8_e4m3:rceil"``, ``"fp8_row:bound=1200"``.
        axis: blocks or rows run along it; by default the format's axis, the last one. Its length need not
            be a multiple of the block: the last block is then short.

    Returns:
        A new tensor of the shape, type and device of ``x``. What shares a scale with a NaN or an infinity
        is NaN. The sign of zero is kept. An empty tensor gives an empty tensor.

    The gradient is the straight-through estimator (Bengio et al., arXiv 1308.3432): that of the identity,
    also where values saturate. Contiguous CPU tensors take one compiled pass where the machine has a C
    compiler; the torch path gives the same bits.

    Raises:
        InputError: an unknown format, a tensor that is not floating-point, or an axis it does not have.
    """
    format = parse_format(format)
    axis = check_tensor(x, format.axis if axis is None else axis)
    result: Tensor = _fake_quantize(x, format.id, axis)
    return result


@torch.library.custom_op("shardwright::fake_quantize", mutates_args=())
def _fake_quantize(x: Tensor, format: str, axis: int) -> Tensor:
    # A custom op: torch.compile, torch.export and fx see one node with a shape, not ctypes calls.
    spec = parse_format(format)
    if x.numel() == 0 or x.is_meta:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    if spec.granularity == "element":
        return x.to(IEEE_DTYPES[spec.base]).to(x.dtype, copy=True).contiguous()
    rows = rows_of(x, axis)
    if mx_native.usable(rows, spec):
        values = mx_native.quantize_dequantize(rows, spec)
    elif spec.granularity == "block":
        values = quantize_dequantize(rows, spec)
    else:
        values = from_rows(to_rows(rows, spec), spec)
    return like_source(values, x.shape, axis, x.dtype)


@_fake_quantize.register_fake
def _(x: Tensor, format: str, axis: int) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _straight_through(context: object, gradient: Tensor) -> tuple[Tensor, None, None]:
    return gradient, None, None


_fake_quantize.register_autograd(_straight_through)


def quantize_dequantize(x_rn: Tensor, format: Format) -> Tensor:
    """The torch path of a block format: float32 (rows, n), any device."""
    rows, n = x_rn.shape
    blocks = pad_to_blocks(x_rn, format.block).reshape(-1, 1, format.block)
    whole = finite_max(blocks) if format.scale == "e4m3" else None
    size = max(1, CHUNK // format.block) if x_rn.device.type == "cpu" else len(blocks)
    starts = range(0, len(blocks), size)
    parts = [from_blocks(to_blocks(blocks[at : at + size], format, whole), format) for at in starts]
    values = torch.cat(parts) if len(parts) > 1 else parts[0]
    return values.reshape(rows, -1)[:, :n]
