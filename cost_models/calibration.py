"""The constants of the cost models: few, each with a meaning, a unit and a source.

A topology states data-sheet peaks; a :class:`Calibration` says how much of them kernels and
collectives reach. The same constants serve every system of one device kind. ``gemm_efficiency`` and
``kernel_seconds`` are the only ones fitted on step times; ``benchmarks/fidelity.py`` repeats the fit and
prints how well it carries over to systems it has not seen. The others are published measurements of
single kernels and collectives.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from pydantic import ConfigDict

from ir.compression import CodecSpeed
from ir.reading import STRICT
from ir.topology import Link, Topology

# Names of links that belong to a device's own fabric rather than to a network of hosts.
_FABRICS = ("nvlink", "xgmi", "loopback")


@dataclass(frozen=True, slots=True)
class Calibration:
    """What fraction of a peak is reached, and what each operation costs at least.

    Attributes:
        row_efficiency: fraction of the peak memory bandwidth that gathering and updating embedding rows reaches.
        cache_speedup: bandwidth of the last-level cache over that of memory.
        stream_efficiency: fraction of the peak memory bandwidth that element-wise kernels reach.
        gemm_efficiency: fraction of the peak FLOP/s that a large GEMM reaches.
        gemm_tile: rows and columns of the output tile a GEMM is rounded up to.
        kernel_seconds: seconds each dense kernel costs beyond its roofline (launch, fill, drain).
        fabric_efficiency: fraction of a link's bandwidth that collectives reach inside a host or NVLink domain.
        pcie_efficiency: the same for PCIe, whose flows meet in root complexes and host memory.
        network_efficiency: the same for the network between hosts.
        collective_seconds: seconds a collective takes at least, without the latency of its links.
        bucket_bytes: gradient bytes gathered before one dense all-reduce starts.
        ids_ahead: the ids of the next batch travel during this step, as in TorchRec's sparse-dist pipeline.
        core_sharing: how much longer a rank computes while all ranks of its host do than alone; more than 1
            where ranks share cores. All other constants are of ranks that compute together.
        card_sharing: the same for what a rank sends to other hosts; more than 1 where ranks share a card.
        all_reduce_factor: seconds of the library's all-reduce over those of a ring on the same links.
        reduce_scatter_factor: the same for its reduce-scatter.
        all_gather_factor: the same for its all-gather.
        one_way_gain: share of the seconds of an all-to-all between hosts that is saved where each card only
            sends or only receives.
        posted_efficiency: fraction of a link's bandwidth that an all-to-all reaches whose receives are posted before its
            sends (:mod:`codegen.runtime.posted`); 0 where it was not measured.
        posted_seconds: seconds such an all-to-all takes at least; 0 likewise.
        step_seconds: seconds a step costs the host beyond its kernels and collectives (Python, autograd, streams).
        table_seconds: the same for each table of a rank's lookups.
        group_seconds: the same for each further sharding type, which has its own kernels, exchanges and layout; the
            least seconds of those exchanges included.
        exchange_seconds: the same as ``step_seconds`` where vectors travel by the compressed exchange.
        exchange_table_seconds: the same for each table there.
        codec_speeds: of this project's codecs, all ranks at once; empty where they were not measured.
        library_codec_speeds: of TorchRec's; likewise.
        source: where the constants come from, for the assumptions of a plan.
    """

    __pydantic_config__: ClassVar[ConfigDict] = STRICT

    row_efficiency: float
    cache_speedup: float
    stream_efficiency: float
    gemm_efficiency: float
    gemm_tile: int
    kernel_seconds: float
    fabric_efficiency: float
    pcie_efficiency: float
    network_efficiency: float
    collective_seconds: float
    bucket_bytes: int
    source: str
    # Neutral where the host keeps ahead of the device, as on GPUs; planner calibrate measures them on CPUs.
    ids_ahead: bool = True
    core_sharing: float = 1.0
    card_sharing: float = 1.0
    all_reduce_factor: float = 1.0
    reduce_scatter_factor: float = 1.0
    all_gather_factor: float = 1.0
    one_way_gain: float = 0.0
    posted_efficiency: float = 0.0
    posted_seconds: float = 0.0
    step_seconds: float = 0.0
    table_seconds: float = 0.0
    group_seconds: float = 0.0
    exchange_seconds: float = 0.0
    exchange_table_seconds: float = 0.0
    codec_speeds: tuple[CodecSpeed, ...] = ()
    library_codec_speeds: tuple[CodecSpeed, ...] = ()

    def link_bandwidth(self, link: Link) -> float:
        """Bytes/s that one device gets through ``link``."""
        return link.bandwidth * self.link_efficiency(link)

    def link_efficiency(self, link: Link) -> float:
        """Fraction of the link's peak that collectives reach."""
        if link.name.startswith("pcie"):
            return self.pcie_efficiency
        return self.fabric_efficiency if link.name.startswith(_FABRICS) else self.network_efficiency


