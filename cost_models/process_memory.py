"""Resident memory of a CPU rank at its peak, from the bytes that a plan counts.

    peak = base + state (weights + optimizer) + gradients (gradients) + traffic (io + activations) + the rest

A plan counts tensors. A process holds more: the framework and its libraries; the buckets beside gradients
that are reduced; and of what is looked up and exchanged the copies that TorchRec, FBGEMM and gloo make on
the way (permuted ids, send and receive buffers, pooled vectors before and after an exchange, their gradients).
On GPUs none of this is measured here; ``memory_reserve`` of the constraints stands for it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class ProcessMemory:
    """What a process holds beside and because of the tensors that a plan counts.

    Attributes:
        base: bytes of a rank that trains a model of hardly any size.
        state: bytes resident for a byte of table weights and fused optimizer state.
        gradients: the same for gradients of data-parallel tables.
        traffic: the same for ids and vectors of a step and for activations.
    """

    base: int
    state: float
    gradients: float
    traffic: float


# measured by `python -m benchmarks.peak_memory --calibrate`: torch 2.13, TorchRec 1.8, FBGEMM 1.8, gloo, x86-64
TORCHREC_CPU = ProcessMemory(base=323_536_814, state=1.0012, gradients=2.0045, traffic=1.5753)

_STATE, _TRAFFIC = ("weights", "optimizer"), ("io", "activations")


def process_peak(used: Mapping[str, int], constants: ProcessMemory = TORCHREC_CPU) -> int:
    """Peak resident bytes of a rank whose planned bytes by purpose are ``used`` (:class:`ir.plan.RankMemory`)."""
    factors = dict.fromkeys(_STATE, constants.state) | dict.fromkeys(_TRAFFIC, constants.traffic)
    factors["gradients"] = constants.gradients
    return constants.base + round(sum(size * factors.get(purpose, 1.0) for purpose, size in used.items()))
