"""Data-sheet figures of devices, links and hosts, each with its source.

Peaks are dense (no sparsity) and per direction. Capacity is the data sheet's gigabytes (1e9 bytes), a
little less than what the driver reports. Latencies are NCCL's figures for one ring hop of its Simple
protocol (nccl v2.30.7, src/graph/tuning.cc).
"""

from __future__ import annotations

from ir.topology import Device, Link, MemoryTier

_GB, _TB, _TERA = 10**9, 10**12, 1e12
_SECTOR = 32  # bytes of one global-memory transaction: CUDA C++ Programming Guide, device memory accesses

_ML = "stas00/ml-engineering compute/accelerator/README.md @744d01e1"


def _gpu(
    name: str, memory: str, capacity: int, bandwidth: float, flops: dict[str, float], source: str
) -> Device:
    tier = MemoryTier(
        name="hbm",
        capacity=capacity * _GB,
        read_bandwidth=bandwidth * _GB,
        write_bandwidth=bandwidth * _GB,
        granule=_SECTOR,
        source=f"{memory}; {source}",
    )
    peaks = {dtype: rate * _TERA for dtype, rate in flops.items()}
    return Device(name=name, kind="gpu", flops=peaks, tiers=(tier,), source=source)


V100 = _gpu("V100-SXM", "HBM2", 32, 900, {"fp32": 15.7, "fp16": 125}, "NVIDIA V100 data sheet")
A100_40 = _gpu(
    "A100-SXM4-40GB",
    "HBM2",
    40,
    1555,
    {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312, "int8": 624},
    f"NVIDIA A100 data sheet; rates: {_ML}",
)
A100 = _gpu(
    "A100-SXM4-80GB",
    "HBM2e",
    80,
    2039,
    {"fp32": 19.5, "tf32": 156, "bf16": 312, "fp16": 312, "int8": 624},
    f"NVIDIA A100 data sheet; rates: {_ML}",
)
H100 = _gpu(
    "H100-SXM5-80GB",
    "HBM3",
    80,
    3350,
    {"fp32": 67, "tf32": 494.5, "bf16": 989, "fp16": 989, "fp8": 1979, "int8": 1979},
    f"NVIDIA H100 data sheet; rates: {_ML}",
)
H100_PCIE = _gpu(
    "H100-PCIe-80GB",
    "HBM2e",
    80,
    2000,
    {"fp32": 51, "tf32": 378, "bf16": 756.5, "fp16": 756.5, "fp8": 1513, "int8": 1513},
    "NVIDIA H100 data sheet, PCIe column",
)
H200 = _gpu(
    "H200-SXM-141GB",
    "HBM3e",
    141,
    4800,
    {"fp32": 67, "tf32": 494.5, "bf16": 989, "fp16": 989, "fp8": 1979, "int8": 1979},
    f"NVIDIA H200 data sheet; rates: {_ML}",
)
B200 = _gpu(
    "B200-SXM",
    "HBM3e",
    180,
    8000,
    {"fp32": 75, "tf32": 1125, "bf16": 2250, "fp16": 2250, "fp8": 4500, "int8": 4500, "fp4": 9000},
    f"NVIDIA HGX B200 data sheet; rates: {_ML}",
)
GB200 = _gpu(
    "GB200",
    "HBM3e",
    186,
    8000,
    {"fp32": 80, "tf32": 1250, "bf16": 2500, "fp16": 2500, "fp8": 5000, "int8": 5000, "fp4": 10000},
    f"NVIDIA GB200 NVL72 data sheet; rates: {_ML}",
)
L40S = _gpu(
    "L40S",
    "GDDR6",
    48,
    864,
    {"fp32": 91.6, "tf32": 183, "bf16": 362, "fp16": 362, "fp8": 733, "int8": 733},
    "NVIDIA L40S data sheet",
)

_NVLINK_HOP = 3.4e-6  # NCCL tuner, NVLink ring hop, Simple
_PCIE_HOP = 5.7e-6  # NCCL tuner, PCI ring hop, Simple
_NET_HOP = 14e-6  # NCCL tuner, network ring hop, Simple

NVLINK2 = Link("nvlink2", 150e9, _NVLINK_HOP, "6 links of 25 GB/s: NVIDIA V100 data sheet")
NVLINK3 = Link("nvlink3", 300e9, _NVLINK_HOP, "12 links of 25 GB/s: NVIDIA A100 data sheet")
NVLINK4 = Link("nvlink4", 450e9, _NVLINK_HOP, "18 links of 25 GB/s: NVIDIA H100 data sheet")
NVLINK5 = Link("nvlink5", 900e9, _NVLINK_HOP, "18 links of 50 GB/s: NVIDIA B200 data sheet")
PCIE4 = Link("pcie4", 31e9, _PCIE_HOP, "PCIe 4.0 x16 with peer access through switches")
PCIE5 = Link("pcie5", 63e9, _PCIE_HOP, "PCIe 5.0 x16 with peer access through switches")
STAGED = Link(
    "pcie-staged",
    10e9,
    _PCIE_HOP,
    "GPUs on CPU root ports without peer access: every byte goes through host memory. 20 GB/s both ways "
    "between any two of 8 GPUs on PCIe 4.0 with peer access off: NVIDIA/nccl-tests issue 74 (collectives of "
    "8 GPUs through host memory reach 6 GB/s: NVIDIA/nccl issue 1817)",
)

IB_EDR = Link("ib-edr-100", 12.5e9, _NET_HOP, "100 Gbit/s; one NIC for each GPU")
IB_EDR_HALF = Link("ib-edr-50", 6.25e9, _NET_HOP, "4 NICs of 100 Gbit/s for 8 GPUs: DGX-1")
IB_HDR = Link("ib-hdr-200", 25e9, _NET_HOP, "200 Gbit/s; one NIC for each GPU: DGX A100")
IB_NDR = Link("ib-ndr-400", 50e9, _NET_HOP, "400 Gbit/s; one NIC for each GPU: DGX H100, DGX B200")
ROCE_POD = Link(
    "roce-400",
    50e9,
    _NET_HOP,
    "400 Gbit/s a GPU, full bisection in a pod: Llama 3, arXiv 2407.21783, section 3.3.1",
)
ROCE_SPINE = Link(
    "roce-400-spine",
    50e9 / 7,
    30e-6,
    "aggregation oversubscribed 1:7, hops of up to tens of microseconds: Llama 3, arXiv 2407.21783, section 3.3.1",
)


def host_memory(capacity_gb: int, bandwidth_gb: float, source: str) -> tuple[MemoryTier, ...]:
    """The DRAM of a host, both sockets, shared by its devices."""
    return (
        MemoryTier(
            name="ddr",
            capacity=capacity_gb * _GB,
            read_bandwidth=bandwidth_gb * _GB,
            write_bandwidth=bandwidth_gb * _GB,
            latency=100e-9,
            source=source,
        ),
    )


DDR4_V100 = host_memory(512, 153.6, "DGX-1: 512 GB, 2 sockets of 4 channels DDR4-2400")
DDR4_A100 = host_memory(2000, 409.6, "DGX A100 640GB: 2 TB, 2 sockets of 8 channels DDR4-3200")
DDR5_H100 = host_memory(2000, 614.4, "DGX H100: 2 TB, 2 sockets of 8 channels DDR5-4800")
DDR5_PCIE = host_memory(1000, 614.4, "typical PCIe server: 1 TB, 2 sockets of 8 channels DDR5-4800")
LPDDR_GB200 = host_memory(
    960, 1024.0, "GB200 NVL72: 480 GB LPDDR5X at 512 GB/s for each of 2 Grace CPUs a tray"
)
