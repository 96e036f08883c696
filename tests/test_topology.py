"""Topologies: the tree, YAML round trip, errors that name the key."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import planner
from ir.errors import InputError
from ir.topology import Device, Level, Link, MemoryTier, Topology


def test_the_tree() -> None:
    t = planner.topology("h100-16x8")
    assert (t.world_size, t.hosts, t.host_size) == (128, 16, 8)
    assert [t.host_of(rank) for rank in (0, 7, 8, 127)] == [0, 0, 1, 15]
    assert t.intra_link.bandwidth > t.inter_link.bandwidth
    assert t.with_hosts(2).world_size == 16


def test_yaml_round_trip_with_units(tmp_path: Path) -> None:
    t = planner.topology("a100-2x8")
    file = tmp_path / "t.yaml"
    file.write_text(yaml.safe_dump(t.to_dict(), sort_keys=False))
    assert planner.topology(str(file)) == t
    data = t.to_dict()
    data["device"]["tiers"][0]["capacity"] = "80 GB"
    data["levels"][1]["link"]["bandwidth"] = "200 Gbps"
    data["levels"][1]["link"]["latency"] = "5 us"
    file.write_text(yaml.safe_dump(data))
    again = planner.topology(str(file))
    assert again.device.tiers[0].capacity == 80 * 10**9
    assert again.inter_link.bandwidth == 25e9


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda d: d.pop("levels"), "levels: missing"),
        (lambda d: d.update(level=1), "level: unknown key"),
        (lambda d: d["device"].update(kind="tpu"), "device.kind"),
        (lambda d: d["levels"][0].update(fanout=0), "levels.0.fanout"),
        (
            lambda d: d["device"]["tiers"][0].update(capacity="80 gigs"),
            "device.tiers.0.capacity.*unknown unit",
        ),
        (lambda d: d["levels"][0]["link"].update(bandwidth=float("nan")), "levels.0.link.bandwidth.*finite"),
        (lambda d: d["levels"][0]["link"].update(bandwidth=-1), "levels.0.link.bandwidth"),
    ],
)
def test_schema_errors_name_the_key(edit, message: str) -> None:  # type: ignore[no-untyped-def]
    data = planner.topology("h100-2x8").to_dict()
    edit(data)
    with pytest.raises(InputError, match=message):
        Topology.from_dict(data)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="does not exist"):
        planner.topology(str(tmp_path / "none.yaml"))
    bad = tmp_path / "bad.yaml"
    bad.write_text("a: [1,\nb: }")
    with pytest.raises(InputError, match=r"not YAML.*line 2"):
        planner.topology(str(bad))
    bad.write_text("!!python/object/apply:os.system ['true']")
    with pytest.raises(InputError, match="has the tag"):
        planner.topology(str(bad))
    bad.write_text("- 1")
    with pytest.raises(InputError, match="topology"):
        planner.topology(str(bad))


TIER = MemoryTier("hbm", 2**34, 1e12, 1e12)
LINK = Link("nvlink4", 4.5e11)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: MemoryTier("hbm", 0, 1e12, 1e12), "MemoryTier 'hbm': capacity: .*greater than 0"),
        (lambda: replace(TIER, read_bandwidth=-1.0), "MemoryTier 'hbm': read_bandwidth: .*greater than 0"),
        (lambda: replace(TIER, iops=math.inf), "MemoryTier 'hbm': iops: .*finite"),
        (lambda: replace(LINK, bandwidth=math.nan), "Link 'nvlink4': bandwidth: .*finite"),
        (lambda: replace(LINK, latency=-1e-6), "Link 'nvlink4': latency"),
        (lambda: Level("host", 0, LINK), "Level 'host': fanout"),
        (lambda: Level("host", 8, "nvlink4"), "Level 'host': link"),  # type: ignore[arg-type]
        (lambda: Device("card", "gpu", {"fp32": 0.0}, (TIER,)), "Device 'card': flops: fp32"),
        (lambda: Device("card", "gpu", {"fp32": 1e12}, ()), "Device 'card': tiers: too few"),
        (lambda: replace(planner.topology("h100-2x8"), levels=()), "Topology 'h100-2x8': levels: too few"),
    ],
)
def test_nouns_made_in_python_are_held_to_what_files_are(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        make()


def test_nouns_made_in_python_take_units() -> None:
    assert Link("ib", "400 Gbps").bandwidth == 5e10  # type: ignore[arg-type]
    assert MemoryTier("hbm", "80 GiB", "3 TB/s", 3e12).capacity == 80 * 2**30  # type: ignore[arg-type]
