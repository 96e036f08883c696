"""Tiered tables train like tables in memory, and cache like the caches they are named after."""

from __future__ import annotations

from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.runtime.optimizers import make_optimizer
from codegen.runtime.tiered import native
from codegen.runtime.tiered.bag import MAX_PENDING, TieredEmbeddingBag
from codegen.runtime.tiered.native import Slots
from codegen.runtime.tiered.pages import page_bytes_for
from codegen.runtime.tiered.table import Range, TieredTable
from cost_models.cache import lru_hit_rate_of_trace, reuse_histogram
from ir.errors import InputError

ROWS, DIM = 4000, 16
LAYOUTS = {
    "block": (Range("block", ROWS, 512),),
    "mapped": (Range("mapped", ROWS, 4096),),
    "three tiers": (Range("ram", 400), Range("mapped", 1500, 1024), Range("block", ROWS - 1900, 4096)),
}


def stream(count: int, order: np.ndarray, seed: int = 3) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Batches of 150 bags of 0 to 7 ids, the first rows of ``order`` more often."""
    random = np.random.default_rng(seed)
    batches = []
    for _ in range(count):
        lengths = random.integers(0, 8, 150)
        ids = order[(random.random(lengths.sum()) ** 4 * ROWS).astype(np.int64)]
        batches.append((torch.from_numpy(ids), torch.from_numpy(np.cumsum(lengths) - lengths)))
    return batches


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("optimizer", ["sgd", "adagrad", "rowwise_adagrad", "adam"])
def test_training_equals_that_of_a_table_in_memory(tmp_path: Path, optimizer: str, layout: str) -> None:
    """Bit for bit with PyTorch's table and optimizers; Adam to rounding (SparseAdam adds in another order)."""
    exact = optimizer != "adam"
    torch.manual_seed(0)
    start, target = torch.randn(ROWS, DIM), torch.randn(150, DIM)
    order = np.random.default_rng(1).permutation(ROWS)
    table = torch.nn.EmbeddingBag(ROWS, DIM, mode="sum", _weight=start.clone(), sparse=not exact)
    step = (
        make_optimizer(optimizer, list(table.parameters()), 0.1)  # type: ignore[arg-type]
        if exact
        else torch.optim.SparseAdam(table.parameters(), lr=0.1)
    )
    bag = TieredEmbeddingBag.create(
        tmp_path / "t",
        ROWS,
        DIM,
        LAYOUTS[layout],
        optimizer=optimizer,  # type: ignore[arg-type]
        cache_rows=1500,
        order=order,
        weights=start,
        lr=0.1,
    )
    for number, (ids, offsets) in enumerate(bag.pipeline(stream(24, order), depth=2)):
        got, expected = bag(ids, offsets), table(ids, offsets)
        assert torch.equal(got, expected) if exact else torch.allclose(got, expected, atol=1e-4)
        step.zero_grad()
        ((expected - target) ** 2).mean().backward()
        step.step()
        ((got - target) ** 2).mean().backward()
        if number == 10:
            bag.flush(number)
    wanted = table.weight.detach()
    assert torch.equal(bag.weight(), wanted) if exact else torch.allclose(bag.weight(), wanted, atol=1e-4)
    assert bag.counters.written_back > 0  # else the cache was never under pressure
    bag.flush(24)
    bag.close()
    with TieredTable.open(
        tmp_path / "t", cache_rows=500
    ) as again:  # weights and optimizer state are both there
        assert (again.tag, again.steps) == (24, 24 if optimizer == "adam" else 0)
        fresh = TieredEmbeddingBag(again, lr=0.1)
        ids, offsets = stream(1, order, seed=8)[0]
        for module in (fresh, table):
            step.zero_grad()
            ((module(ids, offsets) - target) ** 2).mean().backward()
        step.step()
        assert torch.allclose(fresh.weight(), table.weight.detach(), atol=0 if exact else 1e-4, rtol=0)


def test_means_and_weights_of_samples_reach_the_gradient(tmp_path: Path) -> None:
    order = np.arange(ROWS)
    start = torch.randn(ROWS, DIM, generator=torch.Generator().manual_seed(5))
    for mode in ("sum", "mean"):
        bag = TieredEmbeddingBag.create(
            tmp_path / mode,
            ROWS,
            DIM,
            LAYOUTS["mapped"],
            optimizer="sgd",
            cache_rows=900,
            weights=start,
            mode=mode,  # type: ignore[arg-type]
        )
        ids, offsets = stream(1, order)[0]
        factors = torch.rand(len(ids)) if mode == "sum" else None
        table = torch.nn.EmbeddingBag(ROWS, DIM, mode=mode, _weight=start.clone())
        optimizer = torch.optim.SGD(table.parameters(), lr=0.01)
        for module in (bag, table):
            module(ids, offsets, per_sample_weights=factors).pow(2).sum().backward()
        optimizer.step()
        assert torch.equal(bag.weight(), table.weight.detach())
        bag.close()


