"""Topology presets: shapes, figures that exist, and errors people can act on."""

from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ir.errors import InputError
from ir.topology import Topology
from planner.presets import FAMILIES, list_presets, preset


@given(st.sampled_from(sorted(FAMILIES)), st.integers(1, 200), st.integers(1, 4))
def test_every_family_builds_the_shape_it_is_asked_for(family: str, hosts: int, devices: int) -> None:
    made = preset(f"{family}-{hosts}x{devices}")
    assert (made.hosts, made.host_size, made.world_size) == (hosts, devices, hosts * devices)
    assert Topology.from_dict(made.to_dict()) == made
    assert made.device.kind == "gpu"


def test_every_figure_has_a_source() -> None:
    for family in FAMILIES:
        made = preset(f"{family}-2x4")
        assert made.device.source
        assert all(tier.source for tier in (*made.device.tiers, *made.host_tiers))
        assert all(level.link.source for level in made.levels)


def test_generations_are_ordered() -> None:
    """Facts of the data sheets: each generation has more memory bandwidth and a faster fabric."""
    line = [preset(f"{name}-1x8") for name in ("v100", "a100", "h100", "h200", "b200")]
    memory = [made.device.tiers[0].read_bandwidth for made in line]
    fabric = [made.intra_link.bandwidth for made in line]
    assert memory == sorted(memory)
    assert fabric == sorted(fabric)
    assert preset("h200-1x8").device.flops["bf16"] == preset("h100-1x8").device.flops["bf16"]


def test_nvlink_joins_up_to_18_trays_of_gb200() -> None:
    assert preset("gb200-16x4").inter_link.name == "nvlink5"
    assert [level.fanout for level in preset("gb200-18x4").levels] == [4, 18]
    wide = preset("gb200-36x4")
    assert [level.fanout for level in wide.levels] == [4, 18, 2]
    assert wide.inter_link.name == "ib-ndr-400"


def test_local_is_this_machine_in_equal_parts_and_names_nobody() -> None:
    one, four = preset("local-1"), preset("local-4")
    assert four.device.kind == "cpu"
    assert four.world_size == 4
    assert 4 * four.device.tiers[0].capacity == pytest.approx(one.device.tiers[0].capacity, rel=1e-6)
    assert four == preset("local-4")
    assert socket.gethostname() not in str(four.to_dict())
    assert any("uncalibrated" in note for note in four.notes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("h10-8x8", "did you mean 'h100-8x8'"),
        ("h100", "did you mean 'h100-1x8'"),
        ("H100-8x8", "did you mean 'h100-8x8'"),
        ("nonsense", "known are v100-NxM"),
        ("", "no topology preset"),
        ("h100-8x9", "9 devices a host; choose 1 to 8"),
        ("h100-0x8", "0 hosts; choose 1 to"),
        ("b200-99999x8", "99999 hosts; choose 1 to"),
        ("gb200-1x8", "8 devices a host; choose 1 to 4"),
        ("local-0", "0 ranks; choose 1 to"),
        ("local-99999", "99999 ranks; choose 1 to"),
        ("h100-8x8x8", "no topology preset"),
    ],
)
def test_unusable_names_say_what_to_do(name: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        preset(name)


def test_the_list_shows_every_family() -> None:
    patterns = [pattern for pattern, text in list_presets() if text]
    assert patterns == [*(f"{family}-NxM" for family in FAMILIES), "local-N"]
    for pattern in patterns:
        assert preset(pattern.replace("NxM", "2x2").replace("local-N", "local-2")).world_size in (2, 4)
