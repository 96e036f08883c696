"""The model of the tiered runtime against simulated caches, and its constants against a machine made up."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

import numpy as np
import pytest

from cost_models.tiered_runtime import Curve, FileRange, expected_traffic, fetch_probabilities, fit
from ir.errors import InputError

ROWS, IDS = 4000, 300


def shares(exponent: float) -> np.ndarray:
    weights = np.arange(1, ROWS + 1, dtype=np.float64) ** -exponent
    return np.random.default_rng(2).permutation(weights / weights.sum())


def simulate(
    p: np.ndarray, cache: int, policy: str, per_page: int, batches: int = 260
) -> tuple[float, float, float]:
    """Rows fetched, pages of fetched rows and pages of evicted rows, means of the batches after the first 100."""
    random = np.random.default_rng(1)
    held: OrderedDict[int, None] = OrderedDict()
    uses = np.zeros(len(p))
    totals = np.zeros(3)
    for step in range(batches):
        batch = np.unique(random.choice(len(p), IDS, p=p))
        uses[batch] += 1
        missing = [int(row) for row in batch if int(row) not in held]
        for row in batch.tolist():
            held[row] = None
            held.move_to_end(row)
        now = set(batch.tolist())
        gone = []
        while len(held) > cache:
            if policy == "lru":
                gone.append(held.popitem(last=False)[0])
            else:
                victim = min((row for row in held if row not in now), key=lambda row: uses[row])
                del held[victim]
                gone.append(victim)
        if step >= 100:
            totals += [
                len(missing),
                len({r // per_page for r in missing}),
                len({r // per_page for r in gone}),
            ]
    return tuple(totals / (batches - 100))  # type: ignore[return-value]


@pytest.mark.parametrize("exponent", [0.6, 1.1])
@pytest.mark.parametrize("cache", [400, 1500])
def test_an_lru_cache_fetches_and_writes_back_as_many_rows_and_pages(exponent: float, cache: int) -> None:
    p = shares(exponent)
    fetched, read, written = simulate(p, cache, "lru", 15)
    found = expected_traffic(p, IDS, [FileRange("block", ROWS, 15, 1024)], cache, "lru")
    assert found.fetched == pytest.approx(fetched, rel=0.03)
    assert found.blocks[0].fetched == pytest.approx(read, rel=0.03)
    assert found.blocks[0].completed == pytest.approx(written, rel=0.03)
    assert 100 * abs(found.hit_rate - (1 - fetched / IDS)) < 1


def test_an_lfu_cache_fetches_as_many_rows() -> None:
    p = shares(1.1)
    fetched, _, _ = simulate(p, 700, "lfu", 15)
    found = expected_traffic(p, IDS, [FileRange("block", ROWS, 15, 1024)], 700, "lfu")
    assert 100 * abs(found.hit_rate - (1 - fetched / IDS)) < 2


def test_rows_held_in_memory_and_tiers_share_the_rest() -> None:
    p = np.sort(shares(1.0))[::-1].copy()
    ranges = [FileRange("ram", 500), FileRange("mapped", 1500), FileRange("block", 2000, 1, 512)]
    found = expected_traffic(p, IDS, ranges, 600, "lru")
    alone = fetch_probabilities(p[500:], IDS, 600, "lru")
    assert found.fetched == pytest.approx(alone.sum())
    assert found.mapped == pytest.approx(alone[:1500].sum())
    assert found.blocks[0].fetched == pytest.approx(alone[1500:].sum())
    assert found.blocks[0].completed == 0  # one row a page: nothing to complete
    assert fetch_probabilities(p, IDS, ROWS, "lru").sum() == 0
    with pytest.raises(InputError, match="unknown cache policy"):
        fetch_probabilities(p, IDS, 10, "fifo")  # type: ignore[arg-type]
    with pytest.raises(InputError, match="hold 500 rows"):
        expected_traffic(p, IDS, ranges[:1], 10, "lru")


@dataclass
class Run:
    kind: str
    dim: int
    depth: int
    dense: bool
    ids: float
    distinct: float
    fetched: float
    pages_read: float
    main: float
    fetch: float


@dataclass
class Point:
    write: bool
    page_bytes: int
    pages: int
    seconds: float


def machine() -> tuple[list[Point], list[Run]]:
    """A machine that keeps to the model: 10 us and 20 us a page, known work around it."""
    points = [
        Point(write, size, n, (1e-4 + n * (2e-5 if write else 1e-5)) * size / 4096)
        for write in (False, True)
        for size in (512, 4096)
        for n in (1, 10, 100, 1000)
    ]
    runs = []
    for dim in (16, 64):
        for kind in ("ram", "mapped", "block"):
            for ids, share in ((4096.0, 0.97), (1024.0, 0.98), (4096.0, 0.25), (256.0, 1.0), (64.0, 1.0)):
                distinct = share * ids
                fetched = 0.0 if kind == "ram" else 0.7 * distinct
                main = 3e-4 + 2e-7 * ids + (1e-7 + 2e-9 * dim) * distinct
                pages = 1.5 * fetched if kind == "block" else 0.0
                main += 1e-4 * (kind == "block") + 2e-7 * pages
                fetch = 1e-4 + 1e-7 * ids + 2e-7 * distinct + (3e-7 + 1e-9 * dim) * fetched
                runs.append(Run(kind, dim, 0, False, ids, distinct, fetched, pages, main, fetch))
                if kind == "block":  # pairs with layers behind the bag, without and with prefetch
                    runs.append(Run(kind, dim, 0, True, ids, distinct, fetched, pages, main + 0.01, fetch))
                    runs.append(
                        Run(kind, dim, 2, True, ids, distinct, fetched, pages, main + 0.02, 1.3 * fetch)
                    )
    return points, runs


def test_a_fit_finds_the_machine_it_was_measured_on() -> None:
    rates = fit(*machine())
    found = expected_traffic(shares(1.0), IDS, [FileRange("block", ROWS, 7, 4096)], 900, "lru")
    (block,) = found.blocks
    main = 3e-4 + 2e-7 * IDS + (1e-7 + 2e-9 * 32) * found.distinct + 1e-4 + 2e-7 * found.pages_read
    fetch = 1e-4 + 1e-7 * IDS + 2e-7 * found.distinct + (3e-7 + 1e-9 * 32) * found.fetched + 3e-4
    fetch += 1e-5 * (block.fetched + block.completed) + 2e-5 * block.fetched
    assert rates.main(found, 32) == pytest.approx(main, rel=0.02)
    assert rates.fetch(found, 32) == pytest.approx(fetch, rel=0.02)
    assert rates.beside == pytest.approx(1.3, rel=1e-6)
    assert rates.step(found, 32, 0) == pytest.approx(main + fetch, rel=0.02)
    assert rates.step(found, 32, 2) == pytest.approx(1.3 * fetch, rel=0.02)
    assert rates.step(found, 32, 2, dense=1.0) == pytest.approx(1.0 + main, rel=0.02)
    with pytest.raises(InputError, match="too few"):
        fit(machine()[0], machine()[1][:3])


def test_a_curve_goes_on_at_its_last_rate() -> None:
    curve = Curve(4096, (10.0, 100.0), (1.0, 2.0))
    assert [curve.at(n) for n in (0, 5, 10, 55, 100, 280)] == pytest.approx([0, 0.5, 1, 1.5, 2, 4])
