"""Seconds of an embedding lookup on UPMEM processing-in-memory (one DPU a memory bank).

A batch takes five stages, one after the other:

  push    ids CPU -> DPUs       alpha_in + n max_d(bytes_d) / W_in(n)           for each transfer
  launch  start and join        constant
  lookup  slowest DPU           max_j ( I r_j + B g_j ) / f,  j of tasklets, pipeline, DMA
  pull    sums DPUs -> CPU      alpha_out + n max_d(bytes_d) / W_out(n)
  reduce  sums over row tiles   bytes / W_host

n DPUs, I rows read on a DPU, B bags, t tasklets, f clock; r_j and g_j are the cycles of a row and of a bag
under each limit: (11 i + d) / t, i and d for i instructions and d cycles of the DMA engine. A tasklet issues one
instruction each 11 cycles (the pipeline's revolver) and waits for its DMA; the pipeline issues one a cycle; the
engine serves one DMA at a time, in 77 + b/2 cycles for b bytes.

A parallel transfer moves the same number of bytes to every DPU, so all are padded to the largest;
without padding, unequal sizes go one DPU after the other.

W(n) rises by w1 n / (1 + (n-1) g) inside a rank (through the published 1-DPU and 64-DPU figures) and by
(n/64)**k over ranks (through the published 1-rank and all-ranks figures): ranks share channels and the
CPU cores that transpose the bytes, so the second rise is slow.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from ir.errors import InfeasibleError, InputError
from ir.pim import ELEMENT_BYTES, ElementType

Direction = Literal["in", "out"]

DMA_ALIGN = 8  # bytes; both addresses and the size (UPMEM SDK, mram.h)
DMA_MAX = 2048  # bytes of one DMA (UPMEM SDK, mram.h)
READ_CYCLES = (77.0, 0.5)  # fixed, per byte: MRAM -> WRAM (PrIM, arXiv 2105.03814)
WRITE_CYCLES = (61.0, 0.5)  # fixed, per byte: WRAM -> MRAM (PrIM, arXiv 2105.03814)
REVOLVER = 11  # cycles between two instructions of one tasklet (PrIM; uPIMulator's defaults)
MAX_TASKLETS = 24  # hardware threads of a DPU (UPMEM)
MRAM_BYTES = 64 * 2**20  # of a DPU (UPMEM)
WRAM_BYTES = 64 * 2**10  # of a DPU (UPMEM)
WRAM_RUNTIME = 2048  # bytes left to the SDK's runtime: an allowance, as in codegen/upmem_dpu/shim/harness.c
WRAM_STACK = 1024  # bytes a tasklet: -DSTACK_SIZE_DEFAULT of the build (codegen/upmem_dpu/embedding_dpu.c)
RANK = 64  # DPUs of a rank (UPMEM)
ADD_CYCLES: dict[ElementType, float] = {
    "int32": 350 / 58.6,  # instructions an add with its loads and store: 58.6 MOPS at 350 MHz (PrIM)
    "fp32": 350 / 4.9,  # emulated in software: 4.9 MOPS at 350 MHz (PrIM)
}
ROW_INSTRUCTIONS = (
    20.0  # around one row: estimated from the loop of codegen/upmem_dpu/embedding_dpu.c, not measured
)
BAG_INSTRUCTIONS = (
    40.0  # around one bag: estimated from the loop of codegen/upmem_dpu/embedding_dpu.c, not measured
)
CLEAR_INSTRUCTIONS = 3.0  # to set one element of a sum to zero: estimated as above
ID_BLOCK = 256  # bytes of ids the kernel reads at a time (codegen/upmem_dpu/embedding_dpu.c)
ID_BYTES = 4  # an id is its row's place in the tile, 32 bits


@dataclass(frozen=True, slots=True)
class PimSystem:
    """A UPMEM server. Bandwidths in bytes/s of all DPUs together, times in seconds."""

    dpus: int = 2556  # usable of 2,560 (PrIM's machine)
    clock: float = 350e6  # Hz (UPMEM; older modules 267e6)
    tasklets: int = 16  # at least 11 fill the pipeline
    in_one: float = 0.33e9  # CPU -> one DPU (PrIM's microbenchmark, second hand)
    in_rank: float = 6.68e9  # CPU -> one rank, parallel (PrIM's microbenchmark, second hand)
    in_all: float = (
        15.9e9  # CPU -> all ranks, 64 MiB, stock SDK (upmem_communication_performance_test @6ed52e4)
    )
    out_one: float = 0.12e9  # one DPU -> CPU (PrIM)
    out_rank: float = 4.74e9  # one rank -> CPU, parallel (PrIM)
    out_all: float = (
        8.44e9  # all ranks -> CPU, 64 MiB, stock SDK (upmem_communication_performance_test @6ed52e4)
    )
    all_ranks: int = 40  # ranks of the machine of the two figures above: 20 modules of two (assumed full)
    in_latency: float = (
        1.46e-4  # a small push, 4 ranks, stock SDK (upmem_communication_performance_test @6ed52e4)
    )
    out_latency: float = 1.83e-4  # a small pull, 4 ranks, stock SDK (the same)
    launch: float = 1.83e-4  # start and join of an empty kernel, 4 ranks, stock SDK (the same)
    host_bandwidth: float = 75e9  # DDR4-2400 server (MyNVM, EuroSys 18)
    gather: float = (
        11.4e9  # CPU rows at random: 491 MB in 42.8 ms (PIM-Embedding-Lookup perf_rm2_b32.md @ffca0d60)
    )

    def __post_init__(self) -> None:
        if not 1 <= self.tasklets <= MAX_TASKLETS:
            raise InputError(f"tasklets must be 1 to {MAX_TASKLETS}, not {self.tasklets}")
        if self.dpus < 1:
            raise InputError(f"a PIM system needs at least one DPU, not {self.dpus}")


@dataclass(frozen=True, slots=True)
class PimTime:
    """Seconds of the stages of one batch."""

    push: float
    launch: float
    lookup: float
    pull: float
    reduce: float

    @property
    def total(self) -> float:
        """Stages follow one another."""
        return self.push + self.launch + self.lookup + self.pull + self.reduce


@dataclass(frozen=True, slots=True)
class PimLoad:
    """What one batch asks of the DPUs.

    Attributes:
        dpus: in use.
        row_bytes: of a row of a tile, padded to 8 bytes.
        max_reads: rows read on the DPU with the most (stored sums count as rows).
        bags: of the batch; every DPU writes one sum a bag.
        push_bytes: per DPU of each transfer to the DPUs, of the DPU with the most.
        pull_bytes: per DPU of the transfer back, of the DPU with the most.
        reduce_bytes: read and written by the CPU to add partial sums.
        element: type of the accumulator.
    """

    dpus: int
    row_bytes: int
    max_reads: float
    bags: int
    push_bytes: tuple[float, ...]
    pull_bytes: float
    reduce_bytes: float = 0.0
    element: ElementType = "int32"


def padded(nbytes: int) -> int:
    """Bytes rounded up to what a DMA or a host transfer may move."""
    return -(-nbytes // DMA_ALIGN) * DMA_ALIGN


def mram_read_cycles(nbytes: int) -> float:
    """DMA cycles to read ``nbytes`` of MRAM, in transfers of at most 2,048 bytes.

    >>> mram_read_cycles(8), mram_read_cycles(2048)
    (81.0, 1101.0)

    Raises:
        InputError: not a positive multiple of 8.
    """
    return _dma_cycles(nbytes, READ_CYCLES)


def mram_write_cycles(nbytes: int) -> float:
    """DMA cycles to write ``nbytes`` of MRAM; as :func:`mram_read_cycles`."""
    return _dma_cycles(nbytes, WRITE_CYCLES)


def _dma_cycles(nbytes: int, cycles: tuple[float, float]) -> float:
    if nbytes < DMA_ALIGN or nbytes % DMA_ALIGN:
        raise InputError(f"a DMA moves a positive multiple of {DMA_ALIGN} bytes, not {nbytes}; pad the row")
    return math.ceil(nbytes / DMA_MAX) * cycles[0] + cycles[1] * nbytes


Cycles = tuple[float, float, float]
"""Cycles under each limit: tasklets waiting, pipeline, DMA engine. The largest sum holds."""


def row_cycles(row_bytes: int, element: ElementType, tasklets: int) -> Cycles:
    """To read one row of a tile and add it."""
    dma = mram_read_cycles(row_bytes) + mram_read_cycles(ID_BLOCK) * ID_BYTES / ID_BLOCK
    return _limits(ROW_INSTRUCTIONS + row_bytes / ELEMENT_BYTES * ADD_CYCLES[element], dma, tasklets)


def bag_cycles(row_bytes: int, tasklets: int) -> Cycles:
    """To start a bag and write its sum; two bags share a read of their bounds."""
    dma = mram_read_cycles(16) / 2 + mram_write_cycles(row_bytes)
    return _limits(BAG_INSTRUCTIONS + row_bytes / ELEMENT_BYTES * CLEAR_INSTRUCTIONS, dma, tasklets)


def _limits(instructions: float, dma: float, tasklets: int) -> Cycles:
    return ((REVOLVER * instructions + dma) / tasklets, instructions, dma)


def lookup_cycles(load: PimLoad, tasklets: int) -> float:
    """Cycles of the DPU with the most rows to read."""
    rows, bags = row_cycles(load.row_bytes, load.element, tasklets), bag_cycles(load.row_bytes, tasklets)
    return max(load.max_reads * row + load.bags * bag for row, bag in zip(rows, bags, strict=True))


def host_bandwidth(direction: Direction, dpus: float, system: PimSystem) -> float:
    """Bytes/s of a parallel transfer over ``dpus`` DPUs together; rises with their number."""
    one, rank, full = (
        (system.in_one, system.in_rank, system.in_all)
        if direction == "in"
        else (system.out_one, system.out_rank, system.out_all)
    )
    if dpus < RANK:
        crowding = (RANK * one / rank - 1) / (RANK - 1)
        return one * dpus / (1 + (dpus - 1) * crowding)
    return float(rank * (dpus / RANK) ** (math.log(full / rank) / math.log(system.all_ranks)))


def parallel_transfer(direction: Direction, sizes: Sequence[float], system: PimSystem) -> float:
    """Seconds of one parallel transfer: every DPU moves as much as the largest of ``sizes`` (bytes)."""
    if not sizes or max(sizes) <= 0:
        return 0.0
    return _transfer(direction, max(sizes), len(sizes), system)


def _transfer(direction: Direction, nbytes: float, dpus: int, system: PimSystem) -> float:
    latency = system.in_latency if direction == "in" else system.out_latency
    return latency + dpus * nbytes / host_bandwidth(direction, dpus, system)


def lookup_time(load: PimLoad, system: PimSystem) -> PimTime:
    """Seconds of each stage of one batch.

    Raises:
        InfeasibleError: more DPUs than the system has.
    """
    if load.dpus > system.dpus:
        raise InfeasibleError(
            f"the partition needs {load.dpus} DPUs but the system has {system.dpus}",
            ("pim_dpus",),
            f"{load.dpus} DPUs",
        )
    return PimTime(
        push=sum(_transfer("in", size, load.dpus, system) for size in load.push_bytes),
        launch=system.launch,
        lookup=lookup_cycles(load, system.tasklets) / system.clock,
        pull=_transfer("out", load.pull_bytes, load.dpus, system),
        reduce=load.reduce_bytes / system.host_bandwidth,
    )


def reduce_bytes(batch: int, cols: int, row_tiles: int) -> float:
    """Bytes the CPU moves to add ``row_tiles`` partial sums of (batch, cols) and write the result."""
    return float(batch * cols * ELEMENT_BYTES * (row_tiles + 1))


def wram_need(row_bytes: int, tasklets: int) -> int:
    """Bytes of WRAM the kernel takes: per tasklet a row, a sum, an id block, two bag bounds, a stack."""
    return tasklets * (2 * row_bytes + ID_BLOCK + 16 + WRAM_STACK) + 64 + WRAM_RUNTIME
