"""What ranks of one host share, cores and network cards, and what the host itself costs a step.

Where s ranks share a core, all constants are of ranks that compute together (``planner calibrate`` measures
them so), and a rank that computes while others wait is s times faster. A phase with c_r seconds of work on rank r
therefore lasts max(max_r c_r / s, max over hosts of the mean c_r of its ranks): the busiest rank alone, or a
host's work on the cores it has. The same holds for bytes through a shared card. s = 1 gives max_r c_r.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from cost_models.calibration import Calibration

_ON_NETWORK = ("input_dist", "output_dist", "gradient_dist")


def shared_seconds(seconds: npt.NDArray[np.float64], host_size: int, sharing: float) -> float:
    """Seconds until the last rank is done.

    Args:
        seconds: of each rank were all of them busy throughout, host by host.
        host_size: ranks of a host.
        sharing: how much faster a rank is when it is the only one at work, 1 to ``host_size``.
    """
    if sharing <= 1:
        return float(seconds.max())
    # with less than host_size ranks on a core or card, that many of a host's ranks slow each other down
    means = seconds.reshape(-1, host_size).sum(axis=1) / host_size
    return float(max(seconds.max() / sharing, means.max()))


def phase_seconds(
    phase: str, seconds: npt.NDArray[np.float64], host_size: int, calibration: Calibration
) -> float:
    """Seconds of an embedding phase from the seconds of each rank."""
    on_network = phase in _ON_NETWORK
    sharing = calibration.card_sharing if on_network else calibration.core_sharing
    return shared_seconds(seconds, host_size, sharing)


def framework_seconds(tables: int, sharding_types: int, calibration: Calibration) -> float:
    """Seconds of the host's own work in a step: tables, and sharding types with their own exchanges."""
    if not tables:
        return calibration.step_seconds
    further = max(sharding_types - 1, 0)
    return calibration.step_seconds + calibration.table_seconds * tables + calibration.group_seconds * further
