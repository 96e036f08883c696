"""The designs of two papers beside what they replaced, by message size.

Broadcast (Awan et al., arXiv 1707.09414): the pipelined chain over the binomial tree. All-reduce (Awan et al., arXiv
1810.11112): partners with additions on the device, over NCCL's ring and over an MPI that goes through host memory.
The papers' ratios are against NCCL 1 and 2.x of their day; only the direction can be checked.
"""

from __future__ import annotations

from benchmarks._report import Report
from cost_models.collective.algorithms import Priced, Setting, price
from cost_models.collective.library import Library
from cost_models.collective.terms import NetworkLevel
from ir.schedules import Collective

KIB, MIB = 2**10, 2**20
SIZES = (8, 4 * KIB, 64 * KIB, MIB, 8 * MIB, 64 * MIB, 256 * MIB)
# seconds and bytes/s of a message over 100 Gbit/s InfiniBand: microsoft/taccl topo-ndv2-1MB.json, 2.6 us, 105 us/MB
IB = (1e6 / 105e-6, 2.6e-6)
# one PCIe 3.0 x16: 12 GB/s (NCCL topo.h), a hop of the Simple protocol 5.7 us (NCCL tuner v2.30.7)
PCIE = (12e9, 5.7e-6)
NCCL_HOPS = {"LL": 2.7e-6, "Simple": 14e-6}  # seconds, network ring hop: NCCL tuner v2.30.7
NCCL_BASE = 8.4e-6  # seconds, ring, Simple: NCCL tuner v2.30.7
HOST_ADDS = 1 / 10e9  # seconds a byte: one core adds about 10 GB/s of fp32; a round figure
DEVICE_ADDS = 3 / 240e9  # seconds a byte: two reads and a write at the 240 GB/s of one K80 die


def _priced(collective: Collective, algorithm: str, size: float, setting: Setting) -> Priced:
    found = price(collective, algorithm, size, setting)
    assert found is not None
    return found


def broadcast_ratios() -> dict[str, list[float]]:
    """Seconds of the binomial tree over those of the chain by size, inside a host of 16 and over 8 such hosts."""
    host = NetworkLevel(16, *PCIE)
    settings = {
        "16 devices, 1 host": Setting((host,)),
        "128 devices, 8 hosts": Setting((host, NetworkLevel(8, *IB))),
    }
    return {
        name: [
            _priced("broadcast", "binomial", size, s).seconds / _priced("broadcast", "chain", size, s).seconds
            for size in SIZES
        ]
        for name, s in settings.items()
    }


def all_reduce_ratios() -> dict[str, list[float]]:
    """Seconds of NCCL's ring and of a host-staged MPI over those of the device design, 16 hosts of one GPU."""
    level = NetworkLevel(16, *IB)
    setting = Setting((level,), DEVICE_ADDS, NetworkLevel(2, *PCIE), HOST_ADDS)
    ours = [
        min(
            _priced("all_reduce", name, size, setting).seconds
            for name in ("recursive_doubling", "halving_doubling")
        )
        for size in SIZES
    ]
    rivals: dict[str, list[float]] = {}
    for protocol, hop in NCCL_HOPS.items():
        ring = Setting((NetworkLevel(16, IB[0], hop),), DEVICE_ADDS)
        library = Library(NCCL_BASE)
        rivals[f"NCCL ring, {protocol}"] = [
            library.terms("all_reduce", _priced("all_reduce", "ring", size, ring), size, ring).seconds
            for size in SIZES
        ]
    rivals["host-staged MPI"] = [
        _priced("all_reduce", "host_staged", size, setting).seconds for size in SIZES
    ]
    return {
        name: [them / us for them, us in zip(seconds, ours, strict=True)] for name, seconds in rivals.items()
    }


def _label(size: int) -> str:
    return f"{size // MIB} MiB" if size >= MIB else f"{size // KIB} KiB" if size >= KIB else f"{size} B"


def report_designs(report: Report) -> None:
    """Rows by size and the claims on their direction."""
    broadcast, reduced = broadcast_ratios(), all_reduce_ratios()
    published = {
        "16 devices, 1 host": "up to 14x (NCCL-based)",
        "128 devices, 8 hosts": "up to 16.6x (NCCL-based)",
        "NCCL ring, LL": "5x to 17x small and medium, 1.4x large (NCCL 2)",
        "NCCL ring, Simple": "5x to 17x small and medium, 1.4x large (NCCL 2)",
        "host-staged MPI": "-",
    }
    for what, table in (("broadcast, binomial / chain", broadcast), ("all-reduce / device design", reduced)):
        for name, ratios in table.items():
            cells = {_label(size): f"{r:.2f}" for size, r in zip(SIZES, ratios, strict=True)}
            report.row(series=what, system=name, published=published[name], **cells)
    for name, ratios in broadcast.items():
        report.claim(f"chain over binomial broadcast at 256 MiB, {name}", ratios[-1], 2.0, ">=")
        report.claim(f"binomial not behind the chain at 8 B, {name}", ratios[0], 1.0, "<=")
    small = [ratio for name in ("NCCL ring, LL", "NCCL ring, Simple") for ratio in reduced[name][:2]]
    report.claim("device all-reduce over NCCL's ring, small messages", min(small), 5.0, ">=")
    report.claim(
        "device all-reduce over a host-staged one, at worst", min(reduced["host-staged MPI"]), 1.0, ">="
    )
