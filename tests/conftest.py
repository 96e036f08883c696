"""Shared fixtures: a small model without torch, and plans compiled from it."""

from __future__ import annotations

import os
import signal

import pytest

# a shell that starts the suite in the background has it ignore Ctrl-C, which the tests send to their children
if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)

# one thread a process: the suite runs on two cores, beside gloo ranks of its own
os.environ.setdefault("OMP_NUM_THREADS", "1")

from ir.ops import EmbeddingTable
from ir.program import Model
from ir.workload import FeatureStats, Workload


def small_model(rows: tuple[int, ...] = (40_000, 9_000, 700, 2_500, 64), dim: int = 32) -> Model:
    """Tables only, one feature each."""
    return Model(
        name="small",
        tables=tuple(
            EmbeddingTable(name=f"t{i}", rows=n, dim=dim, features=(f"f{i}",), module="ebc")
            for i, n in enumerate(rows)
        ),
        ops=(),
    )


@pytest.fixture(scope="session")
def model() -> Model:
    """Five tables of 64 to 40,000 rows, 32 wide."""
    return small_model()


@pytest.fixture(scope="session")
def workload() -> Workload:
    """Batch 1,024 with pooling factors from 1 to 20."""
    pooling = (20.0, 1.0, 3.0, 8.0, 1.0)
    return Workload(1024, {f"f{i}": FeatureStats(p) for i, p in enumerate(pooling)})
