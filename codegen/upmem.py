"""A partition of an embedding table as it runs on UPMEM DPUs: MRAM images, and a run of the real kernel here.

Every DPU has the same layout of its MRAM heap, sized for the fullest one, because parallel transfers move
the same bytes at the same offset on all DPUs (offsets in bytes, all multiples of 8):

  header 64 | bag bounds | ids | sums | rows and stored sums

One push a batch writes the first three, one pull reads the sums; rows are written once. Rows are padded to
8 bytes, the unit of a DMA. :func:`emulate` compiles ``upmem_dpu/embedding_dpu.c``, the source that the SDK
compiles too, against a shim that enforces the rules of the DMA, and runs it on these images.
"""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ir.errors import InfeasibleError, InputError, PlannerError
from ir.pim import (
    ELEMENT_BYTES,
    ElementType,
    Entries,
    IntArray,
    PimPartition,
    stored_sums,
    tile_entries,
)

SOURCES = Path(__file__).resolve().parent / "upmem_dpu"
MAGIC = 0x454D4231  # "EMB1", as in embedding_dpu.c
HEADER = struct.Struct("<16I")  # struct header of embedding_dpu.c
ALIGN = 8  # bytes: addresses and sizes of DMA (UPMEM SDK, mram.h)
DMA_MAX = 2048  # bytes of one DMA, so of a tile's row (UPMEM SDK, mram.h)
MRAM_BYTES = 64 * 2**20  # of a DPU (UPMEM)
ID_BLOCK = 256  # bytes; ID_BLOCK of embedding_dpu.c
MAX_TASKLETS = 24  # of a DPU (UPMEM)
UNWRITTEN = 0xA5  # what a byte of the results holds before the kernel has run
ILLEGAL = 3  # exit status of the harness on an access that the hardware would refuse
STATUS = {1: "the kernel refused the header", 2: "the kernel met an id outside the tile"}

Table = npt.NDArray[Any]  # (rows, cols) int32 or float32


class EmulationError(PlannerError):
    """The emulated kernel made an access that a DPU does not allow, or refused its input."""


@dataclass(frozen=True, slots=True)
class Regions:
    """Offsets (bytes) of the MRAM heap, the same on every DPU."""

    stride: int
    entries: int
    max_bags: int
    max_ids: int
    bounds_at: int
    ids_at: int
    sums_at: int
    rows_at: int
    total: int

    def push_bytes(self, ids: int) -> int:
        """Bytes of the push of a batch whose fullest DPU has ``ids`` ids: header, bounds and ids."""
        return self.ids_at + _up(ids * 4, ID_BLOCK)


