"""Rates of a machine that was measured, in place of those published for Llama 3 405B on H100.

``planner calibrate`` measures links, products and the cost of a message. The attention kernel is measured by
:mod:`codegen.runtime.context_parallel.measure`; without that it is taken to reach what products reach.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cost_models.calibration import Calibration, default_calibration
from cost_models.compute import peak_flops
from cost_models.serving import ServingRates
from ir.errors import InputError
from ir.topology import Topology

# two norms, q, k, v, their rotation, attention, its projection, gate and up, their product, down, two sums
_LAYER_KERNELS = 14


@dataclass(frozen=True, slots=True)
class AttentionTime:
    """One measured attention: FLOP of its visible pairs, seconds, and whether it was a square under the mask."""

    flops: float
    seconds: float
    masked: bool = False


@dataclass(frozen=True, slots=True)
class AttentionFit:
    """What the attention kernel of a machine reaches.

    Attributes:
        fixed: seconds of a call beyond its FLOP.
        low, high: least and most FLOP/s without a mask.
        masked: FLOP/s of visible pairs under the causal mask.
    """

    fixed: float
    low: float
    high: float
    masked: float


def serving_rates(
    topology: Topology,
    calibration: Calibration | None = None,
    attention: Sequence[AttentionTime] = (),
    merge_seconds: float = 0.0,
) -> ServingRates:
    """What serving reaches on ``topology``.

    GPUs that nobody calibrated get the published rates. Otherwise links reach between what an all-to-all with
    posted receives reached and all of the measured bandwidth, and a message costs the measured latency.

    Args:
        topology: the machine, as ``planner calibrate`` wrote it.
        calibration: constants that it measured; default those of the device kind.
        attention: times of the attention kernel, all ranks at once.
        merge_seconds: measured seconds to add an element of a partial output to the sums, all ranks at once.

    Raises:
        InputError: attention times of fewer than two sizes.
    """
    if calibration is None and topology.device.kind == "gpu":
        return ServingRates()
    found = calibration or default_calibration(topology)
    link = topology.inter_link if topology.hosts > 1 else topology.intra_link
    reached = (found.posted_efficiency or found.link_efficiency(link), 1.0)
    peak = peak_flops(topology.device, "bf16")
    gemms = found.gemm_efficiency * peak
    fit = fit_attention(attention) if attention else AttentionFit(found.kernel_seconds, gemms, gemms, gemms)
    return ServingRates(
        gemm_efficiency=found.gemm_efficiency,
        gemm_tile=found.gemm_tile,
        attention_efficiency=(fit.low / peak, fit.high / peak),
        masked_efficiency=fit.masked / peak,
        merge_seconds=merge_seconds,
        send_efficiency=reached,
        all_to_all_efficiency=reached,
        fabric_efficiency=found.fabric_efficiency,
        stream_efficiency=found.stream_efficiency,
        launch_seconds=_LAYER_KERNELS * found.kernel_seconds,
        ring_seconds=0.0,
        cached_seconds=0.0,
        decode_merge=0.0,
        decode_attention=fit.fixed,
        decode_message=link.latency,
        decode_return=found.collective_seconds,
        card_sharing=found.card_sharing,
        message_seconds=link.latency,
        all_to_all_seconds=found.posted_seconds or found.collective_seconds,
        kernel_seconds=fit.fixed,
        source=found.source,
    )


def fit_attention(times: Sequence[AttentionTime]) -> AttentionFit:
    """The times without a mask by least squares of relative errors, then the rate under the mask.

    The fixed part is not negative; the range is that of the larger half of the measured sizes. Without a
    masked time the mask costs nothing.
    """
    plain = [time for time in times if not time.masked]
    if len({time.flops for time in plain}) < 2:
        raise InputError("the attention kernel needs times of at least two sizes; measure more")
    flops = np.array([time.flops for time in plain])
    seconds = np.array([time.seconds for time in plain])
    columns = np.stack([1 / seconds, flops / seconds], axis=1)
    fixed, inverse = np.linalg.lstsq(columns, np.ones_like(seconds), rcond=None)[0]
    if fixed < 0 or inverse <= 0:
        fixed = 0.0
    large = flops >= np.median(flops)
    rates = flops[large] / np.maximum(seconds[large] - fixed, 0.5 * seconds[large])
    masked = [t.flops / max(t.seconds - fixed, 0.5 * t.seconds) for t in times if t.masked]
    low, high = float(rates.min()), float(rates.max())
    return AttentionFit(float(fixed), low, high, float(np.mean(masked)) if masked else high)
