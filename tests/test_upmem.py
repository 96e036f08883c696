"""The DPU kernel, compiled here, on generated MRAM images: bit-equal to numpy in the same order of addition."""

from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from codegen.upmem import (
    EmulationError,
    UpmemLayout,
    build_layout,
    compile_kernel,
    emit,
    emulate,
    run_images,
    to_fixed_point,
)
from ir.errors import InfeasibleError, InputError
from ir.pim import PimPartition, stored_sums, tile_entries
from passes.pim_partition import cache_aware, non_uniform, uniform

ROWS = 97


@pytest.fixture(scope="module")
def programs(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """The kernel with 1, 11 and 16 tasklets, the last with the sanitizers of gcc."""
    folder = tmp_path_factory.mktemp("kernel")
    checked = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    return {
        1: compile_kernel(folder, 1),
        11: compile_kernel(folder, 11),
        16: compile_kernel(folder, 16, flags=checked),
    }


def make_batch(rng: np.random.Generator, bags: int, longest: int) -> tuple[np.ndarray, np.ndarray]:
    """Bags of 0 to ``longest`` ids, some with a group of rows that recurs."""
    lists = []
    for _ in range(bags):
        bag = rng.integers(0, ROWS, int(rng.integers(0, longest + 1))).tolist()
        if bag and rng.random() < 0.6:
            start = 4 * int(rng.integers(0, 5))
            bag += [start + 2, start, start + 1]
        lists.append(bag)
    ids = np.asarray(list(itertools.chain(*lists)), dtype=np.int64)
    return ids, np.cumsum([0, *map(len, lists)])


def make_partition(
    kind: str, cols: int, tile_cols: int, row_tiles: int, rng: np.random.Generator
) -> PimPartition:
    ids, offsets = make_batch(rng, 60, 12)
    frequency = np.bincount(ids, minlength=ROWS)
    if kind == "uniform":
        return uniform(ROWS, cols, tile_cols, row_tiles)
    if kind == "non_uniform":
        return non_uniform(
            frequency, cols, tile_cols, row_tiles, tile_rows=ROWS, host_rows=int(rng.integers(0, 6))
        )
    return cache_aware(
        ids, offsets, ROWS, cols, tile_cols, row_tiles, tile_rows=ROWS * 2, max_items=4, max_sums=200
    )


def make_table(rng: np.random.Generator, cols: int, element: str) -> np.ndarray:
    if element == "int32":
        return rng.integers(-(2**31), 2**31, (ROWS, cols), dtype=np.int64).astype(np.int32)
    return (rng.standard_normal((ROWS, cols)) * 10 ** rng.uniform(-3, 3, (ROWS, 1))).astype(np.float32)


def reference(partition: PimPartition, table: np.ndarray, ids: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """Bag by bag, in the documented order: in each tile stored sums by list, then rows by id; tiles; CPU rows."""
    out = np.zeros((len(offsets) - 1, partition.cols), dtype=table.dtype)
    for bag in range(len(out)):
        mine = ids[offsets[bag] : offsets[bag + 1]].tolist()
        for tile in [*range(partition.row_tiles), -1]:
            waiting = [row for row in mine if partition.owner[row] == tile]
            partial = np.zeros(partition.cols, dtype=table.dtype)
            for members in partition.lists:
                present = [row for row in members if row in waiting]
                if len(present) >= 2:
                    stored = np.zeros(partition.cols, dtype=table.dtype)
                    for row in present:
                        stored += table[row]
                        waiting.remove(row)  # the first of its repeats
                    partial += stored
            for row in waiting:
                partial += table[row]
            if tile != -1 or len(partition.host_rows):
                out[bag] += partial
    return out


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    kind=st.sampled_from(["uniform", "non_uniform", "cache_aware"]),
    element=st.sampled_from(["int32", "fp32"]),
    cols=st.integers(1, 21),
    tile_cols=st.integers(1, 9),
    row_tiles=st.integers(1, 6),
    tasklets=st.sampled_from([1, 11, 16]),
)
def test_kernel_equals_numpy_bit_for_bit(
    programs: dict[int, Path],
    seed: int,
    kind: str,
    element: str,
    cols: int,
    tile_cols: int,
    row_tiles: int,
    tasklets: int,
) -> None:
    rng = np.random.default_rng(seed)
    partition = make_partition(kind, cols, tile_cols, row_tiles, rng)
    table = make_table(rng, cols, element)
    ids, offsets = make_batch(rng, int(rng.integers(1, 40)), int(rng.choice([0, 3, 150])))
    layout = build_layout(partition, table, max_bags=40, max_ids=len(ids))
    found = emulate(layout, ids, offsets, tasklets=tasklets, program=programs[tasklets])
    with np.errstate(over="ignore"):
        expected = reference(partition, table, ids, offsets)
    assert found.dtype == table.dtype
    assert np.array_equal(found.view(np.uint32), expected.view(np.uint32))


def test_any_number_of_tasklets_gives_the_same_sums(tmp_path: Path) -> None:
    rng = np.random.default_rng(5)
    partition = make_partition("cache_aware", 7, 3, 3, rng)
    table = make_table(rng, 7, "fp32")
    ids, offsets = make_batch(rng, 29, 20)
    layout = build_layout(partition, table, max_bags=29, max_ids=len(ids))
    expected = reference(partition, table, ids, offsets)
    for tasklets in range(1, 25):
        program = compile_kernel(tmp_path, tasklets, flags=("-O0",))
        assert np.array_equal(emulate(layout, ids, offsets, program=program), expected)


def test_the_widest_row_is_one_dma_and_a_wider_one_is_refused(programs: dict[int, Path]) -> None:
    rng = np.random.default_rng(6)
    table = make_table(rng, 512, "int32")
    layout = build_layout(uniform(ROWS, 512, 512, 2), table, max_bags=3, max_ids=90)
    ids, offsets = rng.integers(0, ROWS, 90), np.asarray([0, 50, 50, 90])
    assert np.array_equal(
        emulate(layout, ids, offsets, program=programs[11]), reference(layout.partition, table, ids, offsets)
    )
    with pytest.raises(InfeasibleError, match="513 columns"):
        build_layout(uniform(ROWS, 513, 513, 2), make_table(rng, 513, "int32"), max_bags=3, max_ids=90)
    with pytest.raises(EmulationError, match="WRAM are used up"):  # 16 tasklets x two rows of 2 KB
        emulate(layout, ids, offsets, program=programs[16])


ID_WORD = 16 + 8  # first id of small_layout(): after the header and the bounds of four bags


def small_layout() -> UpmemLayout:
    rng = np.random.default_rng(8)
    return build_layout(uniform(ROWS, 6, 6, 1), make_table(rng, 6, "int32"), max_bags=4, max_ids=64)


def images_of(layout: UpmemLayout) -> bytearray:
    ids = np.arange(10)
    entries = tile_entries(layout.partition, ids, np.asarray([0, 5, 5, 9, 10]))
    return bytearray(next(layout.images(entries, 4)))


def words(image: bytearray) -> np.ndarray:
    return np.frombuffer(image, dtype="<u4")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        (7, 1404, "not a multiple of 8"),  # rows at an odd word
        (7, 2**20, "outside the image"),
        (8, 2**26, "outside the image"),  # bag bounds
        (10, 4, "not a multiple of 8"),  # sums
        (ID_WORD, 4, "not a multiple of 8"),  # an id that is not at the start of a row
        (10, 2**26 - 8, "outside the image"),
    ],
)
def test_an_illegal_access_is_an_error(
    programs: dict[int, Path], tmp_path: Path, field: int, value: int, message: str
) -> None:
    layout = small_layout()
    image = images_of(layout)
    words(image)[field] = value
    with pytest.raises(EmulationError, match=message):
        run_images(programs[11], iter([bytes(image)]), layout.regions.total, tmp_path)


