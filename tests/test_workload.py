"""Workload statistics against direct counting."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ir.errors import InputError
from ir.workload import FeatureStats, Workload, icdf_from_ids, icdf_from_zipf


def test_from_batches_counts_pooling_and_batch() -> None:
    batches = [
        {"user": np.array([[1], [2]]), "tags": (np.array([0, 0, 3]), np.array([2, 1]))},
        {"user": np.array([[1], [1]]), "tags": (np.array([3]), np.array([0, 1]))},
    ]
    work = Workload.from_batches(batches, {"user": 10, "tags": 4}, world_size=3)
    assert work.global_batch == 2 * 3
    assert work.features["user"].pooling_factor == 1
    assert work.features["tags"].pooling_factor == (3 + 1) / 4
    assert work.features["user"].unique_fraction == pytest.approx((2 / 2 + 1 / 2) / 2)


def test_from_batches_reads_a_keyed_jagged_tensor() -> None:
    torchrec = pytest.importorskip("torchrec")
    import torch

    kjt = torchrec.KeyedJaggedTensor.from_lengths_sync(
        keys=["a", "b"], values=torch.tensor([4, 5, 6]), lengths=torch.tensor([1, 0, 2, 0])
    )
    work = Workload.from_batches([kjt])
    assert work.global_batch == 2
    assert work.features["a"].pooling_factor == 0.5
    assert work.features["b"].pooling_factor == 1.0


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "no samples"),
        ([{"a": (np.array([1, 2]), np.array([1]))}], "lengths add up to 1 ids but there are 2"),
        ([{"a": np.array([[1.5]])}], "must be integers"),
        ([{"a": np.array([[99]])}], "outside 0..9"),
        ([{"a": np.array([[-1]])}], "outside 0..9"),
        ([{"a": np.array([[1]])}, {"b": np.array([[1]])}], "does not have the same features"),
        ([{"a": np.array([[1]]), "b": np.array([[1], [2]])}], "different numbers of samples"),
        ([[1, 2]], "a mapping of features"),
    ],
)
def test_bad_batches_are_named(batches: list[object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        Workload.from_batches(batches, {"a": 10})


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=1, max_size=300))
def test_hit_rate_of_the_measured_icdf_equals_counting(ids: list[int]) -> None:
    """Holding the k hottest of 31 rows serves their share of the accesses, to an ICDF step of 1/100."""
    array = np.array(ids)
    stats = FeatureStats(icdf=icdf_from_ids(array, 31))
    counts = np.sort(np.bincount(array, minlength=31))[::-1]
    for k in (0, 1, 5, 31):
        exact = counts[:k].sum() / len(ids)
        # between two ICDF steps the curve is a chord, so the worst case is one step
        assert stats.hit_rate(k / 31) == pytest.approx(exact, abs=0.011)


@pytest.mark.parametrize("exponent", [0.0, 0.6, 1.0, 1.3])
@pytest.mark.parametrize("rows", [1, 1000, 3_000_000])
def test_zipf_icdf_equals_the_direct_sum(rows: int, exponent: float) -> None:
    mass = np.cumsum(np.arange(1, rows + 1, dtype=np.float64) ** -exponent)
    icdf = icdf_from_zipf(rows, exponent)
    for step in (10, 50, 90):
        at = icdf[step] * rows  # rows that serve step %
        served = np.interp(at, np.arange(rows + 1), np.concatenate([[0], mass / mass[-1]]))
        assert served == pytest.approx(step / 100, abs=2e-4)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"global_batch": 0}, "global_batch"),
        ({"features": {"f": {"pooling_factor": float("nan")}}}, "features.f.pooling_factor"),
        ({"features": {"f": {"icdf": [0, 0.5, 0.2]}}}, "features.f.icdf: an ICDF must rise"),
        ({"features": {"f": {"pooling": 3}}}, "features.f.pooling: unknown key"),
        ({"optimizer": "lamb"}, "optimizer"),
        ([], "workload"),
    ],
)
def test_bad_workload_files_name_the_key(data: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        Workload.from_dict(data)


def test_round_trip() -> None:
    work = Workload(global_batch=64, features={"f": FeatureStats(2.5, icdf_from_zipf(100, 1.0), 0.5, True)})
    assert Workload.from_dict(work.to_dict()) == work
