"""Topology presets by name: ``h100-16x8`` is 16 hosts of 8 H100.

``preset(name)`` builds a :class:`ir.topology.Topology` from a family and a shape ``NxM`` (N hosts of M
devices); ``local-N`` is this machine as one host of N gloo ranks.
"""

from __future__ import annotations

import os
import re
from dataclasses import dataclass, replace

from ir.errors import InputError, did_you_mean
from ir.topology import Device, Level, Link, MemoryTier, Topology
from planner.presets import devices as d
from planner.presets import tiers as t

MAX_HOSTS = 16384
MAX_LOCAL_RANKS = 256
LLAMA3_POD_HOSTS = 384  # 192 racks of 2 hosts: Llama 3, arXiv 2407.21783, section 3.3.1
NVL72_HOSTS = 18  # trays of 4 GPUs that one NVLink domain joins: GB200 NVL72 data sheet


@dataclass(frozen=True, slots=True)
class Family:
    """A machine of which any number can be joined.

    Attributes:
        device: the accelerator.
        inner: the link inside a host.
        outer: the link between hosts, one device's share.
        host: memory of a host.
        largest: devices a host can hold.
        what: one phrase for people.
        domain: hosts that the inner link joins (more than 1 for NVL72).
        pod: hosts of a pod that the outer link joins; 0 joins any number.
        spine: the link between pods, one device's share.
    """

    device: Device
    inner: Link
    outer: Link
    host: tuple[MemoryTier, ...]
    largest: int
    what: str
    domain: int = 1
    pod: int = 0
    spine: Link | None = None


FAMILIES: dict[str, Family] = {
    "v100": Family(
        d.V100, d.NVLINK2, d.IB_EDR_HALF, d.DDR4_V100, 16, "V100 SXM 32 GB, NVLink 2, 50 Gbit/s a GPU"
    ),
    "a100": Family(
        d.A100, d.NVLINK3, d.IB_HDR, d.DDR4_A100, 16, "A100 SXM 80 GB, NVLink 3, 200 Gbit/s a GPU"
    ),
    "a100-40g": Family(
        d.A100_40, d.NVLINK3, d.IB_HDR, d.DDR4_A100, 16, "A100 SXM 40 GB, NVLink 3, 200 Gbit/s a GPU"
    ),
    "h100": Family(d.H100, d.NVLINK4, d.IB_NDR, d.DDR5_H100, 8, "H100 SXM, NVLink 4, 400 Gbit/s a GPU"),
    "h100-pcie": Family(
        d.H100_PCIE, d.PCIE5, d.IB_EDR, d.DDR5_PCIE, 10, "H100 PCIe with peer access through PCIe 5 switches"
    ),
    "h100-pcie-staged": Family(
        d.H100_PCIE, d.STAGED, d.IB_EDR, d.DDR5_PCIE, 10, "H100 PCIe on CPU root ports, no peer access"
    ),
    "h200": Family(d.H200, d.NVLINK4, d.IB_NDR, d.DDR5_H100, 8, "H200 SXM, NVLink 4, 400 Gbit/s a GPU"),
    "b200": Family(d.B200, d.NVLINK5, d.IB_NDR, d.DDR5_H100, 8, "B200 SXM, NVLink 5, 400 Gbit/s a GPU"),
    "gb200": Family(
        d.GB200, d.NVLINK5, d.IB_NDR, d.LPDDR_GB200, 4, "GB200, NVLink 5 over up to 18 trays", NVL72_HOSTS
    ),
    "llama3-roce": Family(
        d.H100,
        d.NVLINK4,
        d.ROCE_POD,
        d.DDR5_H100,
        8,
        "Meta's Llama 3 cluster: H100, 400 Gbit/s RoCE, pods of up to 384 hosts, 1:7 between them",
        pod=LLAMA3_POD_HOSTS,
        spine=d.ROCE_SPINE,
    ),
    "l40s": Family(
        d.L40S, d.PCIE4, d.IB_EDR, d.DDR5_PCIE, 10, "L40S with peer access through PCIe 4 switches"
    ),
}


def _mixed(base: str, host: tuple[MemoryTier, ...], what: str) -> Family:
    """A family whose hosts hold more kinds of memory (composed here: not a vendor's product)."""
    return replace(FAMILIES[base], host=host, what=f"{base} hosts with {what}")


