"""The published partitioner, as rival: metric multidimensional scaling, then constrained k-means.

Points x_i in the plane are moved by gradient descent to minimise sum (d_ij - |x_i - x_j|)^2, with d = 1 - I
("coherent") or I ("diverse"). Constrained k-means (Bradley, Bennett and Demiriz 2000, MSR-TR-2000-65) then
alternates centres with an assignment under sizes, a minimum-cost flow solved by OR-Tools. The method as
arXiv 2403.00877 describes it balances the number of features only.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_STEPS = 300  # of gradient descent
_ROUNDS = 30  # of k-means
_GRID = 1e6  # integer steps of the flow's costs


def scaled(distance: Floats, seed: int = 0) -> Floats:
    """(n, 2) points whose distances approximate ``distance``, by Adam from a classical-scaling start."""
    n = len(distance)
    random = np.random.default_rng(seed)
    centre = np.eye(n) - 1.0 / n
    values, vectors = np.linalg.eigh(-0.5 * centre @ distance**2 @ centre)
    points: Floats = vectors[:, -2:] * np.sqrt(np.maximum(values[-2:], 0.0)) + 1e-3 * random.standard_normal(
        (n, 2)
    )
    mean, square = np.zeros_like(points), np.zeros_like(points)
    rate = 0.02 * max(float(distance.max()), 1e-9)
    for step in range(1, _STEPS + 1):
        across = points[:, None, :] - points[None, :, :]
        apart = np.sqrt((across**2).sum(2)) + 1e-12
        pull = 2.0 * (apart - distance) / apart
        np.fill_diagonal(pull, 0.0)
        gradient = 2.0 * (pull[:, :, None] * across).sum(1)
        mean, square = 0.9 * mean + 0.1 * gradient, 0.999 * square + 0.001 * gradient**2
        points -= rate * (mean / (1 - 0.9**step)) / (np.sqrt(square / (1 - 0.999**step)) + 1e-12)
    return points


def constrained_kmeans(points: Floats, towers: int, sizes: tuple[int, int], seed: int = 0) -> Ints:
    """(n,) clusters of at least ``sizes[0]`` and at most ``sizes[1]`` points."""
    random = np.random.default_rng(seed)
    centres = [points[random.integers(len(points))]]
    for _ in range(towers - 1):  # k-means++
        nearest = np.min([((points - c) ** 2).sum(1) for c in centres], axis=0)
        total = nearest.sum()
        share = nearest / total if total > 0 else np.full(len(points), 1 / len(points))
        centres.append(points[random.choice(len(points), p=share)])
    middle = np.array(centres)
    cluster = np.full(len(points), -1)
    for _ in range(_ROUNDS):
        found = _assign(((points[:, None] - middle[None]) ** 2).sum(2), sizes)
        if (found == cluster).all():
            break
        cluster = found
        middle = np.array([points[cluster == t].mean(0) for t in range(towers)])
    return cluster


def _assign(cost: Floats, sizes: tuple[int, int]) -> Ints:
    """The cheapest clusters within the sizes: a minimum-cost flow."""
    from ortools.graph.python import min_cost_flow

    n, towers = cost.shape
    flow = min_cost_flow.SimpleMinCostFlow()
    grid = np.rint(cost * _GRID / max(float(cost.max()), 1e-300)).astype(np.int64)
    items, places = np.divmod(np.arange(n * towers), towers)
    arcs = flow.add_arcs_with_capacity_and_unit_cost(
        items, n + places, np.ones(n * towers, np.int64), grid.ravel()
    )
    # a cluster keeps its least number; more flows on to a common sink
    sink = n + towers
    flow.add_arcs_with_capacity_and_unit_cost(
        n + np.arange(towers),
        np.full(towers, sink),
        np.full(towers, sizes[1] - sizes[0]),
        np.zeros(towers, np.int64),
    )
    supplies = np.concatenate([np.ones(n), np.full(towers, -sizes[0]), [towers * sizes[0] - n]])
    flow.set_nodes_supplies(np.arange(n + towers + 1), supplies.astype(np.int64))
    status = flow.solve()
    assert status == flow.OPTIMAL, "the sizes allow every partition"
    used = flow.flows(arcs).reshape(n, towers)
    return np.asarray(used.argmax(1), dtype=np.int64)


def rival_partition(distance: Floats, towers: int, sizes: tuple[int, int], seed: int = 0) -> Ints:
    """(n,) towers by the published method."""
    return constrained_kmeans(scaled(distance, seed), towers, sizes, seed)
