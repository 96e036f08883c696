"""Bandwidth of a communicator on a tree of networks with oversubscription.

A communicator is a product of mesh dimensions ``(size, stride)``. Level l joins domains of D(l-1) ranks
(D(0) = 1) and gives each device B(l) bytes/s out of its domain, which is less than its port where the level
is oversubscribed. If m of the communicator's ranks lie in each domain, D / m communicators like it share the
domain's D B(l) bytes/s, and a ring passes each domain once: it gets m B(l). Its bandwidth is the least of
that over the levels it crosses. So a data-parallel ring with 16 ranks in a pod that is oversubscribed 1:7
still runs at the full rate of its port, and one with a single rank in each pod at a seventh.

Collectives are rings: (n-1)/n S / bandwidth for S bytes gathered or scattered, plus (n-1) hops.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

from cost_models.calibration import Calibration
from ir.topology import Topology

Dimensions = tuple[tuple[int, int], ...]
"""(size, stride) of each mesh dimension, innermost first."""


@dataclass(frozen=True, slots=True)
class Ring:
    """What a communicator gets.

    Attributes:
        ranks: n.
        bandwidth: bytes/s of one rank.
        hop: seconds of one step of a ring.
        floor: seconds a collective takes at least.
        level: name of the highest level it crosses.
    """

    ranks: int
    bandwidth: float
    hop: float
    floor: float
    level: str

    def gather(self, size: float) -> float:
        """Seconds to all-gather (or reduce-scatter) ``size`` bytes in all."""
        if self.ranks == 1:
            return 0.0
        return (self.ranks - 1) * (size / self.ranks / self.bandwidth + self.hop) + self.floor

    def send(self, size: float) -> float:
        """Seconds to send ``size`` bytes to the next rank."""
        return 0.0 if self.ranks == 1 else size / self.bandwidth + self.hop


@lru_cache(maxsize=4096)
def _members(dimensions: Dimensions, domain: int) -> int:
    """Ranks of the communicator in one aligned domain of ``domain`` ranks."""
    count = 1
    for size, stride in dimensions:
        count *= max(1, min(size, domain // stride))
    return count


def ring(dimensions: Dimensions, topology: Topology, calibration: Calibration) -> Ring:
    """The ring over a communicator of ``topology``."""
    ranks = 1
    for size, _ in dimensions:
        ranks *= size
    bandwidth, hop, crossed = float("inf"), 0.0, topology.levels[0].name
    domain = 1
    for level in topology.levels:
        inside, domain = _members(dimensions, domain), domain * level.fanout
        if _members(dimensions, domain) > inside:
            bandwidth = min(bandwidth, inside * calibration.link_bandwidth(level.link))
            hop, crossed = max(hop, level.link.latency), level.name
    return Ring(ranks, bandwidth, hop, calibration.collective_seconds, crossed)
