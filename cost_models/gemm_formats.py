"""Seconds of a GEMM whose operands are stored in number formats, and of the casts at its borders.

Both operands in one low-precision format that a kernel reads: the roofline of :mod:`cost_models.compute` at
the device's rate for the element's width and with packed bytes, and before it one pass that quantises the
activation. A narrow weight beside a plain activation is dequantised first, then computed with as before.
Training also quantises the weight (its master copy is fp32) and the output's gradient every step; both
backward GEMMs run in the same format.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.compute import BACKWARD_FACTOR, gemm_seconds, peak_flops, stream_seconds
from cost_models.formats import bits_per_element
from ir.dtypes import nbytes
from ir.format_plan import FormatPlan
from ir.formats import parse_format
from ir.ops import Op
from ir.program import Model
from ir.topology import Device, Topology
from ir.workload import Workload

COMPUTE_FORMATS = {"fp32": "fp32", "tf32": "fp32", "bf16": "bf16", "fp16": "fp16", "fp8": "fp8_tensor"}
"""The format that an element type of computation amounts to."""

MASTER_BITS = 32  # master weights are fp32, also under automatic mixed precision


@dataclass(frozen=True, slots=True)
class GemmPrice:
    """Seconds of one step on one rank; ``cast`` is quantising and dequantising, ``gemm`` the rest."""

    gemm: float
    cast: float

    @property
    def seconds(self) -> float:
        """Both."""
        return self.gemm + self.cast


def rate_name(format: str, device: Device) -> str:
    """The element type whose rate GEMMs in ``format`` reach: by the width of the element."""
    element = parse_format(format).element
    if element.name in ("fp32", "bf16", "fp16"):
        return element.name
    names = (
        ("fp4", "fp8", "bf16") if element.bits <= 4 else ("fp8", "bf16") if element.bits <= 8 else ("bf16",)
    )
    return next((name for name in names if name in device.flops), "fp32")


def gemm_price(
    m: float,
    k: int,
    n: int,
    weight: str,
    activation: str,
    compute: str,
    device: Device,
    calibration: Calibration,
    *,
    train: bool,
) -> GemmPrice:
    """Price of one (m, k) x (k, n) product with its backward pass in training.

    Args:
        m, k, n: shape; m rows of activations on this rank.
        weight, activation: formats of the operands.
        compute: element type of plain GEMMs in this workload.
        device: where.
        calibration: constants.
        train: price the backward pass and the casts of training too.
    """
    steps = 1 + (BACKWARD_FACTOR if train else 0)
    plain = COMPUTE_FORMATS[compute]
    if weight == activation == plain:
        return GemmPrice(steps * gemm_seconds(m, k, n, compute, device, calibration), 0.0)
    if parse_format(activation).granularity == "element":
        inner = activation if activation != plain else compute
        narrow = bits_per_element(weight, k) / 8
        cast = 0.0
        if weight != activation:
            cast = stream_seconds(k * n * narrow, k * n * nbytes(inner), device, calibration)
        return GemmPrice(steps * gemm_seconds(m, k, n, inner, device, calibration), steps * cast)
    return GemmPrice(
        steps * _narrow_seconds(m, k, n, weight, activation, device, calibration),
        _casts(m, k, n, weight, activation, nbytes(compute), device, calibration, train=train),
    )


def _narrow_seconds(
    m: float, k: int, n: int, weight: str, activation: str, device: Device, calibration: Calibration
) -> float:
    """The roofline of :func:`cost_models.compute.gemm_seconds` with packed operands, bf16 results."""
    tile, tier = calibration.gemm_tile, device.tiers[0]
    rows, columns = -(-m // tile) * tile, -(-n // tile) * tile
    rate = min(
        (rate_name(f, device) for f in (weight, activation)), key=lambda name: peak_flops(device, name)
    )
    compute = 2.0 * rows * k * columns / (peak_flops(device, rate) * calibration.gemm_efficiency)
    read = (m * k * bits_per_element(activation, k) + k * n * bits_per_element(weight, k)) / 8
    moved = read / tier.read_bandwidth + m * n * nbytes("bf16") / tier.write_bandwidth
    return max(compute, moved / calibration.stream_efficiency) + calibration.kernel_seconds


def _casts(
    m: float,
    k: int,
    n: int,
    weight: str,
    activation: str,
    item: float,
    device: Device,
    calibration: Calibration,
    *,
    train: bool,
) -> float:
    packed = bits_per_element(activation, k) / 8
    seconds = stream_seconds(m * k * item, m * k * packed, device, calibration)
    if train:
        seconds += stream_seconds(m * n * item, m * n * packed, device, calibration)
        narrow = k * n * bits_per_element(weight, k) / 8
        seconds += stream_seconds(k * n * MASTER_BITS / 8, narrow, device, calibration)
    return seconds


def cache_read_seconds(
    ops: Sequence[Op], op: Op, format: str, samples: float, device: Device, calibration: Calibration
) -> tuple[float, float, float]:
    """(seconds to read an attention op's cached keys and values, elements, stored bytes) on one rank."""
    by_name = {other.name: other for other in ops}
    cached = [by_name[name] for name in op.inputs[1:3] if name in by_name]
    elements = samples * sum(other.activation_bytes / nbytes(other.dtype) for other in cached)
    width = cached[0].out_shape[-1] if cached and cached[0].out_shape else 0
    size = elements * bits_per_element(format, width or None) / 8
    return stream_seconds(size, 0.0, device, calibration), elements, size


def format_seconds(
    ops: Sequence[Op],
    decided: FormatPlan,
    forward: Mapping[str, float],
    topology: Topology,
    workload: Workload,
    calibration: Calibration,
    *,
    train: bool,
) -> dict[str, float]:
    """Forward seconds of the ops whose tensors got formats; ``forward`` has those of all ops without.

    A training GEMM's casts and backward pass are spread as its plain backward pass is: twice the forward.
    """
    formats = {tensor.name: tensor.format for tensor in decided.tensors}
    held, repeats = workload.global_batch / topology.world_size, workload.dedup_ops
    device, compute = topology.device, workload.compute_dtype
    made: dict[str, float] = {}
    for op in ops:
        samples = held / repeats.get(op.name, 1.0)
        weight, activation = formats.get(f"{op.name}.weight"), formats.get(f"{op.name}.input")
        kept = formats.get(f"{op.name}.kv")
        if op.gemm is not None and weight and activation:
            rows = samples * op.gemm_rows
            price = gemm_price(rows, *op.gemm, weight, activation, compute, device, calibration, train=train)
            made[op.name] = price.seconds / (1 + (BACKWARD_FACTOR if train else 0))
        elif kept:
            plain = cache_read_seconds(ops, op, COMPUTE_FORMATS[compute], samples, device, calibration)[0]
            read = cache_read_seconds(ops, op, kept, samples, device, calibration)[0]
            made[op.name] = max(0.0, forward[op.name] - plain) + read
    return made


def format_memory(
    model: Model, decided: FormatPlan, workload: Workload, topology: Topology
) -> dict[str, int]:
    """Changes of :func:`cost_models.memory.dense_memory` in inference: packed weights, cached tensors."""
    formats = {tensor.name: tensor for tensor in decided.tensors}
    change, cached = 0.0, 0.0
    for op in model.ops:
        weight = formats.get(f"{op.name}.weight")
        if op.gemm is not None and weight is not None:
            change += op.params * (bits_per_element(weight.format, op.gemm[0]) - MASTER_BITS) / 8
        kept = formats.get(f"{op.name}.kv")
        cached += kept.elements * kept.bits / 8 if kept is not None else 0.0
    found = {"dense_weights": math.ceil(change)}
    return {**found, "kv_cache": math.ceil(cached)} if cached else found
