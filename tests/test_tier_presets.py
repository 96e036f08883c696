"""Tiers of hosts: figures that follow from one another, orders that the technologies have, and their sources."""

from __future__ import annotations

import pytest

from ir.topology import MemoryTier, Topology
from planner.presets import list_presets, preset, tiers

MIXED = {
    "v100-scm": ("ddr", "pmem", "optane"),
    "a100-pmem": ("ddr", "pmem"),
    "a100-optane": ("ddr", "optane"),
    "a100-scm": ("ddr", "pmem", "optane"),
    "a100-upmem": ("ddr", "upmem"),
    "h100-cxl": ("ddr", "cxl"),
    "h100-nand": ("ddr", "nand"),
    "h100-cxl-nand": ("ddr", "cxl", "nand"),
}


@pytest.mark.parametrize("family", MIXED)
def test_mixed_servers_scale_in_hosts_and_gpus_and_are_listed(family: str) -> None:
    made = preset(f"{family}-3x4")
    assert (made.hosts, made.host_size) == (3, 4)
    assert tuple(tier.name for tier in made.host_tiers) == MIXED[family]
    assert made.device == preset(f"{family.split('-')[0]}-3x4").device
    assert all(tier.source for tier in made.host_tiers)
    assert Topology.from_dict(made.to_dict()) == made
    assert f"{family}-NxM" in dict(list_presets())


def test_tiers_lie_in_the_order_of_their_latency_and_get_cheaper() -> None:
    for family in ("v100-scm", "a100-scm", "h100-cxl-nand"):
        row = preset(f"{family}-1x8").host_tiers
        assert [t.latency for t in row] == sorted(t.latency for t in row)
        prices = [t.price_per_gb for t in row]
        assert prices == sorted(prices, reverse=True)


def test_a_small_row_costs_a_block_where_blocks_are_the_granule() -> None:
    """A 128 B row moves 512 B on 3D XPoint SSDs, 4 KB on NAND, 256 B on persistent memory, 128 B in DRAM."""
    moved = {
        tier.name: -(-128 // tier.granule) * tier.granule
        for tier in (tiers.OPTANE_P5800X, tiers.NAND_GEN4, tiers.PMEM_200, tiers.CXL_MODULE)
    }
    assert moved == {"optane": 512, "nand": 4096, "pmem": 256, "cxl": 128}


def test_block_devices_state_iops_and_endurance_and_reads_fit_their_bandwidth() -> None:
    for tier in (tiers.OPTANE_P4800X, tiers.OPTANE_P5800X, tiers.NAND_GEN4):
        assert tier.iops is not None
        assert tier.dwpd is not None
        assert tier.iops * tier.granule <= tier.read_bandwidth  # else one of the two figures is wrong
        assert (tier.write_iops or tier.iops) <= tier.iops
    for tier in (tiers.CXL_MODULE, tiers.PMEM_100, tiers.UPMEM_SERVER):
        assert tier.iops is None


def test_published_totals_of_several_modules() -> None:
    """Six PMem 100 modules: 39.4 GB/s read and 13.9 GB/s write; eight PMem 200 modules hold 4 TB."""
    six = tiers.several(tiers.PMEM_100, 6)
    assert six.read_bandwidth == pytest.approx(39.4e9)
    assert six.write_bandwidth == pytest.approx(13.9e9)
    assert tiers.several(tiers.PMEM_200, 8).capacity == 4096 * 10**9
    assert tiers.UPMEM_SERVER.capacity == 40 * 64 * 64 * 2**20  # ranks x DPUs x MRAM
    four = tiers.several(tiers.NAND_GEN4, 4)
    assert (four.iops, four.latency) == (4e6, tiers.NAND_GEN4.latency)


def test_every_tier_of_the_file_has_a_source() -> None:
    found = [value for value in vars(tiers).values() if isinstance(value, MemoryTier)]
    assert len(found) >= 7
    for tier in found:
        assert len(tier.source) > 40, tier.name


def test_topologies_written_before_write_iops_are_still_read() -> None:
    data = preset("h100-nand-1x8").to_dict()
    for tier in data["host_tiers"]:
        del tier["write_iops"]
    assert {t.write_iops for t in Topology.from_dict(data).host_tiers} == {None}