FAMILIES |= {
    "v100-scm": _mixed("v100", t.SCM_V100_HOST, "DDR4, Optane PMem 100 and Optane SSD P4800X"),
    "a100-pmem": _mixed("a100", t.PMEM_HOST, "DDR4 and Optane PMem 200"),
    "a100-optane": _mixed("a100", t.OPTANE_HOST, "DDR4 and Optane SSD P5800X"),
    "a100-scm": _mixed("a100", t.SCM_HOST, "DDR4, Optane PMem 200 and Optane SSD P5800X"),
    "a100-upmem": _mixed("a100", t.UPMEM_HOST, "DDR4 and 2,560 UPMEM DPUs"),
    "h100-cxl": _mixed("h100", t.CXL_HOST, "DDR5 and CXL memory"),
    "h100-nand": _mixed("h100", t.NAND_HOST, "DDR5 and NAND NVMe"),
    "h100-cxl-nand": _mixed("h100", t.CXL_NAND_HOST, "DDR5, CXL memory and NAND NVMe"),
}

_SHAPE = re.compile(r"^(?P<family>[a-z0-9-]+?)-(?P<hosts>\d{1,9})x(?P<devices>\d{1,9})$")
_LOCAL = re.compile(r"^local-(?P<ranks>\d{1,9})$")


def _check(name: str, what: str, value: int, largest: int) -> None:
    if not 1 <= value <= largest:
        raise InputError(f"preset {name!r} asks for {value} {what}; choose 1 to {largest}")


def _cluster(name: str, family: Family, hosts: int, devices: int) -> Topology:
    levels = [Level("host", devices, family.inner)]
    joined = max(size for size in range(1, min(family.domain, hosts) + 1) if hosts % size == 0)
    if family.domain > 1:
        levels.append(Level("pod", joined, family.inner))
        hosts //= joined
    if family.spine is not None and hosts > family.pod:
        # a job in equal parts of as few pods as its hosts divide into
        part = max(size for size in range(1, family.pod + 1) if hosts % size == 0)
        levels += [Level("pod", part, family.outer), Level("cluster", hosts // part, family.spine)]
    elif family.domain == 1 or hosts > 1:
        levels.append(Level("cluster", hosts, family.outer))
    return Topology(name=name, device=family.device, levels=tuple(levels), host_tiers=family.host)


def _local(name: str, ranks: int) -> Topology:
    """This machine: its memory in equal parts, conservative round figures for everything else."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // ranks
    cores = os.cpu_count() or 1
    source = "uncalibrated: a conservative round figure"
    tier = MemoryTier("ddr", memory, 10e9 / ranks, 10e9 / ranks, source=f"size from the machine; {source}")
    flops = 30e9 * max(1.0, cores / ranks)  # a core with 8-wide fp32 FMA sustains about this much in PyTorch
    device = Device("cpu", "cpu", {"fp32": flops}, (tier,), source=source)
    link = Link("loopback", 1e9, 50e-6, f"gloo over TCP loopback, {source}")
    return Topology(
        name=name,
        device=device,
        levels=(Level("host", ranks, link),),
        notes=("local bandwidths and rates are uncalibrated; `planner calibrate` measures them",),
    )


def preset(name: str) -> Topology:
    """The topology called ``name``.

    Raises:
        InputError: no such family, or a number of hosts or devices out of range.
    """
    local = _LOCAL.match(name)
    if local:
        ranks = int(local["ranks"])
        _check(name, "ranks", ranks, MAX_LOCAL_RANKS)
        return _local(name, ranks)
    shape = _SHAPE.match(name)
    if shape is None or shape["family"] not in FAMILIES:
        raise InputError(_unknown(name))
    family = FAMILIES[shape["family"]]
    hosts, devices = int(shape["hosts"]), int(shape["devices"])
    _check(name, "hosts", hosts, MAX_HOSTS)
    _check(name, "devices a host", devices, family.largest)
    return _cluster(name, family, hosts, devices)


def _unknown(name: str) -> str:
    shaped = re.match(r"^(.*?)-?(\d+x\d+)$", name.lower())
    stem, tail = (shaped[1], shaped[2]) if shaped else (name, "NxM")
    near = f" (did you mean {f'{name}-1x8'!r}?)" if name in FAMILIES else ""
    near = near or did_you_mean(f"{stem}-{tail}", [*(f"{family}-{tail}" for family in FAMILIES), "local-2"])
    known = ", ".join(f"{family}-NxM" for family in FAMILIES)
    return f"no topology preset is called {name!r}{near}; known are {known} and local-N"


def list_presets() -> tuple[tuple[str, str], ...]:
    """``(pattern, description)`` of every preset; N hosts of M devices."""
    made = [(f"{name}-NxM", family.what) for name, family in FAMILIES.items()]
    return (*made, ("local-N", "this machine, N gloo ranks on the CPU (uncalibrated)"))


__all__ = ["FAMILIES", "Family", "list_presets", "preset"]