GPU = Calibration(
    # gather 2646 and scatter-add 2536 of 3350 GB/s, mean, on H100: pytorch/FBGEMM pull request 3993
    row_efficiency=0.773,
    # L2 8986 over HBM 3352 GB/s, H100 (A100: 7219 over 1555): doi 10.1016/j.ultsonch.2023.106546, table 3
    cache_speedup=2.7,
    # 2771 of 3350 GB/s, gather_scale_dense_tokens on H100: pytorch/FBGEMM pull request 3993
    stream_efficiency=0.83,
    # fitted on the H100 1x8 and 8x8 rows of mlperf_dlrm.json (largest GEMMs reach 0.80: stas00/ml-engineering)
    gemm_efficiency=0.6061,
    # output tile of the large cuBLAS kernels
    gemm_tile=128,
    # fitted on the H100 1x8 and 8x8 rows of mlperf_dlrm.json
    kernel_seconds=9.061e-6,
    # 339.6 of 450 GB/s all-to-all on 8 H100: XLA's collective calibration table
    fabric_efficiency=0.755,
    # 28 (8 GPUs) and 35 (4 GPUs) of 63 GB/s, all-reduce over PCIe 5: NVIDIA/nccl issue 1639
    pcie_efficiency=0.5,
    # 45.3 of 50 GB/s a rank, all-to-all on 2x8 H200 with 400 Gbit/s NICs (busbw 85 x 8/15), 1 GiB
    network_efficiency=0.91,
    # floor of all-reduce at 32 KiB on 8 GPUs: H200 40 us, A100 44 us, B200 48 us (stas00/ml-engineering, network)
    collective_seconds=40e-6,
    # PyTorch DistributedDataParallel's default bucket_cap_mb
    bucket_bytes=25 * 2**20,
    source="fitted on the H100 1x8 and 8x8 rows of mlperf_dlrm.json; published measurements for the rest",
)

# Uncalibrated: round figures for gloo ranks that share the cores of one machine.
CPU = Calibration(
    row_efficiency=0.3,  # uncalibrated
    cache_speedup=2.0,  # uncalibrated
    stream_efficiency=0.5,  # uncalibrated
    gemm_efficiency=0.5,  # uncalibrated
    gemm_tile=16,  # vector width of AVX-512 in fp32
    kernel_seconds=10e-6,  # PyTorch's dispatch of one op, uncalibrated
    fabric_efficiency=0.5,  # uncalibrated
    pcie_efficiency=0.5,  # uncalibrated
    network_efficiency=0.5,  # uncalibrated
    collective_seconds=300e-6,  # gloo over loopback, uncalibrated
    bucket_bytes=25 * 2**20,  # PyTorch DistributedDataParallel's default bucket_cap_mb
    source="uncalibrated",
)


def constant_text(value: float | tuple[CodecSpeed, ...]) -> str:
    """A constant for the assumptions of a plan; of codecs the slower way of each, MB/s."""
    if isinstance(value, tuple):
        return ", ".join(f"{speed.codec} {min(speed.encode, speed.decode) / 1e6:.0f} MB/s" for speed in value)
    return f"{value:g}"


def default_calibration(topology: Topology) -> Calibration:
    """The constants for the topology's kind of device."""
    return GPU if topology.device.kind == "gpu" else CPU
