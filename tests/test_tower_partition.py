"""The partitioner: brute force, proved bounds, limits, planted groups, and the rival's flow."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from passes.tower_bound import largest_sizes, upper_bound
from passes.tower_partition import partition, partition_value, stated
from passes.tower_rival import constrained_kmeans, rival_partition, scaled


def random_gain(n: int, seed: int) -> np.ndarray:
    gain = np.random.default_rng(seed).random((n, n))
    gain = (gain + gain.T) / 2
    np.fill_diagonal(gain, 0.0)
    return gain


def planted(n: int, towers: int, noise: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Mean cosines of vectors that share a factor within their group."""
    random = np.random.default_rng(seed)
    group = random.permutation(np.arange(n) % towers)
    vectors = random.standard_normal((towers, 1024))[group] + noise * random.standard_normal((n, 1024))
    unit = vectors.reshape(n, 64, 16)
    unit /= np.linalg.norm(unit, axis=2, keepdims=True)
    flat = unit.reshape(n, -1)
    strengths = np.abs(flat @ flat.T / 64)
    np.fill_diagonal(strengths, 0.0)
    return strengths, group


def rand_index(a: np.ndarray, b: np.ndarray) -> float:
    """Adjusted Rand index (Hubert and Arabie 1985), from its contingency table."""
    table = np.array([[np.sum((a == i) & (b == j)) for j in np.unique(b)] for i in np.unique(a)])
    pairs = lambda x: (x * (x - 1) / 2).sum()  # noqa: E731
    both, one, other, every = pairs(table), pairs(table.sum(1)), pairs(table.sum(0)), pairs(np.array(len(a)))
    expected = one * other / every
    return float((both - expected) / ((one + other) / 2 - expected))


def best_by_brute_force(
    gain: np.ndarray, resources: np.ndarray, towers: int, sizes: tuple[int, int], capacity: np.ndarray
) -> float:
    best = -np.inf
    for tower in itertools.product(range(towers), repeat=len(gain)):
        chosen = np.array(tower)
        count = np.bincount(chosen, minlength=towers)
        held = np.array([resources[chosen == t].sum(0) for t in range(towers)])
        if count.min() >= sizes[0] and count.max() <= sizes[1] and (held <= capacity * (1 + 1e-9)).all():
            best = max(best, partition_value(gain, chosen))
    return best


@pytest.mark.parametrize(("n", "towers"), [(7, 2), (8, 3), (9, 2)])
@pytest.mark.parametrize("seed", [0, 1])
def test_few_tables_are_solved_exactly(n: int, towers: int, seed: int) -> None:
    gain = random_gain(n, seed)
    resources = np.random.default_rng(seed + 9).lognormal(0, 1, (n, 2))
    problem, start = stated(gain, resources, towers, 0.5)
    found = partition(problem, start)
    best = best_by_brute_force(gain, resources, towers, problem.sizes, problem.capacity)
    assert found.value == pytest.approx(best, rel=1e-6)
    assert found.value <= found.bound <= best * (1 + 1e-5)


@settings(max_examples=25, deadline=None)
@given(n=st.integers(4, 8), towers=st.integers(2, 3), seed=st.integers(0, 10**6), balance=st.floats(0, 1))
def test_bounds_hold_for_every_partition(n: int, towers: int, seed: int, balance: float) -> None:
    """Against the best of all partitions; the bound is asked with a far too small known value."""
    gain = random_gain(n, seed) ** 3
    resources = np.random.default_rng(seed).random((n, 2))
    problem, start = stated(gain, resources, towers, balance)
    bound, _ = upper_bound(gain, resources, towers, problem.sizes, problem.capacity, 0.0)
    best = best_by_brute_force(gain, resources, towers, problem.sizes, problem.capacity)
    assert best <= bound * (1 + 1e-12)
    assert partition_value(gain, start) <= best + 1e-12


@settings(max_examples=40, deadline=None)
@given(n=st.integers(4, 30), towers=st.integers(1, 4), seed=st.integers(0, 10**6), balance=st.floats(0, 2))
def test_start_meets_its_own_limits(n: int, towers: int, seed: int, balance: float) -> None:
    resources = np.random.default_rng(seed).lognormal(0, 2, (n, 3))
    problem, start = stated(np.zeros((n, n)), resources, towers, balance)
    count = np.bincount(start, minlength=towers)
    assert problem.sizes[0] <= count.min()
    assert count.max() <= problem.sizes[1]
    held = np.array([resources[start == t].sum(0) for t in range(towers)])
    assert (held <= problem.capacity * (1 + 1e-9)).all()
    assert largest_sizes(n, towers, problem.sizes).sum() == n


def test_planted_groups_are_recovered_and_proved() -> None:
    gain, group = planted(24, 4, 1.0, 3)
    problem, start = stated(gain, np.ones((24, 1)), 4, 0.0)
    found = partition(problem, start)
    assert rand_index(found.tower, group) == 1.0
    assert found.bound == pytest.approx(found.value, rel=1e-6)


@pytest.mark.parametrize("n", [180, 856])
def test_hundreds_of_tables(n: int) -> None:
    """Planted groups under noise, with resources that bind; the rival balances sizes only."""
    gain, group = planted(n, 16, 1.5, 0)
    problem, start = stated(gain, np.ones((n, 1)), 16, 0.05)
    begun = time.process_time()
    found = partition(problem, start)
    assert time.process_time() - begun < 45  # of a core; 30 s on two quiet ones
    assert rand_index(found.tower, group) >= 0.95
    assert found.value <= found.bound
    assert 1 - found.value / found.bound < (0.01 if n < 500 else 0.05)
    if n < 500:
        again = partition(problem, start)
        assert (again.tower == found.tower).all()


def test_rival_places_points_and_respects_sizes() -> None:
    """A 3-4-5 triangle is embedded exactly; clusters have the sizes asked for."""
    distance = np.array([[0, 3, 4], [3, 0, 5], [4, 5, 0]], dtype=float)
    points = scaled(distance)
    found = np.linalg.norm(points[:, None] - points[None], axis=2)
    assert found == pytest.approx(distance, abs=0.05)
    random = np.random.default_rng(1)
    spread = np.concatenate([random.normal(0, 0.1, (9, 2)), random.normal(5, 0.1, (3, 2))])
    clusters = constrained_kmeans(spread, 2, (5, 7))
    assert sorted(np.bincount(clusters)) in ([5, 7], [6, 6])
    gain, group = planted(24, 4, 1.0, 3)
    assert rand_index(rival_partition(1 - gain - np.eye(24), 4, (6, 6)), group) > 0.3