def test_evaluation_changes_nothing_and_may_come_between_steps(tmp_path: Path) -> None:
    bag = TieredEmbeddingBag.create(tmp_path / "t", ROWS, DIM, LAYOUTS["block"], cache_rows=600)
    before = bag.weight()
    ids, offsets = stream(1, np.arange(ROWS))[0]
    with torch.no_grad():
        for _ in range(2 * MAX_PENDING):
            pooled = bag(ids, offsets)
    assert torch.equal(pooled, torch.nn.functional.embedding_bag(ids, before, offsets, mode="sum"))
    assert torch.equal(bag.weight(), before)
    assert bag.flush() == 1
    assert bag.counters.flushed == 0
    bag.close()


# --- the cache ---


def fetched(tmp_path: Path, trace: list[int], cache: int, policy: str) -> int:
    with TieredTable.create(
        tmp_path / f"{policy}{cache}",
        100,
        4,
        "sgd",
        (Range("mapped", 100, 512),),
        init=lambda ids: np.zeros((len(ids), 4), np.float32),
        cache_rows=cache,
        policy=policy,  # type: ignore[arg-type]
    ) as table:
        for row in trace:
            table.release(table.take(np.asarray([row])), changed=False)
        return table.counters.fetched


@pytest.mark.parametrize("compiled", [True, False])
def test_the_lru_cache_misses_exactly_as_often_as_stack_distances_say(
    tmp_path: Path, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not compiled:
        monkeypatch.setattr(native, "library", lambda: None)
    trace = (np.random.default_rng(2).random(600) ** 3 * 100).astype(int).tolist()
    histogram, first = reuse_histogram(trace)
    for cache in (1, 7, 30, 100):
        hits = lru_hit_rate_of_trace(histogram, first, cache) * len(trace)
        assert fetched(tmp_path, trace, cache, "lru") == len(trace) - round(hits)


def test_the_lfu_cache_misses_as_often_as_a_simulated_one(tmp_path: Path) -> None:
    """Least used over the whole past goes first, of equals the one whose last use is longest ago."""
    trace = (np.random.default_rng(2).random(600) ** 3 * 100).astype(int).tolist()
    for cache in (1, 7, 30):
        uses: dict[int, int] = {}
        last: OrderedDict[int, int] = OrderedDict()
        misses = 0
        for now, row in enumerate(trace):
            uses[row] = uses.get(row, 0) + 1
            if row not in last:
                misses += 1
                if len(last) == cache:
                    del last[min(last, key=lambda r: (uses[r], last[r]))]
            last[row] = now
        assert fetched(tmp_path, trace, cache, "lfu") == misses


@pytest.mark.skipif(native.library() is None, reason="no compiler")
@settings(max_examples=60, deadline=None)
@given(st.data())
def test_compiled_and_plain_slots_give_up_the_same_slots(data: st.DataObject) -> None:
    count = data.draw(st.integers(1, 12))
    compiled, plain = Slots.empty(count), Slots.empty(count)
    plain._c = None
    slot_of = np.full(30, -1, np.int32)
    held: list[np.ndarray] = []
    tick = count
    for _ in range(data.draw(st.integers(1, 25))):
        if held and data.draw(st.booleans()):
            done = held.pop(0)
            compiled.release(done)
            plain.release(done)
        rows = np.asarray(sorted(data.draw(st.sets(st.integers(0, 29), max_size=4))), np.int64)
        slots = compiled.take(rows, slot_of)
        assert np.array_equal(slots, plain.take(rows, slot_of))
        assert compiled.free == plain.free
        missing = rows[slots < 0]
        if len(missing) > compiled.free:
            for one in (compiled, plain):
                one.release(slots[slots >= 0])
            continue
        new = compiled.victims(len(missing))
        assert np.array_equal(new, plain.victims(len(missing)))
        slot_of[np.isin(slot_of, new)] = -1
        slot_of[missing] = new
        slots[slots < 0] = new
        for one in (compiled, plain):
            one.key[slots] = np.arange(tick, tick + len(slots))
        tick += len(slots)
        held.append(slots)


# --- files ---


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_rows_come_back_as_they_were_written(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Any rows, dims, page sizes and splits over tiers, against a dictionary of rows."""
    rows, dim = data.draw(st.integers(1, 300)), data.draw(st.integers(1, 40))
    kinds = data.draw(st.lists(st.sampled_from(["mapped", "block"]), min_size=1, max_size=3))
    cuts = sorted(data.draw(st.sets(st.integers(1, rows - 1), max_size=len(kinds) - 1))) if rows > 1 else []
    sizes = np.diff([0, *cuts, rows]).tolist()
    page = page_bytes_for(8 * dim, data.draw(st.sampled_from([512, 1024, 4096])))
    folder = tmp_path_factory.mktemp("table")
    ranges = [Range(kind, size, page) for kind, size in zip(kinds, sizes, strict=False)]  # type: ignore[arg-type]
    expected = np.random.default_rng(rows).random((rows, 2 * dim), np.float32)
    cache = data.draw(st.integers(1, rows))
    with TieredTable.create(
        folder, rows, dim, "adagrad", ranges, init=lambda ids: expected[ids], cache_rows=cache
    ) as table:
        for value in range(data.draw(st.integers(1, 6))):
            ids = np.asarray(sorted(data.draw(st.sets(st.integers(0, rows - 1), max_size=cache))), np.int64)
            batch = table.take(ids)
            assert np.array_equal(table.weights[batch.slots[batch.inverse]], expected[ids, :dim])
            table.weights[batch.slots] += value
            expected[ids, :dim] += value
            table.release(batch, changed=True)
            if data.draw(st.booleans()):
                table.flush()
        table.flush()
    with TieredTable.open(folder, cache_rows=1) as table:
        assert np.array_equal(table.read_all(np.arange(rows)), expected)


def test_block_files_are_read_past_the_page_cache_in_whole_pages(tmp_path: Path) -> None:
    with TieredTable.create(
        tmp_path / "t",
        1000,
        16,
        "sgd",
        (Range("block", 1000, 4096),),
        init=lambda ids: np.zeros((len(ids), 16), np.float32),
        cache_rows=100,
    ) as table:
        batch = table.take(np.arange(0, 1000, 63))  # 63 rows of 64 bytes fit a page: one row of each page
        assert (table.traffic[0].pages_read, table.traffic[0].bytes_read) == (16, 16 * 4096)
        table.release(batch, changed=True)
        table.flush()
        assert (table.traffic[0].pages_read, table.traffic[0].pages_written) == (
            32,
            16,
        )  # the other rows are kept
        if table._files[0].direct:  # type: ignore[attr-defined]
            import os

            info = Path(f"/proc/self/fdinfo/{table._files[0]._fd}").read_text()  # type: ignore[attr-defined]
            flags = int(next(line for line in info.splitlines() if line.startswith("flags")).split()[1], 8)
            assert flags & os.O_DIRECT


def test_prefetched_rows_are_there_before_they_are_asked_for(tmp_path: Path) -> None:
    bag = TieredEmbeddingBag.create(tmp_path / "t", ROWS, DIM, LAYOUTS["block"], cache_rows=900)
    batches = stream(2, np.arange(ROWS))
    bag.prefetch(batches[0][0])
    bag.prefetch(batches[1][0])
    bag.table._queue[1].ready.result(timeout=30)  # type: ignore[union-attr]
    assert bag.counters.batches == 2  # both fetched, none used
    fetched_before = bag.counters.fetched
    bag(*batches[0])
    assert bag.counters.fetched == fetched_before
    bag.close()


# --- what people get wrong ---


def small(folder: Path, **changes: object) -> TieredTable:
    arguments = {"rows": 50, "dim": 4, "optimizer": "sgd", "ranges": (Range("block", 50, 512),)} | changes
    return TieredTable.create(
        folder,
        init=lambda ids: np.zeros((len(ids), 4), np.float32),
        **{"cache_rows": 10, **arguments},  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"ranges": (Range("block", 40, 512),)}, "40 of 50 rows"),
        ({"ranges": (Range("block", 25, 512), Range("ram", 25))}, "first range the one in ram"),
        ({"ranges": (Range("block", 50, 700),)}, "use a multiple of 512"),
        ({"cache_rows": 0}, "give it at least 1"),
        ({"policy": "fifo"}, "unknown cache policy"),
        ({"order": [0] * 50}, "list each of its 50 rows once"),
    ],
)
def test_tables_that_cannot_be_made(tmp_path: Path, changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        small(tmp_path / "t", **changes)


def test_misuse_of_a_table_is_named(tmp_path: Path) -> None:
    with small(tmp_path / "t") as table:
        with pytest.raises(InputError, match="outside 0"):
            table.prefetch(np.asarray([50]))
        with pytest.raises(InputError, match="cannot hold the batches in flight: 11 more rows"):
            table.take(np.arange(11))
        table.prefetch(np.arange(3))
        with pytest.raises(InputError, match="order in which they were prefetched"):
            table.take(np.arange(4))
        batch = table.take(np.arange(3))
        table.release(batch, changed=False)
        with pytest.raises(InputError, match="released already"):
            table.release(batch, changed=False)
    with pytest.raises(InputError, match="not empty"):
        small(tmp_path / "t")
    with pytest.raises(InputError, match="holds no tiered table"):
        TieredTable.open(tmp_path / "none", cache_rows=1)


def test_forward_passes_that_are_never_finished_are_refused(tmp_path: Path) -> None:
    bag = TieredEmbeddingBag.create(tmp_path / "t", ROWS, DIM, LAYOUTS["mapped"], cache_rows=600)
    ids, offsets = stream(1, np.arange(ROWS))[0]
    kept = [bag(ids, offsets) for _ in range(MAX_PENDING)]
    with pytest.raises(InputError, match=r"wrap evaluation in torch.no_grad"):
        bag(ids, offsets)
    for pooled in kept:
        pooled.sum().backward()
    bag(ids, offsets)
    bag.close()
