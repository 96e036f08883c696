"""Seconds of collectives on a two-level network: ``hosts`` hosts of ``host_size`` ranks.

Symbols: n = host_size * hosts ranks, g = host_size, k = hosts, S bytes, B1 the bandwidth of one rank
inside its host, B2 the bandwidth of one rank to other hosts (one NIC a rank). Every function returns
the transfer time alone; :func:`latency` is what one collective costs on top.

=========================== ====================================================================
all_to_all                  max( S (g-1)/n / B1 , S g(k-1)/n / B2 ): both levels work at once
reduce_scatter, all_gather  ring over as many channels as NICs: (n-1)/n S / min(B1, g B2)
all_reduce                  reduce_scatter, then all_gather: 2(n-1)/n S / min(B1, g B2)
=========================== ====================================================================

Sources: NCCL's ring and its tuner (all-reduce busbw 384 GB/s by min(B1, g B2) on 4x8 B200 against 382
measured), nccl-tests' definition of busbw, and the flat all-to-all of NCCL, which keeps one NIC a rank.
A topology with more than two levels is priced at its narrowest outer link.
"""

from __future__ import annotations

from dataclasses import dataclass

from cost_models.calibration import Calibration
from ir.topology import Topology


@dataclass(frozen=True, slots=True)
class Network:
    """What collectives see of a topology.

    Attributes:
        host_size: ranks in a host, g.
        hosts: hosts, k.
        intra: bytes/s one rank reaches inside its host, one direction.
        inter: bytes/s one rank reaches to other hosts, one direction.
        latency: seconds one collective takes at least.
        reduce_scatter_factor: seconds of the library's reduce-scatter over those of the ring.
        all_gather_factor: the same for its all-gather.
        all_reduce_factor: the same for its all-reduce.
    """

    host_size: int
    hosts: int
    intra: float
    inter: float
    latency: float
    reduce_scatter_factor: float = 1.0
    all_gather_factor: float = 1.0
    all_reduce_factor: float = 1.0

    @property
    def ranks(self) -> int:
        """n."""
        return self.host_size * self.hosts

    @property
    def ring(self) -> float:
        """Bytes/s each rank moves around a ring that uses every NIC of a host."""
        if self.hosts == 1:
            return self.intra
        if self.host_size == 1:
            return self.inter
        return min(self.intra, self.host_size * self.inter)


def network(topology: Topology, calibration: Calibration) -> Network:
    """The two-level view of ``topology`` with the bandwidths that collectives reach."""
    inner, outer = topology.intra_link, topology.inter_link
    latency = 0.0
    if topology.world_size > 1:
        latency = calibration.collective_seconds
        latency += inner.latency if topology.host_size > 1 else 0.0
        latency += outer.latency if topology.hosts > 1 else 0.0
    return Network(
        host_size=topology.host_size,
        hosts=topology.hosts,
        intra=calibration.link_bandwidth(inner),
        inter=calibration.link_bandwidth(outer),
        latency=latency,
        reduce_scatter_factor=calibration.reduce_scatter_factor,
        all_gather_factor=calibration.all_gather_factor,
        all_reduce_factor=calibration.all_reduce_factor,
    )


def latency(net: Network) -> float:
    """Seconds a collective over all ranks takes at least; 0 with one rank."""
    return net.latency


def all_to_all(size: float, net: Network) -> float:
    """Seconds to send ``size`` bytes, an equal part to every rank (one's own stays)."""
    n, g = net.ranks, net.host_size
    return max(size * (g - 1) / n / net.intra, size * (n - g) / n / net.inter)


def reduce_scatter(size: float, net: Network) -> float:
    """Seconds to sum ``size`` bytes a rank and leave 1/n of the sum on each."""
    return net.reduce_scatter_factor * _ring_pass(size, net)


def all_gather(size: float, net: Network) -> float:
    """Seconds to give every rank all of ``size`` bytes, of which each holds 1/n."""
    return net.all_gather_factor * _ring_pass(size, net)


def _ring_pass(size: float, net: Network) -> float:
    return (net.ranks - 1) / net.ranks * size / net.ring


def all_reduce(size: float, net: Network) -> float:
    """Seconds to leave the sum of ``size`` bytes a rank on every rank."""
    return net.all_reduce_factor * 2 * _ring_pass(size, net)


def host_reduce_scatter(size: float, net: Network) -> float:
    """Seconds of a reduce-scatter among the ranks of each host."""
    g = net.host_size
    return net.reduce_scatter_factor * (g - 1) / g * size / net.intra


def host_all_gather(size: float, net: Network) -> float:
    """Seconds of an all-gather of ``size`` bytes among the ranks of each host."""
    g = net.host_size
    return net.all_gather_factor * (g - 1) / g * size / net.intra


def cross_host_all_to_all(size: float, net: Network) -> float:
    """Seconds to send ``size`` bytes, an equal part to the rank of equal position in every host."""
    k = net.hosts
    return (k - 1) / k * size / net.inter