@pytest.mark.parametrize(
    ("field", "value", "message"), [(0, 7, "refused the header"), (3, 12, "refused the header")]
)
def test_a_header_that_makes_no_sense_is_reported(
    programs: dict[int, Path], tmp_path: Path, field: int, value: int, message: str
) -> None:
    layout = small_layout()
    image = images_of(layout)
    words(image)[field] = value
    after = run_images(programs[11], iter([bytes(image)]), layout.regions.total, tmp_path)
    with pytest.raises(EmulationError, match=message):
        layout.sums_of(after[0], 4, 0)


def test_an_id_outside_the_tile_is_reported(programs: dict[int, Path], tmp_path: Path) -> None:
    layout = small_layout()
    image = images_of(layout)
    words(image)[layout.regions.ids_at // 4 + 3] = ROWS * layout.regions.stride
    after = run_images(programs[1], iter([bytes(image)]), layout.regions.total, tmp_path)
    with pytest.raises(EmulationError, match="id outside the tile"):
        layout.sums_of(after[0], 4, 0)


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("mram_read(DPU_MRAM_HEAP_POINTER, buffer, 12);", "size must be 8 to 2048"),
        ("mram_read(DPU_MRAM_HEAP_POINTER, buffer, 4096);", "size must be 8 to 2048"),
        ("mram_read(DPU_MRAM_HEAP_POINTER, (char *)buffer + 4, 8);", "WRAM address is not a multiple of 8"),
        ("mram_write(buffer, (char *)DPU_MRAM_HEAP_POINTER + 4, 8);", "MRAM address is not a multiple of 8"),
        ("mram_read(DPU_MRAM_HEAP_POINTER, buffer, 24);", "outside the allocations"),
        ("mram_read((char *)DPU_MRAM_HEAP_POINTER + 56, buffer, 16);", "outside the image"),
        ("mem_alloc(64 * 1024);", "WRAM are used up"),
    ],
)
def test_the_shim_enforces_the_rules_of_the_dma(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, message: str
) -> None:
    import codegen.upmem as upmem

    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "shim").symlink_to(upmem.SOURCES / "shim")
    (sources / "embedding_dpu.c").write_text(
        "#include <alloc.h>\n#include <defs.h>\n#include <mram.h>\n__dma_aligned char header[64];\n"
        f"int main(void) {{ void *buffer; mem_reset(); buffer = mem_alloc(16); {body} return buffer == 0; }}\n"
    )
    monkeypatch.setattr(upmem, "SOURCES", sources)
    program = compile_kernel(tmp_path, 1)
    with pytest.raises(EmulationError, match=message):
        run_images(program, iter([bytes(64)]), 64, tmp_path)


