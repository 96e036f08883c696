"""Memory of a host below its GPUs' HBM, each figure with its source, and the servers that mix it.

Figures are those of one module or drive; :func:`several` makes the tier of a host. A block tier states
``iops``, reads of one granule a second; ``dwpd`` is the endurance that the maker warrants. Byte-addressable
tiers without ``iops`` are limited by their bandwidth, of which an access moves whole granules.

Prices are for weighing tiers against each other: list prices where one was published, else a stated share
of DRAM_PRICE. HBM has neither price nor power of its own: both are part of the GPU's.
"""

from __future__ import annotations

from dataclasses import replace

from ir.topology import MemoryTier
from planner.presets import devices as d

_GB = 10**9
_SECTOR = 64  # bytes of a cache line: what one access to DDR or CXL memory moves

DRAM_PRICE = 10.0  # US dollars per GB, assumed; only ratios of prices matter to a placement
DRAM_POWER = 0.125  # W per GB, assumed: 8 W for a 64 GB RDIMM under load

CXL_MODULE = MemoryTier(
    name="cxl",
    capacity=256 * _GB,
    read_bandwidth=36 * _GB,
    write_bandwidth=18 * _GB,
    latency=300e-9,
    granule=_SECTOR,
    price_per_gb=DRAM_PRICE,
    watt_per_gb=DRAM_POWER,
    source="Micron CZ120, 256 GB, PCIe 5.0 x8: 36 GB/s in all at 2 reads : 1 write, one module, Intel MLC "
    "(Tom's Hardware, 7 August 2023), so writes are taken as half of the reads; latency 3 times that of local DDR, "
    "inside the measured 2 to 5 times (arXiv 2405.14209); price and power as DRAM",
)
PMEM_100 = MemoryTier(
    name="pmem",
    capacity=512 * _GB,
    read_bandwidth=39.4 * _GB / 6,
    write_bandwidth=13.9 * _GB / 6,
    latency=305e-9,
    granule=256,
    price_per_gb=577 / 128,
    watt_per_gb=18 / 512,
    source="Optane PMem 100, one of 6 modules that measure 39.4 GB/s read and 13.9 GB/s write together, 305 ns "
    "random read (Izraelevitz et al., arXiv 1903.05714); 577 dollars the 128 GB module (Tom's Hardware, April "
    "2019); 18 W the largest module (Intel, after computerbase.de, March 2020)",
)
PMEM_200 = replace(
    PMEM_100,
    read_bandwidth=PMEM_100.read_bandwidth * 1.15,
    write_bandwidth=PMEM_100.write_bandwidth * 1.15,
    watt_per_gb=15 / 512,
    source="Optane PMem 200: 15 % more bandwidth than PMem 100, 15 W a module, 512 GB at most, 8 modules a socket "
    "(Intel slide, computerbase.de, March 2020); latency and price as PMem 100",
)
OPTANE_P4800X = MemoryTier(
    name="optane",
    capacity=750 * _GB,
    read_bandwidth=2.4 * _GB,
    write_bandwidth=2.0 * _GB,
    latency=8.9e-6,
    granule=512,
    iops=584_800,
    write_iops=500_000,
    dwpd=30,
    price_per_gb=1520 / 375,
    watt_per_gb=15 / 750,
    source="Optane SSD P4800X 750 GB: 2.4 and 2.0 GB/s, 30 DWPD, 15 W, 1520 dollars for 375 GB (AnandTech 11930); "
    "8.9 us and 584.8 k reads/s of 4 KB (AnandTech 11209) and 500 k writes/s (11930), taken for 512 B blocks too",
)
OPTANE_P5800X = MemoryTier(
    name="optane",
    capacity=1600 * _GB,
    read_bandwidth=7.2 * _GB,
    write_bandwidth=6.2 * _GB,
    latency=6e-6,
    granule=512,
    iops=4.6e6,
    dwpd=100,
    price_per_gb=DRAM_PRICE / 5,
    watt_per_gb=15 / 750,
    source="Optane SSD P5800X 1.6 TB product brief (second hand): 7.2 and 6.2 GB/s, 6 us, 4.6 M reads/s of 512 B; "
    "100 DWPD (Lenovo's page of the drive); price 1/5 of DRAM (arXiv 2110.11489, second hand); power a GB as P4800X",
)
NAND_GEN4 = MemoryTier(
    name="nand",
    capacity=6400 * _GB,
    read_bandwidth=6.8 * _GB,
    write_bandwidth=5.6 * _GB,
    latency=77.9e-6,
    granule=4096,
    iops=1.0e6,
    write_iops=190e3,
    dwpd=3,
    price_per_gb=DRAM_PRICE / 30,
    watt_per_gb=22 / 6400,
    source="Micron 7450 MAX 6.4 TB, TLC: 6.8 and 5.6 GB/s, 3 DWPD (ServeTheHome, 2022); 1 M reads/s and 190 k writes/s "
    "of 4 KB and 22 W of its forerunner 7400 (hardwaretimes.com, 2021); latency of a 4 KB read at depth 1 as "
    "measured on the P3700 (AnandTech 11209); price 1/30 of DRAM (arXiv 2110.11489, second hand)",
)
UPMEM_SERVER = MemoryTier(
    name="upmem",
    capacity=2560 * 64 * 2**20,  # 20 modules x 2 ranks x 64 DPUs of 64 MiB
    read_bandwidth=8.44 * _GB,
    write_bandwidth=15.9 * _GB,
    latency=231e-9,
    granule=8,
    processors=2560,
    source="UPMEM: 2,560 DPUs in 40 ranks of 64, 64 MiB each (PrIM, arXiv 2105.03814). Bandwidth is what the CPU "
    "reads and writes over all ranks (upmem_communication_performance_test @6ed52e4); inside, a DPU reads 8 B in "
    "81 cycles at 350 MHz, and 628 MB/s in 2 KB (PrIM): cost_models/pim.py prices lookups that stay there",
)


