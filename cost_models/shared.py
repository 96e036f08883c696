"""What ranks of one host share, cores and network cards, and what the host itself costs a step.

Where s ranks share a core, all constants are of ranks that compute together (``planner calibrate`` measures
them so), and a rank that computes while others wait is s times faster. A phase with c_r seconds of work on rank r
therefore lasts max(max_r c_r / s, max over hosts of the mean c_r of its ranks): the busiest rank alone, or a
host's work on the cores it has. The same holds for bytes through a shared card. s = 1 gives max_r c_r.

The seconds of an exchange are those of a card that receives as much as it sends. Where it receives less, a share
``one_way_gain`` of the difference is saved: with nothing coming in, what announces a message to its sender does not
queue behind what goes out.
"""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration
from ir.sharding import ROW_SPLIT
from ir.topology import Topology

_TWO_STEPS = ROW_SPLIT - {"row_wise"}  # rows split over a host: reduced in it, then sent between hosts
_ON_NETWORK = ("input_dist", "output_dist", "gradient_dist")
# Copies of what a rank sends and receives, beyond kernels: TorchRec's pooled all-to-all packs the vectors of its
# tables into one buffer and lays out what arrives by feature, forwards and backwards (its comm_ops, All2All_Pooled)
_STAGING_COPIES = 2


def shared_seconds(seconds: npt.NDArray[np.float64], host_size: int, sharing: float) -> float:
    """Seconds until the last rank is done.

    Args:
        seconds: of each rank were all of them busy throughout, host by host.
        host_size: ranks of a host.
        sharing: how much faster a rank is when it is the only one at work, 1 to ``host_size``.
    """
    if sharing <= 1:
        return float(seconds.max(initial=0.0))
    # with less than host_size ranks on a core or card, that many of a host's ranks slow each other down
    means = seconds.reshape(-1, host_size).sum(axis=1) / host_size
    return float(max(seconds.max() / sharing, means.max()))


def exchange_seconds(seconds: npt.NDArray[np.float64], host_size: int, calibration: Calibration) -> float:
    """Seconds of an exchange between hosts in which rank r sends for ``seconds[r]``, an equal part to each host."""
    busiest = shared_seconds(seconds, host_size, calibration.card_sharing)
    hosts = len(seconds) // host_size
    if hosts < 2 or calibration.one_way_gain <= 0:
        return busiest
    sent = seconds.reshape(hosts, host_size).sum(axis=1)
    received = (sent.sum() - sent) / (hosts - 1)
    most, least = np.maximum(sent, received), np.minimum(sent, received)
    idle = float(((most - least)[most > 0] / most[most > 0]).min(initial=1.0)) if most.any() else 0.0
    return busiest * (1 - calibration.one_way_gain * idle)


def phase_seconds(
    phase: str, seconds: npt.NDArray[np.float64], host_size: int, calibration: Calibration
) -> float:
    """Seconds of an embedding phase from the seconds of each rank."""
    if phase in _ON_NETWORK:
        return exchange_seconds(seconds, host_size, calibration)
    return shared_seconds(seconds, host_size, calibration.core_sharing)


def posted_share(topology: Topology, calibration: Calibration) -> float:
    """Seconds of an exchange whose receives are posted first over those of the library's, as bytes grow; at most 1."""
    reached = calibration.link_efficiency(topology.inter_link)
    if topology.hosts == 1 or not calibration.posted_efficiency:
        return 1.0
    return min(reached / calibration.posted_efficiency, 1.0)


def second_exchanges(sharding_types: Collection[str], topology: Topology, latency: float) -> dict[str, float]:
    """Seconds by phase at least of the second step of exchanges that go through the host, then between hosts.

    Nothing on GPUs, where the fitted steps have one floor an exchange.
    """
    if topology.device.kind != "cpu" or 1 in (topology.hosts, topology.host_size):
        return {}
    if _TWO_STEPS.isdisjoint(sharding_types):
        return {}
    return {"output_dist": latency, "gradient_dist": latency}


def framework_seconds(
    tables: int, sharding_types: int, calibration: Calibration, compressed: bool = False
) -> float:
    """Seconds of the host's own work in a step: tables, and sharding types with their own exchanges.

    ``compressed``: tables and vectors are handled by the compressed exchange instead of TorchRec.
    """
    if not tables:
        return calibration.step_seconds
    if compressed and calibration.exchange_seconds > 0:
        return calibration.exchange_seconds + calibration.exchange_table_seconds * tables
    further = max(sharding_types - 1, 0)
    return calibration.step_seconds + calibration.table_seconds * tables + calibration.group_seconds * further


def staging_seconds(exchanged: float, bandwidth: float, calibration: Calibration) -> float:
    """Seconds of copying ``exchanged`` bytes into and out of the buffers of collectives.

    Args:
        exchanged: bytes of vectors and gradients that the busiest rank sends in a step.
        bandwidth: peak bytes/s of the memory, reads and writes together.
        calibration: how much of it copies reach.
    """
    return _STAGING_COPIES * 2 * exchanged / (bandwidth * calibration.stream_efficiency)
