"""Resident memory of a CPU rank at its peak, from the bytes that a plan counts.

    peak = base + state (weights + optimizer) + gradients (gradients) + traffic (io + activations) + the rest

where traffic (x) = traffic * min(x, pool) + beyond * max(x - pool, 0).

A plan counts tensors. A process holds more: the framework and its libraries; the buckets beside gradients
that are reduced; and of what is looked up and exchanged the copies that TorchRec, FBGEMM and gloo make on
the way (permuted ids, send and receive buffers, pooled vectors before and after an exchange, their gradients).
The first bytes of that cost most, and what the same plan holds differs between runs by up to 40 MB: allocators
keep what is freed in pools of each thread. So both factors are the largest that a run showed.
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
        traffic: the same for ids and vectors of a step and for activations, of the first ``pool`` bytes.
        beyond: the same for those that come after.
        pool: bytes.
    """

    base: int
    state: float
    gradients: float
    traffic: float
    beyond: float
    pool: int


# measured by `python -m benchmarks.peak_memory --calibrate`: torch 2.13, TorchRec 1.8, FBGEMM 1.8, gloo, x86-64;
# traffic and beyond are the largest of two runs (the smaller: 1.81 and 1.43)
TORCHREC_CPU = ProcessMemory(
    base=323_536_814, state=1.0012, gradients=2.0045, traffic=2.29, beyond=1.5753, pool=82_078_686
)

_STATE, _TRAFFIC = ("weights", "optimizer"), ("io", "activations")


def process_peak(used: Mapping[str, int], constants: ProcessMemory = TORCHREC_CPU) -> int:
    """Peak resident bytes of a rank whose planned bytes by purpose are ``used`` (:class:`ir.plan.RankMemory`)."""
    factors = dict.fromkeys(_STATE, constants.state) | {"gradients": constants.gradients}
    traffic = sum(used.get(purpose, 0) for purpose in _TRAFFIC)
    pooled = min(traffic, constants.pool)
    kept = sum(size * factors.get(purpose, 1.0) for purpose, size in used.items() if purpose not in _TRAFFIC)
    return constants.base + round(kept + constants.traffic * pooled + constants.beyond * (traffic - pooled))