@dataclass(frozen=True, slots=True, eq=False)
class UpmemLayout:
    """A table cut into MRAM images."""

    partition: PimPartition
    table: Table
    element: ElementType
    regions: Regions

    def tile_values(self, tile: int) -> Table:
        """(entries, cols) rows of a row tile and its stored sums, each added in the order of its list."""
        rows = self.table[self.partition.tile_rows(tile)]
        sums = []
        for members in self.partition.tile_lists(tile):
            for subset in stored_sums(members):
                value = np.zeros(self.partition.cols, dtype=self.table.dtype)
                for row in subset:
                    value += self.table[row]
                sums.append(value)
        return np.concatenate([rows, np.stack(sums)]) if sums else rows

    def columns(self, dpu: int) -> slice:
        """Columns of the table that a DPU holds."""
        start = dpu % self.partition.col_tiles * self.partition.tile_cols
        return slice(start, min(start + self.partition.tile_cols, self.partition.cols))

    def images(self, entries: Entries, bags: int) -> Iterator[bytes]:
        """The MRAM heap of each DPU, in order, ready for one batch."""
        for tile in range(self.partition.row_tiles):
            values = self.tile_values(tile)
            mine = entries.tile == tile
            places = entries.place[mine]
            bounds = np.searchsorted(entries.bag[mine], np.arange(bags + 1))
            for column in range(self.partition.col_tiles):
                yield self._image(values, places, bounds, tile * self.partition.col_tiles + column)

    def _image(self, values: Table, places: IntArray, bounds: IntArray, dpu: int) -> bytes:
        regions, columns = self.regions, self.columns(dpu)
        image = np.full(regions.total, UNWRITTEN, dtype=np.uint8)
        head = (
            *(MAGIC, int(self.element == "fp32"), columns.stop - columns.start, regions.stride),
            *(len(values) * regions.stride, len(bounds) - 1, len(places)),
            *(regions.rows_at, regions.bounds_at, regions.ids_at, regions.sums_at),
        )
        _put(image, 0, np.frombuffer(HEADER.pack(*head, *[0] * (16 - len(head))), dtype=np.uint8))
        _put(image, regions.bounds_at, bounds.astype("<u4").view(np.uint8))
        _put(image, regions.ids_at, (places * regions.stride).astype("<u4").view(np.uint8))
        padded = np.zeros(
            (len(values), regions.stride // ELEMENT_BYTES), dtype=self.table.dtype.newbyteorder("<")
        )
        padded[:, : columns.stop - columns.start] = values[:, columns]
        _put(image, regions.rows_at, padded.reshape(-1).view(np.uint8))
        return image.tobytes()

    def sums_of(self, image: bytes, bags: int, dpu: int) -> Table:
        """(bags, columns of the DPU) partial sums in an image that the kernel has run on.

        Raises:
            EmulationError: the kernel set a status.
        """
        status = HEADER.unpack_from(image)[11]
        if status:
            raise EmulationError(f"DPU {dpu}: {STATUS.get(status, f'status {status}')}")
        columns, stride = self.columns(dpu), self.regions.stride
        raw = np.frombuffer(
            image, self.table.dtype.newbyteorder("<"), bags * stride // 4, self.regions.sums_at
        )
        return raw.reshape(bags, -1)[:, : columns.stop - columns.start].astype(self.table.dtype)


def _up(nbytes: int, unit: int = ALIGN) -> int:
    return -(-nbytes // unit) * unit


def _put(image: npt.NDArray[np.uint8], offset: int, content: npt.NDArray[np.uint8]) -> None:
    image[offset : offset + content.size] = content


def to_fixed_point(
    table: npt.NDArray[np.floating[Any]], max_pooling: int
) -> tuple[npt.NDArray[np.int32], int]:
    """``(int32 table, fraction bits)``: the finest fixed point in which no bag of ``max_pooling`` ids overflows.

    A pooled sum is ``sum * 2.0**-bits``; each row is off by at most ``2.0**-(bits + 1)``. Integers because a
    DPU adds int32 in hardware and fp32 in software, twelve times slower (PrIM, arXiv 2105.03814).

    Raises:
        InputError: values that are not finite, or a pooling below 1.
    """
    if max_pooling < 1 or not np.isfinite(table).all():
        raise InputError("fixed point needs a finite table and a largest bag of at least one id")
    peak = max(float(np.abs(table).max(initial=0.0)), 2.0**-64)
    bits = int(np.floor(np.log2((2**31 - 1 - max_pooling) / (peak * max_pooling))))
    return np.rint(np.asarray(table, dtype=np.float64) * 2.0**bits).astype(np.int32), bits


def build_layout(partition: PimPartition, table: Table, *, max_bags: int, max_ids: int) -> UpmemLayout:
    """The MRAM layout of a table.

    Args:
        partition: of the table.
        table: (rows, cols) int32 (fixed point) or float32.
        max_bags: bags of the largest batch.
        max_ids: entries of the largest batch on the fullest DPU.

    Raises:
        InputError: a table of another shape or type, or sizes below 0.
        InfeasibleError: a row of a tile longer than one DMA, or more bytes than a DPU's MRAM.
    """
    if table.shape != (partition.rows, partition.cols):
        raise InputError(
            f"the partition is of a {partition.rows} x {partition.cols} table, not {table.shape}"
        )
    if table.dtype not in (np.dtype(np.int32), np.dtype(np.float32)):
        raise InputError(f"a DPU adds int32 or float32, not {table.dtype}; use to_fixed_point")
    if max_bags < 1 or max_ids < 0:
        raise InputError(f"a layout needs at least one bag and no negative ids, not {max_bags} and {max_ids}")
    stride = _up(min(partition.tile_cols, partition.cols) * ELEMENT_BYTES)
    if stride > DMA_MAX:
        raise InfeasibleError(
            f"a tile of {partition.tile_cols} columns has rows of {stride} bytes but a DMA moves {DMA_MAX}",
            ("mram_dma",),
            f"tiles of at most {DMA_MAX // ELEMENT_BYTES} columns",
        )
    counts = np.bincount(partition.owner[partition.owner >= 0], minlength=partition.row_tiles)
    for members in partition.lists:
        counts[partition.owner[members[0]]] += len(stored_sums(members))
    entries = int(counts.max())
    bounds_at = HEADER.size
    ids_at = bounds_at + _up((max_bags + 4) * 4)  # the kernel reads bounds four at a time
    sums_at = ids_at + _up(max_ids * 4, ID_BLOCK)
    rows_at = sums_at + max_bags * stride
    regions = Regions(
        *(stride, entries, max_bags, max_ids),
        *(bounds_at, ids_at, sums_at, rows_at, rows_at + entries * stride),
    )
    if regions.total > MRAM_BYTES:
        raise InfeasibleError(
            f"a DPU would hold {regions.total} bytes of rows, ids and sums but has {MRAM_BYTES}",
            ("mram_capacity",),
            "more row tiles, narrower column tiles or smaller batches",
        )
    return UpmemLayout(partition, table, "fp32" if table.dtype == np.float32 else "int32", regions)


def compile_kernel(folder: Path, tasklets: int, *, cc: str = "gcc", flags: tuple[str, ...] = ()) -> Path:
    """Compile the DPU kernel with the host shim; returns the program.

    Raises:
        InputError: no compiler, or a number of tasklets that a DPU does not have.
        EmulationError: the compiler refuses the sources.
    """
    if not 1 <= tasklets <= MAX_TASKLETS:
        raise InputError(f"a DPU runs 1 to {MAX_TASKLETS} tasklets, not {tasklets}")
    if shutil.which(cc) is None:
        raise InputError(f"emulating a DPU needs a C compiler and {cc!r} is not installed; install gcc")
    shim = SOURCES / "shim"
    options = [
        "-std=c11",
        "-O2",
        "-Wall",
        "-Wextra",
        "-Werror",
        f"-DNR_TASKLETS={tasklets}",
        f"-I{shim}",
        *flags,
    ]
    kernel, program = folder / f"kernel{tasklets}.o", folder / f"harness{tasklets}"
    for command in (
        [cc, *options, "-Dmain=dpu_main", "-c", str(SOURCES / "embedding_dpu.c"), "-o", str(kernel)],
        [cc, *options, str(shim / "harness.c"), str(kernel), "-pthread", "-o", str(program)],
    ):
        result = subprocess.run(command, capture_output=True, text=True, check=False)
        if result.returncode:
            raise EmulationError(f"{cc} cannot compile the DPU kernel: {result.stderr.strip()[-2000:]}")
    return program


def run_images(program: Path, images: Iterator[bytes], size: int, folder: Path) -> list[bytes]:
    """Run the compiled kernel on images of ``size`` bytes; returns the MRAM of each DPU afterwards.

    Raises:
        EmulationError: an access that the hardware refuses, or a run that fails.
    """
    before, after = folder / "images", folder / "results"
    count = 0
    with before.open("wb") as file:
        for image in images:
            file.write(image)
            count += 1
    command = [str(program), str(before), str(after), str(count), str(size)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        what = "an illegal access" if result.returncode == ILLEGAL else "a failed run"
        raise EmulationError(f"{what} in the emulated DPU: {result.stderr.strip()[-2000:]}")
    with after.open("rb") as file:
        return [file.read(size) for _ in range(count)]


def emulate(
    layout: UpmemLayout,
    ids: npt.ArrayLike,
    offsets: npt.ArrayLike,
    *,
    tasklets: int = 16,
    program: Path | None = None,
) -> Table:
    """(bags, cols) pooled sums of one batch, by the DPU kernel on the generated images and the CPU's reduction.

    Args:
        layout: of the table.
        ids: (n,) rows, bag after bag.
        offsets: (bags + 1,) bounds of the bags in ``ids``.
        tasklets: 1 to 24; the result does not depend on it.
        program: from :func:`compile_kernel` with the same tasklets, to compile only once.

    Raises:
        InputError: bad ids or offsets, a batch larger than the layout, no compiler.
        EmulationError: an illegal access in the kernel.
    """
    id_array, bounds = np.asarray(ids, dtype=np.int64), np.asarray(offsets, dtype=np.int64)
    partition, bags = layout.partition, len(bounds) - 1
    entries = tile_entries(partition, id_array, bounds)
    most = int(entries.reads(partition.row_tiles).max())
    if not 1 <= bags <= layout.regions.max_bags or most > layout.regions.max_ids:
        raise InputError(
            f"a batch of {bags} bags with {most} entries on a DPU does not fit the layout's "
            f"{layout.regions.max_bags} bags and {layout.regions.max_ids} entries; build a larger layout"
        )
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        program = program or compile_kernel(folder, tasklets)
        results = run_images(program, layout.images(entries, bags), layout.regions.total, folder)
    partial = [layout.sums_of(image, bags, dpu) for dpu, image in enumerate(results)]
    return reduce_on_cpu(layout, partial, entries, bags)


def reduce_on_cpu(layout: UpmemLayout, partial: list[Table], entries: Entries, bags: int) -> Table:
    """(bags, cols): partial sums of the DPUs added tile after tile, then the rows that the CPU keeps."""
    partition = layout.partition
    total = np.zeros((bags, partition.cols), dtype=layout.table.dtype)
    for dpu, sums in enumerate(partial):
        total[:, layout.columns(dpu)] += sums
    mine = entries.tile == -1
    if mine.any():
        kept = np.zeros_like(total)
        np.add.at(kept, entries.bag[mine], layout.table[entries.place[mine]])
        total += kept
    return total


def emit(layout: UpmemLayout, folder: Path, *, tasklets: int = 16) -> list[Path]:
    """Write what a UPMEM machine needs: kernel source, one image of rows a DPU, ``layout.json``.

    The images hold the rows of each DPU from ``rows_at`` on, for
    ``dpu_push_xfer(set, DPU_XFER_TO_DPU, DPU_MRAM_HEAP_POINTER_NAME, rows_at, bytes, DPU_XFER_DEFAULT)``.
    """
    folder.mkdir(parents=True, exist_ok=True)
    kernel = folder / "embedding_dpu.c"
    shutil.copyfile(SOURCES / "embedding_dpu.c", kernel)
    regions, partition = layout.regions, layout.partition
    nothing = Entries(*(np.zeros(0, dtype=np.int64) for _ in range(3)))
    rows = folder / "rows.bin"
    with rows.open("wb") as file:
        for image in layout.images(nothing, 0):
            file.write(image[regions.rows_at :])
    description = {
        "kind": partition.kind,
        "element": layout.element,
        "dpus": partition.dpus,
        "row_tiles": partition.row_tiles,
        "col_tiles": partition.col_tiles,
        "row_bytes_per_dpu": regions.total - regions.rows_at,
        "regions": {name: getattr(regions, name) for name in Regions.__slots__},
        "tasklets": tasklets,
        "build": f"dpu-upmem-dpurte-clang -DNR_TASKLETS={tasklets} -DSTACK_SIZE_DEFAULT=1024 -O2 "
        "-o embedding_dpu embedding_dpu.c",
    }
    about = folder / "layout.json"
    about.write_text(json.dumps(description, indent=2) + "\n")
    return [kernel, rows, about]
