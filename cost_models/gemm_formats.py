"""Seconds of a GEMM whose operands are stored in number formats, and of the casts at its borders.

Both operands in one low-precision format that a kernel reads: the roofline of :mod:`cost_models.compute` at
the device's rate for the element's width and with packed bytes, and before it one pass that quantises the
activation. A narrow weight beside a plain activation is dequantised first, then computed with as before.
Training also quantises the weight (its master copy is fp32) and the output's gradient every step; both
backward GEMMs run in the same format.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.calibration import Calibration
from cost_models.compute import BACKWARD_FACTOR, gemm_seconds, peak_flops, stream_seconds
from cost_models.formats import bits_per_element
from ir.dtypes import nbytes
from ir.formats import parse_format
from ir.topology import Device

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
