"""Collectives that the switch computes or multicasts (NVLink SHARP, InfiniBand SHARP).

Each rank owns 1/n of the buffer: the switch reads that part from all ranks, adds it up and gives it to the
owner, who multicasts the sum. A rank's port so carries S + S/n each way, not 2 (n-1)/n S::

    all_reduce                                a + (n+1)/n S / (e B)
    reduce_scatter, all_gather, broadcast     a + S / (e B)

e is the fraction of the link that the switch's units reach: NCCL's nvlsEfficiency, 0.85 on Hopper and 0.74 on
Blackwell (src/graph/tuning.cc, v2.30.7).
"""

from __future__ import annotations

from cost_models.collective.terms import NetworkLevel, Terms
from ir.errors import InputError
from ir.schedules import Collective


def in_switch(collective: Collective, size: float, level: NetworkLevel) -> Terms:
    """A collective over one level whose switch helps.

    Raises:
        InputError: its switch does not.
    """
    n = level.fanout
    if n == 1:
        return Terms()
    if not level.switch_efficiency:
        raise InputError(
            "the switch of this level computes nothing; choose another algorithm or set its switch_efficiency"
        )
    moved = (n + 1) / n * size if collective == "all_reduce" else size
    return Terms(level.switch_latency, moved / (level.switch_efficiency * level.bandwidth))