def test_every_tasklet_waits_at_the_barrier(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import codegen.upmem as upmem

    sources = tmp_path / "sources"
    sources.mkdir()
    (sources / "shim").symlink_to(upmem.SOURCES / "shim")
    # each tasklet adds 1 before the barrier and must see all of them after it, 100 times over
    (sources / "embedding_dpu.c").write_text(
        """#include <alloc.h>
#include <barrier.h>
#include <defs.h>
#include <mram.h>
__dma_aligned char header[64];
static unsigned int count;
BARRIER_INIT(all, NR_TASKLETS);
int main(void) {
    unsigned int *seen, round;
    if (me() == 0) mem_reset();
    for (round = 1; round <= 100; round++) {
        __atomic_fetch_add(&count, 1, __ATOMIC_SEQ_CST);
        barrier_wait(&all);
        if (__atomic_load_n(&count, __ATOMIC_SEQ_CST) != round * NR_TASKLETS) return 1;
        barrier_wait(&all);
    }
    seen = mem_alloc(8);
    seen[0] = 1; seen[1] = me();
    mram_write(seen, (char *)DPU_MRAM_HEAP_POINTER + 8 * me(), 8);
    return 0;
}
"""
    )
    monkeypatch.setattr(upmem, "SOURCES", sources)
    after = run_images(compile_kernel(tmp_path, 24), iter([bytes(192)]), 192, tmp_path)
    assert np.frombuffer(after[0], dtype="<u4").reshape(24, 2).tolist() == [[1, k] for k in range(24)]


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 300), st.floats(1e-6, 1e6))
def test_fixed_point_never_overflows_and_keeps_its_error_bound(seed: int, pooling: int, scale: float) -> None:
    rng = np.random.default_rng(seed)
    table = rng.standard_normal((20, 3)) * scale
    table[0] = np.abs(table).max()
    fixed, bits = to_fixed_point(table, pooling)
    assert np.abs(fixed.astype(np.int64)).max() * pooling < 2**31
    assert np.abs(fixed * 2.0**-bits - table).max() <= 2.0 ** -(bits + 1)
    assert (
        np.abs(np.rint(table * 2.0 ** (bits + 1))).max() * pooling >= 2**31 - 2 * pooling
    )  # no finer one would do


def test_emitted_rows_are_the_tiles_of_the_table(tmp_path: Path) -> None:
    rng = np.random.default_rng(9)
    partition = make_partition("cache_aware", 5, 2, 3, rng)
    table = make_table(rng, 5, "int32")
    kernel, rows, about = emit(build_layout(partition, table, max_bags=4, max_ids=10), tmp_path / "out")
    assert "mram_read" in kernel.read_text()
    description = json.loads(about.read_text())
    size, stride = description["row_bytes_per_dpu"], description["regions"]["stride"]
    content = rows.read_bytes()
    assert len(content) == size * 9 == size * description["dpus"]
    for tile, column in itertools.product(range(3), range(3)):
        start = (tile * 3 + column) * size
        subsets = [(row,) for row in np.flatnonzero(partition.owner == tile).tolist()]
        for members in partition.lists:
            if partition.owner[members[0]] == tile:
                subsets += stored_sums(members)
        for place, subset in enumerate(subsets):
            entry = np.frombuffer(content, "<i4", stride // 4, start + place * stride)
            values = (
                table[list(subset), 2 * column : 2 * column + 2].sum(axis=0, dtype=np.int64).astype(np.int32)
            )
            assert entry[: len(values)].tolist() == values.tolist()


def test_limits_are_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    layout = small_layout()
    with pytest.raises(InputError, match="does not fit the layout"):
        emulate(layout, np.zeros(5, dtype=np.int64), np.arange(6))
    with pytest.raises(InputError, match="1 to 24 tasklets"):
        emulate(layout, np.zeros(1, dtype=np.int64), np.asarray([0, 1]), tasklets=25)
    with pytest.raises(InputError, match="float64"):
        build_layout(layout.partition, np.zeros((ROWS, 6)), max_bags=1, max_ids=1)
    with pytest.raises(InputError, match="finite table"):
        to_fixed_point(np.asarray([[np.nan]]), 3)
    big = uniform(20_000_000, 1, 1, 2)
    with pytest.raises(InfeasibleError, match="but has 67108864"):
        build_layout(big, np.zeros((20_000_000, 1), dtype=np.int32), max_bags=1, max_ids=1)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(InputError, match="install gcc"):
        compile_kernel(tmp_path, 4)
