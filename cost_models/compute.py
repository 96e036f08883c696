"""Seconds of dense operations: the roofline of GEMMs and of everything that only moves bytes.

A GEMM takes max( 2 m' k n' / (peak * gemm_efficiency), (mk + kn + mn) bytes / (bandwidth *
stream_efficiency) ) + kernel_seconds, with m' and n' rounded up to the output tile (tile quantisation).
Other ops take the larger of their FLOP time and the time to read their inputs and write their output.
The backward pass of any op is twice its forward pass (gradients of inputs and of weights; element-wise
ops read the saved input and the gradient and write a gradient).
Source of the roofline: Williams et al., CACM 52(4), 2009.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from cost_models.calibration import Calibration
from ir.dtypes import nbytes
from ir.errors import InputError
from ir.ops import Op
from ir.topology import Device

BACKWARD_FACTOR = 2.0  # gradients of inputs and of weights: two GEMMs of the forward's size

# Where a device has no rate of its own for an element type, the nearest one that computes it.
_FALLBACK = {
    "fp8": ("bf16", "fp16", "fp32"),
    "fp16": ("bf16", "fp32"),
    "bf16": ("fp16", "fp32"),
    "tf32": ("fp32",),
    "fp32": (),
}


def peak_flops(device: Device, dtype: str) -> float:
    """Peak FLOP/s of ``device`` for ``dtype``; raises InputError when it has none."""
    for name in (dtype, *_FALLBACK.get(dtype, ())):
        if name in device.flops:
            return device.flops[name]
    raise InputError(
        f"device {device.name!r} has no compute rate for {dtype!r} (it has {', '.join(sorted(device.flops))}); "
        f"add one to its flops"
    )


def _round_up(value: float, multiple: int) -> float:
    return math.ceil(value / multiple) * multiple


def gemm_seconds(m: float, k: float, n: float, dtype: str, device: Device, calibration: Calibration) -> float:
    """Seconds of one (m, k) x (k, n) product; 0 when a dimension is 0."""
    if min(m, k, n) <= 0:
        return 0.0
    tile, tier, item = calibration.gemm_tile, device.tiers[0], nbytes(dtype)
    flops = 2.0 * _round_up(m, tile) * k * _round_up(n, tile)
    compute = flops / (peak_flops(device, dtype) * calibration.gemm_efficiency)
    moved = (m * k + k * n) * item / tier.read_bandwidth + m * n * item / tier.write_bandwidth
    return max(compute, moved / calibration.stream_efficiency) + calibration.kernel_seconds


def stream_seconds(read: float, written: float, device: Device, calibration: Calibration) -> float:
    """Seconds of a kernel that reads and writes so many bytes; 0 when it moves none."""
    if read + written <= 0:
        return 0.0
    tier = device.tiers[0]
    moved = read / tier.read_bandwidth + written / tier.write_bandwidth
    return moved / calibration.stream_efficiency + calibration.kernel_seconds


def sgd_seconds(params: float, device: Device, calibration: Calibration) -> float:
    """Seconds of plain SGD on so many parameters: weights and gradients are read and weights written, all in fp32."""
    return stream_seconds(8 * params, 4 * params, device, calibration)


def op_seconds(
    op: Op, samples: float, input_bytes: float, dtype: str, device: Device, calibration: Calibration
) -> float:
    """Forward seconds of one op on ``samples`` samples.

    Args:
        op: the record; lookups, inputs and outputs cost nothing here.
        samples: samples on this rank.
        input_bytes: bytes of the op's inputs per sample, in the op's own element type.
        dtype: element type it is computed in.
        device: where.
        calibration: constants.
    """
    if op.kind in ("lookup", "input", "output") or is_view(op):
        return 0.0
    if op.gemm is not None:
        k, n = op.gemm
        return gemm_seconds(samples * op.gemm_rows, k, n, dtype, device, calibration)
    scale = nbytes(dtype) / nbytes(op.dtype)
    moved = stream_seconds(
        samples * input_bytes * scale, samples * op.activation_bytes * scale, device, calibration
    )
    rate = (
        peak_flops(device, dtype) if op.kind in ("interaction", "attention", "gemm") else _vector_rate(device)
    )
    compute = samples * op.flops / (rate * calibration.gemm_efficiency)
    if op.flops > 0 and compute + calibration.kernel_seconds > moved:
        return compute + calibration.kernel_seconds
    return moved


def _vector_rate(device: Device) -> float:
    """FLOP/s outside matrix units."""
    return device.flops.get("fp32", min(device.flops.values()))


def input_bytes(ops: Iterable[Op]) -> dict[str, float]:
    """Bytes per sample that each op reads from the ops that feed it, in graph order.

    A view writes nothing; whoever reads it reads the bytes behind it.
    """
    readable: dict[str, float] = {}
    fed: dict[str, float] = {}
    for op in ops:
        fed[op.name] = sum(readable.get(name, 0.0) for name in op.inputs)
        readable[op.name] = op.activation_bytes
        if is_view(op):
            shape = math.prod(op.out_shape[1:]) * nbytes(op.dtype) if op.out_shape else math.inf
            readable[op.name] = min(fed[op.name], shape)
    return fed


def is_view(op: Op) -> bool:
    """Whether the op only renames bytes."""
    return op.kind == "reshape" and op.activation_bytes == 0
