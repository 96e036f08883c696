"""Collectives that go through host memory: copy out, communicate between hosts, copy in.

Whole buffers: (t + S/P) + the collective on the hosts + (t + S/P), P the bandwidth of the copies (PCIe). In
chunks, the copies are two more hops of the pipelined chain. This is what an MPI without device support
does, and where its additions run on the CPU; :mod:`cost_models.collective.algorithms` calls it host_staged.
"""

from __future__ import annotations

from cost_models.collective.terms import Levels, NetworkLevel, Terms, hop
from cost_models.collective.trees import chain_hops, pipeline


def staged(size: float, copies: NetworkLevel, between: Terms) -> Terms:
    """A collective on hosts, and the copies before and after it."""
    return hop(size, copies) + between + hop(size, copies)


def staged_hops(levels: Levels, copies: NetworkLevel) -> list[NetworkLevel]:
    """The hops of a chain broadcast from device to device through host memory."""
    return [copies, *chain_hops(levels), copies]


def staged_chain(size: float, levels: Levels, copies: NetworkLevel, chunks: int) -> Terms:
    """Pipelined chain broadcast through host memory: one chunk a copy, in parallel with the hops."""
    return pipeline(size, staged_hops(levels, copies), chunks)