def several(tier: MemoryTier, count: int, what: str = "") -> MemoryTier:
    """``count`` modules or drives used side by side: capacity, bandwidth and IOPS add up, latency stays."""
    return replace(
        tier,
        capacity=tier.capacity * count,
        read_bandwidth=tier.read_bandwidth * count,
        write_bandwidth=tier.write_bandwidth * count,
        iops=None if tier.iops is None else tier.iops * count,
        write_iops=None if tier.write_iops is None else tier.write_iops * count,
        source=f"{count} x {what or tier.source}",
    )


def priced(tiers: tuple[MemoryTier, ...]) -> tuple[MemoryTier, ...]:
    """DRAM tiers of a host with DRAM's price and power."""
    return tuple(
        replace(
            tier,
            price_per_gb=DRAM_PRICE,
            watt_per_gb=DRAM_POWER,
            source=f"{tier.source}; price, power assumed",
        )
        for tier in tiers
    )


DDR4 = priced(d.DDR4_A100)
DDR4_V100 = priced(d.DDR4_V100)
DDR5 = priced(d.DDR5_H100)

# what the hosts of the mixed servers hold, fastest first
CXL_HOST = (*DDR5, several(CXL_MODULE, 8))
NAND_HOST = (*DDR5, several(NAND_GEN4, 4))
OPTANE_HOST = (*DDR4, several(OPTANE_P5800X, 4))
CXL_NAND_HOST = (*CXL_HOST, several(NAND_GEN4, 4))
PMEM_HOST = (*DDR4, several(PMEM_200, 16))
SCM_HOST = (*PMEM_HOST, several(OPTANE_P5800X, 4))
SCM_V100_HOST = (*DDR4_V100, several(PMEM_100, 12), several(OPTANE_P4800X, 4))
UPMEM_HOST = (*DDR4, UPMEM_SERVER)
